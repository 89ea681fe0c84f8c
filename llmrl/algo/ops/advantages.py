"""Rewards of groups -> advantages. Pure functions; rewards of rollouts without a score are NaN.

`rewards[p, g]` is the reward of rollout g of task p. NaN entries are left out of every mean and deviation, and their
advantage is 0, so they have no gradient.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

EPSILON = 1e-4
"""Added to a standard deviation before dividing by it (the value TRL uses)."""
PASSK_EPSILON = 1e-6

Over = Literal["group", "batch", "none"]


def group_advantages(
    rewards: Float[Tensor, "P G"],
    *,
    scale: Over = "group",
    mean: Over = "group",
    batch_std_of: Literal["raw", "centred"] = "raw",
) -> Float[Tensor, "P G"]:
    """Compute rewards relative to a mean, in units of a standard deviation: A = (r - mean r) / (std r + 1e-4).

    Standard deviations are unbiased (n - 1). With `mean` "group", a group with fewer than two scores, or with equal
    scores, gets 0 everywhere. A deviation over fewer than two scores, or over equal ones, is not divided by.

    Args:
        rewards: NaN where a rollout has no score.
        scale: divide by the deviation over this; "none" does not divide.
        mean: subtract the mean over this; "none" subtracts nothing.
        batch_std_of: take the batch's deviation over the rewards, or over the rewards less the mean (which leaves out
            differences between tasks).

    References:
        Shao et al. 2024, arXiv:2402.03300, section 4.1.2 (GRPO: group, group); Liu et al. 2025, arXiv:2503.20783
        (Dr. GRPO: group, none); Liu et al. 2025, arXiv:2508.08221 (Lite PPO: mean group, scale batch).
    """
    scored = ~torch.isnan(rewards)
    centred = torch.where(scored, rewards - _mean(rewards, mean), 0.0)
    if scale != "none":
        of_centred = scale == "batch" and batch_std_of == "centred"
        deviation = _deviation(torch.where(scored, centred, torch.nan) if of_centred else rewards, scale)
        centred = torch.where(deviation > 0, centred / (deviation + EPSILON), centred)
    if mean == "group":
        constant = flat_groups(rewards)[:, None] | (scored.sum(dim=1, keepdim=True) < 2)
        centred = torch.where(constant, 0.0, centred)
    return centred


def _mean(values: Float[Tensor, "P G"], over: Over) -> Tensor:
    if over == "none":
        return values.new_zeros(())
    scored = ~torch.isnan(values)
    filled = torch.where(scored, values, 0.0)
    if over == "batch":
        return filled.sum() / scored.sum().clamp(min=1)
    return filled.sum(dim=1, keepdim=True) / scored.sum(dim=1, keepdim=True).clamp(min=1)


def _deviation(values: Float[Tensor, "P G"], over: Over) -> Tensor:
    """Compute the unbiased standard deviation of the scored values; exactly 0 where they are all equal."""
    if over == "batch":
        values = values.reshape(1, -1)
    scored = ~torch.isnan(values)
    centred = torch.where(scored, values - _mean(values, "group"), 0.0)
    variance = centred.square().sum(dim=1, keepdim=True) / (scored.sum(dim=1, keepdim=True) - 1).clamp(min=1)
    # Rounding can leave a tiny deviation of equal values, and dividing by it would make noise of them.
    return torch.where(flat_groups(values)[:, None], 0.0, variance.sqrt())


def flat_groups(rewards: Float[Tensor, "P G"]) -> Bool[Tensor, " P"]:
    """Return True for groups whose scores are all equal (or absent): they do not show which rollout was better."""
    lowest = torch.where(torch.isnan(rewards), torch.inf, rewards).amin(dim=1)
    highest = torch.where(torch.isnan(rewards), -torch.inf, rewards).amax(dim=1)
    return highest <= lowest


def silent_frac(advantages: Float[Tensor, "P G"], scored: Bool[Tensor, "P G"], *, whiten: bool = False) -> float:
    """Return the share of groups whose advantages are all 0, so that they teach nothing.

    Args:
        advantages: 0 where a rollout has no score.
        scored: where it has one.
        whiten: they will be shifted by the batch's mean: then no group is silent, or all are, in a batch that is flat.
    """
    if whiten:
        return float(len(advantages[scored].unique()) < 2)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
    return (advantages == 0).all(dim=1).float().mean().item()


def leave_one_out(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """Compute A_i = r_i - mean of the group's other scores = n / (n - 1) (r_i - mean r); 0 if there are no others.

    References:
        Ahmadian et al. 2024, arXiv:2402.14740, equation 8 (RLOO).
    """
    count = (~torch.isnan(rewards)).sum(dim=1, keepdim=True)
    return group_advantages(rewards, scale="none") * count / (count - 1).clamp(min=1)


def length_weighted(rewards: Float[Tensor, "P G"], lengths: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """Compute A_i = r_i - sum_j |y_j| r_j / sum_j |y_j|: the baseline of least gradient variance for equal tokens.

    References:
        Hao et al. 2025, arXiv:2505.23585 (OPO).
    """
    scored = ~torch.isnan(rewards)
    weights = torch.where(scored, lengths, 0.0)
    total = (weights * torch.where(scored, rewards, 0.0)).sum(dim=1, keepdim=True)
    baseline = total / weights.sum(dim=1, keepdim=True).clamp(min=1)
    dead = ~scored | flat_groups(rewards)[:, None] | (scored.sum(dim=1, keepdim=True) < 2)
    return torch.where(dead, 0.0, rewards - baseline)


def greedy_baseline(rewards: Float[Tensor, "P G"], greedy: Float[Tensor, " P"]) -> Float[Tensor, "P G"]:
    """Compute A_i = r_i - r(greedy completion of the same prompt); 0 where either has no score.

    References:
        Li et al. 2023, arXiv:2310.10505 (ReMax).
    """
    return torch.nan_to_num(rewards - greedy[:, None], nan=0.0)


def pass_at_k_advantages(correct: Float[Tensor, "P G"], k: int) -> Float[Tensor, "P G"]:
    """Average a rollout's advantage for the reward "at least one of k is right" over all k-subsets that contain it.

    With N rollouts, W of them wrong:
        R = 1 - C(W, k) / C(N, k),  s = sqrt(R (1 - R))
        A_right = (1 - R) / (s + 1e-6)
        A_wrong = (1 - R - C(W - 1, k - 1) / C(N - 1, k - 1)) / (s + 1e-6)
    The advantages of a group sum to 0. Easy prompts (W < k) get 0.

    Args:
        correct: 1 right, 0 wrong, NaN without a score.
        k: size of the subsets; a group with fewer scores uses all of them.

    References:
        Chen et al. 2025, arXiv:2508.10751, section 2.4 (analytic form).
    """
    rows = torch.zeros_like(correct)
    for row, outcomes in zip(rows, correct, strict=True):
        scored = ~torch.isnan(outcomes)
        right, wrong = _pass_at_k_pair(int(scored.sum()), int((outcomes < 1).sum()), k)
        row[scored] = torch.where(outcomes[scored] >= 1, right, wrong)
    return rows


def _pass_at_k_pair(count: int, wrong: int, k: int) -> tuple[float, float]:
    """Return the advantages of a right and of a wrong rollout in a group of `count`."""
    k = min(k, count)
    if k == 0:
        return 0.0, 0.0
    failure = math.comb(wrong, k) / math.comb(count, k)
    scale = math.sqrt(failure * (1 - failure)) + PASSK_EPSILON
    without = math.comb(wrong - 1, k - 1) / math.comb(count - 1, k - 1) if wrong else 0.0
    return failure / scale, (failure - without) / scale


def multi_reward_advantages(parts: Float[Tensor, "R P G"], weights: Float[Tensor, " R"]) -> Float[Tensor, "P G"]:
    """Standardize each reward within its group, add them with weights, standardize the sum over the batch (GDPO).

    A rollout's sum is over the rewards that scored it. Where no group has signal, all advantages are 0.

    References:
        Liu et al. 2026, arXiv:2601.05242; TRL's `normalize_then_sum`.
    """
    scored = ~torch.isnan(parts)
    each = torch.stack([group_advantages(part) for part in parts])
    total = (each * weights[:, None, None]).sum(dim=0)
    found = group_advantages(torch.where(scored.any(dim=0), total, torch.nan), mean="batch", scale="batch")
    # The batch's mean is 0 up to rounding, and rounding is no signal.
    return torch.where((total != 0).any(dim=1, keepdim=True), found, 0.0)


def optimal_token_advantages(
    rewards: Float[Tensor, " G"], logprobs: list[Float[Tensor, " T"]], collisions: list[Float[Tensor, " T"]]
) -> list[Float[Tensor, " T"]]:
    """Subtract one baseline per token position of a group: the one with the least variance of the gradient so far.

        w_t = 1 - 2 pi(y_t) + sum_v pi(v)^2    (squared norm of the gradient of log pi(y_t) with respect to the logits)
        W_t = w_1 + ... + w_t,   B_t = sum_i r_i W_{i,t} / sum_i W_{i,t},   A_{i,t} = r_i - B_t

    Args:
        rewards: rewards of the group's scored rollouts, without NaN.
        logprobs: log-probabilities of each rollout's tokens under the policy that took the batch.
        collisions: sum_v pi(v)^2 at the same places.

    References:
        verl, `optimal_token_baseline`.
    """
    energies = [(1 - 2 * lp.exp() + c).cumsum(dim=0) for lp, c in zip(logprobs, collisions, strict=True)]
    longest = max((len(energy) for energy in energies), default=0)
    padded = torch.stack([torch.nn.functional.pad(energy, (0, longest - len(energy))) for energy in energies])
    baseline = (rewards[:, None] * padded).sum(dim=0) / padded.sum(dim=0).clamp(min=1e-8)
    return [reward - baseline[: len(energy)] for reward, energy in zip(rewards, energies, strict=True)]


def returns_to_go(token_rewards: Float[Tensor, " T"], gamma: float = 1.0) -> Float[Tensor, " T"]:
    """Sum each token's reward and all later ones of its sequence: G_t = r_t + gamma G_{t+1}.

    A sum over the next s rewards becomes one over 2 s: S_2s(t) = S_s(t) + gamma^s S_s(t + s). So there are log2(T)
    operations on whole tensors, in float64.
    """
    found, reach, weight = token_rewards.double(), 1, gamma
    while reach < len(found) and weight > 0:
        found = found + weight * torch.nn.functional.pad(found[reach:], (0, reach))
        reach, weight = 2 * reach, weight * weight
    return found.to(token_rewards.dtype)


def whiten(values: Float[Tensor, " M"]) -> Float[Tensor, " M"]:
    """Compute (x - mean) / sqrt(var + 1e-8) over all tokens of a batch, with the unbiased variance, as PPO does."""
    if len(values) < 2:
        return torch.zeros_like(values)
    return (values - values.mean()) * torch.rsqrt(values.var() + 1e-8)


def overlong_penalty(lengths: Float[Tensor, "P G"], *, limit: int, buffer: float) -> Float[Tensor, "P G"]:
    """Compute the soft penalty of long completions, to add to the reward.

    It is 0 up to limit - buffer tokens and falls linearly to -1 at limit.

    Args:
        lengths: completion tokens.
        limit: length at which the penalty reaches -1.
        buffer: tokens over which it falls from 0 to -1.

    References:
        Yu et al. 2025, arXiv:2503.14476, equation 13 (DAPO).
    """
    return ((limit - buffer - lengths) / buffer).clamp(-1.0, 0.0)
