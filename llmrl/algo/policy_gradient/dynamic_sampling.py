"""Dynamic sampling: draw groups until enough of them carry signal.

A group whose accuracies are all equal has advantage 0 everywhere. The filter looks at accuracy, not at the shaped
reward: a length penalty would make nearly every group look mixed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmrl.types import Rollout, RolloutGroup


async def collect_informative(
    draw: Callable[[int], Awaitable[list[RolloutGroup]]], num_groups: int, *, max_batches: int, accuracy: str
) -> tuple[list[RolloutGroup], list[RolloutGroup]]:
    """Draw until `num_groups` groups have mixed accuracies, or max_batches * num_groups have been drawn.

    Each round draws as many as are missing, so nothing informative is thrown away. When the cap is reached, groups
    without signal fill the rest: they cost no forward pass and keep the denominators what they would have been.

    Args:
        draw: returns the scored groups of the given number of further tasks.
        num_groups: groups of a batch.
        max_batches: cap on the groups drawn, in batches.
        accuracy: name of the score part to filter on; "" is the reward.

    Returns:
        (exactly `num_groups` groups to train on, all groups drawn), both in the order they were drawn in.

    References:
        Yu et al. 2025, arXiv:2503.14476, section 3.2 (DAPO).
    """
    drawn: list[RolloutGroup] = []
    informative: list[bool] = []
    while (missing := num_groups - sum(informative)) > 0 and (left := max_batches * num_groups - len(drawn)) > 0:
        new = await draw(min(missing, left))
        drawn += new
        informative += [is_mixed(group, accuracy) for group in new]
    spare = num_groups - sum(informative)
    chosen: list[RolloutGroup] = []
    for group, has_signal in zip(drawn, informative, strict=True):
        if has_signal or spare > 0:
            chosen.append(group)
            spare -= not has_signal
    return chosen, drawn


def is_mixed(group: RolloutGroup, accuracy: str) -> bool:
    """Return whether the scored rollouts of a group differ in accuracy."""
    values = {value for rollout in group.rollouts if (value := _accuracy(rollout, accuracy)) is not None}
    return len(values) > 1


def _accuracy(rollout: Rollout, name: str) -> float | None:
    if rollout.score is None or rollout.score.reward is None:
        return None
    return rollout.score.parts.get(name) if name else rollout.score.reward
