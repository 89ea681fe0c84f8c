"""What the tests of the sandbox share: limits, a box that works here, and equality that tells types apart."""

from __future__ import annotations

import math
from typing import Any

import pytest

from llmrl.sandbox import Limits, SandboxUnavailable
from llmrl.sandbox.local import LocalSandbox

SHORT = Limits(cpu_seconds=1, wall_seconds=3.0, memory_mb=256, output_mb=2)
LIMITS = Limits(cpu_seconds=5, wall_seconds=20.0, memory_mb=256, output_mb=2)


def any_box(**options: Any) -> LocalSandbox:
    for kind in ("lite", "bwrap"):
        try:
            return LocalSandbox(kind, **options)
        except SandboxUnavailable as error:
            reason = str(error)
    pytest.skip(reason)


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
