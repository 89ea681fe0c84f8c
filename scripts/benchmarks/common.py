"""The benchmark harness: runs each measurement in a fresh process and computes medians, ratios and a table."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
SIDES = ("ours", "rival")
MEASURED = {"cpu": "cpu_s", "wall": "wall_s", "memory": "memory_mb"}
"""Name of a ratio in the result -> key of the measurement that it is computed from."""
TIME_LIMIT_S = 7200
"""Time limit of one measurement."""


# --- inside a measured process ----------------------------------------------------------------------------------------


def cpu_seconds() -> float:
    """Return the CPU time (user and system) of this process and its children, living and ended."""
    import psutil

    own = psutil.Process()
    gone = own.cpu_times()
    children = 0.0
    for child in own.children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        children += times.user + times.system + times.children_user + times.children_system
    return time.process_time() + gone.children_user + gone.children_system + children


class Meter:
    """Records the beginning of every step. Memory counts from `start`, which is called after all imports."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []
        self.start_mb = 0.0

    def start(self) -> None:
        """Count peak memory from here on."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is in use now
        self.start_mb = status_mb("VmRSS")

    def mark(self) -> None:
        """Record the beginning of a step."""
        self.marks.append((cpu_seconds(), time.perf_counter()))

    def report(self, *, skip: int) -> dict[str, Any]:
        """Return means over the steps after the first `skip`. A step lasts from its mark to the next.

        Returns:
            cpu_s and wall_s per step, memory_mb (peak resident memory above `start`, plus the unshared memory of living
            children), step_cpu_s (every measured step).
        """
        marks = self.marks[skip:]
        if len(marks) < 2:
            raise ValueError(f"{len(self.marks)} marks are too few to leave out {skip} steps and measure one")
        count = len(marks) - 1
        return {
            "cpu_s": (marks[-1][0] - marks[0][0]) / count,
            "wall_s": (marks[-1][1] - marks[0][1]) / count,
            "memory_mb": status_mb("VmHWM") - self.start_mb + children_mb(),
            "step_cpu_s": [round(after[0] - before[0], 4) for before, after in pairwise(marks)],
        }


def matmul_rate() -> float:
    """Return the float32 operations per CPU second of a large matrix product on one thread (best of several)."""
    import torch

    size, best = 768, float("inf")
    a, b = torch.rand(size, size), torch.rand(size, size)
    for _ in range(12):
        begin = time.process_time()
        a @ b
        best = min(best, time.process_time() - begin)
    return 2 * size**3 / best


def status_mb(key: str) -> float:
    """Return an entry of /proc/self/status in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


def children_mb() -> float:
    """Return the memory of child processes that no other process shares."""
    import psutil

    total = 0
    for child in psutil.Process().children(recursive=True):
        try:
            total += child.memory_full_info().uss
        except psutil.NoSuchProcess:
            continue
    return total / 2**20


# --- a fresh process per measurement ----------------------------------------------------------------------------------


def measure(module: str, *arguments: str) -> dict[str, Any]:
    """Run `python -m module arguments... OUT` in a fresh process with one thread, and return the JSON it writes to OUT.

    Raises:
        RuntimeError: the process failed; the message shows the end of its output.
    """
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    path = {"PYTHONPATH": os.pathsep.join([str(REPOSITORY / "scripts"), str(REPOSITORY)])}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments, str(out)],
            cwd=REPOSITORY,
            env=os.environ | threads | quiet | offline | path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIME_LIMIT_S,
        )
        if done.returncode or not out.is_file():
            raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{done.stdout[-3000:]}")
        return json.loads(out.read_text())


def compare(name: str, rival: str, run: Callable[[str, int], dict[str, Any]], *, repetitions: int) -> dict[str, Any]:
    """Measure both sides in turn, so that other load on the machine affects both, and compare the medians.

    Args:
        name: name of the case.
        rival: what llmrl is compared with.
        run: maps ("ours" or "rival", repetition) to a measurement with cpu_s, wall_s and memory_mb.
        repetitions: measurements of each side. Every other one begins with the rival.
    """
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for repetition in range(repetitions):
        for side in SIDES if repetition % 2 == 0 else SIDES[::-1]:
            found[side].append(run(side, repetition))
    return summarize(name, rival, found["ours"], found["rival"])


def summarize(
    name: str, rival: str, ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return a case's entry: ratios of medians (rival / ours: above 1 llmrl is cheaper), medians, all measurements."""
    result: dict[str, Any] = {"name": name, "rival": rival}
    for ratio, key in MEASURED.items():
        mine, other = (median(measurement[key] for measurement in side) for side in (ours, theirs))
        result |= {f"ratio_{ratio}": other / mine, f"ours_{key}": mine, f"rival_{key}": other}
    return result | {"measurements": {"ours": list(ours), "rival": list(theirs)}}


# --- the report ----------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Describe the machine and the package versions of a measurement."""
    from importlib.metadata import version

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    packages = {name: version(name) for name in ("torch", "transformers", "trl")}
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **packages,
    }


def show(cases: Sequence[dict[str, Any]], title: str) -> None:
    """Print the table of ratios."""
    from rich.console import Console
    from rich.table import Table

    rivals = ", ".join(dict.fromkeys(case["rival"] for case in cases))
    table = Table(title=f"{title} against {rivals}\nratio rival / ours: above 1 ours is cheaper")
    table.add_column("case", no_wrap=True)
    for column in ("CPU", "wall", "memory", "CPU s, ours", "rival", "MB, ours", "rival"):
        table.add_column(column, justify="right")
    for case in cases:
        ratios = [f"{case[f'ratio_{ratio}']:.2f}" for ratio in MEASURED]
        costs = [f"{case[f'{side}_{key}']:.4g}" for key in ("cpu_s", "memory_mb") for side in SIDES]
        table.add_row(case["name"], *ratios, *costs)
    out = Console()
    out.print(table, width=max(out.width, 90))
