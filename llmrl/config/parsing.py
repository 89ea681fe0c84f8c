"""YAML files and dotted arguments -> a configuration, and back; mistakes are said with file, line and field."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from llmrl.config.checks import validate
from llmrl.config.fields import Config
from llmrl.errors import UserError


def load_config(argv: list[str] | None = None, *, config_class: type = Config, prog: str | None = None) -> Any:
    """Parse `--config FILE.yaml` and dotted overrides, and validate the result.

    Args:
        argv: the arguments after the program's name; default sys.argv[1:].
        config_class: `Config`, or a recipe's subclass of it with further fields.
        prog: program name shown in `--help`.

    Returns:
        An instance of `config_class`. `--help` and `--print_config` print and exit 0.

    Raises:
        UserError: unknown field, wrong type, missing file, contradiction; the message names file, line and field.
    """
    config = parse(argv, config_class=config_class, prog=prog)
    validate(config)
    return config


def parse(argv: list[str] | None = None, *, config_class: type = Config, prog: str | None = None) -> Any:
    """`load_config` without the final check of what types cannot say."""
    from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

    argv = list(sys.argv[1:] if argv is None else argv)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False, description=config_class.__doc__)
    parser.add_argument("--config", action="config", help="YAML file with any of the fields below")
    parser.add_class_arguments(config_class, None)
    try:
        namespace = parser.parse_args(argv)
    except ArgumentError as error:
        raise UserError(_explain(str(error), argv)) from None
    namespace.pop("config", None)
    config = parser.instantiate(Namespace(**vars(namespace)))
    return config_class(**{f.name: config[f.name] for f in dataclasses.fields(config_class)})


def _explain(message: str, argv: list[str]) -> str:
    """Add file and line of the offending YAML key to a parser message, where one can be found."""
    files = [argv[i + 1] for i, a in enumerate(argv[:-1]) if a == "--config"]
    files += [a.split("=", 1)[1] for a in argv if a.startswith("--config=")]
    for file in files:
        if not Path(file).is_file():
            return f"--config {file}: no such file"
        for line, dotted in _yaml_keys(Path(file)):
            if f'"{dotted}"' in message or f"'{dotted}'" in message or f"'{dotted.split('.')[-1]}'" in message:
                return f"{file}, line {line}, field {dotted}: {message}"
    return message


def _yaml_keys(file: Path) -> list[tuple[int, str]]:
    """(line, dotted key) of every key in a YAML file, deepest first."""
    import yaml

    try:
        root = yaml.compose(file.read_text())
    except yaml.YAMLError:
        return []
    found: list[tuple[int, str]] = []

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                walk(value, f"{prefix}{key.value}.")
                found.append((key.start_mark.line + 1, f"{prefix}{key.value}"))
        elif isinstance(node, yaml.SequenceNode):
            for value in node.value:
                walk(value, prefix)

    walk(root, "")
    return found


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved configuration as plain values, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def save_config(config: Any, file: str | Path) -> None:
    """Write the resolved configuration as YAML; `load_config(["--config", file])` gives it back."""
    import yaml

    Path(file).write_text(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))
