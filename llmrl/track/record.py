"""What a run writes while it trains, metrics.jsonl and rollouts.jsonl, and what it runs on."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrl.track.files import BackgroundJsonlFile, JsonlFile
from llmrl.track.metrics import rollout_rows
from llmrl.track.options import TrackConfig
from llmrl.types import RolloutGroup

if TYPE_CHECKING:
    from llmrl.track.trackers import Trackers

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
        trackers: get each step too.
    """

    def __init__(self, options: TrackConfig, folder: Path, *, trackers: Trackers | None = None) -> None:
        self.options, self.trackers = options, trackers
        self.metrics = JsonlFile(folder / "metrics.jsonl")
        self.rollouts = BackgroundJsonlFile(folder / "rollouts.jsonl")

    def step(self, step: int, metrics: dict[str, float], groups: list[RolloutGroup] | None = None) -> None:
        """Record the metrics of one training step (numbered from 1; 0 is before the first), and its rollouts."""
        self.metrics.append({"step": step, **metrics})
        if self.trackers is not None:
            self.trackers.log(step, metrics)
        if groups is not None:
            self.groups(step, groups)

    def groups(self, step: int, groups: list[RolloutGroup]) -> None:
        """Record the rollouts of a step. They are written in the background: an error may come with a later step."""
        saved = {"all": groups, "sample": groups[:1], "none": []}[self.options.save_rollouts]
        self.rollouts.append(*rollout_rows(step, saved)[: self.options.num_saved_rollouts])
        if self.trackers is not None:
            self.trackers.table(step, groups)

    def begin(self, step: int) -> None:
        """Start the trackers, for a run of which `step` steps are done."""
        if self.trackers is not None:
            self.trackers.start(step)

    def lengths(self) -> dict[str, int]:
        """Return the length of each file in bytes, for a checkpoint."""
        return {"metrics": self.metrics.sync(), "rollouts": self.rollouts.sync()}

    def truncate(self, lengths: dict[str, int]) -> None:
        """Cut the files back to the lengths that a checkpoint holds."""
        self.metrics.truncate(lengths["metrics"])
        self.rollouts.truncate(lengths["rollouts"])

    def close(self, *, failed: bool = False) -> None:
        """Write what is left, close both files, and end the trackers' runs, marked as failed or not."""
        self.metrics.close()
        self.rollouts.close()
        if self.trackers is not None:
            self.trackers.close(failed=failed)


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
