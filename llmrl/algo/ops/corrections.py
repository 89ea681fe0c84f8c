"""The mismatch between sampler and policy: how large it is, and weights that correct the loss for it.

kappa_t = pi_old(y_t) / mu(y_t) is the trainer's probability of a token when the batch was taken, divided by the
sampler's. It differs from 1 where the engine computes differently from the trainer (types, kernels) and where rollouts
are stale. Pure functions over the M trained tokens of a micro-batch; any algorithm may call `of_batch`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from llmrl.algo.ops.kl import MAX_LOG_RATIO
from llmrl.algo.ops.losses import sequence_sum

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from llmrl.types import Counts, MicroBatch

WEIGHTS, SQUARES = "kl/mismatch/weights", "kl/mismatch/squares"
"""Sums from which `finish_metrics` computes the effective sample size."""


def log_kappa(old_logprobs: Float[Tensor, " M"], rollout_logprobs: Float[Tensor, " M"]) -> Float[Tensor, " M"]:
    """old_logprobs - rollout_logprobs, without gradient; 0 (no correction) where the sampler reported none."""
    return torch.nan_to_num(old_logprobs.detach() - rollout_logprobs, nan=0.0)


def correction_weights(
    old_logprobs: Float[Tensor, " M"],
    rollout_logprobs: Float[Tensor, " M"],
    sequence_ids: Int[Tensor, " M"],
    sequence_lengths: Int[Tensor, " S"],
    *,
    mode: str,
    clip_min: float,
    clip_max: float,
) -> tuple[Float[Tensor, " M"], Bool[Tensor, " M"]]:
    """Return the factor of each token's loss, and which tokens the bounds changed. No gradient.

    - "token_truncate" (TIS): clip(kappa_t, clip_min, clip_max).
    - "token_mask" (token MIS; with bounds 0.5 and 5 IcePop): kappa_t, and 0 outside [clip_min, clip_max].
    - "sequence_truncate", "sequence_mask": the same with the product of kappa over a sequence in place of kappa_t.

    Example:
        >>> correction_weights(torch.log(torch.tensor([0.4, 1.0, 6.0])), torch.zeros(3), torch.zeros(3, dtype=int),
        ...     torch.tensor([3]), mode="token_mask", clip_min=0.5, clip_max=5.0)
        (tensor([0., 1., 0.]), tensor([ True, False,  True]))

    References:
        Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training" (TIS); Liu et al.
        2025, "When speed kills stability" (sequences, MIS); Ling Team 2025, arXiv:2510.18855 (IcePop). Names as in TRL.
    """
    log_weights = log_kappa(old_logprobs, rollout_logprobs)
    if mode.startswith("sequence"):
        log_weights = sequence_sum(log_weights, sequence_ids, sequence_lengths)
    weights = log_weights.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    outside = (weights < clip_min) | (weights > clip_max)
    if mode.endswith("mask"):
        return weights.masked_fill(outside, 0.0), outside
    return weights.clamp(clip_min, clip_max), outside


def of_batch(
    mode: str, bounds: tuple[float, float], old_logprobs: Float[Tensor, " M"], batch: MicroBatch, counts: Counts
) -> tuple[Float[Tensor, " M"], dict[str, Tensor]]:
    """Compute the weights of a micro-batch, and shares of their metrics.

    Multiply the policy loss of each token by them, before a KL penalty is added. Tokens that are masked stay in the
    denominators.

    Args:
        mode: as in `correction_weights`.
        bounds: (low, high).
        old_logprobs: `batch.old_logprobs`, or the policy's own where the batch has none: with a single optimizer step
            per batch they are the same.
        batch: gives the sampler's log-probabilities.
        counts: the global denominators.
    """
    weights, outside = correction_weights(
        old_logprobs,
        batch.rollout_logprobs,
        batch.sequence_ids,
        batch.sequence_lengths,
        mode=mode,
        clip_min=bounds[0],
        clip_max=bounds[1],
    )
    key = "loss/sampler_masked_frac" if mode.endswith("mask") else "loss/sampler_truncated_frac"
    total = counts.num_computed_tokens
    return weights, {key: outside.sum() / total, "loss/sampler_weight": weights.sum() / total}


# --- metrics ----------------------------------------------------------------------------------------------------------


def mismatch_metrics(
    logprobs: Float[Tensor, " M"], rollout_logprobs: Float[Tensor, " M"], num_tokens: int
) -> dict[str, Tensor]:
    """Measure how far the trainer's log-probabilities are from the sampler's, as shares of `num_tokens` tokens.

    kl/mismatch: mean k3 = kappa - 1 - log kappa (nats; the sampler drew the tokens, so its mean is
    KL(sampler || trainer)); kl/mismatch/gap and /max: mean and largest |log kappa|; kl/mismatch/ratio/max: largest
    kappa. `finish_metrics` computes kl/mismatch/ess from the rest.
    """
    log_ratio = log_kappa(logprobs, rollout_logprobs)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    none = ratio.new_zeros(())
    return {
        "kl/mismatch": (ratio - 1 - log_ratio).sum() / num_tokens,
        "kl/mismatch/gap": log_ratio.abs().sum() / num_tokens,
        "kl/mismatch/max": log_ratio.abs().amax() if len(ratio) else none,
        "kl/mismatch/ratio/max": ratio.amax() if len(ratio) else none,
        WEIGHTS: ratio.sum() / num_tokens,
        SQUARES: ratio.square().sum() / num_tokens,
    }


def finish_metrics(report: dict[str, float]) -> dict[str, float]:
    """Replace the sums over all micro-batches and processes by kl/mismatch/ess = (sum kappa)^2 / (M sum kappa^2).

    This effective sample size, from 0 to 1, is the share of tokens that would carry as much information if the policy
    had drawn them.
    """
    report = dict(report)
    weights, squares = report.pop(WEIGHTS, 0.0), report.pop(SQUARES, 0.0)
    return report | ({"kl/mismatch/ess": weights**2 / squares} if squares > 0 else {})
