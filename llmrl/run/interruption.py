"""SIGTERM and Ctrl-C: a run that is asked to end keeps what it has trained, and says how to go on.

Rollouts and evaluations are given up at once. An update is finished, since half of one is worthless. With several
processes all of them finish the step that they are in, so that they stop after the same one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Generator
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from llmrl.errors import Interrupted

if TYPE_CHECKING:
    from llmrl.model.parallel import Parallel

T = TypeVar("T")
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """Whether a run was asked to end, and by what.

    Args:
        grace_s: seconds between SIGTERM and the end, whatever the run is at. Ctrl-C has no such limit, but a second one
            ends the run at once.
        parallel: the processes.
    """

    def __init__(self, grace_s: float, parallel: Parallel) -> None:
        self.grace_s, self.parallel = grace_s, parallel
        self.signal: signal.Signals | None = None
        self.advice = "nothing was trained yet"
        """What of the run is kept if it has to end at once."""
        self._timer: threading.Timer | None = None
        self._waiting: tuple[asyncio.AbstractEventLoop, asyncio.Future[Any]] | None = None

    @contextlib.contextmanager
    def listening(self) -> Generator[None]:
        """Take signals inside the block. Only a process's main thread can; elsewhere they do what they did."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._asked) for number in SIGNALS}
        try:
            yield
        finally:
            if self._timer is not None:
                self._timer.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            # A launcher passes on what its processes got as well: there, a second one means nothing.
            if number == signal.SIGINT and self.parallel.world == 1:
                self._end_now(f"interrupted twice: {self.advice}")
            return
        self.signal = signal.Signals(number)
        if number == signal.SIGTERM:
            why = f"not done {self.grace_s:g} s after SIGTERM (train.grace_s)"
            self._timer = threading.Timer(self.grace_s, lambda: self._end_now(f"{why}: {self.advice}"))
            self._timer.daemon = True
            self._timer.start()
        if self.parallel.is_main:
            more = "; Ctrl-C again ends it at once" if number == signal.SIGINT and self.parallel.world == 1 else ""
            _say(f"{self.signal.name}: the run ends as soon as what it has trained is saved{more}")
        if self._waiting is not None and self.parallel.world == 1:
            loop, work = self._waiting
            loop.call_soon_threadsafe(work.cancel)

    def _end_now(self, why: str) -> None:
        _say(why)
        os._exit(128 + (self.signal or signal.SIGINT))

    async def giving_up(self, work: Awaitable[T]) -> T:
        """Await something that a signal ends at once, where this is the only process.

        Raises:
            Interrupted: it did.
        """
        task = asyncio.ensure_future(work)
        self._waiting = asyncio.get_running_loop(), task
        if self.signal is not None and self.parallel.world == 1:
            task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            if self.signal is None:
                task.cancel()
                raise
            raise self.end() from None
        finally:
            self._waiting = None

    def agreed(self) -> bool:
        """Return whether any process was asked to end. All call it after the same step."""
        if self.parallel.world > 1:
            asked = [number for number in self.parallel.gather_objects([int(self.signal or 0)]) if number]
            if asked and self.signal is None:
                self.signal = signal.Signals(asked[0])
        return self.signal is not None

    def end(self, advice: str = "") -> Interrupted:
        """Return the exception that ends the run."""
        assert self.signal is not None
        return Interrupted(f"{self.signal.name}: {advice or self.advice}", exit_code=128 + self.signal)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
