"""Plain values as JSON frames on a descriptor: the only data that pass between the verifier and the box.

Values built of None, bool, int, float, str, bytes, list, tuple, set, frozenset, dict, complex and the names of these
classes arrive on the other side with their types, and so do those of `rich`. Any other object travels as a handle: a
number and a type name.
Standard library only, because this module runs on both sides.
"""

from __future__ import annotations

import json
import struct
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from llmrl.sandbox import rich

MAX_DEPTH = 120
MAX_NODES = 500_000
HEADER = struct.Struct(">I")
_CONTAINERS = (list, tuple, dict, set, frozenset)
_CLASSES = (int, float, bool, str, bytes, list, tuple, set, frozenset, dict, complex, object)
_TYPES = {kind.__name__: kind for kind in _CLASSES}
_TYPE_NAMES = {kind: name for name, kind in _TYPES.items()}


_NOT_A_VALUE = (
    *(TypeError, ValueError, KeyError, IndexError, AttributeError, ImportError),
    *(ArithmeticError, RecursionError, MemoryError),
)


class BadValue(ValueError):
    """A frame does not hold a value in this encoding."""


class _Encoder:
    """Turns values into JSON trees. It reads content with the base types' methods, so that a subclass with an `__eq__`
    or `__iter__` of its own arrives as the plain content that it holds.
    """

    def __init__(self, tree_of_object: Callable[[Any], Any]) -> None:
        self.tree_of_object = tree_of_object
        self.nodes = 0

    def tree(self, value: Any, depth: int = 0) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise BadValue(f"the value has more than {MAX_NODES} parts")
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is type and value in _TYPE_NAMES:
            return {"y": _TYPE_NAMES[value]}
        if isinstance(value, (int, float, str, bytes, bytearray, complex)):
            return _scalar(value)
        if depth >= MAX_DEPTH:
            return self.tree_of_object(value)
        return self.container(value, depth + 1)

    def container(self, value: Any, depth: int) -> Any:
        if type(value) not in _CONTAINERS and (packed := rich.pack(value)) is not None:
            return {"v": [packed[0], self.tree(packed[1], depth)]}
        if isinstance(value, list):
            return [self.tree(item, depth) for item in list.__iter__(value)]
        if isinstance(value, tuple):
            return {"t": [self.tree(item, depth) for item in tuple.__iter__(value)]}
        if isinstance(value, set):
            return {"s": [self.tree(item, depth) for item in set.__iter__(value)]}
        if isinstance(value, frozenset):
            return {"z": [self.tree(item, depth) for item in frozenset.__iter__(value)]}
        if isinstance(value, dict):
            return {"d": [[self.tree(key, depth), self.tree(item, depth)] for key, item in dict.items(value)]}
        return self.tree_of_object(value)


def _scalar(value: Any) -> Any:
    if isinstance(value, int):
        number = int.__int__(value)
        return number if -(2**63) < number < 2**63 else {"i": format(number, "x")}
    if isinstance(value, float):
        number = float.__float__(value)
        return number if number - number == 0.0 else {"f": repr(number)}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, complex):
        plain = complex.__add__(value, 0j)
        return {"c": [_scalar(plain.real), _scalar(plain.imag)]}
    return {"b": bytes.hex(value) if isinstance(value, bytes) else bytearray.hex(value)}


def encode(value: Any, tree_of_object: Callable[[Any], Any]) -> Any:
    """Return the JSON tree of a value.

    Args:
        value: at most `MAX_NODES` parts, nested at most `MAX_DEPTH` deep (deeper parts become handles).
        tree_of_object: called with each object that is not a plain value; returns its tree, {"h": [number, type name]}.

    Raises:
        BadValue: the value has too many parts.
    """
    return _Encoder(tree_of_object).tree(value)


def decode(tree: Any, object_of: Callable[..., Any]) -> Any:
    """Return the value of a JSON tree written by `encode`.

    Args:
        tree: parsed JSON from the other side, which may be hostile.
        object_of: called with the number and type name of each handle, and the lineage of an exception class.

    Raises:
        BadValue: `encode` does not write such a tree, or keys were chosen to collide in a hash table.
    """
    try:
        _check_numbers(tree)
        return _value(tree, object_of)
    except BadValue:
        raise
    except _NOT_A_VALUE as error:
        raise BadValue(f"not a value: {type(error).__name__}") from None


def _value(tree: Any, object_of: Callable[..., Any]) -> Any:
    if type(tree) is list:
        return [_value(item, object_of) for item in tree]
    if type(tree) is not dict:
        return tree
    ((tag, content),) = tree.items()
    if tag == "t":
        return tuple(_value(item, object_of) for item in content)
    if tag in ("s", "z"):
        return (set if tag == "s" else frozenset)(_hashable([_value(item, object_of) for item in content]))
    if tag == "d":
        keys = _hashable([_value(key, object_of) for key, _ in content])
        return dict(zip(keys, (_value(item, object_of) for _, item in content), strict=True))
    if tag == "h":
        number, name, *lineage = content
        return object_of(int(number), str(name)[:100], *lineage)
    if tag == "v":
        kind, packed = content
        return rich.unpack(kind, _value(packed, object_of))
    return _tagged_scalar(tag, content)


def _tagged_scalar(tag: str, content: Any) -> Any:
    if tag == "i":
        return int(content, 16)
    if tag == "f":
        return {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}[content]
    if tag == "c":
        real, imaginary = (item if type(item) is float else _tagged_scalar("f", item["f"]) for item in content)
        return complex(real, imaginary)
    if tag == "b":
        return bytes.fromhex(content)
    if tag == "y":
        return _TYPES[content]
    raise BadValue(f"unknown tag {tag!r}")


MAX_EQUAL_HASHES = 64
"""Values with one hash that a message may hold: a table of n of them takes n squared steps."""
_MODULUS = sys.hash_info.modulus


def _hashable(keys: list[Any]) -> list[Any]:
    """Refuse keys that share a hash."""
    if len(keys) > MAX_EQUAL_HASHES and max(Counter(map(hash, keys)).values()) > MAX_EQUAL_HASHES:
        raise BadValue("keys chosen to collide")
    return keys


def _check_numbers(tree: Any) -> None:
    """Refuse numbers that share a hash, which a test may put into a set. Smaller ones than the modulus cannot.

    Texts are hashed with a secret of this process, and tuples of numbers collide where the numbers do.
    """
    large: list[int] = []
    waiting = [tree]
    while waiting:
        part = waiting.pop()
        if type(part) is list:
            waiting += part
        elif type(part) is dict:
            for tag, content in part.items():
                waiting.append(int(content, 16) if tag == "i" and type(content) is str else content)
        elif type(part) is int and not -_MODULUS < part < _MODULUS:
            large.append(part)
    if len(large) > MAX_EQUAL_HASHES:
        large.sort()
        distinct = [number for k, number in enumerate(large) if k == 0 or number != large[k - 1]]
        if max(Counter(map(hash, distinct)).values()) > MAX_EQUAL_HASHES:
            raise BadValue("numbers chosen to collide")


def _no_constant(name: str) -> Any:
    raise BadValue(f"bare {name}")


def dump(message: dict[str, Any]) -> bytes:
    """Return one frame: four bytes of length and ASCII JSON."""
    body = json.dumps(message, allow_nan=False, separators=(",", ":")).encode("ascii")
    return HEADER.pack(len(body)) + body


def load(body: bytes) -> dict[str, Any]:
    """Return the message in the body of one frame.

    Raises:
        BadValue: the body is not a JSON object, or has more parts than `encode` allows.
    """
    if body.count(b",") + body.count(b"[") + body.count(b"{") > 4 * MAX_NODES:
        raise BadValue("the frame has too many parts")
    try:
        message = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError, MemoryError) as error:
        raise BadValue(f"not JSON: {type(error).__name__}") from None
    if type(message) is not dict:
        raise BadValue("not a JSON object")
    return message
