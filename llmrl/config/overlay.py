"""Lay given values over presets and defaults, and collect what is wrong with them.

Values stay plain here (dictionaries, text as typed): pydantic converts and checks them at the end, in `validate`. What
it cannot know is decided before: which class a `kind` chooses, what a new choice leaves out, and which name was meant.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from llmrl.config import hints
from llmrl.config.config import PRESETS, AlgorithmOptions, Config, unread_sections
from llmrl.config.given import Given, Tree, first_leaf, given_tree, leaves, look_up, single, without_places
from llmrl.config.messages import explain, shown
from llmrl.config.schema import OptionField, kind_of, option_fields, plain, type_text

T = TypeVar("T")


class Overlay:
    """The values of one configuration while they are put together.

    Two things are not errors and end up in `left_out`: options of a file that this kind of run does not read, and
    options that belonged to a choice which a later source replaced (a file says `loss: {epsilon: 0.3}`, the command
    line `--algo.loss cispo`). Both are errors when they are typed: what is typed is meant for this run.
    """

    def __init__(self, root: type = Config) -> None:
        self.root = root
        """The class of the whole configuration, where hints are looked for."""
        self.found: list[str] = []
        self.left_out: list[str] = []
        self.reported: set[str] = set()
        """Paths with a finding. Their types are not reported on top of it."""

    def report(self, path: str, text: str, given: Given | None = None, *, label: str = "") -> None:
        """Add a finding about the option at `path`, once; `label` is what the message calls it."""
        if path not in self.reported:
            self.reported.add(path)
            problem = f" ({given.problem})" if given is not None and given.problem else ""
            self.found.append(f"{label or path}{_at(given)}{text}{problem}")

    def algo(self, given: Any) -> AlgorithmOptions | None:
        """Lay `given` over the preset that it names; None where that is wrong."""
        if isinstance(given, Given):
            if type(given.value) in set(map(type, PRESETS.values())):
                return given.value
            given = {} if given.value is None and not given.typed else {"name": given}
        name = single(given.get("name", Given("grpo", source=-1)))
        if not isinstance(name.value, str) or name.value not in PRESETS:
            close = hints.near(str(name.value), PRESETS)
            text = f": there is no such preset{close}; there are {', '.join(PRESETS)}"
            self.found.append(f"algo.name {shown(name.value)}{_at(name)}{text}")
            return None
        base = PRESETS[name.value]
        values = self.lay(type(base), plain(base), given, "algo.", choice=name)
        return self.validate(type(base), values, {"algo": given}, prefix="algo.")

    def leave_out(self, given: Tree, cls: type, algo: AlgorithmOptions, full: type = Config, path: str = "") -> None:
        """Remove what this kind of run does not read, so that one file serves several kinds.

        Args:
            given: the values of a section; changed in place.
            cls: the class of the section in this kind of run.
            algo: the algorithm that was chosen.
            full: the class of the section in another kind of run.
            path: dotted name of the section, with a dot at its end.
        """
        mine, known = option_fields(cls), option_fields(full)
        unread = () if path else unread_sections(algo)
        for name in list(given):
            if name in unread or (name in known and name not in mine):
                for inner, value in leaves(given.pop(name), path + name):
                    if value.typed:
                        self.found.append(f"{inner}: algo.name {algo.name} does not read it; leave it out")
                    else:
                        self.left_out.append(inner)
            elif name in mine and name in known and isinstance(given[name], dict):
                inner_cls, inner_full = mine[name].members.get(""), known[name].members.get("")
                if inner_cls is not None and inner_full is not None:
                    self.leave_out(given[name], inner_cls, algo, inner_full, f"{path}{name}.")

    def lay(
        self, cls: type, base: dict[str, Any], given: Tree, path: str, choice: Given | None = None
    ) -> dict[str, Any]:
        """Return `base` with `given` on top.

        Args:
            cls: the option class.
            base: plain values of an instance of `cls`, possibly with gaps.
            given: what is laid over them.
            path: dotted name of this place, with a dot at its end.
            choice: the value that decided for this class. What older sources gave for another class is left out.
        """
        fields, values = option_fields(cls), dict(base)
        for name, value in given.items():
            field, here = fields.get(name), path + name
            if name == "kind" and kind_of(cls):
                continue
            if field is None:
                self._unknown(cls, name, value, path, choice)
            elif field.members and not field.many:
                values[name] = self._section(field, values.get(name), value, here, choice)
            elif field.members and isinstance(value, Given) and isinstance(value.value, list):
                values[name] = [self._entry(field, e, value, f"{here}[{i}]") for i, e in enumerate(value.value)]
            elif field.takes_text and getattr(value, "text", None) is not None:
                values[name] = value.text  # such as a prompt template, in which brackets are only characters
            elif isinstance(value, dict) and not field.takes_mapping:
                self._too_deep(field, value, here)
            elif isinstance(value, Given) and isinstance(value.value, bool) and field.takes_number:
                self.report(here, f" is {shown(value.value)}: must be a number", value)  # pydantic takes true for 1
            else:
                values[name] = _free(value)
        return values

    def _section(self, field: OptionField, base: Any, value: Any, path: str, choice: Given | None) -> Any:
        """Return the values of a section, or of a choice among option classes."""
        if isinstance(value, Given):
            word = str(value.value).lower()
            if field.optional and word in ("true", "false"):  # `model.lora true` is its defaults, false is off
                value = {} if word == "true" else dataclasses.replace(value, value=None)
            elif value.value is None and not field.optional and not value.typed:
                value = {}  # a section of a file in which every line is a comment
            elif isinstance(value.value, str) and field.tagged:
                value = {"kind": value}
        if isinstance(value, Given):
            return value.value
        base = base if isinstance(base, dict) else {}
        if not field.tagged:
            return self.lay(field.members[""], base, value, f"{path}.", choice)
        named = single(value["kind"]) if "kind" in value else None
        if named is not None and choice is not None and named.source < choice.source:
            named, value = self._without_other_choice(field, named, value, path, choice)
        kind = base.get("kind", next(iter(field.members))) if named is None else named.value
        if not isinstance(kind, str) or kind not in field.members:
            off = field.optional and str(kind).lower() in ("none", "off", "no", "false")
            close = "; null is off" if off else hints.near(str(kind), field.members)
            text = f": not one of {', '.join(field.members)}{close}"
            self.report(path, text, named, label=f"{path}.kind {shown(kind)}")
            return base or None
        kept = base if base.get("kind", kind) == kind else {}  # another kind begins with its own defaults
        return self.lay(field.members[kind], kept, value, f"{path}.", named or choice) | {"kind": kind}

    def _without_other_choice(
        self, field: OptionField, named: Given, value: Tree, path: str, choice: Given
    ) -> tuple[Given | None, Tree]:
        """Leave out a kind, and its options, that only another algorithm has, where this one was chosen later."""
        if named.value in field.members or not hints.is_kind(str(named.value), path, self.root):
            return named, value
        older = [name for name, inner in value.items() if all(g.source < choice.source for _, g in leaves(inner))]
        self.left_out += [leaf for name in older for leaf, _ in leaves(value[name], f"{path}.{name}")]
        return None, {name: inner for name, inner in value.items() if name not in older}

    def _entry(self, field: OptionField, item: Any, given: Given, path: str) -> Any:
        """Return one entry of a list of options."""
        if dataclasses.is_dataclass(item):
            return item
        return self._section(field, None, given_tree(item, given.where, given.source), path, None)

    def _too_deep(self, field: OptionField, value: Tree, path: str) -> None:
        """Report that something is given below an option that is a single value, or a list."""
        inner, leaf = next(item for item in leaves(value, path) if not item[0].endswith(".kind"))
        text = f"there is no such option; {path} is a single value ({type_text(field.hint)})"
        if field.many:
            text = f"{path} is a list: give it whole, such as --{path} '[{{...}}, {{...}}]'"
        self.report(inner, f": {text}", leaf)

    def _unknown(self, cls: type, name: str, value: Any, path: str, choice: Given | None) -> None:
        full, leaf = path + name, first_leaf(value)
        elsewhere = hints.readers(name, path, self.root)
        if elsewhere and choice is not None and leaf is not None and leaf.source < choice.source:
            self.left_out.append(full)
        elif full in hints.MOVED_SECTIONS and isinstance(value, dict):
            self.found += [f"{at}{_at(inner)}: now {hints.moved(at)}" for at, inner in leaves(value, full)]
        else:
            self.found.append(f"{full}{_at(leaf)}: {hints.unknown(cls, name, path, elsewhere, self.root)}")

    def validate(self, cls: type[T], values: dict[str, Any], given: Tree, *, prefix: str = "") -> T | None:
        """Return an instance of `cls`, or None where values have wrong types."""
        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            for problem in error.errors():
                path, text = explain(problem, values, prefix)
                if not any(path.startswith((f"{other}.", f"{other}[")) for other in self.reported):
                    self.report(path, text, look_up(given, path))
            return None


def _at(given: Given | None) -> str:
    return f" ({given.where})" if given is not None and given.where else ""


def _free(value: Any) -> Any:
    """Return a value without an option class. In a free mapping no type says how to read a typed text: it is YAML."""
    if isinstance(value, dict):
        return {name: _free(_parsed(inner)) for name, inner in value.items()}
    return without_places(value)


def _parsed(value: Any) -> Any:
    if isinstance(value, Given) and value.typed and isinstance(value.value, str):
        import yaml

        return Given(yaml.safe_load(value.value) if value.value else "")
    return value
