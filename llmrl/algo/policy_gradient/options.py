"""Options of the policy-gradient family. A preset is an instance, and options given beside it override it.

The choices (`Clip`, `Group`, `KlInLoss` ...) are in `choices.py`.
"""

from __future__ import annotations

from typing import Literal

from llmrl.algo.options import AlgorithmOptions, DynamicSampling, Setting
from llmrl.algo.policy_gradient.choices import (
    Baseline,
    Cispo,
    Clip,
    ClipCov,
    Correction,
    EachReward,
    Gmpo,
    Greedy,
    Group,
    Kl,
    KlCov,
    KlInLoss,
    KlInReward,
    LeaveOneOut,
    LengthWeighted,
    NoBaseline,
    Nthr,
    OptimalToken,
    PassK,
    PolicyLoss,
    RubricMix,
    Sampler,
    Sapo,
    Thr,
    TokenRewards,
    TokenWeighting,
    Vespo,
)
from llmrl.option import Count, NotNegative, Positive, PositiveShare, Share, option


@option
class PolicyLossOptions(AlgorithmOptions):
    """What PPO and the critic-free methods share: everything after the advantages."""

    overlong_buffer: Share = 0.0
    """Soft punishment of length: over this last share of max_completion_length the reward falls by 1; 0 is off."""
    mask_truncated_completions: bool = False
    """Leave truncated rollouts out of the loss and its denominators; their rewards still enter the baselines."""
    whiten: bool = False
    """Shift and scale all tokens' advantages of the batch to mean 0, deviation 1 (REINFORCE++)."""
    top_entropy_quantile: PositiveShare = 1.0
    """Policy loss on this share of the tokens only, those with the highest entropy; 1 is all."""
    loss: PolicyLoss = Clip()
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
        """Weight of the penalty to the reference model; 0 without one."""
        return 0.0 if self.kl is None else self.kl.beta

    @property
    def kl_in_loss(self) -> KlInLoss | None:
        """The penalty, if it is a term of the loss with a weight above 0."""
        return self.kl if isinstance(self.kl, KlInLoss) and self.kl.beta > 0 else None

    @property
    def kl_in_reward(self) -> KlInReward | None:
        """The penalty, if it is subtracted from the reward with a weight above 0."""
        return self.kl if isinstance(self.kl, KlInReward) and self.kl.beta > 0 else None

    def loss_findings(self, per_token: str | None) -> list[str]:
        """Return what is wrong among these options: one line each, with the fix.

        Args:
            per_token: names what gives each token its own advantage, if anything does.
        """
        loss, sampler, kl = self.loss, self.sampler, self.kl
        rules = {
            f"algo.loss.ratio sequence cannot tell the tokens of a sequence apart, but {per_token} gives every token "
            "its own advantage: set algo.loss.ratio sequence_token":
                per_token is not None and getattr(loss, "ratio", "token") == "sequence",
            f"algo.loss {loss.kind} takes one advantage per sequence, but {per_token} gives every token its own: "
            "choose another algo.loss":
                per_token is not None and isinstance(loss, Gmpo | Vespo),
            f"algo.loss.delta is {getattr(loss, 'delta', None)}: must be above 1 + epsilon_high, or it clips before "
            "that does":
                isinstance(loss, Clip) and loss.delta is not None and loss.delta <= 1 + loss.high,
            "algo.kl.bias_correction corrects an estimate from drawn tokens, but algo.kl.estimator full estimates "
            "nothing: set algo.kl.bias_correction false, or another estimator":
                isinstance(kl, KlInLoss) and kl.estimator == "full" and kl.bias_correction,
            f"algo.kl.horizon {kl and kl.horizon} is only read with algo.kl.target: leave it out, or set a target":
                kl is not None and kl.target is None and kl.horizon != 10_000,
            "algo.top_entropy_quantile leaves tokens out, but algo.loss gmpo takes the mean over a whole sequence: "
            "set algo.top_entropy_quantile 1, or choose another algo.loss":
                isinstance(loss, Gmpo) and self.top_entropy_quantile < 1,
            "algo.loss vespo multiplies the weights of a sequence's tokens into its own ratio: set "
            "algo.sampler.of token":
                isinstance(loss, Vespo) and isinstance(sampler, Correction) and sampler.of == "sequence",
            f"algo.sampler: the bounds (low, high) are {getattr(sampler, 'bounds', None)}: 1, where sampler and "
            "policy agree, must lie between them":
                isinstance(sampler, Correction) and not sampler.bounds[0] < 1 < sampler.bounds[1],
        }  # fmt: skip
        return [text for text, wrong in rules.items() if wrong]

    def cautions(self) -> list[str]:
        """Return what is allowed but rarely intended."""
        one_step = self.num_iterations == 1 and self.num_mini_batches == 1
        kl, per_sequence = self.kl_in_loss, getattr(self.loss, "ratio", None) == "sequence"
        rules = {
            f"algo.aggregation {self.aggregation} weighs a per-sequence loss by length; grpo gives every sequence the "
            "same weight":
                (per_sequence or isinstance(self.loss, Gmpo)) and self.aggregation in ("dapo", "dr_grpo"),
            "algo.mask_truncated_completions leaves out the very rollouts that algo.overlong_buffer punishes most":
                self.mask_truncated_completions and self.overlong_buffer > 0,
            "the k3 penalty is biased once the batch is off-policy; algo.kl.bias_correction true corrects it":
                kl is not None and kl.estimator == "k3" and not kl.bias_correction and not one_step,
            "algo.loss kl_cov has no effect with one optimizer step per batch: set algo.num_mini_batches or "
            "algo.num_iterations above 1":
                isinstance(self.loss, KlCov) and one_step,
        }  # fmt: skip
        return [text for text, caution in rules.items() if caution]


@option
class PolicyGradient(PolicyLossOptions):
    """Rewards of groups -> advantages -> a policy-gradient loss."""

    name: str = "grpo"
    """The preset. Options given beside it override it."""
    baseline: Baseline = Group()
    """What is subtracted from a reward, and what it is divided by."""
    rubric: RubricMix | None = None
    """C-GRPO's mixed reward. Default: the reward as it is."""
    dynamic_sampling: DynamicSampling | None = None
    """Draw further tasks in place of groups whose accuracies are all equal. Default: off."""
    token_weighting: TokenWeighting | None = None
    """Token Hidden Reward: reweight advantages by each token's influence on the correct responses' likelihood."""

    @property
    def _per_token(self) -> str | None:
        """What gives each token its own advantage."""
        kind = self.baseline.kind
        if self.token_weighting is not None:
            return f"algo.token_weighting {self.token_weighting.kind}"
        if kind in ("optimal_token", "token_rewards"):
            return f"algo.baseline {kind}"
        if kind == "none" and self.kl_in_reward is not None:
            return "a KL penalty in the reward with algo.baseline none"
        return None

    @property
    def only_right_or_wrong(self) -> bool:
        """Whether advantages depend on the accuracy alone, and on no other part of the reward."""
        return isinstance(self.baseline, PassK) and self.baseline.mix == 1

    def findings(self) -> list[str]:
        """Return what is wrong among these options: one line each, with the fix."""
        baseline, kind, weighting = self.baseline, self.baseline.kind, self.token_weighting
        rules = {
            "algo.dynamic_sampling drops groups whose accuracies are all equal, but with this baseline those do carry "
            "a gradient: set algo.baseline group, or algo.dynamic_sampling null":
                self.dynamic_sampling is not None and (self.whiten or kind in NOT_RELATIVE),
            "algo.rubric mixes outcome and rubric into one reward, algo.baseline each_reward keeps rewards apart: "
            "choose one":
                self.rubric is not None and kind == "each_reward",
            "algo.overlong_buffer shapes the reward, but the pass@k advantage looks at right and wrong only: set "
            "algo.baseline.mix below 1 or algo.overlong_buffer 0":
                self.only_right_or_wrong and self.overlong_buffer > 0,
            "algo.kl.kind reward shapes the reward, but the pass@k advantage looks at right and wrong only: set "
            "algo.kl.kind loss, or algo.baseline.mix below 1":
                self.only_right_or_wrong and self.kl_in_reward is not None,
            "algo.rubric shapes the reward, but the pass@k advantage looks at right and wrong only: set algo.rubric "
            "null, or algo.baseline.mix below 1":
                self.only_right_or_wrong and self.rubric is not None,
            "algo.baseline optimal_token is for an outcome reward; a KL penalty goes into the loss: algo.kl.kind loss":
                kind == "optimal_token" and self.kl_in_reward is not None,
            "algo.kl.kind reward shapes one reward, but algo.baseline each_reward standardizes every reward apart: set "
            "algo.kl.kind loss":
                kind == "each_reward" and self.kl_in_reward is not None,
            "algo.baseline.batch_std_of is only read with algo.baseline.scale batch: leave it out, or set that":
                isinstance(baseline, Group) and baseline.batch_std_of != "raw" and baseline.scale != "batch",
            "algo.token_weighting.p_steps is only read with algo.token_weighting.p_end: leave it out, or set that":
                isinstance(weighting, Thr) and weighting.p_end is None and weighting.p_steps != 100,
            "algo.token_weighting.threshold_value is not read with threshold none: leave it out":
                weighting is not None and weighting.threshold == "none" and weighting.threshold_value != 1,
            f"algo.token_weighting.threshold_value is {getattr(weighting, 'threshold_value', None)}: a quantile must "
            "be at least 0 and below 1":
                weighting is not None and weighting.threshold == "quantile" and not 0 <= weighting.threshold_value < 1,
        }  # fmt: skip
        return self.loss_findings(self._per_token) + [text for text, wrong in rules.items() if wrong]

    def findings_with(self, setting: Setting) -> list[str]:
        """Return what is wrong between these options and the other sections: one line each, with the fix."""
        size, baseline, k = setting.num_generations or 1, self.baseline, getattr(self.baseline, "k", 0)
        weighted = [spec for spec, weight in setting.rewards.items() if weight != 0]
        accuracy = next((spec for spec, weight in setting.rewards.items() if weight > 0), "")
        rules = {
            f"rollout.num_generations is {size}: a group-relative advantage needs at least 2 rollouts":
                size < 2 and baseline.kind not in NOT_RELATIVE,
            f"algo.baseline.k {k} {'exceeds' if k > size else 'equals'} rollout.num_generations {size}, so every "
            "pass@k advantage would be 0: lower it, or raise rollout.num_generations":
                isinstance(baseline, PassK) and k >= size,
            f"algo.baseline passk with mix 1 looks at what {accuracy.partition(' ')[2]} itself says, whatever its gate "
            "or scale: leave these out, or set algo.baseline.mix below 1":
                self.only_right_or_wrong and accuracy in setting.shaped,
            "algo.baseline each_reward needs at least two rewards with a weight other than 0":
                isinstance(baseline, EachReward) and bool(setting.rewards) and len(weighted) < 2,
            "algo.rubric mixes outcome and rubric, and so does the reward `score_group`: name "
            "`rewards/citation_rubric.py:citation_rubric`, or set algo.rubric null":
                self.rubric is not None and any(spec.endswith(":score_group") for spec in setting.rewards),
        }  # fmt: skip
        found = [text for text, wrong in rules.items() if wrong]
        return found + setting.mini_batch_findings(self.num_mini_batches)

    def cautions(self) -> list[str]:
        """Return what is allowed but rarely intended."""
        found = super().cautions()
        if self.dynamic_sampling is not None and getattr(self.baseline, "scale", "") == "batch":
            found.append(
                "algo.dynamic_sampling leaves mixed groups only: the batch's deviation is larger, the learning rate "
                "acts less"
            )
        return found


NOT_RELATIVE = ("none", "batch", "greedy", "token_rewards")
"""Baselines that do not compare a rollout with the others of its group."""

_PRESETS = [
    PolicyGradient(),
    PolicyGradient(name="dr_grpo", baseline=Group(scale="none"), aggregation="dr_grpo"),
    PolicyGradient(
        name="dapo",
        loss=Clip(epsilon_high=0.28, dual_clip=10.0),
        aggregation="dapo",
        dynamic_sampling=DynamicSampling(),
        overlong_buffer=0.2,
    ),
    PolicyGradient(name="lite_ppo", baseline=Group(scale="batch"), aggregation="dapo"),
    PolicyGradient(name="gspo", loss=Clip(ratio="sequence", epsilon=3e-4, epsilon_high=4e-4), num_mini_batches=4),
    PolicyGradient(
        name="gspo_token", loss=Clip(ratio="sequence_token", epsilon=3e-4, epsilon_high=4e-4), num_mini_batches=4
    ),
    PolicyGradient(
        name="luspo",
        loss=Clip(ratio="sequence", epsilon=2e-3, epsilon_high=2.5e-3),
        aggregation="sequence_sum",
        num_mini_batches=4,
    ),
    PolicyGradient(name="gmpo", loss=Gmpo(), num_mini_batches=4),
    PolicyGradient(name="cispo", loss=Cispo(), aggregation="dapo", dynamic_sampling=DynamicSampling()),
    PolicyGradient(name="sapo", loss=Sapo(), num_mini_batches=4),
    PolicyGradient(name="vespo", loss=Vespo(), aggregation="dapo", num_mini_batches=4),
    PolicyGradient(name="clip_cov", loss=ClipCov(), aggregation="dapo", num_mini_batches=4),
    PolicyGradient(name="kl_cov", loss=KlCov(), aggregation="dapo", num_mini_batches=4),
    PolicyGradient(name="rloo", baseline=LeaveOneOut(), aggregation="sequence_sum", kl=KlInReward(beta=0.05)),
    PolicyGradient(name="opo", baseline=LengthWeighted(), aggregation="dapo"),
    PolicyGradient(name="remax", baseline=Greedy(), aggregation="dapo"),
    PolicyGradient(name="optimal_token", baseline=OptimalToken(), aggregation="dapo"),
    PolicyGradient(
        name="reinforce_pp", baseline=NoBaseline(), aggregation="dapo", whiten=True, kl=KlInReward(beta=0.01)
    ),
    PolicyGradient(
        name="reinforce_pp_baseline",
        baseline=Group(scale="none"),
        aggregation="dapo",
        whiten=True,
        kl=KlInLoss(estimator="k2"),
    ),
    PolicyGradient(name="gdpo", baseline=EachReward()),
    PolicyGradient(name="passk", baseline=PassK(), loss=Clip(epsilon_high=0.28), aggregation="dapo"),
    PolicyGradient(name="thr", token_weighting=Thr(p=0.1)),
    PolicyGradient(name="nthr", token_weighting=Nthr()),
    PolicyGradient(name="c_grpo", rubric=RubricMix()),
    PolicyGradient(name="ircoco", baseline=TokenRewards(gamma=0.0)),
]
PRESETS: dict[str, PolicyGradient] = {options.name: options for options in _PRESETS}
