"""Measuring a running program from outside, so that its limits do not depend on what else the machine does."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable

from llmrl.sandbox.limits import Limits

TICK_S = 0.5
"""A program that answers within this real time is not measured at all."""
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class Watch:
    """Reads a process's times from /proc, by a descriptor of the process. Closes the descriptor at the end."""

    def __init__(self, pidfd: int) -> None:
        self._pidfd = pidfd
        with open(f"/proc/self/fdinfo/{pidfd}") as info:
            pid = next(int(line.split()[1]) for line in info if line.startswith("Pid:"))
        self._folder = f"/proc/{pid}" if pid > 0 else ""
        self._cpu = self._queued = 0.0
        self._measured = time.monotonic()

    def times(self) -> tuple[float, float]:
        """Return the processor time of all threads, and the time that a thread was ready but had no processor.

        Of several threads the one that waited longest counts. The last measurement stands for a process that has ended.
        """
        with contextlib.suppress(OSError, ValueError, IndexError):
            with open(f"{self._folder}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            cpu = (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND
            self._queued = max(self._queued, self._queue_time(cpu))
            self._cpu, self._measured = max(self._cpu, cpu), time.monotonic()
        return self._cpu, self._queued

    def _queue_time(self, cpu: float) -> float:
        waited = []
        for thread in os.listdir(f"{self._folder}/task"):
            try:
                with open(f"{self._folder}/task/{thread}/schedstat") as file:
                    waited.append(int(file.read().split()[1]) / 1e9)
            except OSError:
                continue
        if waited:
            return max(waited)
        # A kernel without these statistics. A program that works without pause and has less than a processor waits for
        # the rest; one that sleeps uses none.
        elapsed, used = time.monotonic() - self._measured, cpu - self._cpu
        return self._queued + (max(0.0, elapsed - used) if used > 0.01 * elapsed else 0.0)

    def close(self) -> None:
        """Close the descriptor. Safe to call twice."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


class Stopwatch:
    """The time of one run, or of one test in a session, against its limits.

    It runs while an answer of the program is awaited. Time in which the program waits for a processor does not count,
    so a program takes the same time on a busy machine.

    Args:
        limits: cpu_seconds and wall_seconds are those of one run.
        watch: starts to measure the program; returns None if it has ended.
    """

    def __init__(self, limits: Limits, watch: Callable[[], Watch | None]) -> None:
        self._limits, self._start_watch = limits, watch
        self._watch: Watch | None = None
        self._before = self._elapsed = 0.0
        self._resumed: float | None = None
        self._times = (0.0, 0.0)

    def resume(self) -> None:
        """Begin to wait for an answer."""
        self._resumed = time.monotonic()

    def pause(self) -> None:
        """The answer has come."""
        self._elapsed, self._resumed = self.elapsed, None

    @property
    def elapsed(self) -> float:
        """Real seconds of this test in which an answer was awaited."""
        return self._elapsed + (time.monotonic() - self._resumed if self._resumed is not None else 0.0)

    @property
    def seconds(self) -> float:
        """The time of all tests so far, as in `used`; those that took less than TICK_S each count as nothing."""
        return self._before + self.used()[1]

    def used(self) -> tuple[float, float]:
        """Return (processor time, real time without waiting for a processor) of this test so far."""
        if self._watch is None:
            return 0.0, 0.0
        cpu, queued = (now - then for now, then in zip(self._watch.times(), self._times, strict=True))
        return cpu, max(cpu, self.elapsed - queued)

    def restart(self) -> None:
        """Begin the next test."""
        self._before = self.seconds
        self._elapsed = 0.0
        self._times = self._watch.times() if self._watch else (0.0, 0.0)

    def next_wait(self) -> float:
        """Return how many seconds to wait for the program before asking again; 0 if its time is over."""
        elapsed, first = self.elapsed, min(TICK_S, self._limits.wall_seconds)
        if elapsed < first:
            return first - elapsed
        if self._watch is None:
            self._watch = self._start_watch()
            if self._watch is None:  # it has ended, so its last words or its end can be read at once
                return TICK_S
            cpu, queued = self._watch.times()
            # What earlier tests used was not measured: at most this much belongs to the present one.
            self._times = max(0.0, cpu - elapsed), max(0.0, queued - elapsed)
        cpu, own = self.used()
        if cpu >= self._limits.cpu_seconds:
            return 0.0
        return max(0.0, min(TICK_S, self._limits.wall_seconds - own))

    @property
    def over(self) -> bool:
        """Whether this test has used more processor time than allowed. A test without a long wait has not."""
        return self._watch is not None and self.elapsed > TICK_S and self.used()[0] >= self._limits.cpu_seconds

    def close(self) -> None:
        """Stop measuring."""
        if self._watch is not None:
            self._before = self.seconds
            self._watch.close()
            self._watch = None
