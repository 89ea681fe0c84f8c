"""`--help`: by default what was chosen, one line per option of the algorithm; one section in full on request."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

from llmrl.config import hints
from llmrl.config.config import PRESETS, RunConfig
from llmrl.config.schema import OptionField, option_fields, type_text
from llmrl.errors import UserError

WIDTH = 120


def show(config_class: type, config: Any, *, section: str, prog: str | None) -> None:
    """Print the help; `config` holds what was chosen, `section` is a dotted path or "" for all."""
    print("\n".join(_section(config_class, section) if section else _overview(config_class, config, prog)))


def _overview(config_class: type, config: Any, prog: str | None) -> list[str]:
    lines = [
        f"usage: {prog or 'RECIPE.py'} [--config FILE.yaml] [--SECTION.OPTION VALUE ...]",
        "",
        *textwrap.wrap(" ".join((config_class.__doc__ or "").split()), WIDTH),
        "",
        "  --config FILE.yaml    any of the options below; several files are laid over each other",
        "  --print_config        print every option with its value, and exit",
        "  --help SECTION        explain the options of a section, such as algo, algo.loss or train",
        "",
    ]
    for name, field in option_fields(type(config)).items():
        value = getattr(config, name)
        if name == "algo":
            lines += _chosen_algorithm(value)
        elif field.members and "" in field.members:
            lines += _names(name, option_fields(field.members[""]), many=field.many)
        elif field.members:
            lines += [f"{name}.kind: {' | '.join(field.members)}"]
        else:
            lines.append(f"{name} = {value}: {_first_sentence(field.doc)}")
    return lines


def _names(section: str, fields: dict[str, OptionField], *, many: bool) -> list[str]:
    head = f"{section}: " + ("a list of " if many else "")
    return textwrap.wrap(head + ", ".join(fields), WIDTH, subsequent_indent="    ", break_on_hyphens=False)


def _chosen_algorithm(algo: Any) -> list[str]:
    lines = [f"algo, by the preset {algo.name} (--algo.name; there are {len(PRESETS)}, see --help algo):"]
    for name, field in option_fields(type(algo)).items():
        value = getattr(algo, name)
        kind = getattr(value, "kind", None)
        shown = kind if kind is not None else "off" if value is None else _short(value)
        lines.append(f"  {name} = {shown}"[:40].ljust(42) + _first_sentence(field.doc)[: WIDTH - 42])
        if dataclasses.is_dataclass(value):
            lines += [
                f"  {name}.{inner} = {_short(getattr(value, inner))}"[:40].ljust(42)
                + _first_sentence(f.doc)[: WIDTH - 42]
                for inner, f in option_fields(type(value)).items()
            ]
    return lines


def _section(config_class: type, section: str) -> list[str]:
    """One section in full: every option with its type, default and meaning; of a choice every member."""
    if section == "algo":
        lines = [*textwrap.wrap(f"algo.name: {', '.join(PRESETS)}", WIDTH, subsequent_indent="    "), ""]
        seen: set[str] = set()
        for cls in dict.fromkeys(type(options) for options in PRESETS.values()):
            names = [name for name, options in PRESETS.items() if type(options) is cls]
            lines += _class(cls, "algo", f"by algo.name {', '.join(names)}", seen)
        return lines
    outer, _, kind = section.rpartition(".")
    field, members = _find(config_class, section, kind if outer else "")
    if field.tagged and kind in members:
        return _class(members[kind], outer, f"kind {kind}")
    if not members:
        return _option(section, field)
    seen: set[str] = set()
    return [
        line for kind, cls in members.items() for line in _class(cls, section, f"kind {kind}" if kind else "", seen)
    ]


def _find(config_class: type, path: str, kind: str) -> tuple[OptionField, dict[str, type]]:
    """The option at `path` and the classes it can hold, of all algorithms; where the last part of `path` is a `kind`,
    the choice that has it.
    """
    classes, section = [config_class], path
    if issubclass(config_class, RunConfig) and section.startswith("algo."):
        classes, section = list(dict.fromkeys(type(options) for options in PRESETS.values())), section[5:]
    found, members = None, {}
    for part in section.split("."):
        matches = [option_fields(cls)[part] for cls in classes if part in option_fields(cls)]
        if not matches and part == kind and found is not None and part in members:
            return found, members
        if not matches:
            names = [name for cls in classes for name in option_fields(cls)]
            raise UserError(f"--help {path}: there is no option {part}{hints.near(part, names)}")
        found = matches[0]
        members = {name: cls for match in reversed(matches) for name, cls in match.members.items()}
        members = {name: members[name] for match in matches for name in match.members}
        classes = list(members.values())
    assert found is not None
    return found, members


def _class(cls: type, path: str, title: str, seen: set[str] | None = None) -> list[str]:
    """A class in full; options that stand in `seen` word for word, of a class before, are only named."""
    head = f"{path} {title}".strip()
    doc = (cls.__doc__ or "").strip().splitlines()
    lines = textwrap.wrap(f"{head}: {doc[0] if doc else ''}", WIDTH, subsequent_indent="    ")
    again = []
    for name, field in option_fields(cls).items():
        text = _option(f"{path}.{name}", field, indent="  ")
        if seen is not None and "".join(text) in seen:
            again.append(name)
            continue
        lines += text
        if seen is not None:
            seen.add("".join(text))
    if again:
        lines += textwrap.wrap(f"  and as above: {', '.join(again)}", WIDTH, subsequent_indent="      ")
    return [*lines, ""]


def _option(path: str, field: OptionField, indent: str = "") -> list[str]:
    kinds = f"kind {' | '.join(field.members)}" if field.tagged and field.members else type_text(field.hint)
    default = getattr(field.default, "kind", None) or _short(field.default)
    head = f"{indent}--{path}  ({kinds}; default {default})"
    text = f"{head}  {field.doc}" if field.doc else head
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent + "      ", break_on_hyphens=False)


def _short(value: Any) -> str:
    if value is dataclasses.MISSING:
        return "none: it has to be given"
    if dataclasses.is_dataclass(value):
        return "its own"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _first_sentence(text: str) -> str:
    head, stop, _ = text.partition(". ")
    return head + stop.strip()
