"""Objects, exceptions and exception classes of a program, as test code outside the box has them."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol

_SHOWN_NAMES = ("__name__", "__qualname__", "__dict__", "__wrapped__", "__annotations__", "__mro__", "__members__")
"""Attributes with a special name that test code may read; others belong to Python's own machinery."""
_DATA_PACKAGES = ("pandas", "polars", "torch", "scipy", "sympy", "xarray")


class Asks(Protocol):
    """A session, as handles know it."""

    def request(self, do: str, *args: Any, **kwargs: Any) -> Any:
        """Make the driver do something; see `Session.request`."""
        ...


class CannotTravel(BaseException):
    """A test needs a value to pass the wall of the box that cannot: the row is unusable, the program not wrong."""


class Raised(Exception):
    """The program raised. The class actually raised here also derives from the nearest built-in exception."""

    detail = ""
    origin: Handle | None = None
    """The exception itself, in the box."""

    def __getattr__(self, name: str) -> Any:
        if self.origin is None or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.origin, name)


class ProgramClass(type):
    """The type of the classes that stand for the program's exception classes: calling one makes an object in the box.

    Test code catches the program's exceptions with them. They never catch an exception of the test code itself, even if
    the program gives `AssertionError` out as its own.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        handle = cls.__dict__.get("_handle")
        return super().__call__(*args, **kwargs) if handle is None else handle(*args, **kwargs)


class Handle:
    """An object that stays in the box. It equals no value outside, because a program could fake equality.

    Attributes, calls, items, iteration, length, truth, text and arithmetic are evaluated inside the box, and so is the
    comparison of two of the program's objects: it is the program's own matter what they mean.
    """

    __slots__ = ("_number", "_session", "_type")

    def __init__(self, session: Asks, number: int, type_name: str) -> None:
        object.__setattr__(self, "_session", session)
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_type", type_name)

    def _apply(self, function: str, *args: Any) -> Any:
        return self._session.request("apply", function, *args)

    def __repr__(self) -> str:
        return _text(self._apply("repr", self))

    def __str__(self) -> str:
        return _text(self._session.request("str", self))

    def __format__(self, specification: str) -> str:
        return _text(self._apply("format", self, specification))

    def __eq__(self, other: object) -> bool:
        return (isinstance(other, Handle) and self._apply("eq", self, other) is True) or _differs(self, other)

    def __ne__(self, other: object) -> bool:
        return self._apply("ne", self, other) is True if isinstance(other, Handle) else not _differs(self, other)

    def __hash__(self) -> int:
        found = self._apply("hash", self)
        return found if type(found) is int else 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._session.request("call", self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in _SHOWN_NAMES:
            raise AttributeError(name)
        return self._session.request("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._session.request("setattr", self, name, value)

    def __delattr__(self, name: str) -> None:
        self._apply("delattr", self, name)

    def __getitem__(self, key: Any) -> Any:
        return self._session.request("getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._session.request("setitem", self, key, value)

    def __delitem__(self, key: Any) -> None:
        self._apply("delitem", self, key)

    def __iter__(self) -> Iterator[Any]:
        items = self._session.request("iter", self)
        return iter(items if type(items) is list else [])

    def __next__(self) -> Any:
        return self._session.request("next", self)

    def __len__(self) -> int:
        size = self._session.request("len", self)
        return size if type(size) is int else -1

    def __bool__(self) -> bool:
        return self._session.request("bool", self) is True

    def __enter__(self) -> Any:
        return self._session.request("enter", self)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        """Leave the context. Only an exception that the program raised may be swallowed, never a failed assertion."""
        origin = error.origin if isinstance(error, Raised) else None
        name = kind.__name__ if kind is not None else None
        swallowed = self._session.request("exit", self, origin, name)
        return swallowed is True and isinstance(error, Raised)

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, Handle) and self._apply("isinstance", value, self) is True

    def __subclasscheck__(self, value: object) -> bool:
        return isinstance(value, Handle) and self._apply("issubclass", value, self) is True

    def __copy__(self) -> Any:
        return self._apply("copy", self)

    def __deepcopy__(self, _: object) -> Any:
        return self._apply("deepcopy", self)


class Awaitable(Handle):
    """A coroutine that stays in the box and runs there to its end when it is awaited."""

    __slots__ = ()

    def __await__(self) -> Generator[Any, None, Any]:
        return self._session.request("await", self)
        yield  # makes this a generator, which is what Python awaits

    def send(self, value: Any) -> Any:
        """Run the coroutine to its end, as an event loop does with its first step."""
        raise StopIteration(self._session.request("await", self))

    def __next__(self) -> Any:
        return self.send(None)

    def throw(self, *error: Any) -> Any:
        """Raise the exception here."""
        raise error[-1] if isinstance(error[-1], BaseException) else error[0]

    def close(self) -> None:
        """Do nothing: the coroutine ends with the program."""


def _text(value: Any) -> str:
    return value if type(value) is str else ""


def _differs(handle: Handle, other: object) -> bool:
    """Return False: an object of the program equals nothing else.

    Raises:
        CannotTravel: the other is data of a kind that stays in the box, so even a right program would differ.
    """
    if type(other).__module__.partition(".")[0] in _DATA_PACKAGES:
        raise CannotTravel(f"the test compares an object of the program with a {type(other).__name__}")
    return False


def _operation(function: str, *, reflected: bool = False) -> Callable[..., Any]:
    def method(self: Handle, *others: Any) -> Any:
        return self._apply(function, *((*others, self) if reflected else (self, *others)))

    return method


def _ordering(function: str) -> Callable[..., Any]:
    def method(self: Handle, other: object) -> Any:
        # With a value from outside, the program could claim any order.
        return self._apply(function, self, other) is True if isinstance(other, Handle) else NotImplemented

    return method


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
for _name in _BINARY:
    _function = f"{_name}_" if _name in ("and", "or") else _name
    setattr(Handle, f"__{_name}__", _operation(_function))
    setattr(Handle, f"__r{_name}__", _operation(_function, reflected=True))
for _name in ("neg", "pos", "abs", "invert", "round", "int", "float", "complex", "index", "reversed"):
    setattr(Handle, f"__{_name}__", _operation(_name))
for _name in ("lt", "le", "gt", "ge"):
    setattr(Handle, f"__{_name}__", _ordering(_name))


def exception_text(description: Any) -> str:
    """Return an exception's description as `Name: text`, shortened, for people."""
    if type(description) is not list or len(description) < 3:
        return "an exception"
    return f"{str(description[0])[:100]}: {str(description[2])[:500]}"


def exception_of(description: Any, parent: type[Raised] | None, origin: Handle | None) -> Exception:
    """Return an exception for one raised in the program, which `except` for its nearest built-in class catches.

    Args:
        description: [class name, nearest built-in class, text, ...] from the box.
        parent: what stands for the exception's own class, or None.
        origin: the exception in the box.
    """
    text = description[2] if type(description) is list and len(description) > 2 else ""
    kind: type[Raised] = parent or raised_class(description[1] if type(description) is list else "Exception")
    try:
        error = ProgramClass("Raised", (kind,), {})(text if type(text) is str else "")
    except TypeError:  # a class that requires other arguments
        error = Raised(text)
    error.detail, error.origin = exception_text(description), origin
    return error


def raised_class(nearest: Any) -> type[Raised]:
    """Return the class for exceptions whose nearest built-in class has this name."""
    base = getattr(builtins, nearest, Exception) if type(nearest) is str else Exception
    if not (isinstance(base, type) and issubclass(base, Exception)):
        base = Exception
    return Raised if base is Exception else ProgramClass("Raised", (Raised, base), {})
