"""The choices of the policy-gradient family: baselines, losses of a token, penalties, corrections and token weights.

Source of each: docs/algorithms/policy_gradient.md.
"""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

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


@option
class NoBaseline:
    """The reward itself (REINFORCE)."""

    kind: Literal["none"] = "none"
    scale: Scale = "none"
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
    """k of pass@k; below rollout.num_generations, with which all advantages would be 0."""
    mix: Share = 1.0
    """Share of the pass@k advantage."""


@option
class EachReward:
    """Every reward standardized in its group, then their weighted sum over the batch (GDPO)."""

    kind: Literal["each_reward"] = "each_reward"


Baseline = Annotated[
    Group
    | Batch
    | NoBaseline
    | TokenRewards
    | LeaveOneOut
    | LengthWeighted
    | Greedy
    | OptimalToken
    | PassK
    | EachReward,
    KIND,
]

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


PolicyLoss = Annotated[Clip | Cispo | Sapo | Gmpo | Vespo | ClipCov | KlCov, KIND]


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


Kl = Annotated[KlInLoss | KlInReward, KIND]


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
    """No correction, even for stale rollouts."""

    kind: Literal["none"] = "none"


Sampler = Annotated[Correction | Bypass | Uncorrected, KIND]


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


TokenWeighting = Annotated[Thr | Nthr, KIND]


@option
class RubricMix:
    """C-GRPO: mix the rubric's part into the reward of correct rollouts."""

    alpha: PositiveShare = 0.3
    """Share of the rubric."""
    norm: Literal["none", "group_max", "group_max_correct"] = "group_max"
    """Divide the rubric part by the group's largest (the paper), by that of correct rollouts, or not."""
