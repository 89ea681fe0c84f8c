"""Token Hidden Reward: how much learning one token would raise the likelihood of the group's correct responses.

The input is the hidden states, next-token probabilities and outcomes of one group. The output is one score per token,
then a factor on each token's advantage. No matrix of tokens by tokens is built.

With h_k the hidden state (input of the output head) that predicts token k and g_k = onehot(y_k) - pi(.|<k) the gradient
of its log-probability with respect to the logits, the gradients of two tokens with respect to the head have inner
product <g_k, g_k'> <h_k, h_k'>. Summed over the tokens k of the correct responses:

    M = sum_k w_k g_k h_k^T            one |V*| x H matrix for the group; sums over processes where the group is split
    s_k' = g_k'^T M h_k'               how one unit step on token k' changes sum_k w_k log p(y_k)
    THR_k' = (2 r - 1) s_k'            with w_k = 1 / length of its response, r = 1 for correct responses, else 0

V* is the set of tokens that occur in the group's responses. Probabilities are not renormalized to it, so the products
omit only the terms pi_k(v) pi_k'(v) of tokens v outside it.

References:
    Deng et al. 2025, arXiv:2510.03669 (THR); Deng et al. 2025, arXiv:2505.18830 (NTHR, and the restriction to V*).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float, Int
    from torch import Tensor

Threshold = Literal["nthr_min", "mean", "quantile", "none"]


def prediction_errors(probabilities: Float[Tensor, "T V"], target_columns: Int[Tensor, " T"]) -> Float[Tensor, "T V"]:
    """Compute G = onehot(y) - pi, restricted to the columns of V*, in place of `probabilities`.

    Args:
        probabilities: probabilities of the tokens of V*, one row per trained token; overwritten.
        target_columns: the trained token's own column.
    """
    errors = probabilities.neg_()
    errors[torch.arange(len(errors), device=errors.device), target_columns] += 1
    return errors


def influence_matrix(
    errors: Float[Tensor, "T V"], hidden: Float[Tensor, "T H"], weights: Float[Tensor, " T"]
) -> Float[Tensor, "V H"]:
    """Compute M = sum_k w_k g_k h_k^T. The matrix of a group is the sum of the matrices of its parts.

    Args:
        errors: from `prediction_errors`.
        hidden: float32.
        weights: 1 / response length (THR) or 1 (NTHR) for tokens of correct responses, 0 for all others.
    """
    chosen = torch.nonzero(weights)[:, 0]
    return errors[chosen].T @ (weights[chosen, None] * hidden[chosen])


def influence(
    errors: Float[Tensor, "T V"], hidden: Float[Tensor, "T H"], matrix: Float[Tensor, "V H"]
) -> Float[Tensor, " T"]:
    """Compute s_k = g_k^T M h_k, the influence of each token."""
    return torch.linalg.vecdot(errors @ matrix, hidden)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def threshold(
    influences: Sequence[Float[Tensor, " T"]], correct: Sequence[bool], *, rule: Threshold, value: float
) -> float:
    """Compute the magnitude that a token's score must exceed in this group.

    - "nthr_min": value * smallest mean influence of a correct response (as in the papers, with value 1). It can be
      negative: then every token exceeds it.
    - "mean": value * average mean influence of the correct responses.
    - "quantile": the `value` quantile of |influence| over all tokens of the group.
    - "none": -infinity.
    """
    if rule == "none":
        return float("-inf")
    if rule == "quantile":
        return torch.cat(list(influences)).abs().quantile(value).item()
    means = torch.stack([s.mean() for s, right in zip(influences, correct, strict=True) if right])
    return value * (means.min() if rule == "nthr_min" else means.mean()).item()


def thr_weights(score: Float[Tensor, " T"], *, p: float, above: float) -> Float[Tensor, " T"]:
    """Compute the factor on a token's advantage: 1[|THR| > above] * (1 + sign(THR) p).

    p > 0 gives more weight to tokens that make correct responses more likely (exploitation), p < 0 to the others
    (exploration).
    """
    return (score.abs() > above) * (1 + p * score.sign())


def nthr_weights(influences: Float[Tensor, " T"], *, eta: float, above: float) -> Float[Tensor, " T"]:
    """Compute the factor of a token of an incorrect response: eta where its influence exceeds `above`, else 1.

    The selected tokens also support correct responses; penalizing them less keeps the correct responses likely.
    """
    return torch.where(influences > above, eta, 1.0)


def nthr_eta(correct: Bool[Tensor, " G"]) -> float:
    """Return the default factor 2 |0.5 - success rate|: 0 where half of the responses are right."""
    return 2 * abs(0.5 - correct.float().mean().item())


def scheduled_p(step: int, *, start: float, end: float | None, steps: int | None) -> float:
    """Return p at a step (from 0): `start`, or linear to `end` over `steps` steps and constant afterwards."""
    if end is None or steps is None:
        return start
    return start + (end - start) * min(1.0, step / steps)
