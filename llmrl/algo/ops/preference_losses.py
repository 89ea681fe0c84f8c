"""Losses of preference pairs, and of single completions with a label: pure functions, one value per pair.

Symbols: the log-ratio x = log pi(y) - log pi_ref(y) of a completion (summed over its tokens), its score f(x) (x itself
unless another f-divergence is chosen), and delta = f(x_chosen) - f(x_rejected). S is log sigmoid, e is
`label_smoothing`. The loss of a batch is the mean over its pairs. Losses without a reference take the mean
log-probability of a completion's tokens in place of x.

All of them derive from Rafailov et al. 2023, arXiv:2305.18290 (DPO).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn.functional import logsigmoid

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
MAX_EXPONENT = 80.0
"""Larger exponents are clamped: exp of more than 88 overflows float32."""


def f_score(
    log_ratio: Float[Tensor, " K"], divergence: FDivergence = "reverse_kl", *, alpha: float = 0.5
) -> Float[Tensor, " K"]:
    """Compute f'(pi / pi_ref) of the divergence that ties the policy to the reference; x itself for the reverse KL.

        forward_kl        1 - exp(-x)
        js_divergence     log 2 + S(x)
        alpha_divergence  (exp((alpha - 1) x) - 1) / (alpha - 1)       (x at alpha = 1)

    Source: Wang et al. 2023, arXiv:2309.16240, table 1.
    """
    if divergence == "forward_kl":
        return 1 - torch.exp(-log_ratio)
    if divergence == "js_divergence":
        return math.log(2) + logsigmoid(log_ratio)
    if divergence == "alpha_divergence" and abs(alpha - 1) > 1e-6:
        return torch.expm1(((alpha - 1) * log_ratio).clamp(max=MAX_EXPONENT)) / (alpha - 1)
    return log_ratio


# --- of the difference of two scores ----------------------------------------------------------------------------------


def sigmoid_loss(delta: Float[Tensor, " K"], *, beta: float, label_smoothing: float = 0.0) -> Float[Tensor, " K"]:
    """-(1 - e) S(beta delta) - e S(-beta delta): DPO; with e > 0 cDPO, for labels wrong with probability e.

    Sources: arXiv:2305.18290, equation 7; Mitchell 2023, "A note on DPO with noisy preferences".
    """
    margin = beta * delta
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def hinge_loss(delta: Float[Tensor, " K"], *, beta: float) -> Float[Tensor, " K"]:
    """max(0, 1 - beta delta).

    Sources: Zhao et al. 2023, arXiv:2305.10425 (SLiC); Liu et al. 2023, arXiv:2309.06657 (RSO).
    """
    return torch.relu(1 - beta * delta)


def ipo_loss(delta_per_token: Float[Tensor, " K"], *, beta: float) -> Float[Tensor, " K"]:
    """(delta - 1 / (2 beta))^2 with every score divided by its completion's length; beta is the paper's tau.

    Source: Azar et al. 2023, arXiv:2310.12036, equation 17; the authors later recommended the division by length.
    """
    return (delta_per_token - 1 / (2 * beta)) ** 2


def exo_pair_loss(delta: Float[Tensor, " K"], *, beta: float, label_smoothing: float) -> Float[Tensor, " K"]:
    """KL(softmax(beta * scores) || (1 - e, e)) = q (log q - log(1 - e)) + (1 - q) (log(1 - q) - log e), q = sigmoid.

    Source: Ji et al. 2024, arXiv:2402.00856, equation 16. e must be above 0.
    """
    q, log_q, log_not_q = torch.sigmoid(beta * delta), logsigmoid(beta * delta), logsigmoid(-beta * delta)
    return q * (log_q - math.log1p(-label_smoothing)) + (1 - q) * (log_not_q - math.log(label_smoothing))


def robust_loss(delta: Float[Tensor, " K"], *, beta: float, label_smoothing: float) -> Float[Tensor, " K"]:
    """[-(1 - e) S(beta delta) + e S(-beta delta)] / (1 - 2e): unbiased when labels are flipped with probability e.

    Source: Chowdhury et al. 2024, arXiv:2403.00409, equation 12. e must be below 1/2.
    """
    kept, flipped = -logsigmoid(beta * delta), -logsigmoid(-beta * delta)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def discopop_loss(delta: Float[Tensor, " K"], *, beta: float, tau: float = 0.05) -> Float[Tensor, " K"]:
    """-(1 - g) S(z) + g exp(-z), z = beta delta, g = sigmoid(z / tau): the log-ratio modulated loss.

    Source: Lu et al. 2024, arXiv:2406.08414, equation 5.
    """
    margin = beta * delta
    gate = torch.sigmoid(margin / tau)
    return -(1 - gate) * logsigmoid(margin) + gate * torch.exp(-margin)


def aot_loss(delta: Float[Tensor, " K"], *, beta: float, label_smoothing: float = 0.0) -> Float[Tensor, " K"]:
    """Compute the sigmoid loss of differences between sorted values: one distribution should dominate the other.

    `aot` compares the sorted log pi(chosen) - log pi(rejected) with the reference's, `aot_unpaired` the sorted
    log-ratios of chosen completions with those of rejected ones. `matched` finds the value that each is compared with.
    Source: Melnyk et al. 2024, arXiv:2406.05882.
    """
    return sigmoid_loss(delta, beta=beta, label_smoothing=label_smoothing)


def matched(values: Float[Tensor, " K"], others: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
    """Return for each value the one of `others` that has the same rank.

    Example:
        >>> matched(torch.tensor([5.0, 1.0]), torch.tensor([20.0, 30.0])).tolist()
        [30.0, 20.0]
    """
    ranks = values.argsort(stable=True).argsort(stable=True)
    return others.sort().values[ranks]


# --- of two log-ratios, each on its own -------------------------------------------------------------------------------


def nca_pair_loss(chosen: Float[Tensor, " K"], rejected: Float[Tensor, " K"], *, beta: float) -> Float[Tensor, " K"]:
    """-S(beta x_c) - S(-beta x_c) / 2 - S(-beta x_r) / 2.

    Source: Chen et al. 2024, arXiv:2402.05369, equation 13 for two completions.
    """
    return -logsigmoid(beta * chosen) - 0.5 * logsigmoid(-beta * chosen) - 0.5 * logsigmoid(-beta * rejected)


def bco_pair_loss(chosen: Float[Tensor, " K"], rejected: Float[Tensor, " K"], *, beta: float) -> Float[Tensor, " K"]:
    """-S(beta x_c) - S(-beta x_r): a binary classifier of chosen and rejected, without the paper's reward shift.

    Source: Jung et al. 2024, arXiv:2404.04656; its running shift delta is left out, as in TRL.
    """
    return -logsigmoid(beta * chosen) - logsigmoid(-beta * rejected)


def sppo_hard_loss(chosen: Float[Tensor, " K"], rejected: Float[Tensor, " K"], *, beta: float) -> Float[Tensor, " K"]:
    """(x_c - 1 / (2 beta))^2 + (x_r + 1 / (2 beta))^2: self-play with a winning probability of 1 or 0.

    Source: Wu et al. 2024, arXiv:2405.00675, equation 4.7.
    """
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def apo_zero_loss(chosen: Float[Tensor, " K"], rejected: Float[Tensor, " K"], *, beta: float) -> Float[Tensor, " K"]:
    """1 - sigmoid(beta x_c) + sigmoid(beta x_r): raises chosen, lowers rejected (chosen better than the model's own).

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 7.
    """
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down_loss(chosen: Float[Tensor, " K"], rejected: Float[Tensor, " K"], *, beta: float) -> Float[Tensor, " K"]:
    """sigmoid(beta x_c) + 1 - sigmoid(beta (x_c - x_r)): lowers both, rejected more (both worse than the model's own).

    Source: arXiv:2408.06266, equation 8.
    """
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


# --- without a reference ----------------------------------------------------------------------------------------------


def simpo_loss(
    chosen: Float[Tensor, " K"],
    rejected: Float[Tensor, " K"],
    *,
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
) -> Float[Tensor, " K"]:
    """Minus S(beta (m_c - m_r) - gamma), m the mean log-probability of a completion's tokens.

    Source: Meng et al. 2024, arXiv:2405.14734, equation 6.
    """
    return sigmoid_loss(chosen - rejected - gamma / beta, beta=beta, label_smoothing=label_smoothing)


def odds_ratio_loss(chosen: Float[Tensor, " K"], rejected: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
    """-S(log odds_c - log odds_r), odds = p / (1 - p) of the geometric mean p of a completion's token probabilities.

    Source: Hong et al. 2024, arXiv:2403.07691, equation 7; ORPO adds it, times lambda, to the likelihood of chosen.
    """
    return -logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logprob: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
    """Log p - log(1 - p)."""
    # A probability that rounds to 1 has infinite odds: it counts as a little less.
    below = logprob.clamp(max=-1e-7)
    return logprob - torch.log(-torch.expm1(below))


# --- single completions with a label ----------------------------------------------------------------------------------


def kto_loss(
    log_ratio: Float[Tensor, " R"], desirable: Bool[Tensor, " R"], *, beta: float, kl: Float[Tensor, ""] | float
) -> Float[Tensor, " R"]:
    """1 - sigmoid(beta (x - kl)) for desirable completions, 1 - sigmoid(beta (kl - x)) for undesirable ones.

    Args:
        log_ratio: x of each completion.
        desirable: its label.
        beta: aversion to risk; higher values keep the policy closer to the reference.
        kl: reference point in nats, from `kto_reference_point`; no gradient.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, equation 8.
    """
    sign = torch.where(desirable, 1.0, -1.0)
    return torch.sigmoid(-beta * sign * (log_ratio - kl))


def kto_reference_point(mismatched_log_ratios: Float[Tensor, " R"]) -> Float[Tensor, ""]:
    """max(0, mean log-ratio of completions put behind other prompts): KTO's inexpensive estimate of KL(pi || pi_ref).

    Source: arXiv:2402.01306, section 4.2.
    """
    mean = mismatched_log_ratios.mean() if mismatched_log_ratios.numel() else mismatched_log_ratios.new_zeros(())
    return mean.clamp(min=0).detach()


def apo_zero_unpaired_loss(
    log_ratio: Float[Tensor, " R"], desirable: Bool[Tensor, " R"], *, beta: float
) -> Float[Tensor, " R"]:
    """1 - sigmoid(beta x) for desirable completions, sigmoid(beta x) for undesirable ones.

    Source: arXiv:2408.06266, equation 7, for completions without a partner.
    """
    return kto_loss(log_ratio, desirable, beta=beta, kl=0.0)


# --- weights ----------------------------------------------------------------------------------------------------------


def wpo_weight(chosen: Float[Tensor, " K"], rejected: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
    """Compute how likely the policy would have written both completions: exp(a_c) exp(a_r), without gradient.

    Args:
        chosen: a_c, the mean over tokens of log pi(token) - log sum_v pi(v)^2. The sum is the average of pi(token) over
            tokens that the policy draws, so sharp and flat distributions get equal weights.
        rejected: a_r, the same for the rejected completion.

    Source: Zhou et al. 2024, arXiv:2406.11827, equation 2 with sampled alignment.
    """
    return torch.exp(chosen + rejected).detach()
