"""The trackers of a run (wandb, tensorboard, ...): metrics and completions go out, and a resumed run goes on there.

They exist on the main process only. metrics.jsonl is the record, so a tracker that fails costs a warning, not the run.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmrl.errors import UserError, first_line
from llmrl.track.backends import BACKENDS, Backend, Start
from llmrl.track.files import replace_text
from llmrl.track.metrics import completion_table
from llmrl.track.options import EXTRAS, KNOWN, TrackConfig
from llmrl.types import RolloutGroup

FILE = "trackers.json"
"""In the run's folder: what each tracker calls the run, and the last step that it was sent."""
NOTHING = -1
"""The last step that a new run was sent."""


class Trackers:
    """Send what a run measures to its trackers.

    Args:
        options: which trackers, and the names there.
        folder: the run's folder.
        config: the run's options as plain values.
        warn: shows a line to the user.
    """

    def __init__(
        self, options: TrackConfig, folder: Path, config: dict[str, Any], *, warn: Callable[[str], object]
    ) -> None:
        self.options, self.folder, self.config, self.warn = options, folder, config, warn
        self.backends: dict[str, Backend] = {}
        self.known: dict[str, dict[str, Any]] = {}
        self.failed: set[str] = set()

    def start(self, step: int) -> None:
        """Start the trackers of a run, or of its next part.

        Args:
            step: steps that are done already.

        Raises:
            UserError: a tracker cannot be started (no login, no server).
        """
        file = self.folder / FILE
        self.known = json.loads(file.read_text()) if file.is_file() else {}
        for name in chosen(self.options.report_to):
            known = self.known.setdefault(name, {"id": None, "step": NOTHING})
            begin = Start(
                project=self.options.project,
                run_name=self.options.run_name,
                id=known["id"],
                step=step,
                folder=self.folder,
                config=self.config,
            )
            try:
                backend = BACKENDS[name](begin) if name in BACKENDS else BACKENDS["accelerate"](begin, name)
            except Exception as error:
                self.close(failed=True)
                text = f"{type(error).__name__}: {first_line(error)}"
                raise UserError(f"track.report_to {name}: it cannot be started ({text}){_hint(name)}") from error
            if known["id"] is None or known["id"] != backend.id:  # another run, which holds no steps yet
                known["step"] = NOTHING
            known["id"] = backend.id
            self.backends[name] = backend
        self._remember()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Send the metrics of a step (0: before the first).

        Steps that a tracker was sent before the run was resumed are not sent again, or it would show them twice.
        """
        for name, backend in self.backends.items():
            if (backend.replaces or step > self.known[name]["step"]) and self._send(name, step, backend.log, metrics):
                self.known[name]["step"] = max(step, self.known[name]["step"])
        if self.backends:
            self._remember()

    def table(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """Send some of a step's completions, every `track.log_completions_steps` steps; before the step's metrics."""
        every = self.options.log_completions_steps
        if not every or (step % every and step != 1) or not self.backends:
            return
        columns, rows = completion_table(step, groups)
        for name, backend in self.backends.items():
            if rows and step > self.known[name]["step"]:
                self._send(name, step, backend.table, columns, rows)

    def _send(self, name: str, step: int, send: Callable[..., object], *content: object) -> bool:
        """Return whether a tracker took what it was sent. It may fail and come back; that is said once."""
        try:
            send(*content, step)
        except Exception as error:
            if name not in self.failed:
                self.failed.add(name)
                self.warn(f"{name} failed at step {step} ({first_line(error)}); the run goes on without it")
            return False
        return True

    def close(self, *, failed: bool) -> None:
        """End the trackers' runs; `failed` is what they are marked as."""
        for name, backend in self.backends.items():
            try:
                backend.close(failed)
            except Exception as error:
                self.warn(f"{name} could not be closed: {first_line(error)}")
        self.backends = {}

    def _remember(self) -> None:
        replace_text(self.folder / FILE, json.dumps(self.known, indent=2) + "\n")


def chosen(report_to: Sequence[str]) -> list[str]:
    """Return the trackers to start, each once; `all` means those that are installed."""
    names = [name for name in KNOWN if _installed(name)] if "all" in report_to else report_to
    return list(dict.fromkeys(names))


def check_installed(report_to: Sequence[str]) -> None:
    """Raise a UserError if the package of a tracker is missing."""
    for name in report_to:
        if name in KNOWN and not _installed(name):
            package = f"'llmrl[{name}]'" if name in EXTRAS else KNOWN[name].replace("_", "-")
            raise UserError(
                f"track.report_to {name}: its package is not installed: pip install {package}, or leave it out"
            )


def _installed(name: str) -> bool:
    try:
        spec = importlib.util.find_spec(KNOWN[name])
    except (ImportError, ValueError):
        return False
    # Trackers write to folders of their own name, which look like packages when they lie in the working directory.
    return spec is not None and spec.origin is not None


def _hint(name: str) -> str:
    return ": run `wandb login`, or set WANDB_MODE=offline" if name == "wandb" else ""
