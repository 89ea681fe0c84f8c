"""Test files in the style of pytest or unittest, in a mode whose verdict the program cannot forge.

The tests run in one box and the program in another. Calls of the program's functions travel from the test box through
this process to the program's box, and plain values or handles travel back. Tests that need the program in their own
process (patched modules, shared files, captured output) cannot be judged that way: the row is unusable, with reason.
"""

from __future__ import annotations

import ast
import builtins
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from llmrl.sandbox import Limits, ProgramEnded, Raised, Sandbox, SandboxUnavailable, Session
from llmrl.sandbox.local import LocalSandbox

_HERE = Path(__file__).parent
_TEST_SECONDS, _TEST_CPU_SECONDS = 40.0, 60.0
"""Time the tests have on top of the program's limits, for their own work."""
_MAX_RESTARTS = 3
_MODULE_NAMES = ("solution", "main", "program")


@dataclass(frozen=True, kw_only=True, slots=True)
class SuiteTests:
    """A test file that runs in a box of its own and calls into the program's."""

    source: str
    """Test functions or classes, as text."""
    helpers: str = ""
    """Trusted definitions that the tests use: imports and constants of the prompt."""
    names: frozenset[str] = frozenset()
    """Names that the tests use and nothing in them defines: the program's."""
    modules: frozenset[str] = frozenset()
    """Further names of modules that mean the program."""


class BrokenSuite(Exception):
    """The tests cannot be judged in this mode."""


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """How one test ended."""

    name: str
    verdict: str
    """passed, wrong, error, timeout or compile_error."""
    detail: str = ""


# --- rows -------------------------------------------------------------------------------------------------------------


def is_suite(test: str) -> bool:
    """Return whether the text is a test file: test functions, or classes with test methods, and no `check`."""
    if re.search(r"^def check\(", test, re.MULTILINE):  # HumanEval
        return False
    return re.search(r"^\s*(?:async\s+)?def\s+test|^\s*class\s+\w+\(.*TestCase\)", test, re.MULTILINE) is not None


def read_suite(row: Mapping[str, Any]) -> tuple[SuiteTests, list[str]] | None:
    """Read a row of KodCode (`test` in the style of pytest) or BigCodeBench (`test`, `entry_point`, `code_prompt`).

    Returns:
        The tests and the names that the program defines, or None if the row's `test` is not a test file.
    """
    source = row.get("test")
    if not isinstance(source, str) or not is_suite(source):
        return None
    entry = row.get("entry_point")
    prompt = row.get("code_prompt") or row.get("complete_prompt") or ""
    helpers = _preamble(prompt) if isinstance(prompt, str) else ""
    free = _free_names(source, helpers)
    imported = _imported_from_program(source)
    names = [str(entry)] if entry else sorted(imported) or sorted(free)
    wanted = free | ({str(entry)} if entry else set())
    return SuiteTests(source=source, helpers=helpers, names=frozenset(wanted)), names


def _parse(source: str) -> ast.Module | None:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError):
        return None


def _preamble(prompt: str) -> str:
    """Return the imports and constants of a prompt, which tests that are appended to a program may use."""
    tree = _parse(prompt) or _parse(f"{prompt.rstrip()}\n    pass\n")
    kept = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
    return "\n".join(ast.unparse(node) for node in (tree.body if tree else []) if isinstance(node, kept))


def _imported_from_program(source: str) -> set[str]:
    tree = _parse(source)
    nodes = ast.walk(tree) if tree else []
    return {
        alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module in _MODULE_NAMES
        for alias in node.names
        if alias.name != "*"
    }


def _free_names(source: str, helpers: str) -> set[str]:
    """Return the names that a test file uses and does not define, which are not built-ins either."""
    tree, other = _parse(source), _parse(helpers)
    nodes = [node for part in (tree, other) if part for node in ast.walk(part)]
    used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    bound |= {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= {node.name for node in nodes if isinstance(node, ast.ExceptHandler) and node.name}
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            bound |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return used - bound - set(dir(builtins))


# --- what this mode cannot judge --------------------------------------------------------------------------------------

_PATCHING = "the tests patch modules of the program's process"
_OUTPUT = "the tests capture what the program prints"
_FILES = "the tests share files, processes or the environment with the program"
_EVALUATING = "the tests evaluate text or bytes that can come from the program"
_ROOTS = {
    "unittest.mock": _PATCHING, "mock": _PATCHING, "os": _FILES, "shutil": _FILES, "tempfile": _FILES,
    "subprocess": _FILES, "socket": _FILES, "glob": _FILES, "pathlib": _FILES, "sqlite3": _FILES, "zipfile": _FILES,
    "tarfile": _FILES, "multiprocessing": _FILES, "pickle": _EVALUATING, "marshal": _EVALUATING, "dill": _EVALUATING,
    "shelve": _EVALUATING, "joblib": _EVALUATING, "importlib": _EVALUATING, "runpy": _EVALUATING, "code": _EVALUATING,
    "ctypes": _EVALUATING, "cloudpickle": _EVALUATING, "yaml": _EVALUATING, "logging": _OUTPUT,
}  # fmt: skip
_CALLS = {
    "eval": _EVALUATING, "exec": _EVALUATING, "compile": _EVALUATING, "__import__": _EVALUATING, "open": _FILES,
    "input": _OUTPUT,
}  # fmt: skip
_FIXTURES = {
    "monkeypatch": _PATCHING, "mocker": _PATCHING, "capsys": _OUTPUT, "capfd": _OUTPUT, "caplog": _OUTPUT,
    "tmp_path": _FILES, "tmpdir": _FILES, "tmp_path_factory": _FILES,
}  # fmt: skip
_ATTRIBUTES = {
    ("sys", "stdout"): _OUTPUT, ("sys", "stderr"): _OUTPUT, ("sys", "stdin"): _OUTPUT, ("sys", "modules"): _PATCHING,
    ("sys", "argv"): _FILES, ("contextlib", "redirect_stdout"): _OUTPUT, ("contextlib", "redirect_stderr"): _OUTPUT,
    ("io", "open"): _FILES,
}  # fmt: skip
_HARMLESS = {"os.path.join", "os.path.basename", "os.path.dirname", "os.path.splitext", "os.sep", "os.linesep"}


@lru_cache(maxsize=512)
def unsupported(source: str) -> str | None:
    """Return why a test file cannot be judged from outside the program's process, or None."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        return f"the test code does not compile: {error}"
    names = _meanings(tree)
    for node in ast.walk(tree):
        reason = _reason(node, names)
        if reason is not None:
            return f"{reason} (line {getattr(node, 'lineno', 0)})"
    return None


def _meanings(tree: ast.Module) -> dict[str, str]:
    """Return what each imported name means, as a dotted path."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _reason(node: ast.AST, names: dict[str, str]) -> str | None:
    if isinstance(node, ast.arg):
        return _FIXTURES.get(node.arg)
    if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
        return _of_path(node.module or "")
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        path = names.get(node.id)
        if path is None:
            return _CALLS.get(node.id)
        return _of_path(path) if "." in path else None
    path = _dotted(node, names)
    return _of_path(path) if path else None


def _dotted(node: ast.AST, names: dict[str, str]) -> str | None:
    """Return the whole path of `a.b.c` if `a` was imported."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    if not parts or not isinstance(node, ast.Name) or node.id not in names:
        return None
    return ".".join([names[node.id], *parts])


def _of_path(path: str) -> str | None:
    if path in _HARMLESS or any(name.startswith(f"{path}.") for name in _HARMLESS):
        return None
    root, _, rest = path.partition(".")
    if (root, rest.partition(".")[0]) in _ATTRIBUTES:
        return _ATTRIBUTES[root, rest.partition(".")[0]]
    if path == "unittest.mock" or path.startswith("unittest.mock."):
        return _PATCHING
    return _ROOTS.get(root)


# --- running ----------------------------------------------------------------------------------------------------------


def run_suite(
    program: str,
    tests: SuiteTests,
    box: Sandbox,
    next_limits: Callable[[], Limits | None],
    spend: Callable[[float], None],
    *,
    stop_early: bool,
) -> list[SuiteResult]:
    """Run a test file against a program.

    Args:
        program: source code.
        tests: from `read_suite`.
        box: where both run, each in a process of its own.
        next_limits: limits of the next run of the program, or None when all time is used up.
        spend: called with the time of each run.
        stop_early: end with the first test that does not pass.

    Returns:
        One result per test that ran. A program that ends its own process fails the test in which it does; the others
        run against a new one.

    Raises:
        BrokenSuite: the tests cannot be judged.
        SandboxUnavailable: no box can be started or reached.
        BoxDied: a box died.
    """
    reason = unsupported(tests.source)
    if reason is not None:
        raise BrokenSuite(reason)
    results: list[SuiteResult] = []
    for _ in range(_MAX_RESTARTS):
        limits = next_limits()
        if limits is None:
            return [*results, SuiteResult("", "timeout", "time limit for all runs together")]
        with box.open(program, limits) as session:
            try:
                session.load(program)
            except ProgramEnded as ended:
                kind = ended.kind if ended.kind in ("compile_error", "timeout") else "error"
                return [*results, SuiteResult("", kind, ended.detail)]
            results += _one_run(session, tests, [result.name for result in results], stop_early, box, limits)
            ended_early = session.ended is not None
        spend(session.seconds)
        failed = any(result.verdict != "passed" for result in results)
        if not ended_early or not results or (stop_early and failed) or results[-1].verdict == "timeout":
            break
    if not results:
        raise BrokenSuite("the test file has no test")
    return results


def _one_run(
    session: Session, tests: SuiteTests, done: list[str], stop_early: bool, box: Sandbox, limits: Limits
) -> list[SuiteResult]:
    settings = {"source": tests.source, "helpers": tests.helpers, "names": sorted(tests.names), "done": done}
    settings |= {"modules": sorted(tests.modules), "stop_early": stop_early}
    guest = _guest(tests.source + tests.helpers)
    own = replace(
        limits,
        cpu_seconds=limits.cpu_seconds + _TEST_CPU_SECONDS,
        wall_seconds=limits.wall_seconds + _TEST_SECONDS,
        total_seconds=None,
    )
    # A box of a second pool: threads that each hold one box of a pool could wait for ever for another one of it.
    with (box.twin() if isinstance(box, LocalSandbox) else box).open(guest, own) as runner:
        try:
            runner.load(guest)
            step = runner.name("start")(json.dumps(settings))
            message = json.loads(step(""))
            while not message.keys() & {"results", "unusable", "unavailable"}:
                message = json.loads(step(json.dumps(_answer(session, message))))
        except ProgramEnded as ended:
            raise BrokenSuite(f"the tests themselves ended: {ended.detail}") from None
        except Raised as error:
            raise BrokenSuite(f"the tests cannot run: {error.detail}") from None
    if "unavailable" in message:
        raise SandboxUnavailable(f"the tests cannot start: {message['unavailable']}")
    if "unusable" in message:
        raise BrokenSuite(str(message["unusable"])[:500])
    return [SuiteResult(*result) for result in message["results"]]


def _answer(session: Session, request: dict[str, Any]) -> dict[str, Any]:
    if request.pop("next_test", False):
        session.next_test()
    try:
        return session.forward(request)
    except ProgramEnded as ended:
        return {"ended": [ended.kind, ended.detail]}


_SHIPPED = (
    *("llmrl.errors", "llmrl.sandbox.limits", "llmrl.sandbox.watch", "llmrl.sandbox.handles"),
    *("llmrl.sandbox.callbacks", "llmrl.sandbox.session", "llmrl.verify.code.suite_pytest"),
)
"""Modules that the tests need in their box besides those that every box has."""


@cache
def _modules() -> list[tuple[str, str]]:
    root = _HERE.parents[1]
    packages = [(name, "") for name in ("llmrl.verify", "llmrl.verify.code")]
    files = [(name, root.joinpath(*name.split(".")[1:]).with_suffix(".py").read_text()) for name in _SHIPPED]
    return packages + files


def _guest(named: str) -> str:
    """Return the program of the test box. `named` is repeated in a comment, because a box has the packages it names."""
    words = sorted(set(re.findall(r"[A-Za-z_]\w*", named)))
    lines = ["import sys, types", f"for _name, _source in {_modules()!r}:"]
    lines += [
        "    _module = sys.modules[_name] = types.ModuleType(_name)",
        "    _parent, _, _child = _name.rpartition('.')",
        "    setattr(sys.modules[_parent], _child, _module)",
        "    exec(compile(_source, _name, 'exec', dont_inherit=True), _module.__dict__)",
        f"exec(compile({(_HERE / 'suite_guest.py').read_text()!r}, '<suite>', 'exec', dont_inherit=True), globals())",
        f"# {' '.join(words)}",
    ]
    return "\n".join(lines)
