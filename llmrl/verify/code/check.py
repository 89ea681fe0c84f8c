"""Unit tests: a program (untrusted text) and the tests of its row go in, one result per test comes out.

The tests run here, in the trusted process; the program runs in the sandbox. Arguments enter the box and plain values
leave it; expected values, test code and verdicts never enter it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, cast

from llmrl.sandbox import BoxDied, CannotTravel, Limits, ProgramEnded, Raised, Sandbox, Session, default_sandbox
from llmrl.sandbox.native import NativeSandbox
from llmrl.verify.code.asserts import UnusableRow, all_code, assert_check
from llmrl.verify.code.checker import BrokenChecker, Checker
from llmrl.verify.code.compare import FLOAT_TOLERANCE, same_output, same_value
from llmrl.verify.code.rows import AssertTests, CallTests, Row, StdinTests, Tests
from llmrl.verify.code.suite import BrokenSuite, SuiteTests, run_suite

Outcome = Literal["all", "fraction", "bcoder"]
Verdict = Literal["passed", "wrong", "error", "timeout", "compile_error", "not_run"]
MAX_SOURCE_CHARACTERS = 1_000_000
_MAX_RESTARTS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class TestResult:
    """The result of one test."""

    verdict: Verdict
    detail: str = ""
    """The program's exception, for people; never anything about the expected value."""


def run_tests(
    program: str, row: Row, box: Sandbox, limits: Limits, *, stop_early: bool, total_seconds: float = math.inf
) -> list[TestResult]:
    """Run a program against the tests of its row.

    Args:
        program: source code.
        row: the tests, from `read_row`.
        box: where the program runs.
        limits: limits of one test: an assertion, a call, or one input.
        stop_early: do not run the tests after a failed one; they get `not_run`.
        total_seconds: limit on the time of all tests together, which does not count waiting for a processor; the test
            in which it ends gets `timeout`.

    Returns:
        One result per test, in order. A program that ends its own process or exceeds its time fails the test in which
        it does; after a timeout the remaining tests are not run.

    Raises:
        UnusableRow: the tests are broken.
        SandboxUnavailable: no box can be started or reached.
    """
    tests = row.tests
    if tests is None:
        raise UnusableRow("the row has no tests")
    total = _number_of(tests)
    if not program.strip():
        return [TestResult(verdict="compile_error", detail="no code in the answer")] * total
    if len(program) > MAX_SOURCE_CHARACTERS:
        return [TestResult(verdict="compile_error", detail=f"more than {MAX_SOURCE_CHARACTERS} characters")] * total
    clock = _Clock(limits, total_seconds)
    for _ in range(2):  # the first death of a box may have another cause than the program
        with contextlib.suppress(BoxDied):
            if isinstance(tests, SuiteTests):
                return _run_suite(program, tests, box, clock, stop_early)
            if isinstance(tests, StdinTests):
                results = _run_stdin(program, row, tests, box, clock, stop_early)
            else:
                results = _run_calls(program, row, tests, total, box, clock, stop_early)
            return results + [TestResult(verdict="not_run")] * (total - len(results))
    return [TestResult(verdict="error", detail="the program brought its box down twice")] * total


def _number_of(tests: Tests) -> int:
    if isinstance(tests, SuiteTests):
        return 1  # how many a test file holds is known once it has run
    return len(tests.checks) if isinstance(tests, AssertTests) else len(tests.inputs)


def _run_suite(program: str, tests: SuiteTests, box: Sandbox, clock: _Clock, stop_early: bool) -> list[TestResult]:
    try:
        results = run_suite(program, tests, box, clock.next_limits, clock.spend, stop_early=stop_early)
    except BrokenSuite as error:
        raise UnusableRow(str(error)) from None
    return [TestResult(verdict=cast("Verdict", result.verdict), detail=result.detail) for result in results]


@dataclass(slots=True)
class _Clock:
    """The limits of each run, reduced to the remaining time for all runs."""

    limits: Limits
    left: float

    def next_limits(self) -> Limits | None:
        """Return the limits of the next run, or None if no time is left."""
        if self.left <= 0:
            return None
        cpu = min(self.limits.cpu_seconds, math.ceil(min(self.left, 1e9)))
        wall = min(self.limits.wall_seconds, self.left)
        total = None if self.left == math.inf else self.left
        return replace(self.limits, cpu_seconds=cpu, wall_seconds=wall, total_seconds=total)

    def spend(self, seconds: float) -> None:
        """Take the time of a run off what is left."""
        self.left -= seconds


_OUT_OF_TIME = TestResult(verdict="timeout", detail="time limit for all tests together")


# --- programs that read standard input --------------------------------------------------------------------------------


def _run_stdin(
    program: str, row: Row, tests: StdinTests, box: Sandbox, clock: _Clock, stop_early: bool
) -> list[TestResult]:
    results: list[TestResult] = []
    accept = _judge_of(row, box, clock.limits)
    for given, expected in zip(tests.inputs, tests.outputs, strict=True):
        limits = clock.next_limits()
        if limits is None:
            return [*results, _OUT_OF_TIME]
        end = box.run(program, given, _for_output(limits, expected), row.conventions)
        clock.left -= end.seconds or end.cpu_seconds
        if end.status == "ok":
            verdict: Verdict = "passed" if accept(given, end.stdout, expected) else "wrong"
        else:
            verdict = "wrong" if end.status == "output_limit" else end.status
        results.append(TestResult(verdict=verdict, detail=end.detail))
        if verdict == "compile_error":
            return [results[-1]] * len(tests.inputs)
        if verdict == "timeout" or (stop_early and verdict != "passed"):
            break
    return results


def _for_output(limits: Limits, expected: str) -> Limits:
    """Return limits of one run, with room for twice the expected output."""
    size = max(limits.output_mb, 2 + (2 * len(expected) >> 20))
    return replace(limits, total_seconds=None, output_mb=size)


def _judge_of(row: Row, box: Sandbox, limits: Limits) -> Callable[[str, str, str], bool]:
    """Return what decides about (input, printed, expected)."""
    if row.checker:
        checker = Checker(row.checker, default_sandbox() if isinstance(box, NativeSandbox) else box, limits)
        return lambda given, printed, expected: _checked(checker, given, printed, expected)
    tolerance = FLOAT_TOLERANCE if row.tolerance is None else row.tolerance
    fold: Callable[[str], str] = str.casefold if row.ignore_case else str
    strip = row.conventions == "judge"
    return lambda _, printed, expected: same_output(fold(printed), fold(expected), tolerance=tolerance, strip=strip)


def _checked(checker: Checker, given: str, printed: str, expected: str) -> bool:
    try:
        return checker(given, printed, expected)
    except BrokenChecker as error:
        raise UnusableRow(str(error)) from None


# --- functions --------------------------------------------------------------------------------------------------------


def _run_calls(
    program: str,
    row: Row,
    tests: AssertTests | CallTests,
    total: int,
    box: Sandbox,
    clock: _Clock,
    stop_early: bool,
) -> list[TestResult]:
    results: list[TestResult] = []
    # The box must have numpy for a test that passes an array, even if the program does not name it.
    named = "\n# numpy" if isinstance(tests, AssertTests) and any("numpy" in code for code in all_code(tests)) else ""
    for _ in range(_MAX_RESTARTS):
        limits = clock.next_limits()
        if limits is None:
            return [*results, _OUT_OF_TIME]
        with _timed(box.open(program + named, limits), clock) as session:
            try:
                session.load(program, row.conventions)
                check = assert_check(session, tests) if isinstance(tests, AssertTests) else _call_check(session, tests)
            except ProgramEnded as ended:
                results += [TestResult(verdict=_verdict(ended), detail=ended.detail)] * (total - len(results))
                break
            while len(results) < total and session.ended is None:
                if session.seconds >= clock.left:
                    return [*results, _OUT_OF_TIME]
                session.next_test()
                results.append(_one_check(check, len(results), session))
                if stop_early and results[-1].verdict != "passed":
                    return results
        if len(results) == total or results[-1].verdict == "timeout":
            break
    return results


@contextlib.contextmanager
def _timed(session: Session, clock: _Clock) -> Iterator[Session]:
    try:
        with session:
            yield session
    finally:
        clock.left -= session.seconds


def _verdict(ended: ProgramEnded) -> Verdict:
    return "compile_error" if ended.kind == "compile_error" else "timeout" if ended.kind == "timeout" else "error"


def _one_check(check: Callable[[int], bool], index: int, session: Session) -> TestResult:
    """Run one test. If the program ended, it has failed, even if the test code caught the exception."""
    result = TestResult(verdict="wrong")
    try:
        if check(index):
            result = TestResult(verdict="passed")
    except CannotTravel as error:
        raise UnusableRow(f"test {index}: {error}") from None
    except ProgramEnded:
        pass
    except Raised as error:
        result = TestResult(verdict="error", detail=error.detail)
    except NameError as error:
        result = TestResult(verdict="error", detail=str(error))
    except Exception as error:
        result = TestResult(verdict="wrong", detail=type(error).__name__)
    if session.ended is not None:
        return TestResult(verdict=_verdict(session.ended), detail=session.ended.detail)
    return result


def _call_check(session: Session, tests: CallTests) -> Callable[[int], bool]:
    def check(index: int) -> bool:
        function, expected = session.name(tests.function), tests.outputs[index]
        given = session.request("in_place" if tests.in_place else "call", function, *tests.inputs[index])
        if tests.maybe_wrapped and isinstance(expected, list) and len(expected) == 1:
            return same_value(given, expected[0]) or same_value(given, expected)
        return same_value(given, expected)

    return check


# --- reward -----------------------------------------------------------------------------------------------------------


def reward_of(results: list[TestResult], outcome: Outcome) -> float:
    """Return one number for the results of a program's tests.

    Args:
        results: at least one result.
        outcome: `all`: 1 if every test passed, else 0. `fraction`: share of passed tests. `bcoder` (B-Coder, arXiv
            2310.03173, section 3.1): +1 if all passed, -0.3 if some are wrong, -0.6 for a run-time error or timeout,
            -1 if the program does not compile.
    """
    verdicts = [result.verdict for result in results]
    if outcome == "fraction":
        return verdicts.count("passed") / len(verdicts)
    passed = all(verdict == "passed" for verdict in verdicts)
    if outcome == "all":
        return float(passed)
    if "compile_error" in verdicts:
        return -1.0
    if "error" in verdicts or "timeout" in verdicts:
        return -0.6
    return 1.0 if passed else -0.3
