"""A critic's values: advantages, targets, losses and diagnostics, as pure functions.

Rectangles are [N, T]: one row per rollout, one column per token that the policy sampled, zeros after a row's end.
Tokens of the environment (observations, tool results) have no column: the state after a turn's last token is the one
before the next turn's first token, with everything observed in between in its context. So bootstrapping and discounting
step from policy token to policy token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float, Int
    from torch import Tensor


def pad(rows: Sequence[Float[Tensor, " L"]]) -> Float[Tensor, "N T"]:
    """Pad ragged rows to a rectangle in float64, with zeros after each row's end."""
    return torch.nn.utils.rnn.pad_sequence([row.double() for row in rows], batch_first=True)


def gae(
    rewards: Float[Tensor, "N T"],
    values: Float[Tensor, "N T"],
    *,
    gamma: float,
    lam: float | Float[Tensor, " N"],
) -> Float[Tensor, "N T"]:
    """Compute the generalized advantage estimate of every token.

        delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lambda A_{t+1}

    The value after a row's last token is 0: the episode ends there, also where a limit truncated it. A + V is the
    lambda-return, the critic's target; with lambda 1 it is the (discounted) sum of the remaining rewards.

    Args:
        rewards: r_t, the reward of token t; zeros after a row's end.
        values: V_t, of the state before token t; zeros after a row's end.
        gamma: discount per step.
        lam: lambda, one for all rows or one per row.

    References:
        Schulman et al. 2015, arXiv:1506.02438, equation 16.
    """
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = (rewards + gamma * after - values).T.contiguous()
    decay = gamma * torch.as_tensor(lam, dtype=values.dtype, device=values.device)
    advantages, later = torch.empty_like(deltas), torch.zeros_like(deltas[0])
    for t in range(len(deltas) - 1, -1, -1):
        later = deltas[t] + decay * later
        advantages[t] = later
    return advantages.T


def length_adaptive_lambda(lengths: Int[Tensor, " N"], alpha: float) -> Float[Tensor, " N"]:
    """Compute lambda for a rollout of l tokens: max(0, 1 - 1 / (alpha l)), for which sum_t lambda^t is about alpha l.

    References:
        Yue et al. 2025, arXiv:2504.05118, equation 7 (VAPO; alpha 0.05).
    """
    return (1 - 1 / (alpha * lengths.clamp(min=1).double())).clamp(min=0)


def value_loss(
    values: Float[Tensor, " M"],
    old_values: Float[Tensor, " M"],
    returns: Float[Tensor, " M"],
    *,
    clip: float,
) -> tuple[Float[Tensor, " M"], Bool[Tensor, " M"]]:
    """Compute the squared error of each token's value, and where clipping removed its gradient.

        loss = max((V - R)^2, (V_old + clamp(V - V_old, -clip, clip) - R)^2) / 2

    Once a value has moved by more than `clip` towards its target, it has no gradient. With `clip` 0 nothing is clipped.

    References:
        Schulman et al. 2017, OpenAI baselines `ppo2`; Yue et al. 2025, arXiv:2504.05118 (VAPO).
    """
    free = (values - returns).square() / 2
    if not clip:
        return free, torch.zeros_like(free, dtype=torch.bool)
    clipped = (old_values + (values - old_values).clamp(-clip, clip) - returns).square() / 2
    # Inside the clip both terms are the same number, and rounding alone decides which is larger.
    outside = (values - old_values).abs() > clip
    return torch.maximum(free, clipped), (clipped > free) & outside


def explained_variance(values: Float[Tensor, " M"], returns: Float[Tensor, " M"]) -> float:
    """1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for one no better than the mean.

    NaN where all returns are equal: there is no variance to explain.
    """
    total = returns.double().var(correction=0).item() if len(returns) else 0.0
    if total == 0:
        return float("nan")
    return 1 - (returns - values).double().var(correction=0).item() / total
