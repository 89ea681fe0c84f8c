"""The lite box: rlimits, Landlock and a system-call filter, for containers without namespaces. Needs no package."""

from __future__ import annotations

from llmrl.sandbox.server import BoxPlan

REASON = "rlimits + Landlock + seccomp, without namespaces"


def plan(packages: tuple[str, ...]) -> BoxPlan:
    """How to start a lite box; its programs can write nowhere."""
    return BoxPlan(wrap=lambda command, _: command, landlock="required", scratch=None, packages=packages)
