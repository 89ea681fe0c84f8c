"""Turn files, command lines and dictionaries into a checked configuration.

The steps:

1. `sources` reads files and arguments into one tree of given values; a later source is merged over an earlier one.
2. `Overlay.algo` takes the preset that `algo.name` names and lays what is given for `algo` over it. The algorithm
   decides which sections the run has: those of `Config`, or of `RunConfig` for a run without an engine.
3. `Overlay.leave_out` removes what files hold for other kinds of run.
4. `Overlay.lay` lays the rest over the defaults, and `Overlay.validate` has pydantic convert and check it. All findings
   are raised as one error.
5. `complete` fills defaults that depend on other sections; `check` looks for what does not go together.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, TypeVar, cast

from llmrl.config.config import ORDER, PRESETS, AlgorithmOptions, Config, RunConfig, check, complete, listed, run_class
from llmrl.config.given import Given, Tree, from_dotted_names, given_tree
from llmrl.config.overlay import Overlay
from llmrl.config.schema import plain
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
    """Do what `load_config` does, but do not check what goes together. Works for any option class."""
    from llmrl.config.sources import read_arguments

    arguments = read_arguments(sys.argv[1:] if argv is None else argv)
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
    """Make a configuration of given values, completed but not checked for what goes together.

    Raises:
        UserError: with all findings; `lenient` ignores them.
    """
    overlay, given, cls, algo = Overlay(config_class), dict(tree), config_class, None
    if issubclass(config_class, RunConfig):
        algo = overlay.algo(given.pop("algo", {}))
        if config_class is Config and algo is not None:
            cls = cast("type[T]", run_class(algo))
        for other in (Config, RunConfig):  # kinds of run that read what this one does not
            overlay.leave_out(given, cls, algo or PRESETS["grpo"], other)
    values = overlay.lay(cls, {}, given, "")
    config = overlay.validate(cls, values if algo is None else values | {"algo": algo}, tree)
    if overlay.found and not lenient:
        raise UserError(listed(overlay.found))
    if config is None:
        return cls()
    _print_left_out(overlay.left_out)
    return cast("T", complete(config)) if isinstance(config, RunConfig) else config


def _print_left_out(paths: list[str]) -> None:
    """Print which options of a file are not read: of `algo` each one, of other sections only the outer two names."""
    if paths and os.environ.get("RANK", "0") == "0":
        algo = [path for path in paths if path.startswith("algo.")]
        rest = [".".join(path.split(".")[:2]) for path in paths if not path.startswith("algo.")]
        names = ", ".join(dict.fromkeys(algo + rest))
        print(f"note: this kind of run does not read {names}: left out", file=sys.stderr)


def preset(name: str, **over: Any) -> AlgorithmOptions:
    """Return the options of the preset `name` with `over` on top; nested options are given as dictionaries.

    Example:
        >>> preset("dapo", loss={"epsilon_high": 0.3}).loss.dual_clip
        10.0

    Raises:
        UserError: unknown name or option, or a wrong value.
    """
    overlay = Overlay()
    algo = overlay.algo(given_tree({"name": name, **over}))
    if overlay.found or algo is None:
        raise UserError(listed(overlay.found))
    return algo


def from_dotted(values: dict[str, Any], config_class: type[T] = Config) -> T:
    """Make a configuration of dotted names with Python values."""
    return build(from_dotted_names(values), config_class)


def with_algorithm(config: RunConfig, name: str) -> RunConfig:
    """Return the same run with another algorithm, without what that one does not read.

    What was changed of the old preset is laid over the new one, as if a file had held it.
    """
    plain_config, kind = to_dict(config), type(config)
    before = plain(PRESETS[config.algo.name]) if config.algo.name in PRESETS else {}
    plain_config["algo"] = {k: v for k, v in plain_config["algo"].items() if k != "name" and before.get(k) != v}
    given = given_tree(plain_config, "the configuration", 0)
    given["algo"]["name"] = Given(name)
    return build(given, Config if kind in (Config, RunConfig) else kind)


def to_dict(config: object) -> dict[str, Any]:
    """Return a configuration as plain values: only what applies, without nulls that are defaults."""
    found = plain(config)
    if not isinstance(config, RunConfig):
        return found
    found["algo"] = plain(config.algo, PRESETS.get(config.algo.name))
    return dict(sorted(found.items(), key=lambda item: ORDER.index(item[0]) if item[0] in ORDER else len(ORDER)))


def to_yaml(config: object) -> str:
    """Return `to_dict` as YAML."""
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def save_config(config: object, file: str | Path) -> None:
    """Write a configuration as YAML; `load_config(["--config", file])` gives it back."""
    Path(file).write_text(to_yaml(config))
