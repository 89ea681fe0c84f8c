"""A run's record: config.yaml, env.json, metrics.jsonl, rollouts.jsonl, and accelerate's trackers."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrl.config import Config, save_config, to_dict
from llmrl.track.files import JsonlFile
from llmrl.track.metrics import rollout_rows
from llmrl.types import RolloutGroup

if TYPE_CHECKING:
    from accelerate import Accelerator

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


class Record:
    """Writes everything a run leaves behind; exists on the main process only."""

    def __init__(self, config: Config, accelerator: Accelerator, *, resume: bool) -> None:
        self.folder = Path(config.train.output_dir)
        self.config, self.accelerator = config, accelerator
        self.metrics = JsonlFile(self.folder / "metrics.jsonl")
        self.rollouts = JsonlFile(self.folder / "rollouts.jsonl")
        if not resume:
            save_config(config, self.folder / "config.yaml")
        (self.folder / "env.json").write_text(json.dumps(environment(accelerator), indent=2) + "\n")

    def step(self, step: int, metrics: dict[str, float], groups: list[RolloutGroup]) -> None:
        """Record one training step (numbered from 1)."""
        self.metrics.append({"step": step, **metrics})
        self.accelerator.log(metrics, step=step)
        saved = {"all": groups, "sample": groups[:1], "none": []}[self.config.track.save_rollouts]
        self.rollouts.append(*rollout_rows(step, saved))

    def lengths(self) -> dict[str, int]:
        """Bytes of each file, for a checkpoint."""
        return {"metrics": self.metrics.sync(), "rollouts": self.rollouts.sync()}

    def truncate(self, lengths: dict[str, int]) -> None:
        """Go back to a checkpoint's files."""
        self.metrics.truncate(lengths["metrics"])
        self.rollouts.truncate(lengths["rollouts"])

    def close(self) -> None:
        self.metrics.close()
        self.rollouts.close()


def tracker_config(config: Config) -> dict[str, Any]:
    """The configuration as the flat dictionary of plain values that trackers take."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}{key}.", inner)
        else:
            flat[prefix[:-1]] = value if isinstance(value, (int, float, str, bool)) else str(value)

    walk("", to_dict(config))
    return flat


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Versions and hardware, so that a result can be placed later."""
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
        "device": str(accelerator.device),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "num_processes": accelerator.num_processes,
        "distributed_type": accelerator.distributed_type.value,
        "num_threads": torch.get_num_threads(),
    }
