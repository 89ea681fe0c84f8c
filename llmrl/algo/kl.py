"""Per-token estimators of the Kullback-Leibler divergence between the policy and another model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +- this before exp, so that one token cannot overflow a batch."""


def k3(logprobs: Float[Tensor, " M"], ref_logprobs: Float[Tensor, " M"]) -> Float[Tensor, " M"]:
    """k3 = exp(-d) - 1 + d with d = logprobs - ref_logprobs: never negative, mean = KL(policy || reference) on-policy.

    As a loss its gradient is (1 - exp(-d)) * grad logprobs, which agrees with the reverse KL's to first order in d.

    References:
        Schulman 2020, "Approximating KL divergence" (k3); Shao et al. 2024, arXiv:2402.03300, equation 4.
    """
    difference = (logprobs - ref_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (-difference).exp() - 1 + difference
