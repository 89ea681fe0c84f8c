"""Options for what a run writes and shows."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from llmrl.option import Count, option


@option
class TrackConfig:
    """What is written and shown. metrics.jsonl and rollouts.jsonl are always written."""

    report_to: list[str] = field(default_factory=list)
    """Trackers that accelerate knows: tensorboard, wandb, trackio, mlflow ..."""
    project: str = "llmrl"
    """Project name in the trackers."""
    run_name: str | None = None
    """Run name in the trackers (in TensorBoard, the folder). Default: the tracker's own."""
    save_rollouts: Literal["all", "sample", "none"] = "all"
    """rollouts.jsonl: every rollout, the first group of each step, or nothing."""
    num_saved_rollouts: Count | None = None
    """Most rollouts of one step in rollouts.jsonl, the first ones. A million tokens take 35 MB, 56 MB with advantages
    per token. Default: no limit."""
    console: Literal["auto", "rich", "plain", "quiet"] = "auto"
    """`auto`: rich on a terminal, plain lines elsewhere."""
