from __future__ import annotations

from typing import Any

import pytest

from llmrl.sandbox import Limits, watch
from llmrl.sandbox.watch import TICK_S, Stopwatch

LIMITS = Limits(cpu_seconds=10, wall_seconds=20.0)


class Machine:
    """A machine on which time passes as a test says; it is the clock and what measures the program."""

    def __init__(self) -> None:
        self.now = self.cpu = self.queued = 0.0

    def monotonic(self) -> float:
        return self.now

    def times(self) -> tuple[float, float]:
        return self.cpu, self.queued

    def close(self) -> None:
        pass

    def passes(self, seconds: float, *, cpu: float = 0.0, queued: float = 0.0) -> None:
        self.now, self.cpu, self.queued = self.now + seconds, self.cpu + cpu, self.queued + queued


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine()
    monkeypatch.setattr(watch, "time", found)
    return found


def stopwatch(machine: Any) -> Stopwatch:
    started = Stopwatch(LIMITS, lambda: machine)
    started.resume()
    return started


def test_waiting_for_a_processor_does_not_count(machine: Machine) -> None:
    clock = stopwatch(machine)
    assert clock.next_wait() == TICK_S
    machine.passes(300.0, cpu=9.5, queued=290.0)
    assert clock.next_wait() == TICK_S and not clock.over
    assert clock.used() == (9.5, 10.0) and clock.seconds == 10.0
    machine.passes(16.0, cpu=0.5, queued=15.5)
    assert clock.next_wait() == 0.0 and clock.over  # ten seconds of processor time


def test_a_program_that_sleeps_reaches_the_limit_on_real_time(machine: Machine) -> None:
    clock = stopwatch(machine)
    machine.passes(1.0)
    assert clock.next_wait() == TICK_S
    machine.passes(18.75, cpu=0.01)
    assert clock.next_wait() == pytest.approx(0.25)
    machine.passes(0.25)
    assert clock.next_wait() == 0.0 and not clock.over


def test_each_test_begins_anew_and_time_between_answers_is_free(machine: Machine) -> None:
    clock = stopwatch(machine)
    machine.passes(9.0, cpu=9.0)
    assert clock.next_wait() > 0.0
    clock.pause()
    machine.passes(100.0)
    assert clock.elapsed == 9.0
    clock.restart()
    clock.resume()
    machine.passes(9.0, cpu=9.0)
    assert clock.next_wait() > 0.0 and not clock.over
    assert clock.seconds == 18.0
    machine.passes(1.0, cpu=1.0)
    assert clock.over and clock.next_wait() == 0.0


def test_what_quick_tests_used_before_is_not_charged_to_a_slow_one(machine: Machine) -> None:
    clock = stopwatch(machine)
    for _ in range(100):
        machine.passes(0.25, cpu=0.25)
        assert clock.next_wait() > 0.0
        clock.pause()
        clock.restart()
        clock.resume()
    machine.passes(9.0, cpu=9.0)
    assert clock.next_wait() > 0.0
    assert clock.used() == (9.0, 9.0)
