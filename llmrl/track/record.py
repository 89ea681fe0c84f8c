"""What a run writes while it trains, metrics.jsonl and rollouts.jsonl, and what it runs on."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llmrl.track.files import BackgroundJsonlFile, JsonlFile
from llmrl.track.metrics import rollout_rows
from llmrl.track.options import TrackConfig
from llmrl.types import RolloutGroup

PACKAGES = (
    "llmrl",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "trl",
    "datasets",
    "vllm",
    "deepspeed",
    "math-verify",
)
"""Packages whose versions go into env.json."""


class Record:
    """Write what each step leaves behind. It exists on the main process only.

    Args:
        options: what is written.
        folder: the run's folder.
        log: pass a step's metrics on to the trackers, called as log(metrics, step=1).
    """

    def __init__(self, options: TrackConfig, folder: Path, *, log: Callable[..., object]) -> None:
        self.options, self.log = options, log
        self.metrics = JsonlFile(folder / "metrics.jsonl")
        self.rollouts = BackgroundJsonlFile(folder / "rollouts.jsonl")

    def step(self, step: int, metrics: dict[str, float], groups: list[RolloutGroup] | None = None) -> None:
        """Record the metrics of one training step (numbered from 1; 0 is before the first), and its rollouts."""
        self.metrics.append({"step": step, **metrics})
        self.log(metrics, step=step)
        if groups is not None:
            self.groups(step, groups)

    def groups(self, step: int, groups: list[RolloutGroup]) -> None:
        """Record the rollouts of a step. They are written in the background: an error may come with a later step."""
        saved = {"all": groups, "sample": groups[:1], "none": []}[self.options.save_rollouts]
        self.rollouts.append(*rollout_rows(step, saved)[: self.options.num_saved_rollouts])

    def lengths(self) -> dict[str, int]:
        """Return the length of each file in bytes, for a checkpoint."""
        return {"metrics": self.metrics.sync(), "rollouts": self.rollouts.sync()}

    def truncate(self, lengths: dict[str, int]) -> None:
        """Cut the files back to the lengths that a checkpoint holds."""
        self.metrics.truncate(lengths["metrics"])
        self.rollouts.truncate(lengths["rollouts"])

    def close(self) -> None:
        """Write what is left and close both files."""
        self.metrics.close()
        self.rollouts.close()


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """Return a nested configuration as one flat dictionary with dotted keys, the form that trackers take."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}{key}.", inner)
        else:
            flat[prefix[:-1]] = value if isinstance(value, (int, float, str, bool)) else str(value)

    walk("", config)
    return flat


def environment(*, device: str, num_processes: int, distributed_type: str) -> dict[str, Any]:
    """Return versions and hardware, to compare a result with later ones."""
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "device": device,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "num_processes": num_processes,
        "distributed_type": distributed_type,
        "num_threads": torch.get_num_threads(),
    }
