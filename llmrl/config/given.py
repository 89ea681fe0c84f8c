"""Given values: trees of names whose leaves know where they were written, so that messages can name the place."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

TYPED = 1_000_000
"""The source of values from the command line or from Python: after all files."""
Tree = dict[str, Any]
"""Names -> trees or `Given`."""


@dataclass(frozen=True)
class Given:
    """A value that somebody wrote."""

    value: Any
    where: str = ""
    """File and line; empty for what is typed."""
    source: int = TYPED
    """Sources are numbered in the order in which they are read; a later one wins."""
    text: str | None = None
    """The characters that were typed, where they were parsed as a list."""
    problem: str = ""
    """Why a typed text in brackets could not be parsed."""

    @property
    def typed(self) -> bool:
        """Whether it was meant for this run alone. What a file holds may serve several kinds of run."""
        return self.source == TYPED


class TypedTree(dict[str, Any]):
    """A mapping typed as a whole. `text` is what was typed, for options that turn out to be text."""

    def __init__(self, values: Tree, text: str) -> None:
        super().__init__(values)
        self.text = text


def given_tree(value: Any, where: str = "", source: int = TYPED) -> Any:
    """Turn mappings into trees and everything else into `Given`."""
    if isinstance(value, Given):
        return value
    if isinstance(value, dict):
        return {str(name): given_tree(inner, where, source) for name, inner in value.items()}
    return Given(os.fspath(value) if isinstance(value, os.PathLike) else value, where, source)


def from_dotted_names(values: dict[str, Any]) -> Tree:
    """Make a tree of dotted names with Python values."""
    tree: Tree = {}
    for name, value in values.items():
        merge(tree, nested(str(name), given_tree(value)))
    return tree


def nested(path: str, inner: Any) -> Tree:
    """Turn `a.b` and a value into {"a": {"b": value}}."""
    for part in reversed(path.split(".")):
        inner = {part: inner}
    return inner


def merge(tree: Tree, over: Tree) -> None:
    """Put `over` on top: mappings are merged, other values replaced.

    A text beside a mapping is its `kind`; an instance of an option class is the mapping of its fields.
    """
    for name, value in over.items():
        before = tree.get(name)
        if isinstance(value, dict) and isinstance(before, Given):
            before = _as_mapping(before)
        elif isinstance(before, dict) and isinstance(value, Given) and isinstance(value.value, str):
            value = {"kind": value}
        if isinstance(value, dict) and isinstance(before, dict):
            merge(before, value)
            value = TypedTree(before, value.text) if isinstance(value, TypedTree) else before
        tree[name] = value


def _as_mapping(given: Given) -> Tree | Given:
    value = given.value
    if isinstance(value, str):
        return {"kind": given}
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return given
    return {f.name: dataclasses.replace(given, value=getattr(value, f.name)) for f in dataclasses.fields(value)}


def without_places(value: Any) -> Any:
    """Return a tree, or a value that holds trees, as plain values."""
    if isinstance(value, Given):
        return without_places(value.value)
    if isinstance(value, dict):
        return {name: without_places(inner) for name, inner in value.items()}
    return [without_places(item) for item in value] if isinstance(value, list) else value


def leaves(value: Any, path: str = "") -> list[tuple[str, Given]]:
    """Return (dotted path, value) of everything given in a tree."""
    if isinstance(value, Given):
        return [(path, value)]
    if not isinstance(value, dict):
        return []
    return [leaf for name, inner in value.items() for leaf in leaves(inner, f"{path}.{name}" if path else name)]


def first_leaf(value: Any) -> Given | None:
    """Return one given value of a tree, for its place."""
    return next((leaf for _, leaf in leaves(value)), None)


def single(value: Any) -> Given:
    """Return what should be a single value; where it is a mapping, that mapping is the value."""
    if isinstance(value, Given):
        return value
    return dataclasses.replace(first_leaf(value) or Given(None, source=-1), value=without_places(value))


def look_up(tree: Tree, path: str) -> Given | None:
    """Return the value given at a path such as `rewards[0].fn`, or the one that it is part of."""
    value: Any = tree
    place: Given | None = None
    for part in path.replace("[", ".").replace("]", "").split("."):
        if isinstance(value, Given):
            value, place = value.value, value
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            break
    return place if value is tree else first_leaf(value) or place
