"""Token losses of policy-gradient methods. Pure functions over the M trained tokens of a micro-batch, no reduction."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from llmrl.algo.kl import MAX_LOG_RATIO

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


def token_ratio(logprobs: Float[Tensor, " M"], old_logprobs: Float[Tensor, " M"]) -> Float[Tensor, " M"]:
    """exp(logprobs - old_logprobs), how much likelier the policy has made each token since the batch was taken."""
    return (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def clipped_surrogate(
    ratio: Float[Tensor, " M"],
    advantages: Float[Tensor, " M"],
    *,
    epsilon: float,
    epsilon_high: float,
) -> Float[Tensor, " M"]:
    """The clipped policy-gradient loss of each token, with separate bounds:

        loss = -min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A)

    Its gradient is zero where the clipped branch is the smaller one: the token has moved far enough in the direction
    its advantage asks for. A larger `epsilon_high` leaves rare tokens room to grow.

    Example:
        >>> clipped_surrogate(torch.tensor([1.0, 1.5]), torch.ones(2), epsilon=0.2, epsilon_high=0.28)
        tensor([-1.0000, -1.2800])

    References:
        Schulman et al. 2017, arXiv:1707.06347, equation 7 (PPO); Yu et al. 2025, arXiv:2503.14476, equation 10 (DAPO's
        clip-higher).
    """
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def clip_masks(
    ratio: Float[Tensor, " M"],
    advantages: Float[Tensor, " M"],
    *,
    epsilon: float,
    epsilon_high: float,
) -> tuple[Bool[Tensor, " M"], Bool[Tensor, " M"]]:
    """Where the clipped surrogate has no gradient: (at the lower bound, at the upper bound)."""
    return (ratio < 1 - epsilon) & (advantages < 0), (ratio > 1 + epsilon_high) & (advantages > 0)
