"""Options for what a run writes and shows."""

from __future__ import annotations

import difflib
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from llmrl.option import Count, Natural, option

KNOWN = {
    name: name
    for name in ("tensorboard", "wandb", "trackio", "mlflow", "aim", "clearml", "comet_ml", "dvclive", "swanlab")
}
"""The trackers, and the package of each."""
EXTRAS = ("tensorboard", "wandb", "trackio", "mlflow")
"""Trackers that are extras of this package. They get tables of completions, and a resumed run continues theirs."""


def _names(value: Any) -> Any:
    """Return a list of trackers also for one name or for several with commas; `none` is no tracker."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return value
    return [name.strip() for name in names if name.strip() not in ("", "none")]


@option
class TrackConfig:
    """What is written and shown. metrics.jsonl and rollouts.jsonl are always written."""

    report_to: Annotated[list[str], BeforeValidator(_names)] = field(default_factory=list)
    """Trackers: tensorboard, wandb, trackio, mlflow (each an extra of that name), or aim, clearml, comet_ml, dvclive,
    swanlab. One name may stand without a list; `all` means those that are installed."""
    project: str | None = None
    """Project name in the trackers. Default: the tracker's own variable (WANDB_PROJECT ...), else llmrl."""
    run_name: str | None = None
    """Run name in the trackers (in TensorBoard, the folder). Default: the tracker's own."""
    log_completions_steps: Natural = 20
    """Send a table of completions with prompts, rewards and parts to the trackers every so many steps, and after the
    first; 0: never."""
    save_rollouts: Literal["all", "sample", "none"] = "all"
    """rollouts.jsonl: every rollout, the first group of each step, or nothing."""
    num_saved_rollouts: Count | None = None
    """Most rollouts of one step in rollouts.jsonl, the first ones. A million tokens take 35 MB, 56 MB with advantages
    per token. Default: no limit."""
    console: Literal["auto", "rich", "plain", "quiet"] = "auto"
    """`auto`: rich on a terminal, plain lines elsewhere."""

    def findings(self) -> list[str]:
        """Return what types cannot express: unknown trackers, and options that no tracker reads."""
        found = []
        for name in self.report_to:
            if name not in KNOWN and name != "all":
                near = difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.6)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                found.append(f"track.report_to: no tracker is called {name!r}{hint} (known: {', '.join(KNOWN)})")
        if not self.report_to:
            usual = TrackConfig()
            found += [
                f"track.{name} is set, but track.report_to names no tracker that would read it: add one, such as "
                "`--track.report_to wandb`, or leave it out"
                for name in ("project", "run_name", "log_completions_steps")
                if getattr(self, name) != getattr(usual, name)
            ]
        return found
