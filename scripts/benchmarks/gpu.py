"""scripts/gpu_check: what is run, in what time, and the table of what was found."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.gpu_checks import check_head, check_layouts, check_sync
from benchmarks.gpu_speed import measure_generation, measure_trl, measure_update
from benchmarks.gpu_work import SHAPES, SMALL, TINY, NotMeasured, matmul_rate
from llmrl.model.parallel import Parallel

ATTENTIONS = ("sdpa", "flash_attention_2", "flex_attention")
TIME_LIMIT_S = 450.0
"""Nothing new begins after this."""


@dataclass
class Report:
    """What was found so far."""

    device: torch.device
    begin: float = field(default_factory=time.monotonic)
    rows: list[dict[str, Any]] = field(default_factory=list)
    matmul_per_s: float = 0.0

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.begin:5.0f} s] {text}", flush=True)

    def run(self, name: str, work: Callable[[], dict[str, Any]], *, seconds: float = 30.0) -> None:
        """Do one piece of work and keep what it returns, or why it failed; skip it where its time is up.

        Args:
            name: of the row.
            work: returns its cells. A check sets `ok`; a measurement does not.
            seconds: what it is expected to take.
        """
        if time.monotonic() - self.begin + seconds > TIME_LIMIT_S:
            self.rows.append({"name": name, "note": "skipped: no time left"})
            return
        self.say(name)
        try:
            row = work()
        except NotMeasured as reason:
            row = {"note": str(reason)}
        except torch.OutOfMemoryError:
            row = {"note": "out of memory"}
        except Exception as error:  # one section must not take the others with it
            traceback.print_exc()
            row = {"ok": False, "note": f"{type(error).__name__}: {str(error)[:200]}"}
        self.rows.append({"name": name} | row | {"note": " ".join(row.get("note", "").split())})
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def table(self) -> str:
        """Return the rows as a Markdown table."""
        columns = ["name", "ok", "ms", "tokens/s", "peak GiB", "MFU", "note"]
        lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        for row in self.rows:
            cells = {"ok": {True: "pass", False: "FAIL", None: ""}[row.get("ok")]}
            lines.append("| " + " | ".join(str(cells.get(c, row.get(c, ""))) for c in columns) + " |")
        return "\n".join(lines)


def main(argv: list[str], description: str | None) -> int:
    """Run everything and return the exit code."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on the CPU where there is no GPU")
    tiny = parser.parse_args(argv).tiny
    if not tiny and not torch.cuda.is_available():
        print("torch sees no GPU: install a build of torch for CUDA, or try the script itself with --tiny")
        return 2
    report = Report(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    report.say(", ".join(f"{k} {v}" for k, v in versions(report.device).items()))
    rate = report.matmul_per_s = matmul_rate(report.device, 256 if tiny else 8192)
    small = TINY if tiny else SMALL
    parallel = Parallel(Accelerator(cpu=report.device.type == "cpu"))
    report.run("output head in bfloat16", lambda: check_head(report.device, tiny))
    for attention in ATTENTIONS:
        report.run(f"layouts, {attention}", lambda attention=attention: check_layouts(small, attention, report.device))
    report.run("weight sync and its proof", lambda: asyncio.run(check_sync(small, parallel)))
    for shape in [TINY] if tiny else SHAPES:
        for lora in (False, True):
            name = f"update {shape.name}{', LoRA' if lora else ''}"
            report.run(
                name, lambda shape=shape, lora=lora: measure_update(shape, parallel, rate, lora=lora), seconds=60
            )
        report.run(f"update {shape.name}, TRL", lambda shape=shape: measure_trl(shape, report.device, rate), seconds=60)
    first = TINY if tiny else SHAPES[0]
    for attention in ATTENTIONS[1:]:
        work = partial(measure_update, first, parallel, rate, attention=attention)
        report.run(f"update {first.name}, {attention}", work, seconds=60)
    first = TINY if tiny else replace(SHAPES[0], prompt_length=256, completion_length=128)
    report.run(f"generation {first.name}, hf engine", lambda: asyncio.run(measure_generation(first, parallel)))
    print(
        f"\n{', '.join(versions(report.device).values())}; matrix products {report.matmul_per_s / 1e12:.3g} TFLOP/s\n"
    )
    print(report.table())
    if os.environ.get("OUT"):
        found = {"versions": versions(report.device), "matmul_per_s": report.matmul_per_s, "rows": report.rows}
        (Path(os.environ["OUT"]) / "gpu_check.json").write_text(json.dumps(found | {"shape": asdict(first)}, indent=2))
    return int(any(row.get("ok") is False for row in report.rows))


def versions(device: torch.device) -> dict[str, str]:
    """Return what the numbers depend on."""
    import peft
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
