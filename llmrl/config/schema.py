"""What option classes look like from outside: their fields, the choices among them, types and defaults as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

WORDS = {Ge: ("at least", "ge"), Gt: ("above", "gt"), Le: ("at most", "le"), Lt: ("below", "lt")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptionField:
    """One field of an option class."""

    name: str
    hint: Any
    """Its type with the ranges."""
    members: dict[str, type]
    """The option classes it can hold, by `kind`; a single class without a kind stands under ""."""
    many: bool
    """It holds a list of them."""
    optional: bool
    """It can be null."""
    default: Any
    """`dataclasses.MISSING` where it has to be given."""
    doc: str
    """Its docstring on one line."""

    @property
    def takes_text(self) -> bool:
        """It is a text, and brackets in it have no meaning."""
        return str in _parts(self.hint) and not any(get_origin(part) in (list, dict) for part in _parts(self.hint))

    @property
    def takes_number(self) -> bool:
        """It is a number, so that true is a mistake and not 1."""
        parts = _parts(self.hint)
        return bool({int, float} & {p for p in parts if isinstance(p, type)}) and bool not in parts

    @property
    def takes_mapping(self) -> bool:
        """It is a mapping with any keys."""
        return Any in _parts(self.hint) or any(get_origin(part) is dict or part is dict for part in _parts(self.hint))

    @property
    def tagged(self) -> bool:
        """Whether a `kind` chooses among several classes."""
        return "" not in self.members


@cache
def option_fields(cls: type) -> dict[str, OptionField]:
    """The fields of an option class by name, without the `kind` that tells it apart."""
    hints = get_type_hints(cls, include_extras=True)
    ordered = sorted(dataclasses.fields(cls), key=lambda f: f.name != "name")  # the rest in their order
    return {f.name: _field(f, hints[f.name], _docstring(cls, f.name)) for f in ordered if f.name != "kind"}


def _docstring(cls: type, name: str) -> str:
    """The docstring of a field, where it is defined: pydantic drops those of inherited fields."""
    for base in cls.__mro__:
        info = getattr(base, "__pydantic_fields__", {}).get(name)
        if info is not None and info.description:
            return info.description
    return ""


def _field(f: dataclasses.Field[Any], hint: Any, doc: str) -> OptionField:
    classes, many = _option_classes(hint)
    default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
    return OptionField(
        name=f.name,
        hint=hint,
        members={kind_of(c): c for c in classes},
        many=many,
        optional=NoneType in _parts(hint),
        default=default,
        doc=" ".join(doc.split()),
    )


def _option_classes(hint: Any) -> tuple[list[type], bool]:
    parts = _parts(hint)
    lists = [part for part in parts if get_origin(part) is list]
    if lists:
        return [c for c in _parts(get_args(lists[0])[0]) if dataclasses.is_dataclass(c)], True  # pyright: ignore
    return [c for c in parts if dataclasses.is_dataclass(c)], False  # pyright: ignore


def _parts(hint: Any) -> list[Any]:
    """The members of a union, without annotations; a type that is not a union is its only member."""
    if get_origin(hint) is Annotated:
        return _parts(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return [part for member in get_args(hint) for part in _parts(member)]
    return [hint]


def kind_of(cls: type) -> str:
    """The value of the field `kind`, or ""."""
    return next((str(f.default) for f in dataclasses.fields(cls) if f.name == "kind"), "")


def type_text(hint: Any) -> str:
    """A type as people read it: `int, at least 1`, `token | sequence`, `a choice by kind`."""
    if get_origin(hint) is Annotated:
        inner, *notes = get_args(hint)
        ranges = [
            f"{words} {getattr(note, name):g}"
            for note in notes
            for c, (words, name) in WORDS.items()
            if type(note) is c
        ]
        return ", ".join([type_text(inner), *ranges])
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " | ".join(dict.fromkeys(type_text(a) for a in arguments))
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is list:
        return f"list of {type_text(arguments[0])}"
    if origin is tuple:
        return "[" + ", ".join(type_text(a) for a in arguments) + "]"
    if origin is dict:
        return "mapping"
    if origin is Callable or hint is Callable:
        return "function"
    if dataclasses.is_dataclass(hint):
        return kind_of(hint) or "options"  # pyright: ignore[reportArgumentType]
    return {NoneType: "null", str: "text", float: "number", bool: "true | false", Any: "anything"}.get(hint) or getattr(
        hint, "__name__", str(hint)
    )


def walk(cls: type, prefix: str = "") -> Iterator[tuple[str, OptionField]]:
    """(dotted path, field) of everything inside an option class, all members of its choices included."""
    for name, field in option_fields(cls).items():
        yield prefix + name, field
        if not field.many:
            for member in field.members.values():
                yield from walk(member, f"{prefix}{name}.")


def plain(value: Any, base: Any = dataclasses.MISSING) -> Any:
    """An option as plain values, ready for YAML: nulls only where `base` (default: the class) says otherwise."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return getattr(value, "__name__", str(value)) if callable(value) else value
    found: dict[str, Any] = {}
    same = type(base) is type(value)
    for f in sorted(dataclasses.fields(value), key=lambda f: f.name not in ("name", "kind")):
        inner = getattr(value, f.name)
        otherwise = getattr(base, f.name) if same else _default(f)
        if inner is not None or otherwise is not None:
            found[f.name] = plain(inner, otherwise)
    return found


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
