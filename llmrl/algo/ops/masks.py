"""Which tokens and sequences take part in the policy loss. Pure functions with the same result on every process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from llmrl.algo.ops.losses import sequence_mean

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

COVARIANCE_RANGE = (1.0, 5.0)
"""Clip-Cov selects among tokens whose covariance lies between these."""


def high_entropy_mask(entropies: Float[Tensor, " M"], fraction: float) -> Bool[Tensor, " M"]:
    """True for the `fraction` of tokens with the highest entropy: those at or above its (1 - fraction) quantile.

    References:
        Wang et al. 2025, arXiv:2506.01939, equation 5 (the 80/20 rule; fraction 0.2).
    """
    if not len(entropies):
        return torch.zeros(0, dtype=torch.bool)
    # torch.quantile refuses more than 2**24 values. This interpolates between order statistics in the same way.
    ordered = entropies.sort().values
    place = (1 - fraction) * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return entropies >= torch.lerp(ordered[below], ordered[above], place - below)


def token_covariance(logprobs: Float[Tensor, " M"], advantages: Float[Tensor, " M"]) -> Float[Tensor, " M"]:
    """(A_t - mean A) (logprob_t - mean logprob) over the tokens of a batch. Its mean drives the fall of the entropy.

    References:
        Cui et al. 2025, arXiv:2505.22617, equation 10.
    """
    return (advantages - advantages.mean()) * (logprobs - logprobs.mean())


def clip_cov_selection(
    covariance: Float[Tensor, " M"], fraction: float, generator: torch.Generator
) -> Bool[Tensor, " M"]:
    """Select the tokens whose gradient Clip-Cov removes: max(1, fraction * M) drawn from those in `COVARIANCE_RANGE`.

    References:
        Cui et al. 2025, arXiv:2505.22617, equation 11.
    """
    low, high = COVARIANCE_RANGE
    candidates = torch.nonzero((covariance > low) & (covariance < high))[:, 0]
    count = min(len(candidates), max(1, int(fraction * len(covariance))))
    chosen = candidates[torch.randperm(len(candidates), generator=generator)[:count]]
    selected = torch.zeros(len(covariance), dtype=torch.bool)
    selected[chosen] = True
    return selected


def kl_cov_selection(covariance: Float[Tensor, " M"], fraction: float) -> Bool[Tensor, " M"]:
    """Select the tokens that KL-Cov penalizes: the max(1, fraction * M) with the highest covariance.

    References:
        Cui et al. 2025, arXiv:2505.22617, equation 12.
    """
    selected = torch.zeros(len(covariance), dtype=torch.bool)
    if len(covariance):
        selected[covariance.topk(max(1, int(fraction * len(covariance)))).indices] = True
    return selected


def off_policy_keep(
    logprobs: Float[Tensor, " M"],
    rollout_logprobs: Float[Tensor, " M"],
    advantages: Float[Tensor, " M"],
    sequence_ids: Int[Tensor, " M"],
    sequence_lengths: Int[Tensor, " S"],
    *,
    threshold: float,
) -> Bool[Tensor, " M"]:
    """False for tokens of sequences to drop: A < 0 and mean_t(rollout_logprobs - logprobs) > threshold.

    A bad sequence that the policy has already moved far away from teaches it nothing and can disturb it.

    References:
        DeepSeek-AI 2025, arXiv:2512.02556, section 3.1 (off-policy sequence masking).
    """
    gap = torch.nan_to_num(rollout_logprobs - logprobs.detach(), nan=0.0)
    return (advantages >= 0) | (sequence_mean(gap, sequence_ids, sequence_lengths) <= threshold)
