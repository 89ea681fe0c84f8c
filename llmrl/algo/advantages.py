"""Rewards of groups -> advantages. Pure functions; rewards of rollouts that could not be scored are NaN.

`rewards[p, g]` is the reward of rollout g of task p. NaN entries take no part in any mean or deviation, and their
advantage is 0, so they carry no gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

EPSILON = 1e-4
"""Added to a standard deviation before dividing by it (the value TRL uses)."""


def group_advantages(
    rewards: Float[Tensor, "P G"], *, scale: Literal["group", "none"] = "group"
) -> Float[Tensor, "P G"]:
    """Reward relative to the group: A = (r - mean_g r) / (std_g r + 1e-4).

    The standard deviation is the unbiased one (n - 1). A group with fewer than two scores, or whose scores are all
    equal, gets 0 everywhere.

    Args:
        rewards: NaN where a rollout has no score.
        scale: "none" leaves out the division by the standard deviation.

    References:
        Shao et al. 2024, arXiv:2402.03300, section 4.1.2 (GRPO); Liu et al. 2025, arXiv:2503.20783 (Dr. GRPO: no
        division).
    """
    scored = ~torch.isnan(rewards)
    count = scored.sum(dim=1, keepdim=True)
    filled = torch.where(scored, rewards, 0.0)
    mean = filled.sum(dim=1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(scored, rewards - mean, 0.0)
    constant = flat_groups(rewards)[:, None] | (count < 2)
    if scale == "group":
        variance = centred.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + EPSILON)
    return torch.where(constant, 0.0, centred)


def flat_groups(rewards: Float[Tensor, "P G"]) -> Bool[Tensor, " P"]:
    """True for groups whose scores are all equal (or absent): they say nothing about which rollout was better."""
    lowest = torch.where(torch.isnan(rewards), torch.inf, rewards).amin(dim=1)
    highest = torch.where(torch.isnan(rewards), -torch.inf, rewards).amax(dim=1)
    return highest <= lowest
