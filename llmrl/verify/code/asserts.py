"""Test code of a row, run in this process: the names of the program mean handles of what is in the box."""

from __future__ import annotations

import ast
import builtins
import importlib.util
import sys
import types
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from llmrl.sandbox import CannotTravel, Raised, Session
from llmrl.sandbox.callbacks import TEST_FILE
from llmrl.verify.code.rows import AssertTests


class UnusableRow(Exception):
    """The row's own tests cannot be run, so the program cannot be judged."""


def assert_check(session: Session, tests: AssertTests) -> Callable[[int], bool]:
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


def all_code(tests: AssertTests) -> tuple[str, ...]:
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
