"""Progress of long work: a bar on a terminal, a plain line every few seconds elsewhere, nothing for what is quick."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Generator

PATIENCE_S = 5.0
"""Work that takes less long shows nothing."""
EVERY_S = 10.0
"""Seconds between plain lines."""


@contextlib.contextmanager
def progress(
    what: str, total: int, *, unit: str = "", patience: float = PATIENCE_S
) -> Generator[Callable[[int], None]]:
    """Yield a function to call with the number of items done since the last call.

    Args:
        what: shown in front ("sampling").
        total: items in all.
        unit: what the items are ("tasks").
        patience: seconds before anything is shown.
    """
    shown = _Bar(what, total) if sys.stderr.isatty() else _Lines(what, total, unit)
    start, done = time.monotonic(), 0

    def advance(count: int = 1) -> None:
        nonlocal done
        done += count
        if time.monotonic() - start >= patience:
            shown.update(done)

    try:
        yield advance
    finally:
        shown.stop()


class _Bar:
    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.bar = what, total, None

    def update(self, done: int) -> None:
        if self.bar is None:
            from rich.console import Console
            from rich.progress import Progress

            self.bar = Progress(console=Console(stderr=True))
            self.task = self.bar.add_task(self.what, total=self.total)
            self.bar.start()
        self.bar.update(self.task, completed=done)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()


class _Lines:
    def __init__(self, what: str, total: int, unit: str) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.last: float | None = None

    def update(self, done: int) -> None:
        now = time.monotonic()
        if self.last is None or now - self.last >= EVERY_S or done == self.total:
            self.last = now
            print(f"{self.what}: {done} of {self.total} {self.unit}".rstrip(), file=sys.stderr, flush=True)

    def stop(self) -> None:
        pass
