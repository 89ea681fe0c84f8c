"""The losses of the DPO family as options: each class holds what its loss reads, and nothing else.

The equations and papers are in `llmrl/algo/ops/preference_losses.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import Field

from llmrl.option import NotNegative, Positive, option

Smoothing = Annotated[float, Ge(0), Lt(0.5)]

# --- losses of pairs --------------------------------------------------------------------------------------------------


@option
class WeightedLoss:
    """What every loss of pairs reads."""

    kind: str
    weight: float = 1.0
    """Factor of this loss."""


@option
class BetaLoss(WeightedLoss):
    """A loss that scales log-ratios (simpo: mean log-probabilities) by beta."""

    beta: Positive = 0.1
    """How strongly a log-ratio counts: a higher value keeps the policy closer to the reference."""


@option
class Sigmoid(BetaLoss):
    """The logistic loss of DPO; with label smoothing it is cDPO."""

    kind: Literal["sigmoid"] = "sigmoid"
    label_smoothing: Smoothing = 0.0
    """Probability that a label is wrong."""


@option
class SigmoidNorm(BetaLoss):
    """The logistic loss of scores divided by their completions' lengths."""

    kind: Literal["sigmoid_norm"] = "sigmoid_norm"


@option
class Hinge(BetaLoss):
    """The hinge loss of SLiC and RSO."""

    kind: Literal["hinge"] = "hinge"


@option
class Ipo(BetaLoss):
    """The squared loss of IPO; beta is the paper's tau."""

    kind: Literal["ipo"] = "ipo"


@option
class ExoPair(BetaLoss):
    """The reverse KL to smoothed labels (EXO)."""

    kind: Literal["exo_pair"] = "exo_pair"
    label_smoothing: Annotated[float, Gt(0), Lt(0.5)]
    """Probability that a label is wrong (paper: 1e-3). Required: the loss is infinite at 0."""


@option
class Robust(BetaLoss):
    """The logistic loss, unbiased when labels are flipped with a known probability."""

    kind: Literal["robust"] = "robust"
    label_smoothing: Smoothing = 0.0
    """Probability that a label is wrong."""


@option
class Discopop(BetaLoss):
    """The log-ratio modulated loss of DiscoPOP."""

    kind: Literal["discopop"] = "discopop"
    tau: Positive = 0.05
    """How sharply the loss changes from logistic to exponential; lower is sharper."""


@option
class NcaPair(BetaLoss):
    """Noise contrastive alignment of two completions."""

    kind: Literal["nca_pair"] = "nca_pair"


@option
class BcoPair(BetaLoss):
    """A binary classifier of chosen and rejected completions."""

    kind: Literal["bco_pair"] = "bco_pair"


@option
class SppoHard(BetaLoss):
    """Self-play with winning probabilities of 1 and 0."""

    kind: Literal["sppo_hard"] = "sppo_hard"


@option
class ApoZero(BetaLoss):
    """Raise chosen completions and lower rejected ones."""

    kind: Literal["apo_zero"] = "apo_zero"


@option
class ApoDown(BetaLoss):
    """Lower both completions, the rejected one more."""

    kind: Literal["apo_down"] = "apo_down"


@option
class Aot(BetaLoss):
    """Compare the sorted margins of all pairs of the batch with the reference's."""

    kind: Literal["aot"] = "aot"
    label_smoothing: Smoothing = 0.0
    """Probability that a label is wrong."""


@option
class AotUnpaired(BetaLoss):
    """Compare the sorted log-ratios of all chosen completions of the batch with those of all rejected ones."""

    kind: Literal["aot_unpaired"] = "aot_unpaired"
    label_smoothing: Smoothing = 0.0
    """Probability that a label is wrong."""


@option
class Sft(WeightedLoss):
    """The negative log-likelihood of chosen completions, per token. Needs no reference."""

    kind: Literal["sft"] = "sft"


@option
class Simpo(BetaLoss):
    """The logistic loss of mean log-probabilities with a target margin. Needs no reference."""

    kind: Literal["simpo"] = "simpo"
    gamma: float = 0.5
    """Margin by which beta times the mean log-probability of the chosen completion should lead."""
    label_smoothing: Smoothing = 0.0
    """Probability that a label is wrong."""


@option
class Orpo(WeightedLoss):
    """The odds ratio of the two completions. Needs no reference."""

    kind: Literal["orpo"] = "orpo"


ScoreDifference: TypeAlias = Sigmoid | SigmoidNorm | Hinge | Ipo | ExoPair | Robust | Discopop
"""Losses of f(x_chosen) - f(x_rejected), for which every divergence is defined."""
WholeBatch: TypeAlias = Aot | AotUnpaired
"""Losses whose terms depend on all pairs of the optimizer step."""
NoReference: TypeAlias = Sft | Simpo | Orpo

PairLoss: TypeAlias = Annotated[
    ScoreDifference | NcaPair | BcoPair | SppoHard | ApoZero | ApoDown | WholeBatch | NoReference,
    Field(discriminator="kind"),
]


@option
class Sum:
    """Several losses, each times its own weight."""

    kind: Literal["sum"] = "sum"
    terms: Annotated[list[PairLoss], MinLen(1)]
    """The losses; each kind at most once."""


LossOfPairs: TypeAlias = Annotated[PairLoss | Sum, Field(discriminator="kind")]


# --- losses of single completions -------------------------------------------------------------------------------------


@option
class LabelLoss:
    """What every loss of single completions with a label reads."""

    kind: str
    beta: Positive = 0.1
    """How strongly a log-ratio counts: a higher value keeps the policy closer to the reference."""
    desirable_weight: NotNegative = 1.0
    """Weight of desirable completions."""
    undesirable_weight: NotNegative = 1.0
    """Weight of undesirable completions."""


@option
class KtoLoss(LabelLoss):
    """The loss of KTO, relative to an estimate of the KL from the reference."""

    kind: Literal["kto"] = "kto"


@option
class ApoZeroUnpaired(LabelLoss):
    """The loss of APO-zero for completions without a partner: KTO's with a KL of 0."""

    kind: Literal["apo_zero_unpaired"] = "apo_zero_unpaired"


LossOfLabels: TypeAlias = Annotated[KtoLoss | ApoZeroUnpaired, Field(discriminator="kind")]


# --- the divergence from the reference --------------------------------------------------------------------------------


@option
class ReverseKl:
    """KL(policy || reference): scores are the log-ratios themselves."""

    kind: Literal["reverse_kl"] = "reverse_kl"


@option
class ForwardKl:
    """KL(reference || policy)."""

    kind: Literal["forward_kl"] = "forward_kl"


@option
class JsDivergence:
    """The Jensen-Shannon divergence."""

    kind: Literal["js_divergence"] = "js_divergence"


@option
class AlphaDivergence:
    """The alpha divergence."""

    kind: Literal["alpha_divergence"] = "alpha_divergence"
    coef: float = 0.5
    """alpha; 1 is the reverse KL."""


Divergence: TypeAlias = Annotated[ReverseKl | ForwardKl | JsDivergence | AlphaDivergence, Field(discriminator="kind")]
