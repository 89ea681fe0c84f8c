"""Options of the policy-gradient family: what its members choose. A preset is an instance; what is given lies over it.

Source of each choice: docs/algorithms/policy_gradient.md.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from llmrl.algo.options import DynamicSampling, Setting
from llmrl.option import KIND, Count, NotNegative, Positive, PositiveShare, Share, option

# --- the baseline of a reward, and its scale ---

Scale = Literal["group", "batch", "none"]


@option
class Group:
    """A reward minus its group's mean, divided by a standard deviation (GRPO)."""

    kind: Literal["group"] = "group"
    scale: Scale = "group"
    """Divide by the standard deviation of the group, of the batch, or by nothing (Dr. GRPO)."""
    batch_std_of: Literal["raw", "centred"] = "raw"
    """scale batch: the deviation of the rewards, or of the rewards minus the baseline."""


@option
class Batch:
    """A reward minus the batch's mean."""

    kind: Literal["batch"] = "batch"
    scale: Scale = "group"
    """As in kind group."""
    batch_std_of: Literal["raw", "centred"] = "raw"
    """As in kind group."""


@option
class NoBaseline:
    """The reward itself (REINFORCE)."""

    kind: Literal["none"] = "none"
    scale: Scale = "none"
    """As in kind group."""
    batch_std_of: Literal["raw", "centred"] = "raw"
    """As in kind group."""


@option
class TokenRewards:
    """The discounted sum of a verifier's dense rewards from a token on, without a critic (IRCoCo)."""

    kind: Literal["token_rewards"] = "token_rewards"
    gamma: Share = 1.0
    """Discount per token. 0: a token's own reward alone (IRCoCo)."""


@option
class LeaveOneOut:
    """A reward minus the mean of the others in its group (RLOO)."""

    kind: Literal["leave_one_out"] = "leave_one_out"


@option
class LengthWeighted:
    """A reward minus its group's mean weighted by length (OPO)."""

    kind: Literal["length_weighted"] = "length_weighted"


@option
class Greedy:
    """A reward minus that of the greedy completion (ReMax)."""

    kind: Literal["greedy"] = "greedy"


@option
class OptimalToken:
    """A reward minus the optimal baseline of each token."""

    kind: Literal["optimal_token"] = "optimal_token"


@option
class PassK:
    """The analytic pass@k advantage, mixed with the group-standardized one."""

    kind: Literal["passk"] = "passk"
    k: Count = 4
    """k of pass@k; at most rollout.num_generations."""
    mix: Share = 1.0
    """Share of the pass@k advantage."""


@option
class EachReward:
    """Every reward standardized in its group, then their weighted sum over the batch (GDPO)."""

    kind: Literal["each_reward"] = "each_reward"


BaselineConfig = (
    Group
    | Batch
    | NoBaseline
    | TokenRewards
    | LeaveOneOut
    | LengthWeighted
    | Greedy
    | OptimalToken
    | PassK
    | EachReward
)
Scaled = (Group, Batch, NoBaseline)
"""The baselines with a choice of scale."""
Baseline = Annotated[BaselineConfig, KIND]


# --- the loss of a token ---

Level = Literal["token", "sequence", "sequence_token"]


@option
class Clip:
    """min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) of the probability ratio r and the advantage A (PPO)."""

    kind: Literal["clip"] = "clip"
    ratio: Level = "token"
    """The ratio of a token, the geometric mean over its sequence (GSPO), or that with a token's gradient."""
    epsilon: NotNegative = 0.2
    """The ratio stops mattering below 1 - epsilon."""
    epsilon_high: NotNegative | None = None
    """... and above 1 + epsilon_high. Default: epsilon."""
    delta: float | None = None
    """Two-sided clipping: also cap the ratio of tokens with negative advantage here; above 1 + epsilon_high."""
    dual_clip: Annotated[float, Gt(1)] | None = None
    """Dual clipping: a token with negative advantage loses at most dual_clip * |A|."""

    @property
    def high(self) -> float:
        """`epsilon_high` with its default."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


@option
class Cispo:
    """-log p weighted by the advantage and by the ratio, at most `max_ratio`, as a constant (CISPO)."""

    kind: Literal["cispo"] = "cispo"
    ratio: Level = "token"
    """As in kind clip."""
    max_ratio: Positive = 5.0
    """Cap of the weight (absolute)."""


@option
class Sapo:
    """A soft gate on the ratio, steeper for negative advantages (SAPO)."""

    kind: Literal["sapo"] = "sapo"
    ratio: Level = "token"
    """As in kind clip."""
    temperature_pos: Positive = 1.0
    """Steepness for positive advantages."""
    temperature_neg: Positive = 1.05
    """Steepness for negative advantages."""


@option
class Gmpo:
    """The geometric mean of a sequence's ratios, each clipped at exp(+-epsilon) (GMPO)."""

    kind: Literal["gmpo"] = "gmpo"
    epsilon: NotNegative = 0.4
    """Bound of the log-ratio."""


@option
class Vespo:
    """log p weighted by W^k exp(lambda (1 - W)) of the sequence ratio W (VESPO)."""

    kind: Literal["vespo"] = "vespo"
    k_pos: float = 2.0
    """k for positive advantages."""
    lambda_pos: float = 3.0
    """lambda for positive advantages."""
    k_neg: float = 3.0
    """k for negative advantages."""
    lambda_neg: float = 2.0
    """lambda for negative advantages."""


@option
class ClipCov:
    """The clipped loss; tokens drawn among those with a high covariance get no gradient (Clip-Cov)."""

    kind: Literal["clip_cov"] = "clip_cov"
    epsilon: NotNegative = 0.2
    """As in kind clip."""
    epsilon_high: NotNegative | None = None
    """As in kind clip."""
    fraction: PositiveShare = 2e-4
    """Share of the batch's tokens that is held back."""

    @property
    def high(self) -> float:
        """`epsilon_high` with its default."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


@option
class KlCov:
    """The unclipped loss; the tokens with the highest covariance are held back by coef * |log-ratio| (KL-Cov)."""

    kind: Literal["kl_cov"] = "kl_cov"
    fraction: PositiveShare = 2e-4
    """Share of the batch's tokens that is held back."""
    coef: NotNegative = 1.0
    """Weight of |logprobs - old_logprobs| on those tokens."""


PolicyLossConfig = Clip | Cispo | Sapo | Gmpo | Vespo | ClipCov | KlCov
PolicyLoss = Annotated[PolicyLossConfig, KIND]


# --- the penalty to the reference ---


@option
class KlInLoss:
    """A term of the loss."""

    kind: Literal["loss"] = "loss"
    beta: NotNegative = 0.01
    """Weight; 0 needs no reference."""
    estimator: Literal["k2", "k3", "abs", "full"] = "k3"
    """Per-token estimator. `full` estimates nothing: the KL of the whole next-token distribution, without sampling
    noise, for a pass of the reference at every optimizer step."""
    bias_correction: bool = False
    """Multiply the penalty by the (differentiated) ratio: unbiased when the batch is off-policy."""
    target: Positive | None = None
    """Adapt beta so that the measured KL (nats per token) stays near this. Default: constant."""
    horizon: Count = 10_000
    """Rollouts over which an adaptive beta changes by a factor of about e^0.2."""


@option
class KlInReward:
    """Subtracted from the reward, by the estimator k1: the only sound one there."""

    kind: Literal["reward"] = "reward"
    beta: NotNegative = 0.05
    """Weight; 0 needs no reference."""
    target: Positive | None = None
    """As in kind loss."""
    horizon: Count = 10_000
    """As in kind loss."""


KlConfig = KlInLoss | KlInReward
Kl = Annotated[KlConfig, KIND]


# --- a sampler that is not quite the policy ---


@option
class Correction:
    """Weights pi_old / sampler on the loss of each token or sequence, truncated to or masked outside the bounds.

    `token`, `truncate`, 0, 2 is TIS; `token`, `mask`, 0.5, 5 is IcePop; sequences take a `high` of 3.
    """

    kind: Literal["weights"] = "weights"
    of: Literal["token", "sequence"] = "token"
    """One weight per token, or the product over the sequence."""
    outside: Literal["truncate", "mask"] = "truncate"
    """A weight outside the bounds becomes the bound, or 0."""
    low: NotNegative | None = None
    """Lower bound, below 1. Default: 0.5 for a mask of tokens (IcePop), else 0."""
    high: Positive | None = None
    """Upper bound, above 1. Default: tokens 2 truncated, 5 masked (IcePop); sequences 3."""

    @property
    def bounds(self) -> tuple[float, float]:
        """(low, high) with their defaults."""
        tokens, mask = self.of == "token", self.outside == "mask"
        low = (0.5 if tokens and mask else 0.0) if self.low is None else self.low
        high = ((5.0 if mask else 2.0) if tokens else 3.0) if self.high is None else self.high
        return low, high


@option
class Bypass:
    """The sampler's log-probabilities take the place of old_logprobs."""

    kind: Literal["bypass"] = "bypass"


@option
class Uncorrected:
    """No correction, also where rollouts are stale."""

    kind: Literal["none"] = "none"


SamplerConfig = Correction | Bypass | Uncorrected
Sampler = Annotated[SamplerConfig, KIND]


# --- which tokens count how much ---

Threshold = Literal["nthr_min", "mean", "quantile", "none"]


@option
class Thr:
    """Token Hidden Reward: 1 + p on tokens that raise the likelihood of correct responses, 1 - p on the others."""

    kind: Literal["thr"] = "thr"
    p: Annotated[float, Ge(-1), Le(1)] = 0.0
    """Above 0 exploits, below 0 explores."""
    p_end: Annotated[float, Ge(-1), Le(1)] | None = None
    """Move p linearly to this over `p_steps`. Default: p."""
    p_steps: Count = 100
    """Policy versions over which p moves."""
    threshold: Threshold = "nthr_min"
    """Tokens whose |score| is not above it get no advantage: `threshold_value` * the least mean score of a correct
    response; * the mean of those; the quantile `threshold_value` of |score|; or no threshold."""
    threshold_value: float = 1.0
    """Factor or quantile of the threshold."""


@option
class Nthr:
    """NTHR: eta on the selected tokens of incorrect responses."""

    kind: Literal["nthr"] = "nthr"
    eta: NotNegative | None = None
    """Factor. Default: 2 |0.5 - success rate|."""
    threshold: Threshold = "nthr_min"
    """As in kind thr."""
    threshold_value: float = 1.0
    """As in kind thr."""


TokenWeightingConfig = Thr | Nthr
TokenWeighting = Annotated[TokenWeightingConfig, KIND]


@option
class RubricMix:
    """C-GRPO: mix the rubric's part into the reward of correct rollouts."""

    alpha: PositiveShare = 0.3
    """Share of the rubric."""
    norm: Literal["none", "group_max", "group_max_correct"] = "group_max"
    """Divide the rubric part by the group's largest (the paper), by that of correct rollouts, or not."""


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
        loss, sampler = self.loss, self.sampler
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
    """The preset; what is given beside it lies over it."""
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
