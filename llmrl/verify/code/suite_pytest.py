"""As much of pytest as the test files of programming tasks use, for the test box. The rest is named and refused.

Real pytest collects files, and the box has none. Standard library only.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

from llmrl.sandbox.session import CannotTravel, ProgramEnded


class Unsupported(BaseException):
    """The tests need something that this mode does not have. Not an `Exception`: test code must not catch it."""


class Skipped(Exception):
    """A test asked to be skipped."""


class ExceptionInfo:
    """What `with pytest.raises(...) as info` gives."""

    value: BaseException

    @property
    def type(self) -> type[BaseException]:
        return type(self.value)

    @property
    def typename(self) -> str:
        return type(self.value).__name__

    def match(self, pattern: str) -> bool:
        assert re.search(pattern, str(self.value)), f"pattern {pattern!r} not found"
        return True


class _Raises:
    def __init__(self, expected: Any, match: str | None) -> None:
        self.expected, self.match, self.info = expected, match, ExceptionInfo()

    def __enter__(self) -> ExceptionInfo:
        return self.info

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        assert error is not None, "did not raise"
        if isinstance(error, (ProgramEnded, CannotTravel, Unsupported)) or not isinstance(error, self.expected):
            return False
        self.info.value = error
        if self.match is not None:
            self.info.match(self.match)
        return True


def raises(expected: Any, *call: Any, match: Any = None, **keywords: Any) -> Any:
    context = _Raises(expected, match)
    if not call:
        return context
    with context as info:
        call[0](*call[1:], **keywords)
    return info


class Approx:
    """A number, or a list, tuple or dict of numbers, with a tolerance."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, expected: Any, rel: float | None = None, abs: float | None = None, nan_ok: bool = False) -> None:
        self.expected, self.rel, self.abs, self.nan_ok = expected, rel, abs, nan_ok

    def __eq__(self, given: Any) -> bool:
        return self._near(given, self.expected)

    def __repr__(self) -> str:
        return f"approx({self.expected!r})"

    def _near(self, given: Any, expected: Any) -> bool:
        if isinstance(expected, dict):
            return isinstance(given, dict) and given.keys() == expected.keys() and all(
                self._near(given[key], item) for key, item in expected.items()
            )  # fmt: skip
        if isinstance(expected, (list, tuple)):
            same = isinstance(given, (list, tuple)) and len(given) == len(expected)
            return same and all(map(self._near, given, expected))
        if not isinstance(expected, (int, float, complex)) or isinstance(expected, bool):
            return type(given) is type(expected) and bool(given == expected)
        if not isinstance(given, (int, float, complex)) or isinstance(given, bool):
            return False
        if given == expected:
            return True
        if given != given or expected != expected:
            return self.nan_ok and given != given and expected != expected
        if math.inf in (abs(given), abs(expected)):
            return False
        relative = self.rel if self.rel is not None else (0.0 if self.abs is not None else 1e-6)
        return abs(given - expected) <= max(relative * abs(expected), 1e-12 if self.abs is None else self.abs)


class Fixture:
    """A function marked with `@pytest.fixture`."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        self.function, self.options = function, options
        self.name = options.get("name") or function.__name__

    def __get__(self, instance: Any, owner: Any) -> Any:
        if instance is None:
            return self
        return Fixture(functools.partial(self.function, instance), self.options | {"name": self.name})


def fixture(function: Any = None, **options: Any) -> Any:
    if set(options) - {"scope", "params", "autouse", "name", "ids"}:
        raise Unsupported(f"pytest.fixture({', '.join(options)}) is not supported")
    return Fixture(function, options) if function is not None else lambda inner: Fixture(inner, options)


class Param(tuple[Any, ...]):
    marks: Any = ()


def param(*values: Any, marks: Any = (), id: Any = None) -> Param:
    made = Param(values)
    made.marks = marks if isinstance(marks, (list, tuple)) else [marks]
    return made


class Mark:
    """`pytest.mark`: `parametrize`, `skip`, `skipif` and `xfail` act; all others only decorate."""

    def __getattr__(self, name: str) -> Any:
        if name in ("asyncio", "anyio", "usefixtures"):
            raise Unsupported(f"pytest.mark.{name} is not supported")

        def mark(*args: Any, **keywords: Any) -> Any:
            if len(args) == 1 and not keywords and (inspect.isfunction(args[0]) or inspect.isclass(args[0])):
                return self.apply(args[0], name, (), {})
            return _Applied(self, name, args, keywords)

        return mark

    def apply(self, target: Any, name: str, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if name == "parametrize":
            target.__params__ = [(args, keywords), *getattr(target, "__params__", [])]
        elif name in ("skip", "xfail") or (name == "skipif" and args and args[0]):
            target.__left_out__ = True
        return target


class _Applied:
    def __init__(self, mark: Mark, name: str, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.mark, self.name, self.args, self.keywords = mark, name, args, keywords

    def __call__(self, target: Any) -> Any:
        return self.mark.apply(target, self.name, self.args, self.keywords)


def _fail(reason: str = "", pytrace: bool = True, msg: str = "") -> None:
    raise AssertionError(reason or msg)


def _skip(*_: Any, **__: Any) -> None:
    raise Skipped


class PytestModule(types.ModuleType):
    """`pytest`, in a test file."""

    def __init__(self) -> None:
        super().__init__("pytest")
        self.__dict__.update(raises=raises, approx=Approx, fixture=fixture, param=param, mark=Mark(), fail=_fail)
        self.__dict__.update(skip=_skip, importorskip=_import_or_refuse, main=lambda *_, **__: 0)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise Unsupported(f"pytest.{name} is not supported")


def _import_or_refuse(name: str, *_: Any, **__: Any) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise Unsupported(f"the tests import {name}, which the box does not have") from None


# --- tests and fixtures -----------------------------------------------------------------------------------------------


class Function:
    """One pytest test: a function or a method, with one set of parameters."""

    def __init__(self, name: str, function: Any, values: dict[str, Any], owner: type | None) -> None:
        self.name, self.function, self.values, self.owner = name, function, values, owner

    def run(self, fixtures: dict[str, Fixture], params: dict[str, Any]) -> None:
        instance = self.owner() if self.owner is not None else None
        target = getattr(instance, self.function.__name__) if instance is not None else self.function
        with_methods = dict(fixtures)
        for name, item in inspect.getmembers(self.owner or object):
            if isinstance(item, Fixture):
                with_methods[item.name] = getattr(instance, name)
        setup = Setup(with_methods, params)
        try:
            _call_if_there(instance, "setup_method", self.function)
            for item in with_methods.values():
                if item.options.get("autouse"):
                    setup.value(item.name)
            given = {name: setup.value(name) for name in _parameters(target) if name not in self.values}
            if inspect.iscoroutinefunction(target):
                raise Unsupported("async test functions are not supported")
            target(**given, **self.values)
        finally:
            setup.close()
            _call_if_there(instance, "teardown_method", self.function)


def _call_if_there(instance: Any, name: str, function: Any) -> None:
    method = getattr(instance, name, None)
    if method is not None:
        method(*([function] if len(inspect.signature(method).parameters) else []))


def _parameters(function: Any) -> list[str]:
    found = inspect.signature(function).parameters.values()
    return [p.name for p in found if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


class Setup:
    """The fixtures of one test."""

    def __init__(self, fixtures: dict[str, Fixture], params: dict[str, Any]) -> None:
        self.fixtures, self.params = fixtures, params
        self.values: dict[str, Any] = {}
        self.open: list[Iterator[Any]] = []

    def value(self, name: str, asking: str = "") -> Any:
        if name == "request":
            return types.SimpleNamespace(param=self.params.get(asking))
        if name not in self.fixtures:
            raise Unsupported(f"the fixture {name} is not supported")
        if name not in self.values:
            function = self.fixtures[name].function
            made = function(**{need: self.value(need, name) for need in _parameters(function)})
            if inspect.isgenerator(made):
                self.open.append(made)
                made = next(made)
            self.values[name] = made
        return self.values[name]

    def close(self) -> None:
        for generator in reversed(self.open):
            next(generator, None)


def functions_of(name: str, function: Any, owner: type | None) -> list[Function]:
    """Return one test for every combination of the parameters of a test function."""
    choices: list[list[dict[str, Any]]] = []
    for args, keywords in [*getattr(owner, "__params__", []), *getattr(function, "__params__", [])]:
        names, rows = (*args, keywords.get("argnames"), keywords.get("argvalues"))[:2] if len(args) < 2 else args[:2]
        if names is None or keywords.get("indirect"):
            raise Unsupported("pytest.mark.parametrize in this form is not supported")
        names = [item.strip() for item in names.split(",")] if isinstance(names, str) else list(names)
        sets = []
        for row in rows:
            if isinstance(row, Param) and row.marks:
                raise Unsupported("pytest.param with marks is not supported")
            row = tuple(row) if isinstance(row, Param) or len(names) > 1 else (row,)
            sets.append(dict(zip(names, row, strict=True)))
        choices.append(sets)
    made = []
    for index, combination in enumerate(itertools.product(*choices)):
        values = {key: value for part in combination for key, value in part.items()}
        made.append(Function(f"{name}[{index}]" if choices else name, function, values, owner))
    return made


def used_by(function: Any, fixtures: dict[str, Fixture]) -> list[str]:
    """Return the fixtures that a test uses, directly or through others."""
    used = [name for name, item in fixtures.items() if item.options.get("autouse")]
    waiting = [*used, *_parameters(function)]
    while waiting:
        name = waiting.pop(0)
        if name in fixtures:
            used.append(name)
            waiting += [need for need in _parameters(fixtures[name].function) if need not in used]
    return list(dict.fromkeys(used))
