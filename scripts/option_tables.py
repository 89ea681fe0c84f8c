"""Make the tables of options in the documentation from the option classes: name, type, default, meaning.

PATH in `<!-- options: PATH -->` starts with a name of `ROOTS`, followed by fields: `policy_gradient.loss` is the field
`loss` of that family's options, `model.lora` the adapters of the model.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from llmrl.option import MISSING

REPOSITORY = Path(__file__).resolve().parents[1]

ROOTS = {
    "model": "llmrl.model.options:ModelConfig",
    "critic": "llmrl.model.options:CriticConfig",
    "data": "llmrl.data.options:DataConfig",
    "rollout": "llmrl.rollout.options:RolloutConfig",
    "rewards": "llmrl.verify.options:RewardConfig",
    "verify": "llmrl.verify.options:VerifyConfig",
    "train": "llmrl.train.options:TrainConfig",
    "track": "llmrl.track.options:TrackConfig",
    "eval": "llmrl.config.config:EvalConfig",
    "policy_gradient": "llmrl.algo.policy_gradient.options:PolicyGradient",
    "ppo": "llmrl.algo.ppo.options:PPO",
    "preference": "llmrl.algo.preference.options:Preference",
    "bcoder": "llmrl.methods.bcoder.options:BCoderOptions",
}
"""The option class, or the union of option classes, that a path begins with."""

MARKED = re.compile(r"(<!-- options: ([\w.]+) -->\n).*?(<!-- /options -->)", re.DOTALL)
TAGS = {"kind": "kind", "name": "preset"}
"""The fields that tell the members of a union apart, and what a table calls them."""
AS_IN = re.compile(r"As in kind (\w+)\.")
"""A field docstring of this form stands for that of another member of the union."""


# --- what a path names ---


def find(path: str) -> list[type]:
    """Return the option classes at `path`: one, or the members of a union.

    Raises:
        ModuleNotFoundError: the module of the path's root does not exist.
        ValueError: the path names nothing, or a single value.
    """
    root, *names = path.split(".")
    if root not in ROOTS:
        raise ValueError(f"options: {path}: {root!r} is not a known root; use one of {', '.join(ROOTS)}")
    module, _, name = ROOTS[root].partition(":")
    classes = option_classes(getattr(importlib.import_module(module), name))
    for name in names:
        infos = [fields_of(cls)[name] for cls in classes if name in fields_of(cls)]
        if not infos:
            known = ", ".join(dict.fromkeys(field for cls in classes for field in fields_of(cls)))
            raise ValueError(f"options: {path}: there is no option {name!r}; use one of {known}")
        classes = list(dict.fromkeys(cls for info in infos for cls in option_classes(info.annotation)))
    if not classes:
        raise ValueError(f"options: {path} is a single value, not a set of options")
    return classes


def fields_of(cls: type) -> dict[str, FieldInfo]:
    return cls.__pydantic_fields__  # type: ignore[attr-defined]


def option_classes(annotation: Any) -> list[type]:
    """Return the option classes in an annotation, in order; for a list, those of its items."""
    if get_origin(annotation) is Annotated:
        return option_classes(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType, list):
        return [cls for part in get_args(annotation) for cls in option_classes(part)]
    return [annotation] if hasattr(annotation, "__pydantic_fields__") else []


# --- a cell ---


def type_text(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """Describe a type: `int >= 1`, `text or null`, `list of int`, the values of a Literal."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(arguments[0], arguments[1:])
    if origin in (Union, UnionType):
        optional = " or null" if NoneType in arguments else ""
        if len(option_classes(annotation)) > 1:
            return "choice" + optional
        return " or ".join(dict.fromkeys(type_text(part) for part in arguments if part is not NoneType)) + optional
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is list:
        return f"list of {type_text(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(type_text(part) for part in arguments)}]"
    if origin is Callable:
        return "function"
    if hasattr(annotation, "__pydantic_fields__"):
        return "options"
    name = {str: "text", dict: "mapping"}.get(origin or annotation, getattr(annotation, "__name__", "any"))
    return f"{name} {range_text(metadata)}".strip()


def range_text(metadata: Iterable[Any]) -> str:
    """Describe the bounds of a number: `>= 1`, `in (0, 1]`."""
    bounds = {type(bound): bound for bound in metadata}
    low = f"[{bounds[Ge].ge:g}" if Ge in bounds else f"({bounds[Gt].gt:g}" if Gt in bounds else ""
    high = f"{bounds[Le].le:g}]" if Le in bounds else f"{bounds[Lt].lt:g})" if Lt in bounds else ""
    if low and high:
        return f"in {low}, {high}"
    if low:
        return f"{'>=' if low[0] == '[' else '>'} {low[1:]}"
    return f"{'<=' if high[-1] == ']' else '<'} {high[:-1]}" if high else ""


def default_text(info: FieldInfo) -> str:
    """Describe a default: a value, the kind of a choice, `{}` for options with their own defaults, or "required"."""
    value = MISSING if info.is_required() else info.get_default(call_default_factory=True, validated_data={})
    if value == MISSING:
        return "required"
    if hasattr(value, "__pydantic_fields__"):
        return f"`{getattr(value, 'kind', '{}')}`"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value).replace('e-0', 'e-')}`"


def one_line(text: str | None) -> str:
    """Put a docstring's first paragraph on one line that a table can hold."""
    paragraph = (text or "").strip().split("\n\n")[0]
    return re.sub(r"\s+", " ", paragraph).replace("|", "\\|")


# --- a table ---


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rows])


def meaning(cls: type, name: str) -> str:
    """Return a field's docstring, which pydantic keeps with the class that declares the field only."""
    declaring = (base for base in cls.__mro__ if name in vars(base).get("__annotations__", {}))
    return one_line(next((fields_of(base)[name].description for base in declaring), None))


def option_row(cls: type, name: str) -> list[str]:
    info = fields_of(cls)[name]
    return [f"`{name}`", type_text(info.annotation, info.metadata), default_text(info), meaning(cls, name)]


def tag_of(classes: list[type]) -> str | None:
    """Return the field that tells the members of a union apart; None for a class that stands alone."""
    if all("kind" in fields_of(cls) for cls in classes):
        return "kind"
    return "name" if len(classes) > 1 else None


def table(path: str) -> str:
    """Return the table of the options at `path`. A union has two: its members, and the options with their members."""
    classes = find(path)
    tag = tag_of(classes)
    if tag is None:
        rows = (option_row(classes[0], name) for name in fields_of(classes[0]))
        return markdown(["option", "type", "default", "meaning"], rows)
    by_tag = {fields_of(cls)[tag].default: cls for cls in classes}
    members = markdown([TAGS[tag], "meaning"], ([f"`{kind}`", one_line(cls.__doc__)] for kind, cls in by_tag.items()))
    rows = merged_rows(by_tag, tag)
    return members + ("\n" + markdown(["option", TAGS[tag], "type", "default", "meaning"], rows) if rows else "")


def merged_rows(by_tag: dict[str, type], tag: str) -> list[list[str]]:
    """Return one row for each option of a union, with all the members in which it is the same."""
    owners: dict[tuple[str, ...], list[str]] = {}
    for kind, cls in by_tag.items():
        for name in (name for name in fields_of(cls) if name != tag):
            *row, text = option_row(cls, name)
            if other := AS_IN.match(text):
                text = meaning(by_tag[other[1]], name)
            owners.setdefault((*row, text), []).append(kind)
    names = [f"`{name}`" for cls in by_tag.values() for name in fields_of(cls)]
    return [
        [row[0], owners_text(of, list(by_tag)), *row[1:]]
        for row, of in sorted(owners.items(), key=lambda item: names.index(item[0][0]))
    ]


def owners_text(of: list[str], everyone: list[str]) -> str:
    """Name the members that have an option, or the few that lack it."""
    others = [f"`{kind}`" for kind in everyone if kind not in of]
    if not others and len(everyone) > 1:
        return "all"
    return "all but " + ", ".join(others) if 0 < len(others) < len(of) / 3 else ", ".join(f"`{kind}`" for kind in of)


# --- the pages ---


def rewrite(text: str) -> str:
    """Return a page with its tables made anew."""
    return MARKED.sub(lambda found: f"{found[1]}{table(found[2])}{found[3]}", text)


def pages() -> list[Path]:
    """Return the pages that hold a table."""
    return [page for page in sorted(REPOSITORY.glob("docs/**/*.md")) if MARKED.search(page.read_text())]


def main(arguments: list[str]) -> int:
    """Rewrite the stale pages, or with --check only name them. Returns the exit status."""
    stale = {page: new for page in pages() if (new := rewrite(page.read_text())) != page.read_text()}
    for page, text in stale.items():
        print(page.relative_to(REPOSITORY))
        if "--check" not in arguments:
            page.write_text(text)
    return int("--check" in arguments and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
