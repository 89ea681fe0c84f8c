"""Unit tests: a program (untrusted text) and the tests of its row go in, one result per test comes out.

The tests run here, in the trusted process; the program runs in the sandbox. Arguments enter the box and plain values
leave it; expected values, test code and verdicts never enter it.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib.util
import math
import re
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal

from llmrl.sandbox import BoxDied, CannotTravel, Limits, ProgramEnded, Raised, Sandbox, Session, default_sandbox
from llmrl.sandbox.callbacks import TEST_FILE
from llmrl.sandbox.native import NativeSandbox
from llmrl.verify.code.checker import BrokenChecker, Checker
from llmrl.verify.code.rows import AssertTests, CallTests, Row, StdinTests, Tests
from llmrl.verify.code.suite import BrokenSuite, SuiteTests, run_suite

Outcome = Literal["all", "fraction", "bcoder"]
Verdict = Literal["passed", "wrong", "error", "timeout", "compile_error", "not_run"]
FLOAT_TOLERANCE = 1e-6
"""Relative and absolute tolerance for numbers that are written with a point or an exponent, and for floats."""
MAX_SOURCE_CHARACTERS = 1_000_000
_MAX_RESTARTS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class TestResult:
    """The result of one test."""

    verdict: Verdict
    detail: str = ""
    """The program's exception, for people; never anything about the expected value."""


class UnusableRow(Exception):
    """The row's own tests cannot be run, so the program cannot be judged."""


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
    return [TestResult(verdict=result.verdict, detail=result.detail) for result in results]


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


_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?")


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


def same_output(printed: str, expected: str, *, tolerance: float = FLOAT_TOLERANCE, strip: bool = False) -> bool:
    """Return whether two outputs agree line by line, ignoring white space at line ends and blank lines at the end.

    Lines that differ are compared token by token. Two tokens agree if they are equal, or if both are decimal numbers,
    at least one is written with a point or an exponent, and they differ by at most the tolerance, relative or absolute.

    Args:
        printed: the program's output.
        expected: the test's.
        tolerance: see above.
        strip: ignore blank lines at the beginning too.
    """
    texts = (printed, expected)
    given, wanted = ((text.strip() if strip else text.rstrip()).split("\n") for text in texts)
    if len(given) != len(wanted):
        return False
    pairs = zip(given, wanted, strict=True)
    return all(_same_line(one.split(), other.split(), tolerance) for one, other in pairs)


def _same_line(given: list[str], wanted: list[str], tolerance: float) -> bool:
    if given == wanted:
        return True
    return len(given) == len(wanted) and all(map(partial(_same_token, tolerance), given, wanted))


def _same_token(tolerance: float, given: str, wanted: str) -> bool:
    if given == wanted:
        return True
    if len(given) > 400 or not (_NUMBER.fullmatch(given) and _NUMBER.fullmatch(wanted)):
        return False
    if not set(".eE") & set(given + wanted):
        return False
    return math.isclose(float(given), float(wanted), rel_tol=tolerance, abs_tol=tolerance)


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
    named = "\n# numpy" if isinstance(tests, AssertTests) and any("numpy" in code for code in _all_code(tests)) else ""
    for _ in range(_MAX_RESTARTS):
        limits = clock.next_limits()
        if limits is None:
            return [*results, _OUT_OF_TIME]
        with _timed(box.open(program + named, limits), clock) as session:
            try:
                session.load(program, row.conventions)
                check = _assert_check(session, tests) if isinstance(tests, AssertTests) else _call_check(session, tests)
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


def same_value(given: Any, expected: Any) -> bool:
    """Return whether a returned value is the expected one.

    Tuples count as lists, because JSON has no tuples. True is not 1. A float may differ by FLOAT_TOLERANCE, relative or
    absolute. All other values must be equal and of the same type.
    """
    if type(given).__name__ == "ndarray" and isinstance(expected, list):
        given = given.tolist()
    if isinstance(given, (list, tuple)) and isinstance(expected, (list, tuple)):
        return len(given) == len(expected) and all(map(same_value, given, expected))
    if isinstance(given, dict) and isinstance(expected, dict):
        # Expected values come from JSON, whose keys are text.
        texts = {str(key): value for key, value in given.items()}
        return texts.keys() == expected.keys() and all(same_value(texts[key], expected[key]) for key in expected)
    if type(given) is float or type(expected) is float:
        return _close(given, expected)
    return type(given) is type(expected) and bool(given == expected)


def _close(given: Any, expected: Any) -> bool:
    if not all(type(value) in (int, float) for value in (given, expected)):
        return False
    try:
        return math.isclose(given, expected, rel_tol=FLOAT_TOLERANCE, abs_tol=FLOAT_TOLERANCE)
    except OverflowError:  # an integer larger than any float
        return False


def _assert_check(session: Session, tests: AssertTests) -> Callable[[int], bool]:
    """Return a function that runs one check, in a namespace that holds the program's names as handles."""
    if evaluated := _EVALUATING & {
        name for source in (tests.setup, *tests.checks) for name in _names_used(source)
    }:  # the text may be the program's, and would run here
        raise UnusableRow(f"the tests evaluate text ({', '.join(sorted(evaluated))}), which can come from the program")
    namespace: dict[str, Any] = {"__name__": "tests", "__builtins__": _test_builtins() | {_RUN: session.run}}
    if tests.helpers:
        exec(_compiled(tests.helpers), namespace)
    for name in _program_names(tests):
        try:
            namespace[name] = session.name(name)
        except Raised:
            namespace.pop(name, None)
    if tests.entry_point:  # `name`, or `Solution().name`, which the box looks up in the class
        name = tests.entry_point.removeprefix("Solution().")
        namespace["candidate"] = namespace[name] = _candidate(session, name)
    setup_error = _run_setup(tests, namespace, session)

    def check(index: int) -> bool:
        if setup_error is not None:
            raise setup_error
        exec(_compiled(tests.checks[index]), namespace)
        if session.failed is not None:
            raise session.failed
        return True

    return check


def _run_setup(tests: AssertTests, namespace: dict[str, Any], session: Session) -> Exception | None:
    """Run the setup. Return an exception that the program can have caused.

    Raises:
        UnusableRow: the setup itself is broken.
    """
    for name in _module_names(tests):
        namespace.setdefault(name, importlib.import_module(name))
    asked = session.num_requests
    try:
        exec(_compiled(tests.setup), namespace)
    except CannotTravel as error:
        raise UnusableRow(f"setup: {error}") from None
    except Exception as error:
        if session.num_requests > asked or isinstance(error, (Raised, NameError)):
            return error
        raise UnusableRow(f"setup: {type(error).__name__}: {error}") from None
    return None


def _candidate(session: Session, name: str) -> Any:
    try:
        return session.name(name)
    except Raised as error:
        missing = NameError(error.detail)

    def undefined(*_: Any, **__: Any) -> Any:
        raise missing

    return undefined


_EVALUATING = frozenset({"eval", "exec", "compile", "__import__", "pickle", "marshal"})


@lru_cache(maxsize=512)
def _names_used(source: str) -> frozenset[str]:
    _compiled(source)
    return frozenset(node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name))


_RUN = "__run__"
"""The name of `Session.run` in test code."""


class _Runs(ast.NodeTransformer):
    """Makes `f(a)` as a statement a call whose changes of `a` the test sees; other calls are for their result."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        self.generic_visit(node)
        call = node.value
        if not isinstance(call, ast.Call) or (isinstance(call.func, ast.Name) and call.func.id == "super"):
            return node
        run = ast.Call(func=ast.Name(id=_RUN, ctx=ast.Load()), args=[call.func, *call.args], keywords=call.keywords)
        node.value = ast.copy_location(run, call)
        return ast.fix_missing_locations(node)


@lru_cache(maxsize=512)
def _compiled(source: str) -> types.CodeType:
    try:
        return compile(_Runs().visit(ast.parse(source)), TEST_FILE, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise UnusableRow(f"the test code does not compile: {error}") from None


def _all_code(tests: AssertTests) -> tuple[str, ...]:
    return (tests.setup, tests.helpers, *tests.checks)


def _sources(tests: AssertTests) -> list[ast.AST]:
    _ = [_compiled(source) for source in (tests.setup, *tests.checks)]
    return [ast.parse(source) for source in (tests.setup, *tests.checks)]


def _program_names(tests: AssertTests) -> set[str]:
    """Return the names in the test code that mean the program's: the reference defines them, or nothing else does.

    All other names keep their own meaning, so a program that redefines `set` or `abs` cannot change the tests. If the
    tests use only built-ins, the one they call most is the program's.
    """
    return set(_names_of(tuple(tests.checks), tests.setup, tests.helpers, tests.defined)[0])


def _module_names(tests: AssertTests) -> set[str]:
    return set(_names_of(tuple(tests.checks), tests.setup, tests.helpers, tests.defined)[1])


@lru_cache(maxsize=512)
def _names_of(
    checks: tuple[str, ...], setup: str, helpers: str, defined: frozenset[str]
) -> tuple[frozenset[str], frozenset[str]]:
    trees = _sources(AssertTests(checks=list(checks), setup=setup))
    nodes = [node for tree in trees for node in ast.walk(tree)]
    used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    bound = _bound_names(nodes) | _bound_names(list(ast.walk(ast.parse(helpers))) if helpers else []) | {"candidate"}
    modules = {
        node.value.id
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if node.value.id in sys.stdlib_module_names and node.value.id not in defined | bound
    }
    trusted = set(dir(builtins)) | bound | modules
    names = (used & defined) | (used - trusted)
    if not names and not helpers:
        called = [n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
        names = {name for name, _ in Counter(called).most_common(1)}
    return frozenset(names), frozenset(modules)


def _bound_names(nodes: list[ast.AST]) -> set[str]:
    """Return every name that the code itself binds."""
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    names |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return names


def _test_builtins() -> dict[str, Any]:
    """Return the built-ins for test code: `print` is silent, and `random` is a seeded copy of its own.

    The copy makes tests reproducible and leaves the random numbers of this process alone.
    """
    own_random: list[types.ModuleType] = []

    def import_module(name: str, *args: Any, **kwargs: Any) -> Any:
        if name != "random":
            return builtins.__import__(name, *args, **kwargs)
        if not own_random:
            spec = importlib.util.find_spec("random")
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            module.seed(0)
            own_random.append(module)
        return own_random[0]

    return vars(builtins) | {"__import__": import_module, "print": lambda *_, **__: None}


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
