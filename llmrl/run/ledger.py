"""The ledger: the step at which each task was issued and trained on, so that a loss or repetition shows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from llmrl.track.files import JsonlFile, read_jsonl
from llmrl.types import RolloutGroup, Task


class Ledger:
    """ledger.jsonl: one line when a task is issued and one when its group has been trained on.

    A task is identified by its position in the run's endless sequence of tasks: a dataset read for three epochs issues
    each task at three positions.
    """

    def __init__(self, path: Path) -> None:
        self.file = JsonlFile(path)

    def issued(self, step: int, position: int, tasks: list[Task]) -> None:
        """Record tasks issued for a step, the first of them at `position`."""
        places = enumerate(tasks, start=position)
        self.file.append(*({"event": "issued", "step": step, "position": k, "task": task.id} for k, task in places))

    def trained(self, step: int, groups: list[RolloutGroup]) -> None:
        """Record the groups of an update; `signal` is False where all advantages were zero."""
        rows: list[dict[str, Any]] = []
        for group in groups:
            scored = [r for r in group.rollouts if r.score is not None and r.score.reward is not None]
            rows.append(
                {
                    "event": "trained",
                    "step": step,
                    "position": group.position,
                    "task": group.task.id,
                    "rollouts": len(group.rollouts),
                    "scored": len(scored),
                    "signal": any(np.any(r.advantage or 0.0) for r in scored),
                }
            )
        self.file.append(*rows)

    def reward_state(self, step: int, changes: list[dict[str, Any]]) -> None:
        """Record what changed in the state of rewards, such as rubrics that evolve."""
        self.file.append(*({"event": "reward_state", "step": step, **change} for change in changes))


def audit(path: str | Path) -> dict[str, Any]:
    """Read a ledger and check that every issued task was trained exactly once.

    Returns:
        {"issued", "trained": counts, "lost": positions issued but never trained, "doubled": positions with more than
        one line of a kind, "exact": neither exists}. The tasks of a step that was under way when the run stopped are
        lost until the run is resumed.
    """
    rows = read_jsonl(path)
    issued = Counter(row["position"] for row in rows if row["event"] == "issued")
    trained = Counter(row["position"] for row in rows if row["event"] == "trained")
    lost = sorted(set(issued) - set(trained))
    doubled = sorted(p for counter in (issued, trained) for p, n in counter.items() if n > 1)
    return {
        "issued": sum(issued.values()),
        "trained": sum(trained.values()),
        "lost": lost,
        "doubled": doubled,
        "exact": not lost and not doubled and set(trained) <= set(issued),
    }
