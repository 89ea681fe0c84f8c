"""What a configuration of TRL holds, by TRL's names, and what becomes of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from llmrl.run.from_trl.tables import USUAL

WARMUP = "train.warmup_steps"
"""Counts optimizer steps, as TRL does; other options count batches."""


@dataclass(kw_only=True)
class Translation:
    """What a configuration of TRL means here."""

    source: str
    """What messages call it: the name of its class, or `args`."""
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    """Dotted options."""
    notes: list[str] = field(default_factory=list[str])
    """Lines for the user."""
    epochs: dict[str, float] = field(default_factory=dict[str, float])
    """Options given in epochs, which need the number of rows: train.max_steps 3.0 is three epochs."""
    updates_per_epoch: Callable[[int], int] | None = None
    """Rows -> TRL's optimizer steps in an epoch. None: rows / `rollout.num_prompts`."""
    updates_per_batch: int = 1
    """Optimizer steps of TRL for one step here, which is one batch of rollouts."""
    reward_weights: list[float] | None = None

    def at_epochs(self, num_rows: int, num_prompts: int) -> dict[str, int]:
        """Return the options that were given in epochs, for a dataset of this many rows."""
        per_epoch = max(1, num_rows // num_prompts)
        if self.updates_per_epoch is not None:
            per_epoch = self.updates_per_epoch(num_rows)
        updates = {option: math.ceil(epochs * per_epoch) for option, epochs in self.epochs.items()}
        return {option: value if option == WARMUP else self.batches(value) for option, value in updates.items()}

    def batches(self, updates: float) -> int:
        """Return the steps here for this many of TRL's."""
        return max(1, math.ceil(updates / self.updates_per_batch))


NUMBERS = {
    "eval_steps": 0,
    "generation_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "logging_steps": 0,
    "max_steps": -1,
    "num_generations": 1,
    "num_iterations": 1,
    "num_train_epochs": 0,
    "per_device_train_batch_size": 1,
    "save_steps": 0,
    "steps_per_generation": 1,
    "warmup_ratio": 0,
    "warmup_steps": 0,
}
"""Fields that are counted with, and the least value of each."""
DERIVED = ("dataloader_pin_memory", "pad_to_multiple_of")
"""Fields that `__post_init__` switches off by itself."""


class Fields:
    """What was given, by TRL's names, and which of it has been read.

    Args:
        given: a configuration object, or a dictionary of some of its fields.
    """

    def __init__(self, given: Any) -> None:
        self.complete = not isinstance(given, Mapping)
        if self.complete:
            self.values = {f.name: getattr(given, f.name) for f in dataclasses.fields(given)}
            self.defaults = {f.name: _default(f) for f in dataclasses.fields(given)}
        else:
            self.values, self.defaults = dict(given), dict[str, Any]()
        self.read = set[str]()

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def get(self, name: str) -> Any:
        """Return a value, or TRL's default where a dictionary has none, and mark it as read."""
        self.read.add(name)
        return plain(self.values.get(name, USUAL.get(name)))

    def wrong_types(self) -> list[str]:
        """Return lines about values that are no numbers, or too small ones, where the translation counts with them."""
        found: list[str] = []
        for name, least in NUMBERS.items():
            value = self.values.get(name)
            if value is None:
                continue
            if not _is_number(value) or value < least:
                found.append(f"{name} is {value!r}: must be a number" + (f", at least {least}" if least >= 0 else ""))
        for name in ("reward_weights", "loss_weights"):
            value = self.values.get(name)
            numbers = cast("list[Any]", value if isinstance(value, (list, tuple)) else [None])
            if value is not None and not all(map(_is_number, numbers)):
                found.append(f"{name} is {value!r}: must be a list of numbers")
        value = self.values.get("model_init_kwargs")
        if value is not None and not isinstance(value, Mapping):
            found.append(f"model_init_kwargs is {value!r}: must be a dictionary")
        return found

    def any(self, *names: str) -> bool:
        """Return whether one of these is given."""
        return any(name in self.values for name in names)

    def unread(self) -> dict[str, Any]:
        """Return what was given but not read, without what an object has by default."""
        return {
            name: value
            for name, value in self.values.items()
            if name not in self.read
            and not (self.complete and (_same(value, self.defaults[name]) or (name in DERIVED and not value)))
        }


def copy(found: Translation, fields: Fields, table: dict[str, str]) -> None:
    """Set the options that mean the same as TRL's fields."""
    for name, option in table.items():
        if name in fields and (value := fields.get(name)) is not None:
            found.options[option] = value


def plain(value: Any) -> Any:
    """Return an enumeration's value; anything else as it is."""
    return getattr(value, "value", value) if isinstance(value, str) else value


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _same(value: Any, default: Any) -> bool:
    """Return whether a value is the default, or what `__post_init__` makes of it."""
    if (not value and not default) or value == default:
        return True
    return dataclasses.is_dataclass(value) and not isinstance(value, type) and value == type(value)()


def shown(value: Any) -> str:
    text = str(plain(value))
    return text if len(text) <= 60 else f"{text[:57]}..."
