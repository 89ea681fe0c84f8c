from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from llmrl.sandbox import Limits, Sandbox, SandboxUnavailable, open_sandbox
from llmrl.verify.code.check import UnusableRow, run_tests
from llmrl.verify.code.rows import Row, StdinTests

LIMITS = Limits(cpu_seconds=60, wall_seconds=300.0)
SUM = """
import sys
total = int(open("input.txt").read())
with open(sys.argv[3]) as file:
    a, b = map(int, file.read().split())
print(int(a + b == total))
"""
"""Two numbers with a given sum: every such pair is right."""
ROW = Row(tests=StdinTests(inputs=["7"], outputs=["3 4"]), checker=SUM)


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    try:
        sandbox = open_sandbox()
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    yield sandbox
    sandbox.close()


def verdict(program: str, row: Row, box: Sandbox) -> str:
    return run_tests(program, row, box, LIMITS, stop_early=False)[0].verdict


@pytest.mark.parametrize(
    ("printed", "expected"),
    [("3 4", "passed"), ("1 6", "passed"), ("1 5", "wrong"), ("one six", "wrong"), ("", "wrong"), ("1", "wrong")],
)
def test_a_checker_decides_about_outputs(box: Sandbox, printed: str, expected: str) -> None:
    assert verdict(f"print({printed!r})", ROW, box) == expected


def test_a_program_cannot_reach_its_checker(box: Sandbox) -> None:
    hostile = "import builtins, os\nbuiltins.print = lambda *_: os.write(1, b'1')\nopen('/tmp/checker.py', 'w')"
    assert verdict(hostile, ROW, box) in ("wrong", "error")


@pytest.mark.parametrize(
    ("checker", "expected"),
    [
        ("import sys\nsys.exit(0)", "passed"),
        ("import sys\nsys.exit(1)", "wrong"),
        ("print('ok')", "passed"),
        ("print('wrong answer')", "wrong"),
        ("print(0.5)", "wrong"),
        ("print(1.0)", "passed"),
    ],
)
def test_what_a_checker_says(box: Sandbox, checker: str, expected: str) -> None:
    assert verdict("print('3 4')", replace(ROW, checker=checker), box) == expected


def test_a_broken_checker_is_no_verdict(box: Sandbox) -> None:
    with pytest.raises(UnusableRow, match="the row's checker does not accept the row's own output"):
        verdict("print('3 4')", replace(ROW, checker="1 / 0"), box)


def test_a_row_may_have_its_own_tolerance_and_ignore_case(box: Sandbox) -> None:
    row = Row(tests=StdinTests(inputs=[""], outputs=["0.3333 YES"]))
    assert verdict("print('0.33334 yes')", row, box) == "wrong"
    assert verdict("print('0.33334 YES')", replace(row, tolerance=1e-4), box) == "passed"
    assert verdict("print('0.3333 yes')", replace(row, ignore_case=True), box) == "passed"
    assert verdict("print('0.3345 YES')", replace(row, tolerance=1e-4), box) == "wrong"
