"""Shared by the tests of the sandbox: limits, a box that works here, and equality that tells types apart."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest

from llmrl.sandbox import Limits, SandboxUnavailable
from llmrl.sandbox.local import LocalSandbox

SHORT = Limits(cpu_seconds=1, wall_seconds=3.0, memory_mb=256, output_mb=2)
"""For programs that never end: others could miss it on a busy machine."""
LIMITS = Limits(cpu_seconds=60, wall_seconds=300.0, memory_mb=256, output_mb=2)
"""For all other programs: no time limit that they could reach."""


def any_box(**options: Any) -> LocalSandbox:
    for kind in ("lite", "bwrap"):
        try:
            return LocalSandbox(kind, **options)
        except SandboxUnavailable as error:
            reason = str(error)
    pytest.skip(reason)


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Return when the condition holds, or after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        if math.isnan(one):
            return math.isnan(other)
        return math.copysign(1, one) == math.copysign(1, other) and one == other
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return bool(one == other)
