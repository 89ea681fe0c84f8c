"""Measures the verifiers against what is usually done in their place, on the same work in the same run.

In: names of cases. Out: one row per case with ratios rival / ours in processor time, wall time and memory.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmrl.errors import UserError
from llmrl.verify.code import run_tests
from llmrl.verify.code_rows import read_row
from llmrl.verify.sandbox import Limits
from llmrl.verify.sandbox.local import LocalSandbox

_PROGRAMS = 60
_TEMPLATE = """from typing import List
import math


def solve(numbers: List[int]) -> List[int]:
    total = sum(number * {factor} for number in numbers)
    return sorted(numbers) + [total, math.gcd(total, {factor})]
"""


def run(cases: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure cases.

    Args:
        cases: of `CASES`; None measures all.

    Returns:
        Rows with name, rival, ratio_cpu, ratio_wall, ratio_memory (rival / ours), and what was measured on each side.

    Raises:
        UserError: an unknown case.
        SandboxUnavailable: the box of a case does not work here.
    """
    for name in cases or []:
        if name not in CASES:
            raise UserError(f"verify has no case {name!r}: use {', '.join(CASES)}")
    return [CASES[name](name) for name in cases or CASES]


def _programs() -> list[tuple[str, list[str]]]:
    """Different small functions, each with the three assertions of an MBPP row."""
    programs = []
    for factor in range(2, 2 + _PROGRAMS):
        checks = [f"assert solve([3, 1, 2]) == [1, 2, 3, {6 * factor}, {factor}]"]
        checks += [f"assert solve([]) == [0, {factor}]", f"assert solve([5]) == [5, {5 * factor}, {factor}]"]
        programs.append((_TEMPLATE.format(factor=factor), checks))
    return programs


def _unit_tests(kind: str) -> Callable[[str], dict[str, Any]]:
    def measure(name: str) -> dict[str, Any]:
        """A warm boxed server against one new, unboxed interpreter per program with the assertions appended."""
        box = LocalSandbox(kind, packages=(), max_servers=1)
        try:
            _judge(box)
            ours, rival = [], []
            for _ in range(3):  # in turns, so that a busy machine burdens both alike
                ours.append(_measured(lambda: _judge(box), _server_seconds))
                rival.append(_measured(_fresh_interpreters, _children_seconds))
            memory = box.run("print()", "", Limits()).memory_mb
        finally:
            box.close()
        rival_memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        (cpu, wall), (rival_cpu, rival_wall) = min(ours), min(rival)
        return {
            "name": name,
            "rival": "one new python per program, no sandbox",
            "ratio_cpu": rival_cpu / cpu,
            "ratio_wall": rival_wall / wall,
            "ratio_memory": rival_memory / memory,
            "cpu_ms": 1000 * cpu / _PROGRAMS,
            "rival_cpu_ms": 1000 * rival_cpu / _PROGRAMS,
            "wall_ms": 1000 * wall / _PROGRAMS,
            "rival_wall_ms": 1000 * rival_wall / _PROGRAMS,
        }

    return measure


def _measured(work: Callable[[], None], others: Callable[[], float]) -> tuple[float, float]:
    """(processor seconds of this process and of the `others` it uses, wall seconds) of some work."""
    cpu, wall = time.process_time() + others(), time.perf_counter()
    work()
    return time.process_time() + others() - cpu, time.perf_counter() - wall


def _judge(box: LocalSandbox) -> None:
    for program, checks in _programs():
        results = run_tests(program, read_row({"test_list": checks}), box, Limits(), stop_early=True)
        assert all(result.verdict == "passed" for result in results), results


def _fresh_interpreters() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.py"
        for program, checks in _programs():
            file.write_text("\n".join([program, *checks]))
            subprocess.run([sys.executable, str(file)], check=True, stdout=subprocess.DEVNULL, timeout=60)


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _server_seconds() -> float:
    """Of all processes that this one started and that still live, with the children they have waited for."""
    tick = os.sysconf("SC_CLK_TCK")
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
            seconds[int(entry.name)] = sum(map(int, fields[11:15])) / tick
    family = {os.getpid()}
    for _ in range(4):  # this process, bubblewrap, its init, the server
        family |= {pid for pid, parent in parents.items() if parent in family}
    return sum(seconds[pid] for pid in family - {os.getpid()})


CASES: dict[str, Callable[[str], dict[str, Any]]] = {
    "unit_tests_bwrap": _unit_tests("bwrap"),
    "unit_tests_lite": _unit_tests("lite"),
}
