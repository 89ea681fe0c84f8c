"""The best model of a run by a metric of its evaluations: the folder best/, and what is known about it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrl.errors import RunFailed
from llmrl.run.model_folder import save_model
from llmrl.track.files import replace_text

if TYPE_CHECKING:
    from llmrl.config import OfflineEvalConfig
    from llmrl.model.policy import Policy

FOLDER = "best"
FACTS = "best.json"
"""In that folder: the metric, its value and the step."""


class Best:
    """Keeps the best model of the evaluations so far.

    Args:
        options: with `keep_best`.
        output_dir: the run's folder.
    """

    def __init__(self, options: OfflineEvalConfig, output_dir: Path) -> None:
        self.metric, self.sign = options.keep_best, 1.0 if options.better == "up" else -1.0
        self.output_dir, self.folder = output_dir, output_dir / FOLDER
        self.value: float | None = None
        self.step: int | None = None

    def take(self, step: int, found: dict[str, float]) -> bool:
        """Return whether the evaluation after `step` is the best so far.

        Raises:
            RunFailed: the evaluation did not measure the metric.
        """
        if self.metric is None:
            return False
        if self.metric not in found:
            raise RunFailed(
                f"eval.keep_best {self.metric} was not measured: the evaluation has {', '.join(found) or 'nothing'}"
            )
        value = found[self.metric]
        if not math.isfinite(value) or (self.value is not None and self.sign * value <= self.sign * self.value):
            return False
        self.value, self.step = value, step
        return True

    def save(self, policy: Policy, tokenizer: Any) -> None:
        """Write the model of `self.step`, unless the folder holds it already (on the main process)."""
        assert self.step is not None
        facts = {"step": self.step, "metric": self.metric, "value": self.value}
        if self.saved() == facts:
            return
        save_model(self.folder, policy, tokenizer, run=self.output_dir, step=self.step)
        replace_text(self.folder / FACTS, json.dumps(facts) + "\n")

    def saved(self) -> dict[str, Any] | None:
        """Return what is known about the model in the folder, or None if there is none."""
        file = self.folder / FACTS
        return json.loads(file.read_text()) if file.is_file() else None

    def line(self) -> str:
        """Return a line for the user about where the best model is; "" if none is kept."""
        if self.step is None:
            return ""
        saved = self.saved()
        if saved is None or saved["step"] != self.step:
            other = "nothing" if saved is None else f"the model of step {saved['step']}, of a part that was given up"
            return f"best so far: {self.metric} {self.value:.4g} after step {self.step}; {self.folder} holds {other}"
        return f"best: {self.metric} {self.value:.4g} after step {self.step}, saved in {self.folder}"

    def state_dict(self) -> dict[str, Any]:
        """Return the best evaluation so far."""
        return {"metric": self.metric, "value": self.value, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore from `state_dict`; another metric begins anew."""
        if state.get("metric") == self.metric:
            self.value, self.step = state["value"], state["step"]
