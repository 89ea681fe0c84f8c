"""Time limits for rewards that run in this process: a call goes in, its value or a LimitReached comes out.

Code that blocks the main thread (a loop, a sleep, a socket, a regular expression) is interrupted by a signal, which
raises inside it; that keeps rewards on the thread on which they may use alarms, CUDA and files that are not
thread-safe. Where there is no such signal, because the event loop runs in another thread, the call runs in a thread of
its own, which is abandoned at the limit. What awaits is cancelled, and no longer driven when it ignores that. Neither
way ends C code that never returns to the interpreter: `POOL = True` runs a reward in a process that can be killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import inspect
import os
import signal
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Coroutine, Generator, Iterator
from typing import Any, ClassVar

GRACE_S = 5.0
"""How long a cancelled coroutine may still clean up."""
REPEAT_S = 1.0
"""Code that catches everything gets the exception again after this long."""
SIGNAL: int = getattr(signal, "SIGRTMIN", signal.SIGUSR2 - 7) + 7
"""Not SIGALRM, which rewards use for limits of their own."""


class LimitReached(BaseException):
    """Raised inside a call at its time limit. No `except Exception` of a reward may catch it."""


async def call(function: Callable[[], Any], time_limit_s: float) -> Any:
    """Return the value of `function()`, awaited if it is awaitable.

    Raises:
        LimitReached: the call was still running after `time_limit_s` seconds, and was given up.
    """
    deadline = time.monotonic() + time_limit_s
    if _watchdog.works_here:
        with _watchdog.limit(deadline):
            value = function()
    else:
        value = await _in_a_thread(function, time_limit_s)
        deadline = time.monotonic() + time_limit_s  # waiting for a turn does not count
    return await _within(value, deadline) if inspect.isawaitable(value) else value


async def _within(awaitable: Any, deadline: float) -> Any:
    call = _Call(awaitable, deadline)
    task = asyncio.ensure_future(_drive(call))
    try:
        while not task.done() and (left := call.deadline - time.monotonic()) > 0:
            await asyncio.wait({task}, timeout=left)
    except asyncio.CancelledError:
        task.cancel()
        raise
    if task.done():
        value, error = task.result()
        if error is not None:
            raise error
        return value
    call.dropped_at = time.monotonic() + GRACE_S
    task.cancel()
    task.add_done_callback(_forget)
    raise LimitReached


def _forget(task: asyncio.Task[Any]) -> None:
    """Take the exception of a task that nobody waits for, so that asyncio does not print it."""
    if not task.cancelled():
        task.exception()


class _Call:
    """An awaitable of a reward. From `dropped_at` on it is not driven further."""

    def __init__(self, awaitable: Any, deadline: float) -> None:
        self.iterator: Coroutine[Any, Any, Any] | Generator[Any, Any, Any] = (
            awaitable if inspect.iscoroutine(awaitable) else awaitable.__await__()
        )
        self.own_s = 0.0
        self._deadline, self._busy_s = deadline, _watchdog.busy_s
        self.dropped_at: float | None = None

    @property
    def deadline(self) -> float:
        """The deadline, moved by as long as other calls have blocked the event loop meanwhile."""
        return self._deadline + _watchdog.busy_s - self._busy_s - self.own_s

    def step(self, value: Any, error: BaseException | None) -> Any:
        """Run to the next suspension. A step that blocks the event loop is interrupted at the deadline."""
        if self.dropped_at is not None and time.monotonic() > self.dropped_at:
            with contextlib.suppress(BaseException):  # it may refuse to end; it is not asked again
                self.iterator.close()
            raise LimitReached
        started = time.monotonic()
        try:
            with _watchdog.limit(self.dropped_at or self.deadline):
                return self._send(value, error)
        finally:
            self.own_s += time.monotonic() - started

    def _send(self, value: Any, error: BaseException | None) -> Any:
        return self.iterator.send(value) if error is None else self.iterator.throw(error)


@types.coroutine
def _drive(call: _Call) -> Generator[Any, Any, tuple[Any, BaseException | None]]:
    """Await a call step by step, as `await` would, with the watchdog around each step.

    Returns:
        Its value, or what it raised: a task that raises SystemExit would end the event loop.
    """
    value: Any = None
    error: BaseException | None = None
    while True:
        try:
            waited_for = call.step(value, error)
        except StopIteration as done:
            return done.value, None
        except (Exception, LimitReached, SystemExit) as raised:
            return None, raised
        try:
            value, error = (yield waited_for), None
        except GeneratorExit:
            call.iterator.close()
            raise
        except BaseException as thrown:
            value, error = None, thrown


# --- code that blocks -------------------------------------------------------------------------------------------------


class _Event(ctypes.Structure):
    """`struct sigevent` of Linux, with the thread that gets the signal."""

    _fields_: ClassVar = [
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("thread", ctypes.c_int),
        ("rest", ctypes.c_char * 44),
    ]


class _Times(ctypes.Structure):
    """`struct itimerspec`: seconds and nanoseconds between two signals, and until the first."""

    _fields_: ClassVar = [(name, ctypes.c_long) for name in ("every_s", "every_ns", "first_s", "first_ns")]


_SIGEV_THREAD_ID = 4


class _Watchdog:
    """A timer of the kernel that sends the main thread a signal when the call that runs there is past its deadline.

    A thread of Python could not send it: it would wait for the interpreter lock, which a regular expression holds.
    """

    def __init__(self) -> None:
        self.deadline: float | None = None
        self.busy_s = 0.0
        """How long rewards have run on the main thread, in total."""
        self.has_timers = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "timer_create")
        self._library = ctypes.CDLL(None, use_errno=True)
        self._timer = ctypes.c_void_p()
        self._process: int | None = None

    @property
    def works_here(self) -> bool:
        """Whether this thread can be interrupted."""
        return self.has_timers and threading.current_thread() is threading.main_thread()

    @contextlib.contextmanager
    def limit(self, deadline: float) -> Iterator[None]:
        """Raise LimitReached in the code inside that still runs at the deadline, if it can be interrupted."""
        if not self.works_here:
            yield
            return
        if self._process != os.getpid():  # a fork has no timers
            self._create()
        outer, started = self.deadline, time.monotonic()
        try:
            try:
                self._arm(deadline)
                yield
            finally:
                self._arm(outer)
        finally:  # the signal may have come before the line above: no deadline may outlive its call
            self._arm(outer)
            self.busy_s += time.monotonic() - started

    def _create(self) -> None:
        signal.signal(SIGNAL, self._raise)
        event = _Event(signal=SIGNAL, notify=_SIGEV_THREAD_ID, thread=threading.get_native_id())
        if self._library.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer)):
            raise OSError(ctypes.get_errno(), "timer_create failed")
        self._process = os.getpid()

    def _arm(self, deadline: float | None) -> None:
        """Set the timer, or stop it."""
        self.deadline = deadline
        seconds = 0.0 if deadline is None else max(deadline - time.monotonic(), 1e-6)
        times = _Times(int(REPEAT_S), int(REPEAT_S % 1 * 1e9), int(seconds), int(seconds % 1 * 1e9))
        self._library.timer_settime(self._timer, 0, ctypes.byref(times), None)

    def _raise(self, number: int, frame: types.FrameType | None) -> None:
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise LimitReached


_watchdog = _Watchdog()


async def _in_a_thread(function: Callable[[], Any], time_limit_s: float) -> Any:
    """Run a function in a daemon thread, which is left behind at the limit. Calls take turns, as on a main thread."""
    loop = asyncio.get_running_loop()
    async with _turns.setdefault(loop, asyncio.Lock()):
        return await _alone_in_a_thread(function, time_limit_s, loop)


_turns: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = weakref.WeakKeyDictionary()


async def _alone_in_a_thread(function: Callable[[], Any], time_limit_s: float, loop: asyncio.AbstractEventLoop) -> Any:
    future: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if not future.done():
            future.set_result((value, error))

    def run() -> None:
        value, failure = None, None
        try:
            value = function()
        except BaseException as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, value, failure)

    threading.Thread(target=run, name="reward", daemon=True).start()
    try:
        value, failure = await asyncio.wait_for(future, time_limit_s)
    except TimeoutError:
        raise LimitReached from None
    if failure is not None:
        raise failure
    return value
