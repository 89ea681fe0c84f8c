"""Rewards of a command line: `--reward SPEC`, `--args '{key: value}'` and `--args.key value` in, Parts out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from llmrl.errors import UserError, first_line
from llmrl.verify.options import RewardConfig

ARGS_HELP = (
    "fixed arguments of the --reward before it, as YAML or JSON ('{require_box: true}'), as a file of either, or one "
    "by one: --args.judge.model NAME"
)


class AddReward(argparse.Action):
    """Begin the next reward."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Append (spec, no arguments yet)."""
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), (str(values), {})])


class AddTarget(argparse.Action):
    """Name the reward that is attacked."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Append it to the rewards."""
        namespace.red_team = True
        namespace.reward = [*(namespace.reward or []), (str(values), {})]


class AddArgs(argparse.Action):
    """Add to the arguments of the last reward."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Merge what is given into the arguments of the reward before it."""
        if not namespace.reward:
            raise UserError(f"--args {values}: it must come after the --reward that it is for")
        spec, args = namespace.reward[-1]
        namespace.reward[-1] = (spec, merged(args, read_args(str(values))))


def with_dotted(argv: Sequence[str]) -> list[str]:
    """Return the command line with `--args.key VALUE` and `--args.key=VALUE` written as `--args JSON`.

    Raises:
        UserError: a key without a value.
    """
    found, words = [], iter(argv)
    for word in words:
        if not word.startswith("--args."):
            found.append(word)
            continue
        key, separator, value = word.removeprefix("--args.").partition("=")
        if not separator:
            value = next(words, None)
            value = None if value is None or value.startswith("--") else value
        if value is None or not all(key.split(".")):
            raise UserError(f"{word}: give it as --args.KEY VALUE")
        nested = _yaml(value, word)
        for name in reversed(key.split(".")):
            nested = {name: nested}
        found += ["--args", json.dumps(nested, default=str)]
    return found


def read_args(text: str) -> dict[str, Any]:
    """Return the mapping that a text, or the file that it names, holds.

    Raises:
        UserError: it cannot be read, or is not a mapping with names.
    """
    where = f"--args {text}"
    if text.endswith((".yaml", ".yml", ".json")) and "{" not in text:
        try:
            content = Path(text).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"{where}: {getattr(error, 'strerror', None) or error}") from None
    else:
        content = text
    found = _yaml(content, where)
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UserError(f"{where}: must be a mapping of argument names, such as '{{require_box: true}}'")
    return found


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML or JSON: {first_line(error)}") from None


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return both mappings in one; where both have a mapping these are merged too, else the new value counts."""
    both = dict(old)
    for key, value in new.items():
        before = both.get(key)
        both[key] = merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return both


def parts_of(rewards: Sequence[tuple[str, dict[str, Any]]], time_limit_s: float | None) -> list[RewardConfig]:
    """Return the parts of a rubric."""
    return [RewardConfig(fn=spec, args=args, time_limit_s=time_limit_s) for spec, args in rewards]
