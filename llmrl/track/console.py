"""What a person sees during a run: a progress bar on a terminal, one plain line per step elsewhere."""

from __future__ import annotations

import sys
from typing import Literal

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from llmrl.errors import printable
from llmrl.track import names

SHOWN = (
    ("reward", names.REWARD),
    ("pass@1", names.PASS_1),
    ("length", names.LENGTH),
    ("entropy", names.ENTROPY),
    ("explained", names.EXPLAINED),
    ("grad", names.GRAD_NORM),
    ("s/step", names.STEP_SECONDS),
)
"""Metrics of a step's line, with their short labels; those that a run does not have are left out."""


class Console:
    """Print for one process; every process but the main one is quiet.

    Args:
        mode: `auto` is rich on a terminal and plain elsewhere; `quiet` prints warnings only.
        enabled: this is the main process.
    """

    def __init__(self, mode: Literal["auto", "rich", "plain", "quiet"] = "auto", *, enabled: bool = True) -> None:
        if mode == "auto":
            mode = "rich" if sys.stdout.isatty() else "plain"
        self.mode = mode if enabled else "quiet"
        self.out = RichConsole(highlight=False, soft_wrap=True)
        self._progress: Progress | None = None

    def say(self, text: str) -> None:
        """Print one line of information."""
        if self.mode != "quiet":
            self.out.print(printable(text), markup=False)

    def warn(self, text: str) -> None:
        """Print a warning on standard error, in every mode."""
        # Text() keeps brackets in the message ([fn], list[int]) from being read as markup.
        RichConsole(stderr=True, highlight=False, soft_wrap=True).print(
            "[bold yellow]warning:[/]", Text(printable(text))
        )

    def start(self, description: str, *, total: int, done: int = 0) -> None:
        """Begin work of `total` steps, of which `done` are done."""
        if self.mode == "rich":
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self.out,
            )
            self._progress.start()
            self._bar = self._progress.add_task(description, total=total, completed=done, numbers="")
        self.description, self.total = description, total

    def step(self, number: int, metrics: dict[str, float]) -> None:
        """Show that step `number` (counted from 1) is done."""
        numbers = "  ".join(f"{label} {metrics[key]:.3g}" for label, key in SHOWN if key in metrics)
        if self._progress is not None:
            self._progress.update(self._bar, completed=number, numbers=numbers)
        elif self.mode == "plain":
            self.say(f"{self.description} {number}/{self.total}  {numbers}")

    def stop(self) -> None:
        """End the work that `start` began; calling it twice is fine."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
