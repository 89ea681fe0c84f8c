"""Results over seeds in, Markdown tables out: the mean and half the width of the 95 % interval of Student's t."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

T_975 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26, 20: 2.09}
"""97.5 % quantile of Student's t, by number of values."""
COLUMNS = ("greedy", "pass@1", "pass@4", "pass@16", "carry_frac", "length")


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return (mean, half width of the 95 % interval); NaN as half width of a single value."""
    if len(values) < 2:
        return fmean(values), math.nan
    t = T_975[max(n for n in T_975 if n <= len(values))]
    return fmean(values), t * stdev(values) / math.sqrt(len(values))


def cell(values: Sequence[float], digits: int = 3) -> str:
    mean, half = interval(values)
    return f"{mean:.{digits}f} +- {half:.{digits}f}"


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *body)]
    return "\n".join(lines)


def show_additions(file: Path) -> None:
    """Print accuracies after training, and paired differences from grpo with the same seed and warm start."""
    results = [json.loads(line) for line in file.read_text().splitlines()]
    by_arm: dict[str, dict[int, dict]] = {}
    for result in results:
        by_arm.setdefault(result["arm"], {})[result["seed"]] = result
    first = next(iter(by_arm.values()))
    body = [
        [
            "(warm start)",
            str(len(first)),
            "",
            *(cell([r["before"][c] for r in first.values()]) for c in COLUMNS),
            "",
            "",
        ]
    ]
    for arm, runs in by_arm.items():
        row = [arm, str(len(runs)), cell([r["steps"] for r in runs.values()], 0)]
        row += [cell([r["after"][c] for r in runs.values()]) for c in COLUMNS]
        for column in ("greedy", "pass@16"):
            shared = [seed for seed in runs if seed in by_arm.get("grpo", {})]
            pairs = [runs[s]["after"][column] - by_arm["grpo"][s]["after"][column] for s in shared]
            row.append("" if arm == "grpo" or not pairs else cell(pairs))
        body.append(row)
    print(markdown(["arm", "seeds", "steps", *COLUMNS, "greedy - grpo", "pass@16 - grpo"], body))
