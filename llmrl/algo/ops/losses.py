"""Token losses of policy-gradient methods. Pure functions over the M trained tokens of a micro-batch, not reduced.

`log_ratio` is logprobs - old_logprobs; `sequence_ids` is the sequence (of S) that a token belongs to and
`sequence_lengths` the number of trained tokens of each. Losses of whole sequences are returned once per token: the mean
over a sequence's tokens is the sequence's loss.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch

from llmrl.algo.ops.kl import MAX_LOG_RATIO

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

Level = Literal["token", "sequence", "sequence_token"]
MIN_WEIGHT = 1e-8
"""VESPO's floor on a sequence's ratio."""


# --- ratios -----------------------------------------------------------------------------------------------------------


def token_ratio(logprobs: Float[Tensor, " M"], old_logprobs: Float[Tensor, " M"]) -> Float[Tensor, " M"]:
    """exp(logprobs - old_logprobs): how much more likely each token has become since the batch was taken."""
    return (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def sequence_sum(
    values: Float[Tensor, " M"], sequence_ids: Int[Tensor, " M"], sequence_lengths: Int[Tensor, " S"]
) -> Float[Tensor, " M"]:
    """Sum `values` over each sequence, and return the sum at each of its tokens."""
    sums = values.new_zeros(len(sequence_lengths)).index_add(0, sequence_ids, values)
    return sums[sequence_ids]


def sequence_mean(
    values: Float[Tensor, " M"], sequence_ids: Int[Tensor, " M"], sequence_lengths: Int[Tensor, " S"]
) -> Float[Tensor, " M"]:
    """Average `values` over each sequence, and return the mean at each of its tokens."""
    return sequence_sum(values, sequence_ids, sequence_lengths) / sequence_lengths.to(values.dtype)[sequence_ids]


def importance_ratio(
    logprobs: Float[Tensor, " M"],
    old_logprobs: Float[Tensor, " M"],
    sequence_ids: Int[Tensor, " M"],
    sequence_lengths: Int[Tensor, " S"],
    level: Level,
) -> Float[Tensor, " M"]:
    """Compute the probability ratio of the policy to the old policy.

    - "token": exp(d_t) with d = logprobs - old_logprobs.
    - "sequence": s = exp(mean_t d_t), the same for all tokens of a sequence; its gradient spreads over all of them.
    - "sequence_token": the value of s, the gradient of the token alone: sg[s] * pi_t / sg[pi_t].

    References:
        Schulman et al. 2017, arXiv:1707.06347; Zheng et al. 2025, arXiv:2507.18071, equations 7 and 14 (GSPO).
    """
    if level == "token":
        return token_ratio(logprobs, old_logprobs)
    mean = sequence_mean(logprobs - old_logprobs, sequence_ids, sequence_lengths)
    mean = mean.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if level == "sequence":
        return mean.exp()
    return mean.detach().exp() * (logprobs - logprobs.detach()).exp()


# --- losses -----------------------------------------------------------------------------------------------------------


def clipped_surrogate(
    ratio: Float[Tensor, " M"],
    advantages: Float[Tensor, " M"],
    *,
    epsilon: float,
    epsilon_high: float,
    delta: float | None = None,
    dual_clip: float | None = None,
) -> Float[Tensor, " M"]:
    """Compute the clipped policy-gradient loss of each token, with separate bounds:

        loss = -min(min(ratio, delta) * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A)

    and for A < 0 at most -dual_clip * A.

    Its gradient is zero where the clipped branch is the smaller one: the token has moved far enough in the direction of
    its advantage. A larger `epsilon_high` leaves rare tokens room to grow. `delta` and `dual_clip` bound the loss of a
    token with a negative advantage and an exploding ratio; beyond either bound its gradient is zero.

    Example:
        >>> clipped_surrogate(torch.tensor([1.0, 1.5]), torch.ones(2), epsilon=0.2, epsilon_high=0.28)
        tensor([-1.0000, -1.2800])

    References:
        Schulman et al. 2017, arXiv:1707.06347, equation 7 (PPO); Yu et al. 2025, arXiv:2503.14476, equation 10 (DAPO's
        clip-higher); Ye et al. 2019, arXiv:1912.09729, equation 5 (dual clip); Prime Intellect 2025, arXiv:2505.07291
        (two-sided: delta).
    """
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    free = ratio if delta is None else ratio.clamp(max=delta)
    losses = -torch.minimum(free * advantages, clipped * advantages)
    if dual_clip is None:
        return losses
    return torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)


def clip_masks(
    ratio: Float[Tensor, " M"],
    advantages: Float[Tensor, " M"],
    *,
    epsilon: float,
    epsilon_high: float,
) -> tuple[Bool[Tensor, " M"], Bool[Tensor, " M"]]:
    """Return where the clipped surrogate has no gradient: (at the lower bound, at the upper bound)."""
    return (ratio < 1 - epsilon) & (advantages < 0), (ratio > 1 + epsilon_high) & (advantages > 0)


def cispo_loss(
    ratio: Float[Tensor, " M"], logprobs: Float[Tensor, " M"], advantages: Float[Tensor, " M"], *, max_ratio: float
) -> Float[Tensor, " M"]:
    """Loss = -sg[min(ratio, max_ratio)] * A * logprobs: the weight is bounded, and no token loses its gradient.

    `max_ratio` is the cap itself (as in TRL and ScaleRL), not its distance from 1 (as in verl).

    References:
        MiniMax 2025, arXiv:2506.13585, equation 4 (CISPO); Khatri et al. 2025, arXiv:2510.13786 (cap of 5).
    """
    return -ratio.detach().clamp(max=max_ratio) * advantages * logprobs


def sapo_loss(
    ratio: Float[Tensor, " M"], advantages: Float[Tensor, " M"], *, temperature_pos: float, temperature_neg: float
) -> Float[Tensor, " M"]:
    """Loss = -f(ratio) * A with the soft gate f(x) = 4 / tau * sigmoid(tau (x - 1)): slope 1 at x = 1, decaying both
    ways.

    References:
        Gao et al. 2025, arXiv:2511.20347 (SAPO).
    """
    tau = torch.where(advantages > 0, temperature_pos, temperature_neg)
    return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages


def gmpo_loss(
    log_ratio: Float[Tensor, " M"],
    advantages: Float[Tensor, " M"],
    sequence_ids: Int[Tensor, " M"],
    sequence_lengths: Int[Tensor, " S"],
    *,
    epsilon: float,
) -> Float[Tensor, " M"]:
    """Loss of a sequence = -A * exp(mean_t clip(d_t)): the geometric mean of token ratios, clipped in log space.

    A token's log-ratio d is clipped at +epsilon where A > 0 and at -epsilon where A < 0 (the pessimistic side only).

    References:
        Zhao et al. 2025, arXiv:2507.20673 (GMPO).
    """
    clipped = torch.where(advantages >= 0, log_ratio.clamp(max=epsilon), log_ratio.clamp(min=-epsilon))
    return -advantages * sequence_mean(clipped, sequence_ids, sequence_lengths).exp()


def vespo_loss(
    log_ratio: Float[Tensor, " M"],
    logprobs: Float[Tensor, " M"],
    advantages: Float[Tensor, " M"],
    sequence_ids: Int[Tensor, " M"],
    sequence_lengths: Int[Tensor, " S"],
    *,
    k_pos: float,
    lambda_pos: float,
    k_neg: float,
    lambda_neg: float,
) -> Float[Tensor, " M"]:
    """Loss = -sg[W^k exp(lambda (1 - W))] * A * logprobs with W the ratio of the whole sequence (a product over
    tokens).

    The weight is 1 at W = 1 and falls on both sides; (k, lambda) differ by the sign of A.

    References:
        Shen et al. 2026, arXiv:2602.10693 (VESPO).
    """
    with torch.no_grad():
        clamped = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        log_w = sequence_sum(clamped, sequence_ids, sequence_lengths).clamp(math.log(MIN_WEIGHT), MAX_LOG_RATIO)
        k = torch.where(advantages >= 0, k_pos, k_neg)
        slope = torch.where(advantages >= 0, lambda_pos, lambda_neg)
        weight = (slope + k * log_w - slope * log_w.exp()).exp()
    return -weight * advantages * logprobs


def kl_cov_loss(
    ratio: Float[Tensor, " M"],
    log_ratio: Float[Tensor, " M"],
    advantages: Float[Tensor, " M"],
    selected: Float[Tensor, " M"],
    *,
    coef: float,
) -> Float[Tensor, " M"]:
    """Loss = -ratio * A, plus coef * |log_ratio| on the selected tokens (those with the highest covariance).

    References:
        Cui et al. 2025, arXiv:2505.22617, equation 12 (KL-Cov).
    """
    return -ratio * advantages + coef * selected * log_ratio.abs()
