"""The command behind scripts/bench: names of a suite and a case in, a table and a JSON file out."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

from benchmarks.common import machine, show
from llmrl.errors import UserError, run_main

SUITES = {"grpo": "benchmarks.grpo", "dpo": "benchmarks.dpo", "verify": "benchmarks.verify"}
"""Suite -> module with `CASES` (names) and `run(cases, repetitions) -> list[dict]`."""


def main(argv: list[str] | None = None) -> None:
    """Run the suite that the arguments name."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--suite", required=True, help=f"one of: {', '.join(SUITES)}")
    parser.add_argument("--case", action="append", help="run only this case; may be given several times")
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    parser.add_argument("--repetitions", type=int, default=3, help="measurements of each side (default 3)")
    arguments = parser.parse_args(argv)
    if arguments.suite not in SUITES:
        raise UserError(f"--suite {arguments.suite}: no such suite; there are: {', '.join(SUITES)}")
    if arguments.repetitions < 1:
        raise UserError(f"--repetitions {arguments.repetitions}: must be at least 1")
    suite = importlib.import_module(SUITES[arguments.suite])
    cases = arguments.case or list(suite.CASES)
    for name in cases:
        if name not in suite.CASES:
            raise UserError(
                f"--case {name}: suite {arguments.suite} has no such case; it has: {', '.join(suite.CASES)}"
            )
    report = {"machine": machine(), "cases": suite.run(cases, arguments.repetitions)}
    show(report["cases"], f"suite {arguments.suite}")
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
