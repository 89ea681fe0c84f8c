"""The lite box: rlimits, Landlock and a system-call filter. It works in containers and needs no package."""

from __future__ import annotations

from llmrl.sandbox.server import BoxPlan

REASON = "rlimits + Landlock + seccomp, without namespaces"


def plan(packages: tuple[str, ...]) -> BoxPlan:
    """Return how to start a lite box. Its programs cannot write anywhere."""
    return BoxPlan(wrap=lambda command, _: command, landlock="required", scratch=None, packages=packages)
