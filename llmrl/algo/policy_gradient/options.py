"""Options of the policy-gradient family: what its members choose. A preset is an instance; what is given lies over it.

The choices themselves are in `choices.py` and can be imported from here too.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

from llmrl.algo.options import DynamicSampling, Setting
from llmrl.algo.policy_gradient.choices import (
    Baseline as Baseline,
)
from llmrl.algo.policy_gradient.choices import (
    BaselineConfig as BaselineConfig,
)
from llmrl.algo.policy_gradient.choices import (
    Batch as Batch,
)
from llmrl.algo.policy_gradient.choices import (
    Bypass as Bypass,
)
from llmrl.algo.policy_gradient.choices import (
    Cispo as Cispo,
)
from llmrl.algo.policy_gradient.choices import (
    Clip as Clip,
)
from llmrl.algo.policy_gradient.choices import (
    ClipCov as ClipCov,
)
from llmrl.algo.policy_gradient.choices import (
    Correction as Correction,
)
from llmrl.algo.policy_gradient.choices import (
    EachReward as EachReward,
)
from llmrl.algo.policy_gradient.choices import (
    Gmpo as Gmpo,
)
from llmrl.algo.policy_gradient.choices import (
    Greedy as Greedy,
)
from llmrl.algo.policy_gradient.choices import (
    Group as Group,
)
from llmrl.algo.policy_gradient.choices import (
    Kl as Kl,
)
from llmrl.algo.policy_gradient.choices import (
    KlConfig as KlConfig,
)
from llmrl.algo.policy_gradient.choices import (
    KlCov as KlCov,
)
from llmrl.algo.policy_gradient.choices import (
    KlInLoss as KlInLoss,
)
from llmrl.algo.policy_gradient.choices import (
    KlInReward as KlInReward,
)
from llmrl.algo.policy_gradient.choices import (
    LeaveOneOut as LeaveOneOut,
)
from llmrl.algo.policy_gradient.choices import (
    LengthWeighted as LengthWeighted,
)
from llmrl.algo.policy_gradient.choices import (
    Level as Level,
)
from llmrl.algo.policy_gradient.choices import (
    NoBaseline as NoBaseline,
)
from llmrl.algo.policy_gradient.choices import (
    Nthr as Nthr,
)
from llmrl.algo.policy_gradient.choices import (
    OptimalToken as OptimalToken,
)
from llmrl.algo.policy_gradient.choices import (
    PassK as PassK,
)
from llmrl.algo.policy_gradient.choices import (
    PolicyLoss as PolicyLoss,
)
from llmrl.algo.policy_gradient.choices import (
    PolicyLossConfig as PolicyLossConfig,
)
from llmrl.algo.policy_gradient.choices import (
    RubricMix as RubricMix,
)
from llmrl.algo.policy_gradient.choices import (
    Sampler as Sampler,
)
from llmrl.algo.policy_gradient.choices import (
    SamplerConfig as SamplerConfig,
)
from llmrl.algo.policy_gradient.choices import (
    Sapo as Sapo,
)
from llmrl.algo.policy_gradient.choices import (
    Scale as Scale,
)
from llmrl.algo.policy_gradient.choices import (
    Scaled as Scaled,
)
from llmrl.algo.policy_gradient.choices import (
    Thr as Thr,
)
from llmrl.algo.policy_gradient.choices import (
    Threshold as Threshold,
)
from llmrl.algo.policy_gradient.choices import (
    TokenRewards as TokenRewards,
)
from llmrl.algo.policy_gradient.choices import (
    TokenWeighting as TokenWeighting,
)
from llmrl.algo.policy_gradient.choices import (
    TokenWeightingConfig as TokenWeightingConfig,
)
from llmrl.algo.policy_gradient.choices import (
    Uncorrected as Uncorrected,
)
from llmrl.algo.policy_gradient.choices import (
    Vespo as Vespo,
)
from llmrl.option import Count, NotNegative, Positive, PositiveShare, Share, option

# --- the family ---


@option
class PolicyLossOptions:
    """What every member of the family chooses, whatever gives it advantages."""

    overlong_buffer: Share = 0.0
    """Soft punishment of length: over this last share of max_completion_length the reward falls by 1; 0 is off."""
    mask_truncated_completions: bool = False
    """Leave truncated rollouts out of the loss and its denominators; their rewards still enter the baselines."""
    whiten: bool = False
    """Shift and scale all tokens' advantages of the batch to mean 0, deviation 1 (REINFORCE++)."""
    top_entropy_quantile: PositiveShare = 1.0
    """Policy loss on this share of the tokens only, those with the highest entropy; 1 is all."""
    loss: PolicyLoss = field(default_factory=Clip)
    """The loss of a token, as a function of its probability ratio and advantage."""
    aggregation: Literal["grpo", "dapo", "dr_grpo", "sequence_sum", "prompt_mean"] = "grpo"
    """Mean of sequence means, mean over all tokens, sum over B * max_completion_length, mean of sequence sums, or mean
    over prompts of their token means."""
    sampler: Sampler | None = None
    """Correct for a sampler (of any engine) that is not quite the policy. Default: no correction; with
    rollout.max_staleness, weights of tokens, truncated."""
    off_policy_mask_threshold: Positive | None = None
    """Drop sequences of negative advantage whose mean log(sampler / policy) exceeds this (nats; try 0.5)."""
    kl: Kl | None = None
    """Penalty to the reference model. Default: none."""
    entropy_coef: NotNegative = 0.0
    """Weight of the mean token entropy, which the loss then raises."""
    num_iterations: Count = 1
    """Passes over each batch of rollouts."""
    num_mini_batches: Count = 1
    """Optimizer steps per pass; groups are dealt out whole."""

    @property
    def beta(self) -> float:
        """Weight of the penalty to the reference; 0 without one."""
        return 0.0 if self.kl is None else self.kl.beta

    @property
    def kl_in_loss(self) -> KlInLoss | None:
        """The penalty where it is a term of the loss with a weight."""
        return self.kl if isinstance(self.kl, KlInLoss) and self.kl.beta > 0 else None

    @property
    def kl_in_reward(self) -> KlInReward | None:
        """The penalty where it is subtracted from the reward with a weight."""
        return self.kl if isinstance(self.kl, KlInReward) and self.kl.beta > 0 else None

    def loss_findings(self, per_token: str | None) -> list[str]:
        """What no single option can see; `per_token` names what gives each token its own advantage, if anything."""
        loss, sampler, kl = self.loss, self.sampler, self.kl
        rules = [
            (
                per_token is not None and getattr(loss, "ratio", "token") == "sequence",
                f"algo.loss.ratio sequence cannot tell the tokens of a sequence apart, but {per_token} gives every "
                "token its own advantage: set algo.loss.ratio sequence_token",
            ),
            (
                per_token is not None and isinstance(loss, Gmpo | Vespo),
                f"algo.loss {loss.kind} takes one advantage per sequence, but {per_token} gives every token its own: "
                "choose another algo.loss",
            ),
            (
                isinstance(loss, Clip) and loss.delta is not None and loss.delta <= 1 + loss.high,
                f"algo.loss.delta is {getattr(loss, 'delta', None)}: must be above 1 + epsilon_high, or it clips "
                "before that does",
            ),
            (
                isinstance(kl, KlInLoss) and kl.estimator == "full" and kl.bias_correction,
                "algo.kl.bias_correction corrects an estimate from drawn tokens, but algo.kl.estimator full estimates "
                "nothing: set algo.kl.bias_correction false, or another estimator",
            ),
            (
                kl is not None and kl.target is None and kl.horizon != 10_000,
                f"algo.kl.horizon {kl and kl.horizon} is only read with algo.kl.target: leave it out, or set a target",
            ),
            (
                isinstance(loss, Gmpo) and self.top_entropy_quantile < 1,
                "algo.top_entropy_quantile leaves tokens out, but algo.loss gmpo takes the mean over a whole sequence: "
                "set algo.top_entropy_quantile 1, or choose another algo.loss",
            ),
            (
                isinstance(loss, Vespo) and isinstance(sampler, Correction) and sampler.of == "sequence",
                "algo.loss vespo multiplies the weights of a sequence's tokens into its own ratio: set "
                "algo.sampler.of token",
            ),
            (
                isinstance(sampler, Correction) and not sampler.bounds[0] < 1 < sampler.bounds[1],
                f"algo.sampler: the bounds (low, high) are {getattr(sampler, 'bounds', None)}: 1, where sampler and "
                "policy agree, must lie between them",
            ),
        ]
        return [text for wrong, text in rules if wrong]

    def loss_cautions(self) -> list[str]:
        """What may well be meant, but rarely is."""
        one_step = self.num_iterations == 1 and self.num_mini_batches == 1
        kl, per_sequence = self.kl_in_loss, getattr(self.loss, "ratio", None) == "sequence"
        rules = [
            (
                (per_sequence or isinstance(self.loss, Gmpo)) and self.aggregation in ("dapo", "dr_grpo"),
                f"algo.aggregation {self.aggregation} weighs a per-sequence loss by length; grpo gives every sequence "
                "the same weight",
            ),
            (
                self.mask_truncated_completions and self.overlong_buffer > 0,
                "algo.mask_truncated_completions leaves out the very rollouts that algo.overlong_buffer punishes most",
            ),
            (
                kl is not None and kl.estimator == "k3" and not kl.bias_correction and not one_step,
                "the k3 penalty is biased once the batch is off-policy; algo.kl.bias_correction true corrects it",
            ),
            (
                isinstance(self.loss, KlCov) and one_step,
                "algo.loss kl_cov has no effect with one optimizer step per batch: set algo.num_mini_batches or "
                "algo.num_iterations above 1",
            ),
        ]
        return [text for caution, text in rules if caution]


@option
class PolicyGradient(PolicyLossOptions):
    """Rewards of groups -> advantages -> a policy-gradient loss."""

    name: str = "grpo"
    """The preset. Options given beside it override it."""
    baseline: Baseline = field(default_factory=Group)
    """What is subtracted from a reward, and what it is divided by."""
    rubric: RubricMix | None = None
    """C-GRPO's mixed reward. Default: the reward as it is."""
    dynamic_sampling: DynamicSampling | None = None
    """Draw further tasks in place of groups whose accuracies are all equal. Default: off."""
    token_weighting: TokenWeighting | None = None
    """Token Hidden Reward: reweight advantages by each token's influence on the correct responses' likelihood."""

    def findings(self) -> list[str]:
        """Contradictions that no single option can see, one line each, with the fix."""
        kind = self.baseline.kind
        per_token = None
        if self.token_weighting is not None:
            per_token = f"algo.token_weighting {self.token_weighting.kind}"
        elif kind in ("optimal_token", "token_rewards"):
            per_token = f"algo.baseline {kind}"
        elif kind == "none" and self.kl_in_reward is not None:
            per_token = "a KL penalty in the reward with algo.baseline none"
        weighting = self.token_weighting
        rules = [
            (
                self.dynamic_sampling is not None
                and (self.whiten or kind in ("none", "batch", "greedy", "token_rewards")),
                "algo.dynamic_sampling drops groups whose accuracies are all equal, but with this baseline those do "
                "carry a gradient: set algo.baseline group, or algo.dynamic_sampling null",
            ),
            (
                self.rubric is not None and kind == "each_reward",
                "algo.rubric mixes outcome and rubric into one reward, algo.baseline each_reward keeps rewards apart: "
                "choose one",
            ),
            (
                isinstance(self.baseline, PassK) and self.baseline.mix == 1 and self.overlong_buffer > 0,
                "algo.overlong_buffer shapes the reward, but the pass@k advantage looks at right and wrong only: set "
                "algo.baseline.mix below 1 or algo.overlong_buffer 0",
            ),
            (
                kind == "optimal_token" and self.kl_in_reward is not None,
                "algo.baseline optimal_token is for an outcome reward; a KL penalty goes into the loss: algo.kl.kind "
                "loss",
            ),
            (
                isinstance(self.baseline, Scaled)
                and self.baseline.batch_std_of != "raw"
                and self.baseline.scale != "batch",
                "algo.baseline.batch_std_of is only read with algo.baseline.scale batch: leave it out, or set that",
            ),
            (
                isinstance(weighting, Thr) and weighting.p_end is None and weighting.p_steps != 100,
                "algo.token_weighting.p_steps is only read with algo.token_weighting.p_end: leave it out, or set that",
            ),
            (
                weighting is not None and weighting.threshold == "none" and weighting.threshold_value != 1,
                "algo.token_weighting.threshold_value is not read with threshold none: leave it out",
            ),
            (
                weighting is not None and weighting.threshold == "quantile" and not 0 <= weighting.threshold_value < 1,
                f"algo.token_weighting.threshold_value is {getattr(weighting, 'threshold_value', None)}: a quantile "
                "must be at least 0 and below 1",
            ),
        ]
        return self.loss_findings(per_token) + [text for wrong, text in rules if wrong]

    def findings_with(self, setting: Setting) -> list[str]:
        """Contradictions with the other sections, one line each, with the fix."""
        size, baseline = setting.num_generations or 1, self.baseline
        weighted = [spec for spec, weight in setting.rewards.items() if weight > 0]
        rules = [
            (
                size < 2 and baseline.kind not in ("none", "batch", "greedy", "token_rewards"),
                f"rollout.num_generations is {size}: a group-relative advantage needs at least 2 rollouts",
            ),
            (
                isinstance(baseline, PassK) and baseline.k > size,
                f"algo.baseline.k {getattr(baseline, 'k', None)} exceeds rollout.num_generations {size}: lower it",
            ),
            (
                isinstance(baseline, EachReward) and bool(setting.rewards) and len(weighted) < 2,
                "algo.baseline each_reward needs at least two rewards with weight above 0",
            ),
            (
                self.rubric is not None and any(spec.endswith(":score_group") for spec in setting.rewards),
                "algo.rubric mixes outcome and rubric, and so does the reward `score_group`: name "
                "`rewards/citation_rubric.py:citation_rubric`, or set algo.rubric null",
            ),
        ]
        return [text for wrong, text in rules if wrong] + setting.mini_batch_findings(self.num_mini_batches)

    def cautions(self) -> list[str]:
        """What may well be meant, but rarely is."""
        found = self.loss_cautions()
        if self.dynamic_sampling is not None and getattr(self.baseline, "scale", "") == "batch":
            found.append(
                "algo.dynamic_sampling leaves mixed groups only: the batch's deviation is larger, the learning rate "
                "acts less"
            )
        return found


# --- the members of the family ---


def _make(name: str, **options: Any) -> PolicyGradient:
    return PolicyGradient(name=name, **options)


def _sequence(name: str, *, ratio: Level = "sequence", low: float = 3e-4, high: float = 4e-4, **options: Any) -> Any:
    loss = Clip(ratio=ratio, epsilon=low, epsilon_high=high)
    return _make(name, loss=loss, num_mini_batches=4, **options)


def _token_mean(name: str, **options: Any) -> PolicyGradient:
    return _make(name, aggregation="dapo", **options)


_MEMBERS: list[PolicyGradient] = [
    _make("grpo"),
    _make("dr_grpo", baseline=Group(scale="none"), aggregation="dr_grpo"),
    _token_mean(
        "dapo",
        loss=Clip(epsilon_high=0.28, dual_clip=10.0),
        dynamic_sampling=DynamicSampling(),
        overlong_buffer=0.2,
    ),
    _token_mean("lite_ppo", baseline=Group(scale="batch")),
    _sequence("gspo"),
    _sequence("gspo_token", ratio="sequence_token"),
    _sequence("luspo", low=2e-3, high=2.5e-3, aggregation="sequence_sum"),
    _make("gmpo", loss=Gmpo(), num_mini_batches=4),
    _token_mean("cispo", loss=Cispo(), dynamic_sampling=DynamicSampling()),
    _make("sapo", loss=Sapo(), num_mini_batches=4),
    _token_mean("vespo", loss=Vespo(), num_mini_batches=4),
    _token_mean("clip_cov", loss=ClipCov(), num_mini_batches=4),
    _token_mean("kl_cov", loss=KlCov(), num_mini_batches=4),
    _make("rloo", baseline=LeaveOneOut(), aggregation="sequence_sum", kl=KlInReward(beta=0.05)),
    _token_mean("opo", baseline=LengthWeighted()),
    _token_mean("remax", baseline=Greedy()),
    _token_mean("optimal_token", baseline=OptimalToken()),
    _token_mean("reinforce_pp", baseline=NoBaseline(), whiten=True, kl=KlInReward(beta=0.01)),
    _token_mean("reinforce_pp_baseline", baseline=Group(scale="none"), whiten=True, kl=KlInLoss(estimator="k2")),
    _make("gdpo", baseline=EachReward()),
    _token_mean("passk", baseline=PassK(), loss=Clip(epsilon_high=0.28)),
    _make("thr", token_weighting=Thr(p=0.1)),
    _make("nthr", token_weighting=Nthr()),
    _make("c_grpo", rubric=RubricMix()),
    _make("ircoco", baseline=TokenRewards(gamma=0.0)),
]
PRESETS: dict[str, PolicyGradient] = {member.name: member for member in _MEMBERS}
