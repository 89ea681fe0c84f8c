"""Read YAML files and command lines into one tree of given values."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llmrl.config.given import Given, Tree, TypedTree, given_tree, merge, nested
from llmrl.errors import UserError

MERGE_KEY = "tag:yaml.org,2002:merge"
"""YAML's tag of the key `<<`."""


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with numbers such as 1e-6, which YAML 1.1 reads as text."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


@dataclass(frozen=True)
class Arguments:
    """A command line, sorted."""

    tree: Tree
    help: str | None = None
    """The section asked for with `--help`; "" is all."""
    print_config: bool = False


def read_arguments(argv: list[str]) -> Arguments:
    """Read `--config FILE.yaml` (any number, later ones win), dotted overrides, `--help [SECTION]`, `--print_config`.

    Raises:
        UserError: a file that is missing or is not YAML, or an option without a value.
    """
    tree: Tree = {}
    section, print_config = None, False
    waiting, num_files = list(argv), 0
    while waiting:
        name, equals, value = waiting.pop(0).partition("=")
        if name in ("-h", "--help"):
            section = value or (waiting.pop(0) if waiting and not waiting[0].startswith("-") else "")
            continue
        if name == "--dry_run":
            raise UserError("--dry_run is an option of the command: llmrl train RECIPE.yaml --dry_run")
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
            merge(tree, nested(name[2:], typed_value(value)))
    return Arguments(tree, section, print_config)


def typed_value(text: str) -> Any:
    """Parse JSON or YAML in brackets; anything else stays text until the type of its option is known.

    Whether brackets mean anything depends on that type too, so the text is kept beside what was parsed.
    """
    if not text.startswith(("[", "{")):
        return Given(None if text == "null" else text)
    try:
        found = given_tree(yaml.load(text, Loader=Loader))
    except (yaml.YAMLError, RecursionError) as error:
        return Given(text, problem=f"not valid YAML or JSON: {_problem(error)}")
    return TypedTree(found, text) if isinstance(found, dict) else dataclasses.replace(found, text=text)


def read_yaml(file: str, source: int) -> Tree:
    """Read a YAML file as a tree.

    Raises:
        UserError: no such file, not YAML, not a mapping, or a key that is there twice.
    """
    if not Path(file).is_file():
        raise UserError(f"--config {file}: " + ("is a folder" if Path(file).is_dir() else "no such file"))
    loader = None
    try:
        loader = Loader(Path(file).read_text(encoding="utf-8-sig"))
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
    """Read a mapping node by node: PyYAML's own dictionaries have no line numbers, and hide keys given twice."""
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
        elif isinstance(value, yaml.SequenceNode):  # its mappings keep their places: it may be a list of options
            items = [
                _mapping(loader, item, file, source)
                if isinstance(item, yaml.MappingNode)
                else loader.construct_object(item, deep=True)
                for item in value.value
            ]
            tree[name] = Given(items, where, source)
        else:
            tree[name] = Given(loader.construct_object(value, deep=True), where, source)
    return merged | tree


def _problem(error: Any) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}: " if mark is not None else ""
    return place + str(getattr(error, "problem", None) or error).splitlines()[0]
