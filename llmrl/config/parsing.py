"""Given values -> a checked configuration: presets, choices, what is left out, and every finding with its place."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from llmrl.config import hints
from llmrl.config.config import (
    ORDER,
    PRESETS,
    AlgoOptions,
    Config,
    RunConfig,
    check,
    complete,
    listed,
    run_class,
    unread_sections,
)
from llmrl.config.messages import explain, shown
from llmrl.config.schema import OptionField, option_fields, plain, type_text
from llmrl.config.sources import Given, Tree, TypedTree, from_python, given_tree, read_arguments, without_places
from llmrl.errors import UserError

T = TypeVar("T")


def load_config(argv: list[str] | None = None, *, config_class: type = Config, prog: str | None = None) -> Any:
    """Parse `--config FILE.yaml` and dotted overrides, fill what depends on several sections, and check the result.

    Args:
        argv: the arguments after the program's name; default sys.argv[1:].
        config_class: `Config`, or a recipe's subclass of it with further fields.
        prog: program name shown in `--help`.

    Returns:
        An instance of `config_class`; for a kind of run without an engine a `RunConfig`. `--help` and `--print_config`
        print and exit 0.

    Raises:
        UserError: unknown option, wrong type, missing file, contradiction; each finding names its place and the fix.
    """
    config = parse(argv, config_class=config_class, prog=prog)
    check(config)
    return config


def parse(argv: list[str] | None = None, *, config_class: type[T] = Config, prog: str | None = None) -> T:
    """`load_config` without the check of what goes together, for any option class."""
    arguments = read_arguments(list(sys.argv[1:] if argv is None else argv))
    if arguments.help is not None:
        from llmrl.config.help import show

        config = None if arguments.help else build(arguments.tree, config_class, lenient=True)
        show(config_class, config, section=arguments.help, prog=prog)
        sys.exit(0)
    config = build(arguments.tree, config_class)
    if arguments.print_config:
        print(to_yaml(config), end="")
        sys.exit(0)
    return config


def build(tree: Tree, config_class: type[T] = Config, *, lenient: bool = False) -> T:
    """A configuration from given values, completed but not checked for what goes together.

    Raises:
        UserError: with all findings; `lenient` ignores them.
    """
    builder = _Builder(config_class)
    given = dict(tree)
    parts: dict[str, Any] = {}
    if issubclass(config_class, RunConfig):
        algo = builder.algo(given.pop("algo", {}))
        parts["algo"] = algo
        if config_class is Config and algo is not None:
            config_class = cast("type[T]", run_class(algo))
        builder.leave_out(given, config_class, PRESETS["grpo"] if algo is None else algo)
    values = builder.overlay(config_class, {}, given, "")
    config = builder.validate(config_class, values | parts, tree, skip=("algo",))
    if builder.found and not lenient:
        raise UserError(listed(builder.found))
    if config is None:
        return config_class()
    builder.report_left_out()
    return cast("T", complete(config)) if isinstance(config, RunConfig) else config


def preset(name: str, **over: Any) -> AlgoOptions:
    """The options of the preset `name` with `over` on top; nested options are given as dictionaries.

    Example:
        >>> preset("dapo", loss={"epsilon_high": 0.3}).loss.dual_clip
        10.0

    Raises:
        UserError: unknown name or option, or a wrong value.
    """
    builder = _Builder()
    algo = builder.algo(given_tree({"name": name, **over}, "algo", 0, typed=True))
    if builder.found or algo is None:
        raise UserError(listed(builder.found))
    return algo


def from_dotted(values: dict[str, Any], config_class: type[T] = Config) -> T:
    """A configuration from dotted names with Python values."""
    return build(from_python(values), config_class)


def with_algorithm(config: RunConfig, name: str) -> RunConfig:
    """The same run by another algorithm: what that one does not read is left out."""
    tree = given_tree({k: v for k, v in to_dict(config).items() if k != "algo"}, "the configuration", 0, typed=False)
    return build(tree | {"algo": {"name": Given(name, "algorithm", 1, typed=True)}})


class _Builder:
    """Lays given values over presets and defaults, and collects what is wrong with them."""

    def __init__(self, root: type = Config) -> None:
        self.root = root
        self.found: list[str] = []
        self.left_out: list[str] = []
        self.wrong: set[str] = set()
        """Paths that have been reported, so that their types are not reported again."""

    def report(self, path: str, text: str, given: Given | None = None, *, place: str | None = None) -> None:
        """Note what is wrong with the option at `path`, once."""
        if path in self.wrong:
            return
        self.wrong.add(path)
        problem = f" ({given.problem})" if given is not None and given.problem else ""
        self.found.append(f"{path}{_at(given) if place is None else place}{text}{problem}")

    def algo(self, given: Any) -> AlgoOptions | None:
        """The algorithm's options: a preset with what is given on top."""
        if isinstance(given, Given):
            if type(given.value) in {type(p) for p in PRESETS.values()}:
                return given.value
            given = {} if given.value is None and not given.typed else {"name": given}
        given = dict(given)
        name = _one(given.get("name", Given("grpo", "default", -1)))
        if not isinstance(name.value, str) or name.value not in PRESETS:
            close = hints.near(str(name.value), PRESETS)
            self.found.append(
                f"algo.name {shown(name.value)}{_at(name)}: there is no such preset{close}; there are "
                + ", ".join(PRESETS)
            )
            return None
        base = PRESETS[name.value]
        values = self.overlay(type(base), plain(base), given, "algo.", choice=name)
        return self.validate(type(base), values, {"algo": given}, prefix="algo.")

    def leave_out(self, given: Tree, cls: type, algo: AlgoOptions) -> None:
        """Remove sections and options that this kind of run does not read, so that one file serves several kinds."""
        fields, known = option_fields(cls), option_fields(Config)
        for name in list(given):
            if name in unread_sections(algo) or (name in known and name not in fields):
                self._leave(given, name, name, f"algo.name {algo.name} does not read it")
            elif name in fields and isinstance(given[name], dict):
                self._leave_inner(given[name], fields[name], known.get(name), f"{name}.", algo)

    def _leave_inner(
        self, given: Tree, field: OptionField, full: OptionField | None, path: str, algo: AlgoOptions
    ) -> None:
        if full is None or field.tagged or full.tagged:
            return
        mine, all_of = option_fields(field.members[""]), option_fields(full.members[""])
        for name in list(given):
            if name in all_of and name not in mine:
                self._leave(given, name, path + name, f"algo.name {algo.name} does not read it")
            elif name in mine and mine[name].members and isinstance(given[name], dict):
                self._leave_inner(given[name], mine[name], all_of.get(name), f"{path}{name}.", algo)

    def _leave(self, given: Tree, name: str, path: str, why: str) -> None:
        for inner, value in _leaves(given.pop(name), path):
            if value.typed:
                self.found.append(f"{inner}{_at(value)}: {why}; leave it out")
            else:
                self.left_out.append(inner)

    def report_left_out(self) -> None:
        """Say once which options of a file are not read, on the main process."""
        if self.left_out and os.environ.get("RANK", "0") == "0":
            algo = [path for path in self.left_out if path.startswith("algo.")]
            rest = [".".join(path.split(".")[:2]) for path in self.left_out if not path.startswith("algo.")]
            names = ", ".join(dict.fromkeys(algo + rest))
            print(f"note: this kind of run does not read {names}: left out", file=sys.stderr)

    # --- laying over ---

    def overlay(
        self, cls: type, base: dict[str, Any], given: Tree, path: str, choice: Given | None = None
    ) -> dict[str, Any]:
        """`base` (plain values of an instance of `cls`, may have gaps) with `given` on top.

        Args:
            cls: the option class.
            base: what is kept where nothing is given.
            given: the values.
            path: dotted name of this place, with a dot at its end.
            choice: the value that decided for this class; options from before it that only others read are left out.
        """
        fields, values = option_fields(cls), dict(base)
        is_member = any(f.name == "kind" for f in dataclasses.fields(cast("Any", cls)))
        for name, value in given.items():
            field = fields.get(name)
            if name == "kind" and is_member:
                continue
            if field is None:
                self._unknown(cls, name, value, path, choice)
            elif field.members and not field.many:
                values[name] = self._nested(field, values.get(name), value, path + name, choice)
            elif field.members and isinstance(value, Given) and isinstance(value.value, list):
                values[name] = [
                    self._entry(field, item, value, f"{path}{name}[{i}]") for i, item in enumerate(value.value)
                ]
            elif isinstance(value, dict) and not field.takes_mapping:
                if field.takes_text and isinstance(value, TypedTree):
                    values[name] = value.text
                else:
                    self._parts_of_one(field, value, path + name)
            elif isinstance(value, Given) and value.text is not None and field.takes_text:
                values[name] = value.text
            elif isinstance(value, Given) and isinstance(value.value, bool) and field.takes_number:
                self.report(path + name, f" is {shown(value.value)}: must be a number", value)
            else:
                values[name] = _free(value)
        return values

    def _parts_of_one(self, field: OptionField, value: Tree, path: str) -> None:
        """Something is given below an option that is a single value, or a list."""
        inner, leaf = next(item for item in _leaves(value, path) if not item[0].endswith(".kind"))
        if field.many:
            self.report(inner, f": {path} is a list: give it whole, such as --{path} '[{{...}}, {{...}}]'", leaf)
        else:
            self.report(inner, f": there is no such option; {path} is a single value ({type_text(field.hint)})", leaf)

    def _entry(self, field: OptionField, item: Any, given: Given, path: str) -> Any:
        """One entry of a list of options."""
        if dataclasses.is_dataclass(item):
            return item
        return self._nested(field, None, given_tree(item, given.where, given.source, typed=given.typed), path, None)

    def _nested(self, field: OptionField, base: Any, value: Any, path: str, choice: Given | None) -> Any:
        """A section, or a choice among option classes."""
        if isinstance(value, Given) and field.optional and str(value.value).lower() in ("true", "false"):
            # `model.lora true` is the option with its defaults, false is off
            value = {} if str(value.value).lower() == "true" else Given(None, value.where, value.source, value.typed)
        if isinstance(value, Given) and value.value is None and not field.optional and not value.typed:
            value = {}  # a section of a file in which every line is a comment
        if isinstance(value, Given):
            if not isinstance(value.value, str) or not field.tagged:
                return value.value
            value = {"kind": value}  # a text names the kind
        base = base if isinstance(base, dict) else {}
        if not field.tagged:
            return self.overlay(field.members[""], base, value, f"{path}.", choice)
        kinds = list(field.members)
        named = _one(value["kind"]) if "kind" in value else None
        if named is not None and choice is not None and named.source < choice.source:
            named, value = self._without_other_choice(field, named, value, path, choice)
        kind = base.get("kind", kinds[0]) if named is None else named.value
        if not isinstance(kind, str) or kind not in field.members:
            off = field.optional and str(kind).lower() in ("none", "off", "no", "false")
            close = "; null is off" if off else hints.near(str(kind), kinds)
            self.wrong.add(path)
            problem = f" ({named.problem})" if named is not None and named.problem else ""
            self.found.append(f"{path}.kind {shown(kind)}{_at(named)}: not one of {', '.join(kinds)}{close}{problem}")
            return base or None
        kept = base if base.get("kind", kind) == kind else {}
        return self.overlay(field.members[kind], kept, value, f"{path}.", named or choice) | {"kind": kind}

    def _without_other_choice(
        self, field: OptionField, named: Given, value: Tree, path: str, choice: Given
    ) -> tuple[Given | None, Tree]:
        """Leave out a kind, and its options, that only another algorithm has, where this one was chosen later."""
        if named.value in field.members or not hints.is_kind(str(named.value), path, self.root):
            return named, value
        older = [name for name, inner in value.items() if all(g.source < choice.source for _, g in _leaves(inner, ""))]
        self.left_out += [leaf for name in older for leaf, _ in _leaves(value[name], f"{path}.{name}")]
        return None, {name: inner for name, inner in value.items() if name not in older}

    def _unknown(self, cls: type, name: str, value: Any, path: str, choice: Given | None) -> None:
        where = next((leaf for _, leaf in _leaves(value, "")), None)
        elsewhere = hints.readers(name, path, self.root)
        if elsewhere and choice is not None and where is not None and where.source < choice.source:
            self.left_out.append(path + name)
            return
        is_section = path + name in hints.MOVED_SECTIONS
        if is_section and isinstance(value, dict):
            self.found += [f"{at}{_at(leaf)}: now {hints.moved(at)}" for at, leaf in _leaves(value, path + name)]
            return
        self.found.append(f"{path}{name}{_at(where)}: {hints.unknown(cls, name, path, elsewhere, self.root)}")

    # --- types ---

    def validate(
        self, cls: type[T], values: dict[str, Any], given: Tree, *, prefix: str = "", skip: tuple[str, ...] = ()
    ) -> T | None:
        """An instance of `cls`, or None where values have wrong types."""
        if any(values.get(name, 0) is None for name in skip):
            values = {k: v for k, v in values.items() if k not in skip}
        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            for problem in error.errors():
                path, text = explain(problem, values, prefix)
                if not any(path == other or path.startswith((f"{other}.", f"{other}[")) for other in self.wrong):
                    self.report(path, text, _look_up(given, path))
            return None


def _one(value: Any) -> Given:
    """What should be a single value; a mapping in its place is one without the places of its parts."""
    if isinstance(value, Given):
        return value
    first = next((leaf for _, leaf in _leaves(value, "")), Given(None, "", -1))
    return dataclasses.replace(first, value=without_places(value))


def _at(given: Given | None) -> str:
    """The place in brackets, where it is a file."""
    return f" ({given.where})" if given is not None and not given.typed and given.source >= 0 else ""


def _leaves(value: Any, path: str) -> list[tuple[str, Given]]:
    if isinstance(value, Given):
        return [(path, value)]
    if not isinstance(value, dict):
        return []
    return [leaf for name, inner in value.items() for leaf in _leaves(inner, f"{path}.{name}" if path else name)]


def _free(value: Any) -> Any:
    """A value without an option class. Inside a free mapping nothing says how to convert a text: it is read as YAML."""
    return {name: _scalar(inner) for name, inner in value.items()} if isinstance(value, dict) else without_places(value)


def _scalar(value: Any) -> Any:
    if isinstance(value, Given) and value.typed and isinstance(value.value, str):
        import yaml

        return yaml.safe_load(value.value) if value.value else ""
    return _free(value)


def _look_up(tree: Tree, path: str) -> Given | None:
    """The value given at a path, or at the place it is part of."""
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
    if isinstance(value, Given):
        return value
    first = next((leaf for _, leaf in _leaves(value, "")), None) if value is not tree else None
    return first or place


# --- out ---


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain values: only what applies, without nulls that are defaults."""
    if not isinstance(config, RunConfig):
        return plain(config)
    found = plain(config)
    found["algo"] = plain(config.algo, PRESETS.get(config.algo.name))
    order = {name: i for i, name in enumerate(ORDER)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def to_yaml(config: Any) -> str:
    """The same as YAML."""
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def save_config(config: Any, file: str | Path) -> None:
    """Write a configuration as YAML; `load_config(["--config", file])` gives it back."""
    Path(file).write_text(to_yaml(config))
