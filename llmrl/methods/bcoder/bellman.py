"""B-Coder's mathematics: a Q function made of logits and a value, and its conservative Bellman targets.

Streams hold one entry per trained token, one sequence after the other. State s_t is the prompt and the tokens before
token t, the action is token t, the only reward comes with the last token.

References:
    Yu et al. 2024, "B-Coder: Value-Based Deep Reinforcement Learning for Program Synthesis", arXiv:2310.03173.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

MAX_REWARD = 1.0
"""R_max: a program that passes."""
SOUND_SOFTABS = -math.log(2)
"""The constant with which SOFTABS(0) = 0, so that every value up to R_max can be reached. The paper prints +ln 2: then
no value exceeds R_max - 2 ln 2 = -0.386, and the reward of a program that passes is out of reach."""


def softabs(x: Tensor, const: float = SOUND_SOFTABS) -> Tensor:
    """Compute [softplus(x) + softplus(-x)] / 2 + const, a smooth |x| / 2 (appendix G.1)."""
    return (F.softplus(x) + F.softplus(-x)) / 2 + const


def capped_value(raw: Tensor, const: float = SOUND_SOFTABS) -> Tensor:
    """Compute V = R_max - SOFTABS(raw). With A <= 0 no Q exceeds R_max (appendix G.1)."""
    return MAX_REWARD - softabs(raw, const)


def raw_of_value(value: float, const: float = SOUND_SOFTABS) -> float:
    """Return the x >= 1 whose capped_value(x) is closest to `value`. Below 1 the slope vanishes: a bad start.

    From (softplus(x) + softplus(-x)) / 2 = ln(2 cosh(x / 2)).
    """
    return 2 * math.acosh(max(math.exp(MAX_REWARD - const - value) / 2, math.cosh(0.5)))


def advantage(logits: Float[Tensor, "M V"], actions: Int[Tensor, " M"], alpha: float = 1.0) -> Float[Tensor, " M"]:
    """Compute A(s, a) = alpha (l(s, a) - max_a' l(s, a')): 0 for the greedy token, below 0 for others (section 4.1)."""
    return alpha * (logits.gather(1, actions[:, None])[:, 0] - logits.amax(1))


def last_tokens(sequence_ids: Int[Tensor, " M"]) -> Bool[Tensor, " M"]:
    """Return True at the last token of each sequence."""
    last = torch.ones_like(sequence_ids, dtype=torch.bool)
    last[:-1] = sequence_ids[1:] != sequence_ids[:-1]
    return last


def next_in_sequence(values: Float[Tensor, " M"], sequence_ids: Int[Tensor, " M"]) -> Float[Tensor, " M"]:
    """Return the value one token later in the same sequence; 0 after the last, where the episode ends."""
    shifted = torch.cat([values[1:], values[:1]])
    return shifted.masked_fill(last_tokens(sequence_ids), 0.0)


def bellman_targets(
    rewards: Float[Tensor, " M"],
    anchor_q: Float[Tensor, " M"],
    sequence_ids: Int[Tensor, " M"],
    *,
    gamma: float,
) -> Float[Tensor, " M"]:
    """Compute (B^q Q)(s_t, a_t) = r_t + gamma Q(s_{t+1}, argmax_a q(a | s_{t+1})), without gradient (equation 6).

    The next action is that of a fixed q, the model before training, and not Q's own best. So the operator evaluates q's
    greedy policy, is a contraction, and never takes the maximum over a vocabulary of estimation errors.

    Args:
        rewards: reward of each token; only a sequence's last token has one.
        anchor_q: Q(s_t, argmax_a q(a | s_t)) of the state before each token.
        sequence_ids: which sequence a token belongs to.
        gamma: discount per token.
    """
    return rewards + gamma * next_in_sequence(anchor_q.detach(), sequence_ids)


def td_loss(
    q: Float[Tensor, " M"],
    targets: Float[Tensor, " M"],
    sequence_ids: Int[Tensor, " M"],
    sequence_lengths: Int[Tensor, " S"],
) -> Float[Tensor, " M"]:
    """Compute each token's (target - Q)^2 / T, with T the tokens of its sequence (L_V and L_Q, section 4.4).

    The loss is their sum, divided by the number of sequences.
    """
    return (targets.detach() - q).square() / sequence_lengths[sequence_ids]


def recovered_reward(
    advantages: Float[Tensor, " M"],
    values: Float[Tensor, " M"],
    sequence_ids: Int[Tensor, " M"],
    *,
    gamma: float,
    anchor_advantages: Float[Tensor, " M"] | None = None,
) -> Float[Tensor, " M"]:
    """Compute the reward that Q implies for each token: the Bellman operator inverted (section 4.5).

    Its sum over a program ranks programs: r(s_t, a_t) = Q(s_t, a_t) - gamma V(s_{t+1}).

    Args:
        advantages: A(s_t, a_t), alpha included.
        values: V(s_t).
        sequence_ids: which sequence a token belongs to.
        gamma: discount per token.
        anchor_advantages: A(s_t, argmax_a q(a | s_t)), for the exact form with gamma Q(s_{t+1}, argmax q).
    """
    following = values if anchor_advantages is None else values + anchor_advantages
    return advantages + values - gamma * next_in_sequence(following, sequence_ids)


def per_sequence(values: Float[Tensor, " M"], sequence_ids: Int[Tensor, " M"], num: int) -> Float[Tensor, " S"]:
    """Return the sum over the tokens of each sequence."""
    return values.new_zeros(num).index_add(0, sequence_ids, values)
