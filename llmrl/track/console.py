"""What a person sees while a run goes: a progress bar on a terminal, one plain line per step elsewhere."""

from __future__ import annotations

import sys
from typing import Literal

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

SHOWN = (
    ("reward", "reward/mean"),
    ("pass@1", "reward/pass@1"),
    ("length", "rollout/length/mean"),
    ("entropy", "policy/entropy"),
    ("explained", "value/explained_variance"),
    ("grad", "policy/grad_norm"),
    ("s/step", "time/step_s"),
)


class Console:
    """Output of one process; only the main one speaks."""

    def __init__(self, mode: Literal["auto", "rich", "plain", "quiet"] = "auto", *, enabled: bool = True) -> None:
        if mode == "auto":
            mode = "rich" if sys.stdout.isatty() else "plain"
        self.mode = mode if enabled else "quiet"
        self.out = RichConsole(highlight=False, soft_wrap=True)
        self._progress: Progress | None = None

    def say(self, text: str) -> None:
        """One line of information."""
        if self.mode != "quiet":
            self.out.print(text, markup=False)

    def warn(self, text: str) -> None:
        """A warning; also shown when quiet, on standard error."""
        RichConsole(stderr=True, highlight=False, soft_wrap=True).print("[bold yellow]warning:[/]", Text(text))

    def start(self, description: str, *, total: int, done: int = 0) -> None:
        """Begin a long piece of work of `total` steps."""
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
        """Show that step `number` (from 1) is done."""
        numbers = "  ".join(f"{label} {metrics[key]:.3g}" for label, key in SHOWN if key in metrics)
        if self._progress is not None:
            self._progress.update(self._bar, completed=number, numbers=numbers)
        elif self.mode == "plain":
            self.say(f"{self.description} {number}/{self.total}  {numbers}")

    def stop(self) -> None:
        """End what `start` began."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
