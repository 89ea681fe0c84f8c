"""Print `--help`: what was chosen, with one line per option of the algorithm, or one section in full."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

from llmrl.config import hints
from llmrl.config.config import PRESETS, RunConfig
from llmrl.config.schema import OptionField, option_fields, type_text
from llmrl.errors import UserError

WIDTH = 120


def show(config_class: type, config: object, *, section: str, prog: str | None) -> None:
    """Print the help; `config` holds what was chosen, `section` is a dotted path or "" for all."""
    print("\n".join(_section(config_class, section) if section else _overview(config_class, config, prog)))


def _overview(config_class: type, config: object, prog: str | None) -> list[str]:
    lines = [
        f"usage: {prog or 'RECIPE.py'} [--config FILE.yaml] [--SECTION.OPTION VALUE ...]",
        "",
        *_wrap(" ".join((config_class.__doc__ or "").split())),
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
        elif "" in field.members:
            head = f"{name}: " + ("a list of " if field.many else "")
            lines += _wrap(head + ", ".join(option_fields(field.members[""])), "    ")
        elif field.members:
            lines.append(f"{name}.kind: {' | '.join(field.members)}")
        else:
            lines.append(f"{name} = {value}: {_first_sentence(field.doc)}")
    return lines


def _chosen_algorithm(algo: Any) -> list[str]:
    lines = [f"algo, by the preset {algo.name} (--algo.name; there are {len(PRESETS)}, see --help algo):"]

    def add(name: str, value: str, doc: str) -> None:
        lines.append(f"  {name} = {value}"[:40].ljust(42) + _first_sentence(doc)[: WIDTH - 42])

    for name, field in option_fields(type(algo)).items():
        value = getattr(algo, name)
        add(name, "off" if value is None else _short(value), field.doc)
        if dataclasses.is_dataclass(value):
            for inner, f in option_fields(type(value)).items():
                add(f"{name}.{inner}", _short(getattr(value, inner)), f.doc)
    return lines


def _section(config_class: type, section: str) -> list[str]:
    """Explain one section: every option with its type, default and meaning; of a choice every member."""
    seen: set[str] = set()
    if section == "algo":
        lines = [*_wrap(f"algo.name: {', '.join(PRESETS)}", "    "), ""]
        for cls in _algorithms():
            names = [name for name, options in PRESETS.items() if type(options) is cls]
            lines += _class(cls, "algo", f"by algo.name {', '.join(names)}", seen)
        return lines
    outer, _, kind = section.rpartition(".")
    field, members = _find(config_class, section, kind if outer else "")
    if field.tagged and kind in members:
        return _class(members[kind], outer, f"kind {kind}", seen)
    if not members:
        return _option(section, field)
    return [line for k, cls in members.items() for line in _class(cls, section, f"kind {k}" if k else "", seen)]


def _find(config_class: type, path: str, kind: str) -> tuple[OptionField, dict[str, type]]:
    """Return the option at `path` and the classes it can hold, of all algorithms.

    Where the last part of `path` is the `kind` of a choice, that choice is meant.
    """
    classes, names = [config_class], path.split(".")
    if issubclass(config_class, RunConfig) and names[0] == "algo":
        classes, names = _algorithms(), names[1:]
    found: OptionField | None = None
    members: dict[str, type] = {}
    for part in names:
        matches = [option_fields(cls)[part] for cls in classes if part in option_fields(cls)]
        if not matches and found is not None and part == kind and part in members:
            break
        if not matches:
            known = [name for cls in classes for name in option_fields(cls)]
            raise UserError(f"--help {path}: there is no option {part}{hints.near(part, known)}")
        found, members = matches[0], {}
        for match in matches:
            members |= {name: cls for name, cls in match.members.items() if name not in members}
        classes = list(members.values())
    assert found is not None
    return found, members


def _algorithms() -> list[type]:
    return list(dict.fromkeys(map(type, PRESETS.values())))


def _class(cls: type, path: str, title: str, seen: set[str]) -> list[str]:
    """Explain a class; options already in `seen` word for word, from the class before, are only named."""
    summary = (cls.__doc__ or "").strip().split("\n")[0]
    lines = _wrap(f"{f'{path} {title}'.strip()}: {summary}", "    ")
    again: list[str] = []
    for name, field in option_fields(cls).items():
        option = _option(f"{path}.{name}", field, indent="  ")
        if (text := "".join(option)) in seen:
            again.append(name)
        else:
            lines += option
            seen.add(text)
    return [*lines, *(_wrap(f"  and as above: {', '.join(again)}", "      ") if again else []), ""]


def _option(path: str, field: OptionField, indent: str = "") -> list[str]:
    kinds = f"kind {' | '.join(field.members)}" if field.tagged and field.members else type_text(field.hint)
    head = f"{indent}--{path}  ({kinds}; default {_short(field.default)})"
    return _wrap(f"{head}  {field.doc}" if field.doc else head, indent + "      ")


def _wrap(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def _short(value: Any) -> str:
    if value is dataclasses.MISSING:
        return "none: it has to be given"
    if dataclasses.is_dataclass(value):
        return getattr(value, "kind", "its own")
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _first_sentence(text: str) -> str:
    head, stop, _ = text.partition(". ")
    return head + stop.strip()
