"""Runs every hostile program in one kind of box, with the honest one in between, and prints a JSON report.

A process of its own, so that any user can run it: run_all.py KIND CANARY_FOLDER PORT ABSTRACT_NAME
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llmrl.verify.code.check import run_tests
from llmrl.verify.code.rows import read_row
from llmrl.sandbox import Limits
from llmrl.sandbox.local import LocalSandbox
from llmrl.sandbox.server import Server

HERE = Path(__file__).parent
CHECKS = ["solve([3, 1, 2]) == 39", "solve([10, 20]) == 9002", "solve([]) == 'none'", "solve([5, -5]) == 2"]
FUNCTIONS = read_row({"test_list": [f"assert {check}" for check in CHECKS]})
SUITE = read_row({"test": "from solution import solve\n" + "".join(
    f"def test_{index}():\n    assert {check}\n" for index, check in enumerate(CHECKS)
)})  # fmt: skip
STDIN = read_row({"input_output": {"inputs": ["3 1 2\n", "10 20\n"], "outputs": ["39\n", "9002\n"]}})
LIMITS = Limits(cpu_seconds=1, wall_seconds=2.0, memory_mb=256, output_mb=2)
HONEST_LIMITS = Limits(cpu_seconds=60, wall_seconds=300.0, memory_mb=256, output_mb=2)
"""Never reached: the honest program passes however busy the machine is."""


def main() -> None:
    kind, canary, port, abstract = sys.argv[1:]
    places = {"CANARY": canary, "PORT": port, "ABSTRACT": abstract, "PARENT": str(os.getpid())}
    places["SECRET"] = os.environ["TEST_SECRET"]
    sessions = watch_servers()
    box = LocalSandbox(kind, packages=(), max_servers=3)
    honest = (HERE / "honest.py").read_text()

    def judge(path: Path) -> dict[str, object]:
        source = path.read_text()
        for name, value in places.items():
            source = source.replace(f"@{name}@", value)
        verdicts = {
            name: [result.verdict for result in run_tests(source, row, box, LIMITS, stop_early=True)]
            for name, row in (("functions", FUNCTIONS), ("stdin", STDIN), ("suite", SUITE))
        }
        verdicts["honest"] = [
            result.verdict
            for row in (FUNCTIONS, STDIN, SUITE)
            for result in run_tests(honest, row, box, HONEST_LIMITS, stop_early=False)
        ]
        return {"program": path.stem, **verdicts}

    with ThreadPoolExecutor(max_workers=3) as pool:
        reports = list(pool.map(judge, sorted((HERE / "programs").glob("*.py"))))
    box.close()
    print(json.dumps({"uid": os.getuid(), "reports": reports, "left": left_over(sessions), "threads": live_threads()}))


def watch_servers() -> set[int]:
    """Return a set that collects the session numbers of all servers started from now on."""
    sessions: set[int] = set()
    handshake = Server._handshake

    def watched(self: Server, *args: object) -> dict[str, object]:
        sessions.add(self._process.pid)
        return handshake(self, *args)  # type: ignore[arg-type]

    Server._handshake = watched  # type: ignore[method-assign, assignment]
    return sessions


def left_over(sessions: set[int], patience: float = 120.0) -> list[int]:
    """Return the processes that still belong to a server's session after at most `patience` seconds."""
    deadline = time.monotonic() + patience
    while True:
        left = [int(name) for name in os.listdir("/proc") if name.isdigit() and session_of(name) in sessions]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def session_of(pid: str) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[3])
    except (OSError, IndexError):
        return -1


def live_threads() -> int:
    return sum(thread.is_alive() and not thread.name.startswith("sandbox-spawner") for thread in threading.enumerate())


if __name__ == "__main__":
    main()
