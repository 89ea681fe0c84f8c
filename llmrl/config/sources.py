"""YAML files and command lines -> one tree of given values, each with the place it comes from."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrl.errors import UserError

TYPED = 1_000_000
"""The source of what is typed: after all files."""
MERGE_KEY = "tag:yaml.org,2002:merge"
"""YAML's tag of the key `<<`."""
Tree = dict[str, Any]
"""Names -> trees or `Given`."""


@dataclass(frozen=True)
class Given:
    """A value that somebody gave."""

    value: Any
    where: str
    """For messages: a file and line, or the option as it was typed."""
    source: int = 0
    """Sources are numbered in the order in which they are read; a later one wins."""
    typed: bool = False
    """On the command line or in Python, so for this run alone."""
    text: str | None = None
    """The characters that were typed, where they were parsed as a list."""
    problem: str = ""
    """Why a typed text in brackets could not be parsed."""


class TypedTree(dict[str, Any]):
    """A mapping that was typed as a whole: `text` is what stood there, for options that are text themselves."""

    def __init__(self, values: Tree, text: str) -> None:
        super().__init__(values)
        self.text = text


@dataclass(frozen=True)
class Arguments:
    """A command line, sorted."""

    tree: Tree
    help: str | None = None
    """The section asked for with `--help`; "" is all."""
    print_config: bool = False


def read_arguments(argv: list[str]) -> Arguments:
    """`--config FILE.yaml` (any number, later ones win), dotted overrides, `--help [SECTION]`, `--print_config`.

    Raises:
        UserError: a file that is missing or is not YAML, or an option without a value.
    """
    tree: Tree = {}
    shown, print_config = None, False
    waiting, num_files = list(argv), 0
    while waiting:
        name, equals, value = waiting.pop(0).partition("=")
        if name in ("-h", "--help"):
            shown = value or (waiting.pop(0) if waiting and not waiting[0].startswith("-") else "")
            continue
        if name == "--print_config":
            if equals:
                raise UserError(f"--print_config={value}: --print_config takes no value")
            print_config = True
            continue
        if not name.startswith("--"):
            raise UserError(f"{name!r}: options begin with --, such as --train.max_steps 100")
        if "" in name[2:].split("."):
            raise UserError(f"{name}: not the name of an option, such as --train.max_steps")
        if not equals:
            if not waiting or waiting[0].startswith("--"):
                raise UserError(f"{name} needs a value, such as {name} VALUE")
            value = waiting.pop(0)
        if name == "--config":
            if not value:
                raise UserError("--config needs a value, such as --config FILE.yaml")
            num_files += 1
            merge(tree, read_yaml(value, num_files))
        else:
            merge(tree, nested(name[2:], typed_value(value, name, TYPED)))
    return Arguments(tree, shown, print_config)


def from_python(values: dict[str, Any]) -> Tree:
    """Dotted names with Python values."""
    tree: Tree = {}
    for name, value in values.items():
        merge(tree, nested(str(name), given_tree(value, str(name), TYPED, typed=True)))
    return tree


def nested(path: str, inner: Any) -> Tree:
    """`a.b` and a value -> {"a": {"b": value}}."""
    for part in reversed(path.split(".")):
        inner = {part: inner}
    return inner


def typed_value(text: str, where: str, source: int) -> Any:
    """A value from the command line: JSON or YAML in brackets is parsed, anything else stays text until its type is
    known. Options that are text themselves get what was typed, brackets and all.
    """
    if text[:1] in "[{" and text:
        import yaml

        try:
            found = given_tree(yaml.load(text, Loader=_loader()), where, source, typed=True)
        except (yaml.YAMLError, RecursionError) as error:
            problem = f"not valid YAML or JSON: {_problem(error)}"
            return Given(text, where, source, typed=True, problem=problem)
        return TypedTree(found, text) if isinstance(found, dict) else dataclasses.replace(found, text=text)
    return Given(None if text == "null" else text, where, source, typed=True)


def given_tree(value: Any, where: str, source: int, *, typed: bool) -> Any:
    """Mappings as trees, anything else as `Given`."""
    if isinstance(value, Given):
        return value
    if isinstance(value, dict):
        return {str(k): given_tree(v, where, source, typed=typed) for k, v in value.items()}
    return Given(os.fspath(value) if isinstance(value, os.PathLike) else value, where, source, typed)


def merge(tree: Tree, over: Tree) -> None:
    """Put `over` on top; mappings are merged, other values replaced. A text beside a mapping is its `kind`, and an
    instance of an option class is the mapping of its fields.
    """
    for name, value in over.items():
        before = tree.get(name)
        if isinstance(value, dict) and _is_text(before):
            before = tree[name] = _like(value, {"kind": before})
        elif isinstance(value, dict) and isinstance(before, Given) and _is_option(before.value):
            before = tree[name] = {
                f.name: dataclasses.replace(before, value=getattr(before.value, f.name))
                for f in dataclasses.fields(before.value)
            }
        elif isinstance(before, dict) and _is_text(value):
            value = {"kind": value}
        if isinstance(value, dict) and isinstance(before, dict):
            merge(before, value)
        else:
            tree[name] = value


def _is_option(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _like(value: Tree, values: Tree) -> Tree:
    """`values` with the text that `value` was typed as, if it was."""
    return TypedTree(values, value.text) if isinstance(value, TypedTree) else values


def _is_text(value: Any) -> bool:
    return isinstance(value, Given) and isinstance(value.value, str)


def read_yaml(file: str, source: int) -> Tree:
    """A YAML file as a tree.

    Raises:
        UserError: no such file, not YAML, not a mapping, or a key that is there twice.
    """
    import yaml

    if not Path(file).is_file():
        raise UserError(f"--config {file}: " + ("is a folder" if Path(file).is_dir() else "no such file"))
    loader = None
    try:
        loader = _loader()(Path(file).read_text(encoding="utf-8-sig"))
        root = loader.get_single_node()
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"--config {file}: must be a mapping of sections (model, data, train ...)")
        return _mapping(loader, root, file, source)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"--config {file}: not valid YAML ({_problem(error)})") from None
    finally:
        if loader is not None:
            loader.dispose()


def _mapping(loader: Any, node: Any, file: str, source: int) -> Tree:
    import yaml

    tree: Tree = {}
    merged: Tree = {}
    for key, value in node.value:
        name, where = str(key.value), f"{file}, line {key.start_mark.line + 1}"
        if key.tag == MERGE_KEY:  # `<<: *anchor`: the values of other mappings, for the keys that are not given here
            for other in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                merged = _mapping(loader, other, file, source) | merged  # the first of several wins
            continue
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{where}: a name has to be text, not a list or a mapping")
        if name in tree:
            raise UserError(f"{where}: {name} is there twice; remove one")
        if isinstance(value, yaml.MappingNode):
            tree[name] = _mapping(loader, value, file, source)
        elif isinstance(value, yaml.SequenceNode):
            tree[name] = Given([_item(loader, item, file, source) for item in value.value], where, source)
        else:
            tree[name] = Given(loader.construct_object(value, deep=True), where, source)
    return merged | tree


def _item(loader: Any, node: Any, file: str, source: int) -> Any:
    """An entry of a list: a mapping keeps the places of its values, since it may be a list of options."""
    import yaml

    is_mapping = isinstance(node, yaml.MappingNode)
    return _mapping(loader, node, file, source) if is_mapping else loader.construct_object(node, deep=True)


def without_places(value: Any) -> Any:
    """A tree, or a value that holds trees, as plain values."""
    if isinstance(value, Given):
        return without_places(value.value)
    if isinstance(value, dict):
        return {name: without_places(inner) for name, inner in value.items()}
    return [without_places(item) for item in value] if isinstance(value, list) else value


def _problem(error: Any) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}: " if mark is not None else ""
    return place + str(getattr(error, "problem", None) or error).splitlines()[0]


def _loader() -> Any:
    """PyYAML's safe loader with numbers such as 1e-6, which YAML 1.1 reads as text."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789."))
    return Loader
