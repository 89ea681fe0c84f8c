"""Read option classes: their fields, the choices among them, their types as text, their values for YAML."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

WORDS = {Ge: ("at least", "ge"), Gt: ("above", "gt"), Le: ("at most", "le"), Lt: ("below", "lt")}
NAMES = {
    NoneType: "null",
    str: "text",
    float: "number",
    bool: "true | false",
    dict: "mapping",
    Callable: "function",
    Any: "anything",
}

GIVEN = "(given in Python)"
"""Stands in a written configuration for an object that has no name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptionField:
    """One field of an option class."""

    owner: type
    name: str
    hint: Any
    """Type, with its ranges."""
    members: dict[str, type]
    """The option classes it can hold, by `kind`; the key of a class without a kind is ""."""
    many: bool
    """Whether it holds a list of them."""
    optional: bool
    """Whether it can be null."""
    default: Any
    """`dataclasses.MISSING` where it has to be given."""

    @property
    def doc(self) -> str:
        """Its docstring on one line, from the class that defines it."""
        classes = [cls for cls in self.owner.__mro__ if dataclasses.is_dataclass(cls)]
        texts = (_docstrings(cls.__module__).get((cls.__name__, self.name)) for cls in classes)
        return next(filter(None, texts), "")

    @property
    def takes_text(self) -> bool:
        """Whether it is text, in which brackets are only characters."""
        return str in _parts(self.hint) and not any(get_origin(part) in (list, dict) for part in _parts(self.hint))

    @property
    def takes_number(self) -> bool:
        """Whether it is a number, so that true is a mistake and not 1."""
        parts = _parts(self.hint)
        return bool({int, float} & {p for p in parts if isinstance(p, type)}) and bool not in parts

    @property
    def takes_mapping(self) -> bool:
        """Whether it is a mapping with any keys."""
        return Any in _parts(self.hint) or any(get_origin(part) is dict or part is dict for part in _parts(self.hint))

    @property
    def tagged(self) -> bool:
        """Whether a `kind` chooses among several classes."""
        return "" not in self.members


@cache
def option_fields(cls: type) -> dict[str, OptionField]:
    """Return the fields of an option class by name, `name` first, without the `kind` that tells it apart."""
    hints = get_type_hints(cls, include_extras=True)
    ordered = sorted(dataclasses.fields(cls), key=lambda f: f.name != "name")
    return {f.name: _field(cls, f, hints[f.name]) for f in ordered if f.name != "kind"}


def _field(owner: type, f: dataclasses.Field[Any], hint: Any) -> OptionField:
    parts = _parts(hint)
    lists = [part for part in parts if get_origin(part) is list]
    classes = [c for c in (_parts(get_args(lists[0])[0]) if lists else parts) if dataclasses.is_dataclass(c)]
    return OptionField(
        owner=owner,
        name=f.name,
        hint=hint,
        members={kind_of(c): c for c in classes},  # pyright: ignore[reportArgumentType]
        many=bool(lists),
        optional=NoneType in parts,
        default=_default(f),
    )


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


@cache
def _docstrings(module: str) -> dict[tuple[str, str], str]:
    """Return (class, field) -> docstring of a module. Only `--help` needs them; pydantic would read them at import."""
    found: dict[tuple[str, str], str] = {}
    try:
        source = inspect.getsource(sys.modules[module])
    except (OSError, KeyError):  # no source, such as `python -c`
        return found
    for cls in [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]:
        for pair in pairwise(cls.body):
            match pair:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[cls.name, name] = " ".join(text.split())
    return found


def _parts(hint: Any) -> list[Any]:
    """Return the members of a union, without annotations; for any other type, that type alone."""
    if get_origin(hint) is Annotated:
        return _parts(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return [part for member in get_args(hint) for part in _parts(member)]
    return [hint]


def kind_of(cls: type) -> str:
    """Return the value of the field `kind`, or ""."""
    return next((str(f.default) for f in dataclasses.fields(cls) if f.name == "kind"), "")


def type_text(hint: Any) -> str:
    """Return a type as people read it: `int, at least 1`, `token | sequence`."""
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if origin is Annotated:
        notes = [(note, *WORDS[type(note)]) for note in arguments[1:] if type(note) in WORDS]
        return ", ".join([type_text(arguments[0]), *(f"{words} {getattr(note, key):g}" for note, words, key in notes)])
    if origin in (Union, UnionType):
        return " | ".join(dict.fromkeys(map(type_text, arguments)))
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is list and arguments:
        return f"list of {type_text(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(map(type_text, arguments))}]"
    if dataclasses.is_dataclass(hint):
        return kind_of(hint) or "options"  # pyright: ignore[reportArgumentType]
    return NAMES.get(origin) or getattr(hint, "__name__", str(hint))


def walk(cls: type, prefix: str = "") -> Iterator[tuple[str, OptionField]]:
    """Yield (dotted path, field) for everything inside an option class, all members of its choices included."""
    for name, field in option_fields(cls).items():
        yield prefix + name, field
        if not field.many:
            for member in field.members.values():
                yield from walk(member, f"{prefix}{name}.")


def plain(value: Any, base: Any = dataclasses.MISSING) -> Any:
    """Return an option as plain values, ready for YAML: nulls only where `base` (default: the class) says otherwise."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return _scalar(value)
    found: dict[str, Any] = {}
    same = type(base) is type(value)
    for f in sorted(dataclasses.fields(value), key=lambda f: f.name not in ("name", "kind")):
        inner = getattr(value, f.name)
        otherwise = getattr(base, f.name) if same else _default(f)
        if inner is not None or otherwise is not None:
            found[f.name] = plain(inner, otherwise)
    return found


def _scalar(value: Any) -> Any:
    """Return a value as plain text, number or null; in place of another object, its name or GIVEN."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # of an enumeration too
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    while isinstance(value, functools.partial):
        value = value.func
    return str(getattr(value, "__name__", GIVEN))
