"""Values beyond plain ones that may pass between the verifier and the box: dates, decimals, fractions, arrays ...

Each becomes a kind and plain content, and is built again on the other side from checked content, so it is a genuine
value there. Standard library only, because this module runs on both sides; numpy is used where a value needs it.
"""

from __future__ import annotations

import re
from collections import Counter, OrderedDict, deque, namedtuple
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

MAX_DIGITS = 10_000
MAX_ITEMS = 200_000
MAX_LETTERS = 10_000_000
_DTYPE = re.compile(r"[<>|=]?[biufc](?:1|2|4|8|16)|[<>|=]U\d{1,4}")
_IDENTIFIER = re.compile(r"[A-Za-z]\w{0,60}")


def pack(value: Any) -> tuple[str, Any] | None:
    """Return the kind and the content of a value, or None if it is of no known kind."""
    kind = type(value)
    if kind in _PACK:
        content = _PACK[kind](value)
        return None if content is None else (kind.__name__, content)
    if kind.__module__ == "numpy" and kind.__name__ == "ndarray":
        return ("ndarray", [value.dtype.str, list(value.shape), value.ravel().tolist()]) if value.ndim else None
    fields = kind.__dict__.get("_fields")
    if isinstance(value, tuple) and type(fields) is tuple and len(fields) == tuple.__len__(value):
        return "namedtuple", [kind.__name__, list(fields), list(tuple.__iter__(value))]
    return None


def unpack(kind: str, content: Any) -> Any:
    """Return the value of a kind and its content.

    Raises:
        ValueError, TypeError, KeyError, OverflowError: there is no such value.
    """
    return _UNPACK[kind](content)


def _offset(value: datetime | time) -> float | None:
    zone = value.tzinfo
    return zone.utcoffset(None).total_seconds() if type(zone) is timezone else None


def _clock(value: datetime | time) -> list[Any] | None:
    if value.tzinfo is not None and type(value.tzinfo) is not timezone:
        return None
    return [value.hour, value.minute, value.second, value.microsecond, _offset(value), value.fold]


def _time(content: Any) -> time:
    *numbers, offset, fold = content
    return time(*numbers, tzinfo=None if offset is None else timezone(timedelta(seconds=offset)), fold=fold)


def _pack_datetime(value: datetime) -> list[Any] | None:
    clock = _clock(value)
    return None if clock is None else [value.year, value.month, value.day, clock]


def _decimal(text: str) -> Decimal:
    if len(text) > MAX_DIGITS:
        raise ValueError("a long decimal")
    value = Decimal(text)
    # Otherwise the conversion of 1e999999999 to an integer would never end.
    if value.is_finite() and abs(value.adjusted()) > MAX_DIGITS:
        raise ValueError("a large exponent")
    return value


def _fraction(content: Any) -> Fraction:
    top, bottom = content
    if max(top.bit_length(), bottom.bit_length()) > 10 * MAX_DIGITS or bottom == 0:
        raise ValueError("not a fraction")
    return Fraction(top, bottom)


def _array(content: Any) -> Any:
    import numpy

    dtype, shape, items = content
    letters = int(dtype[2:]) if dtype[1:2] == "U" else 1
    if not _DTYPE.fullmatch(dtype) or len(shape) > 16 or letters * len(items) > MAX_LETTERS:
        raise ValueError(f"an array of {dtype}")
    return numpy.array(items, dtype=dtype).reshape([int(size) for size in shape])


@lru_cache(maxsize=256)
def _tuple_type(name: str, fields: tuple[str, ...]) -> Any:
    if not all(_IDENTIFIER.fullmatch(word) for word in (name, *fields)):
        raise ValueError("not a named tuple")
    return namedtuple(name, fields)


def _range(content: Any) -> range:
    value = range(*content)
    if len(value) > MAX_ITEMS:
        raise ValueError("a long range")
    return value


_PACK: dict[type, Callable[[Any], Any]] = {
    date: lambda value: [value.year, value.month, value.day],
    datetime: _pack_datetime,
    time: _clock,
    timedelta: lambda value: [value.days, value.seconds, value.microseconds],
    Decimal: str,
    Fraction: lambda value: [value.numerator, value.denominator],
    range: lambda value: [value.start, value.stop, value.step] if len(value) <= MAX_ITEMS else None,
    deque: lambda value: [list(value), value.maxlen],
    Counter: lambda value: dict(value),
    OrderedDict: lambda value: dict(value),
}
_UNPACK: dict[str, Callable[[Any], Any]] = {
    "date": lambda content: date(*content),
    "datetime": lambda content: datetime.combine(date(*content[:3]), _time(content[3])),
    "time": _time,
    "timedelta": lambda content: timedelta(*content),
    "Decimal": _decimal,
    "Fraction": _fraction,
    "range": _range,
    "deque": lambda content: deque(content[0], content[1]),
    "Counter": lambda content: Counter(dict(content)),
    "OrderedDict": lambda content: OrderedDict(dict(content)),
    "ndarray": _array,
    "namedtuple": lambda content: _tuple_type(content[0], tuple(content[1]))(*content[2]),
    "iterator": iter,
}
