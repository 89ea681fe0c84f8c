"""The age of rollouts: the policy's version minus that of the weights that wrote them."""

from __future__ import annotations

from collections.abc import Sequence

from llmrl.types import RolloutGroup


def staleness(groups: Sequence[RolloutGroup], version: int) -> list[int]:
    """Return, for each rollout, `version` minus that of the oldest weights that wrote one of its tokens."""
    rollouts = [rollout for group in groups for rollout in group.rollouts if rollout.turns]
    return [version - min(turn.policy_version[0] for turn in rollout.turns) for rollout in rollouts]


def staleness_metrics(groups: Sequence[RolloutGroup], version: int) -> dict[str, float]:
    """Return the mean and the maximum of the rollouts' ages, in policy versions."""
    ages = staleness(groups, version)
    return {
        "rollout/staleness/mean": sum(ages) / max(1, len(ages)),
        "rollout/staleness/max": float(max(ages, default=0)),
    }
