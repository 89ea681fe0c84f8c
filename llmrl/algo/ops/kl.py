"""Per-token estimators of the Kullback-Leibler divergence between the policy and another model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to plus or minus this before exp, so that one token cannot overflow a batch."""


def k1(logprobs: Float[Tensor, " M"], ref_logprobs: Float[Tensor, " M"]) -> Float[Tensor, " M"]:
    """k1 = d = logprobs - ref_logprobs: mean = KL(policy || reference) on-policy.

    Subtracted from the reward it gives the exact reverse-KL gradient. As a loss its gradient is zero on average.

    References:
        Schulman 2020, "Approximating KL divergence".
    """
    return (logprobs - ref_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def k2(logprobs: Float[Tensor, " M"], ref_logprobs: Float[Tensor, " M"]) -> Float[Tensor, " M"]:
    """k2 = d^2 / 2: biased as a value; as a loss its gradient d * grad logprobs is the reverse KL's, exact on-policy.

    References:
        Schulman 2020, "Approximating KL divergence".
    """
    return k1(logprobs, ref_logprobs).square() / 2


def k3(logprobs: Float[Tensor, " M"], ref_logprobs: Float[Tensor, " M"]) -> Float[Tensor, " M"]:
    """k3 = exp(-d) - 1 + d with d = logprobs - ref_logprobs: never negative, mean = KL(policy || reference) on-policy.

    As a loss its gradient is (1 - exp(-d)) * grad logprobs, which agrees with the reverse KL's to first order in d.
    Multiplied by the ratio (differentiated) the gradient is ratio * d * grad logprobs: exact, off-policy too.

    References:
        Schulman 2020, "Approximating KL divergence" (k3); Shao et al. 2024, arXiv:2402.03300, equation 4;
        DeepSeek-AI 2025, arXiv:2512.02556 (times the ratio).
    """
    difference = k1(logprobs, ref_logprobs)
    return (-difference).exp() - 1 + difference


def absolute(logprobs: Float[Tensor, " M"], ref_logprobs: Float[Tensor, " M"]) -> Float[Tensor, " M"]:
    """|d|: its gradient is equally strong at any distance (verl's `abs`)."""
    return k1(logprobs, ref_logprobs).abs()


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3, "abs": absolute}
"""Estimators from the drawn token. The divergence of whole distributions is in `model/logprob_head.py`."""


def adapted_beta(beta: float, measured: float, *, target: float, horizon: int, num_rollouts: int) -> float:
    """Return the KL coefficient after a step: beta * (1 + clip(KL / target - 1, -0.2, 0.2) * num_rollouts / horizon).

    A step counts as one horizon at most. Otherwise a batch of more than five horizons would turn beta negative, which
    rewards leaving the reference, and one of exactly five would set it to 0 for good.

    References:
        Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """
    error = min(max(measured / target - 1, -0.2), 0.2)
    return beta * (1 + error * min(num_rollouts / horizon, 1.0))


def penalty(
    kind: Literal["k1", "k2", "k3", "abs"], logprobs: Float[Tensor, " M"], ref_logprobs: Float[Tensor, " M"]
) -> Float[Tensor, " M"]:
    """Compute the estimator that `kind` names."""
    return ESTIMATORS[kind](logprobs, ref_logprobs)
