"""What each part of a run really used: config.yaml and env.json of the part at hand, history.jsonl of all of them.

A part begins when a run starts or is resumed, and ends where the next one begins.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from llmrl.errors import UserError
from llmrl.track.files import read_jsonl, replace_text
from llmrl.track.flat import flatten

FILE = "history.jsonl"
OUTPUT = "train.output_dir"
"""Differs in every branch, which is said anyway."""


def begin(
    folder: Path, config: dict[str, Any], *, step: int, environment: dict[str, Any], resumed_from: Path | None = None
) -> list[str]:
    """Record that the part of a run that follows `step` begins.

    Parts that began at this step or later were given up and are forgotten.

    Args:
        folder: the run's folder.
        config: the configuration as plain values.
        step: steps that are done already.
        environment: what `record.environment` returns.
        resumed_from: the checkpoint that the part goes on from. Where it is another run's, that run's parts come first.

    Returns:
        The options that differ from those of the part before, as lines for the user.

    Raises:
        RunFailed: the files cannot be written. Those of the parts before stay.
    """
    source = folder if resumed_from is None else resumed_from.parent.parent
    parts = [part for part in read_parts(source) if part["from_step"] < step]
    config = {name: dict(section) if isinstance(section, dict) else section for name, section in config.items()}
    config.get("train", {}).pop("resume_from_checkpoint", None)  # the file is also a recipe for a run of its own
    part = {
        "from_step": step,
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "resumed_from": None if resumed_from is None else str(resumed_from),
        "config": config,
        "environment": environment,
    }
    lines = "".join(json.dumps(each) + "\n" for each in [*parts, part])
    replace_text(folder / FILE, lines)
    replace_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    replace_text(folder / "env.json", json.dumps(environment, indent=2) + "\n")
    return _changes(parts[-1]["config"], config) if parts else []


def read_parts(folder: Path) -> list[dict[str, Any]]:
    """Return the parts of a run, oldest first."""
    return read_jsonl(folder / FILE) if (folder / FILE).is_file() else []


def part_of(folder: Path, step: int) -> dict[str, Any]:
    """Return the part of a run in which `step` (from 1) was trained.

    Raises:
        UserError: the folder holds no run.
    """
    parts = [part for part in read_parts(folder) if part["from_step"] < max(step, 1)]
    if not parts:
        raise UserError(f"{folder} holds no run (a folder with {FILE}); name the train.output_dir of one")
    return parts[-1]


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    old, new = flatten(before), flatten(now)
    names = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    return [f"{name} {old.get(name, 'default')} -> {new.get(name, 'default')}" for name in names if name != OUTPUT]
