"""The options of the DPO family: which completions are compared, by which loss, and against which reference.

Four classes for four kinds of run: `DPO` and `KTO` read a dataset, `OnlineDPO` and `OnlineKTO` the policy's own
rollouts. A preset is an instance of one of them. Nothing here needs torch, so wrong options are reported before
anything loads.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, TypeAlias

from annotated_types import Ge, MinLen

from llmrl.algo.options import AlgorithmOptions, DynamicSampling, Setting
from llmrl.algo.preference.loss_options import (
    Divergence,
    Ipo,
    KtoLoss,
    LossOfLabels,
    LossOfPairs,
    NoReference,
    Orpo,
    PairLoss,
    ReverseKl,
    ScoreDifference,
    Sft,
    Sigmoid,
    Simpo,
    Sum,
    WholeBatch,
)
from llmrl.option import Count, NotNegative, Place, PositiveShare, Share, option


@option
class Level:
    """One level of a hierarchy of reward parts (HERON)."""

    part: str
    """Name of a reward; a reward of weight 0 is measured without being added to the sum."""
    margin: NotNegative = 0.0
    """Differences up to this much leave the decision to the next level."""
    margin_in: Literal["std", "value"] = "std"
    """Unit of `margin`: standard deviations of the part over what is compared (a batch), or the part's own unit."""
    lower_is_better: bool = False


@option
class MovingReference:
    """Move the reference towards the policy (TR-DPO; with alpha 1, rounds of iterative DPO)."""

    steps: Count
    """Optimizer steps between two moves."""
    alpha: PositiveShare = 0.6
    """reference = alpha * policy + (1 - alpha) * reference; 1 replaces it."""


def mixes_adapters(alpha: float) -> str:
    """Return why a reference cannot move in part where adapters are trained."""
    return (
        f"algo.reference.alpha {alpha:g} would mix the weights of two adapters, which is not the mixture of the two "
        "models: set it to 1 (the policy's adapter becomes the reference's), or train the whole model"
    )


# --- what the kinds of run share --------------------------------------------------------------------------------------


@option
class PreferenceOptions(AlgorithmOptions):
    """What all four kinds of run read."""

    num_iterations: Count = 1
    """Passes over each batch."""
    num_mini_batches: Count = 1
    """Optimizer steps per pass."""
    reference: MovingReference | None = None
    """How the reference follows the policy. Default: it never moves."""

    def findings_with(self, setting: Setting) -> list[str]:
        """Return what is wrong between these options and the other sections: one line each, with the fix."""
        found = setting.mini_batch_findings(self.num_mini_batches)
        if self.reference is not None and self.reference.alpha != 1 and setting.has_adapters:
            found.append(mixes_adapters(self.reference.alpha))
        return found


@option
class PairOptions(PreferenceOptions):
    """What runs on pairs read."""

    loss: LossOfPairs = Sigmoid()
    """The loss of a pair, or a sum of several."""
    divergence: Divergence = ReverseKl()
    """What ties the policy to the reference. Others than reverse_kl need a loss of the difference of two scores."""
    ld_alpha: Share | None = None
    """LD-DPO: weight of the tokens beyond the shorter completion's length. Default: all tokens count equally."""
    use_weighting: bool = False
    """WPO: weight each pair by how likely the policy itself would have written it."""

    @property
    def terms(self) -> list[PairLoss]:
        """The losses that are added up; one where `loss` is not a sum."""
        return self.loss.terms if isinstance(self.loss, Sum) else [self.loss]

    @property
    def needs_reference(self) -> bool:
        """Whether any loss reads the reference model."""
        return any(not isinstance(term, NoReference) for term in self.terms)

    @property
    def sorts_batch(self) -> bool:
        """Whether any loss depends on all pairs of the optimizer step."""
        return any(isinstance(term, WholeBatch) for term in self.terms)

    def findings(self) -> list[str]:
        """Return what is wrong among these options: one line each, with the fix."""
        kinds = [term.kind for term in self.terms]
        divergence = self.divergence.kind
        undefined = [term.kind for term in self.terms if not isinstance(term, ScoreDifference | Sft)]
        several_steps = self.num_iterations * self.num_mini_batches > 1
        rules = {
            f"algo.loss.terms {kinds} names a loss twice: name each once and set its weight":
                len(set(kinds)) < len(kinds),
            "algo.loss.terms holds aot and aot_unpaired, which sort the batch in different ways: choose one":
                {"aot", "aot_unpaired"} <= set(kinds),
            f"algo.divergence {divergence} is not defined for {', '.join(undefined)}: leave it out":
                divergence != "reverse_kl" and bool(undefined),
            f"algo.divergence {divergence} is not read by algo.loss {' + '.join(kinds)}: leave it out":
                divergence != "reverse_kl" and not undefined and not self.needs_reference,
            f"algo.loss {' + '.join(kinds)} compares all pairs of an optimizer step with each other: set "
            "algo.num_iterations and algo.num_mini_batches to 1":
                several_steps and self.sorts_batch,
            "algo.ld_alpha discounts what a comparison of two lengths adds, but algo.loss sft compares nothing: leave "
            "it out":
                self.ld_alpha is not None and set(kinds) == {"sft"},
            "algo.ld_alpha shortens each pair by its own lengths, algo.loss aot compares pairs with each other: "
            "choose one":
                self.ld_alpha is not None and self.sorts_batch,
            "algo.use_weighting weights pairs, but the terms of algo.loss aot belong to ranks, not to pairs: "
            "choose one":
                self.use_weighting and self.sorts_batch,
            "algo.use_weighting is measured on the policy that takes the step: set algo.num_iterations and "
            "algo.num_mini_batches to 1":
                several_steps and self.use_weighting,
            f"algo.reference is given, but algo.loss {' + '.join(kinds)} reads no reference: leave it out":
                self.reference is not None and not self.needs_reference,
        }  # fmt: skip
        return [text for text, wrong in rules.items() if wrong] + super().findings()


@option
class DatasetOptions(PreferenceOptions):
    """What runs on a dataset read."""

    samples: ClassVar[bool] = False

    max_length: Annotated[int, Ge(2)] = 1024
    """Cut sequences (prompt and completion) to this many tokens; rows with no room for a completion are left out."""
    precompute_ref_log_probs: bool = False
    """Compute the reference's log-probabilities of all rows before the first step, and keep no reference."""
    ref_cache_dir: Place | None = None
    """Keep them in this folder for further runs with the same model and rows. Default: the run directory."""

    def findings(self) -> list[str]:
        """Return what is wrong among these options: one line each, with the fix."""
        rules = {
            f"algo.ref_cache_dir {self.ref_cache_dir!r} is only read with algo.precompute_ref_log_probs true: leave "
            "it out":
                self.ref_cache_dir is not None and not self.precompute_ref_log_probs,
            "algo.reference moves the reference, algo.precompute_ref_log_probs fixes it: choose one":
                self.reference is not None and self.precompute_ref_log_probs,
        }  # fmt: skip
        return [text for text, wrong in rules.items() if wrong] + super().findings()


# --- the four kinds of run --------------------------------------------------------------------------------------------


@option
class DPO(DatasetOptions, PairOptions):
    """Pairs from a dataset: rows with prompt, chosen and rejected. Nothing is sampled."""

    name: str = "dpo"
    """The preset. Options given beside it override it."""

    def findings(self) -> list[str]:
        """Return what is wrong among these options: one line each, with the fix."""
        found = super().findings()
        if self.precompute_ref_log_probs and not self.needs_reference:
            found.append("algo.precompute_ref_log_probs is given, but algo.loss reads no reference: leave it out")
        return found


@option
class OnlineDPO(PairOptions):
    """Pairs among the policy's own rollouts, compared by their rewards."""

    name: str = "online_dpo"
    """The preset. Options given beside it override it."""
    pairs: Literal["best_worst", "all"] = "best_worst"
    """Compare the best rollout of each group with the worst, or use every pair that is decided."""
    min_margin: NotNegative = 0.0
    """A pair is decided when the rewards differ by more than this."""
    hierarchy: Annotated[list[Level], MinLen(1)] | None = None
    """Compare by reward parts, the most important first, instead of by the reward (HERON)."""
    dynamic_sampling: DynamicSampling | None = None
    """Draw further tasks in place of groups whose accuracies are all equal."""

    def findings_with(self, setting: Setting) -> list[str]:
        """Return what is wrong between these options and the other sections: one line each, with the fix."""
        found = super().findings_with(setting)
        if setting.num_generations is not None and setting.num_generations < 2:
            found.append(
                f"rollout.num_generations is {setting.num_generations}, but a pair needs two rollouts: set it to 2 or "
                "more"
            )
        return found

    def findings(self) -> list[str]:
        """Return what is wrong among these options: one line each, with the fix."""
        found = super().findings()
        found += [
            f"algo.hierarchy: margin_in {level.margin_in} of {level.part!r} is only read with a margin above 0: leave "
            "it out, or set margin"
            for level in self.hierarchy or ()
            if level.margin_in != "std" and not level.margin
        ]
        if self.hierarchy and self.min_margin:
            found.append(
                f"algo.min_margin {self.min_margin} is not read with algo.hierarchy: leave it out; each level has its "
                "own margin"
            )
        return found


@option
class LabelOptions(PreferenceOptions):
    """What runs on single completions read."""

    loss: LossOfLabels = KtoLoss()
    """The loss of a completion."""

    def findings_with(self, setting: Setting) -> list[str]:
        """Return what is wrong between these options and the other sections: one line each, with the fix."""
        found = super().findings_with(setting)
        if isinstance(self.loss, KtoLoss) and setting.num_prompts < 2:
            found.append(
                f"rollout.num_prompts is {setting.num_prompts}, but algo.loss kto estimates the KL with completions of "
                "other prompts: set rollout.num_prompts to 2 or more"
            )
        return found


@option
class KTO(DatasetOptions, LabelOptions):
    """Single completions from a dataset: rows with prompt, completion and label. Nothing is sampled."""

    name: str = "kto"
    """The preset. Options given beside it override it."""


@option
class OnlineKTO(LabelOptions):
    """The policy's own rollouts, desirable or not by their rewards."""

    name: str = "online_kto"
    """The preset. Options given beside it override it."""
    desirable_above: float = 0.5
    """Completions with a reward above this are desirable."""
    dynamic_sampling: DynamicSampling | None = None
    """Draw further tasks in place of groups whose accuracies are all equal."""


Preference: TypeAlias = DPO | OnlineDPO | KTO | OnlineKTO

PRESETS: dict[str, Preference] = {
    "dpo": DPO(),
    "online_dpo": OnlineDPO(),
    "cdpo": DPO(name="cdpo", loss=Sigmoid(label_smoothing=0.1)),
    "ipo": DPO(name="ipo", loss=Ipo()),
    "simpo": DPO(name="simpo", loss=Simpo(beta=2.0, gamma=1.0)),
    "orpo": DPO(name="orpo", loss=Sum(terms=[Sft(), Orpo(weight=0.1)])),
    "kto": KTO(),
    "online_kto": OnlineKTO(),
}
