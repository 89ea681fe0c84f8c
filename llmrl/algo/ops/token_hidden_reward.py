"""Token Hidden Reward: how much learning one token would raise the likelihood of the group's correct responses.

Hidden states, next-token probabilities and outcomes of one group go in; one score per token comes out, then a factor on
each token's advantage. No matrix of tokens by tokens is ever built.

With h_k the hidden state (input of the output head) that predicts token k and g_k = onehot(y_k) - pi(.|<k) the gradient
of its log-probability with respect to the logits, the gradients of two tokens with respect to the head have inner
product <g_k, g_k'> <h_k, h_k'>. Summed over the tokens k of the correct responses:

    M = sum_k w_k g_k h_k^T            one |V*| x H matrix for the group; sums over processes where the group is split
    s_k' = g_k'^T M h_k'               how one unit step on token k' changes sum_k w_k log p(y_k)
    THR_k' = (2 r - 1) s_k'            with w_k = 1 / length of its response, r = 1 for correct responses, else 0

V* are the tokens that occur in the group's responses; probabilities are not renormalised to it, so the products miss
only the terms pi_k(v) pi_k'(v) of tokens v that occur nowhere.

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
    """G = onehot(y) - pi, restricted to the columns of V*. Works in place on `probabilities`.

    Args:
        probabilities: of the tokens of V*, one row per trained token.
        target_columns: where in V* the token itself is.
    """
    errors = probabilities.neg_()
    errors[torch.arange(len(errors), device=errors.device), target_columns] += 1
    return errors


def influence_matrix(
    errors: Float[Tensor, "T V"], hidden: Float[Tensor, "T H"], weights: Float[Tensor, " T"]
) -> Float[Tensor, "V H"]:
    """M = sum_k w_k g_k h_k^T. Add the matrices of parts of a group to get the group's.

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
    """s_k = g_k^T M h_k, the influence of each token."""
    return torch.linalg.vecdot(errors @ matrix, hidden)


def threshold(
    influences: Sequence[Float[Tensor, " T"]], correct: Sequence[bool], *, rule: Threshold, value: float
) -> float:
    """The magnitude a token's score has to exceed in this group.

    - "nthr_min": value * least mean influence of a correct response (the papers, value 1). It can be negative: then
      every token exceeds it.
    - "mean": value * mean over correct responses of that.
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
    """Factor on a token's advantage: 1[|THR| > above] * (1 + sign(THR) p).

    p > 0 gives more weight to what makes correct responses likelier (exploitation), p < 0 to the rest (exploration).
    """
    return (score.abs() > above) * (1 + p * score.sign())


def nthr_weights(influences: Float[Tensor, " T"], *, eta: float, above: float) -> Float[Tensor, " T"]:
    """Factor for a token of an incorrect response: eta where its influence exceeds `above`, else 1.

    Those tokens are shared with correct responses; punishing them less keeps the correct responses likely.
    """
    return torch.where(influences > above, eta, 1.0)


def nthr_eta(correct: Bool[Tensor, " G"]) -> float:
    """The default factor 2 |0.5 - success rate|: hardest on the prompts of middling difficulty."""
    return 2 * abs(0.5 - correct.float().mean().item())


def scheduled_p(step: int, *, start: float, end: float | None, steps: int | None) -> float:
    """P at a step (from 0): `start`, or linear to `end` over `steps` steps and constant from there."""
    if end is None or steps is None:
        return start
    return start + (end - start) * min(1.0, step / steps)
