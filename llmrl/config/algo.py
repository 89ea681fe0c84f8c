"""What turns rewards into a gradient: the options of all algorithms, filled from the preset that is named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Preset = Literal[
    "grpo", "dr_grpo", "dapo", "lite_ppo", "gspo", "gspo_token", "luspo", "gmpo", "cispo", "sapo", "vespo", "clip_cov",
    "kl_cov", "rloo", "opo", "remax", "optimal_token", "reinforce_pp", "reinforce_pp_baseline", "gdpo", "passk", "thr",
    "nthr", "c_grpo", "ircoco", "ppo", "vapo",
]  # fmt: skip
StoredPreset = Literal["bcoder"]
"""Its options are in `bcoder.py`."""
PreferencePreset = Literal["dpo", "online_dpo", "cdpo", "ipo", "simpo", "orpo", "kto"]
"""Their options are in `preference.py`."""


@dataclass
class AlgoConfig:
    """What turns rewards into a gradient. A field left out has the value of the preset that `name` names.

    An option that the other choices leave without a reader stays None, and giving it is an error.
    """

    name: Preset | PreferencePreset | StoredPreset = "grpo"
    """The preset: a row of `llmrl/algo/presets.py`. What is given below wins over it."""
    baseline: (
        Literal[
            "group", "batch", "none", "leave_one_out", "length_weighted", "greedy", "optimal_token", "passk", "critic"
        ]
        | None
    ) = None
    """What is subtracted from a reward: its group's mean, the batch's mean, nothing; the mean of the others (RLOO); the
    mean weighted by length (OPO); the greedy completion's reward (ReMax); one per token (optimal token baseline); the
    analytic pass@k advantage; or a critic's values (PPO)."""
    scale_rewards: Literal["group", "batch", "none"] | None = None
    """... and what it is divided by: the standard deviation of its group, of the batch, or nothing (Dr. GRPO)."""
    batch_std_of: Literal["raw", "centred"] | None = None
    """The batch's deviation is that of the rewards, or of the rewards less the baseline."""
    whiten_advantages: bool | None = None
    """Then shift and scale all tokens' advantages of the batch to mean 0, deviation 1 (REINFORCE++)."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] | None = None
    """Several rewards: add them up, or standardise each in its group first and the sum over the batch (GDPO)."""
    passk_k: int | None = None
    """k of the pass@k advantage."""
    passk_mix: float | None = None
    """Share of the pass@k advantage; the rest is the group-standardised one."""
    rubric_alpha: float | None = None
    """C-GRPO: share of the rubric part in the reward of correct rollouts; 0 takes the reward as it is."""
    rubric_norm: Literal["none", "group_max", "group_max_correct"] | None = None
    """C-GRPO: the rubric part is divided by the group's largest (the paper), that of correct rollouts, or not."""
    overlong_buffer: float | None = None
    """Soft punishment of length: over this last share of max_completion_length the reward falls by 1; 0 is off."""
    mask_truncated_completions: bool | None = None
    """Leave truncated rollouts out of the loss and its denominators; their rewards still enter the baselines."""
    dynamic_sampling: bool | None = None
    """Draw further tasks in place of groups whose accuracies are all equal, until the batch is full."""
    dynamic_sampling_max_batches: int | None = None
    """... at most so many times num_prompts tasks; then groups without signal fill the rest."""
    policy_loss: Literal["clip", "cispo", "sapo", "gmpo", "vespo", "clip_cov", "kl_cov"] | None = None
    """The loss of a token, as a function of its probability ratio and advantage."""
    importance_sampling_level: Literal["token", "sequence", "sequence_token"] | None = None
    """The ratio is a token's, the geometric mean over its sequence (GSPO), or that with a token's gradient."""
    loss_type: Literal["grpo", "dapo", "dr_grpo", "sequence_sum", "prompt_mean"] | None = None
    """Aggregation of token losses: mean of sequence means, mean over all tokens, sum over B * max_completion_length,
    mean of sequence sums, or mean over prompts of their token means."""
    epsilon: float | None = None
    """The ratio stops mattering below 1 - epsilon (gmpo: the log-ratio beyond +- epsilon)."""
    epsilon_high: float | None = None
    """... and above 1 + epsilon_high (default: the preset's, else epsilon)."""
    delta: float | None = None
    """Two-sided clipping: the ratio of tokens with negative advantage is capped here too; above 1 + epsilon_high."""
    dual_clip: float | None = None
    """Dual clipping: a token with negative advantage loses at most dual_clip * |A|; above 1."""
    max_ratio: float | None = None
    """cispo: the weight of a token is its ratio, at most this (an absolute cap)."""
    sapo_temperature_pos: float | None = None
    """sapo: steepness of the soft gate for positive advantages."""
    sapo_temperature_neg: float | None = None
    vespo_k_pos: float | None = None
    """vespo: weight W^k exp(lambda (1 - W)) of the sequence ratio W, for positive and negative advantages."""
    vespo_lambda_pos: float | None = None
    vespo_k_neg: float | None = None
    vespo_lambda_neg: float | None = None
    cov_fraction: float | None = None
    """clip_cov, kl_cov: share of the batch's tokens with a high covariance that is held back."""
    kl_cov_coef: float | None = None
    """kl_cov: weight of |logprobs - old_logprobs| on those tokens."""
    off_policy_mask_threshold: float | None = None
    """Drop sequences of negative advantage whose mean log(sampler / policy) exceeds this (nats; try 0.5). None: off."""
    vllm_importance_sampling_mode: (
        Literal["none", "bypass", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None
    ) = None
    """Correct for a sampler (of any engine) that is not quite the policy, by weights pi_old / sampler on the loss of
    each token or sequence, truncated to or masked outside the two bounds below (TRL's names); `bypass` takes the
    sampler's log-probabilities for old_logprobs instead. Default: none, with rollout.max_staleness token_truncate."""
    vllm_importance_sampling_clip_min: float | None = None
    """... lower bound. Default by mode: token_mask 0.5 (IcePop), the others 0."""
    vllm_importance_sampling_clip_max: float | None = None
    """... upper bound. Default by mode: token_truncate 2, token_mask 5 (IcePop), those of sequences 3."""
    beta: float | None = None
    """Weight of the KL penalty to the reference model; 0 needs no reference."""
    kl_in: Literal["loss", "reward"] | None = None
    """The penalty is a term of the loss, or is subtracted from the reward."""
    kl_estimator: Literal["k1", "k2", "k3", "abs", "full"] | None = None
    """Per-token estimator. k1 belongs in the reward, the others in the loss. `full` estimates nothing: the KL of the
    whole next-token distribution, without sampling noise, for a pass of the reference at every optimizer step."""
    use_bias_correction_kl: bool | None = None
    """Multiply the penalty by the (differentiated) ratio: unbiased when the batch is off-policy."""
    kl_target: float | None = None
    """Adapt beta so that the measured KL (nats per token) stays near this; unset: constant."""
    kl_horizon: int | None = None
    """Rollouts over which an adaptive beta changes by a factor of about e^0.2."""
    entropy_coef: float | None = None
    """Weight of the mean token entropy, which the loss then raises."""
    top_entropy_quantile: float | None = None
    """Policy loss on this share of the tokens only, those with the highest entropy; 1 is all."""
    token_weighting: Literal["none", "thr", "nthr"] | None = None
    """Token Hidden Reward: reweight advantages by each token's influence on the correct responses' likelihood."""
    thr_p: float | None = None
    """thr: factor 1 + p on tokens that raise it, 1 - p on those that lower it: above 0 exploits, below 0 explores."""
    thr_p_end: float | None = None
    """thr: p moves linearly to here over `thr_p_steps` (default: thr_p)."""
    thr_p_steps: int | None = None
    thr_threshold: Literal["nthr_min", "mean", "quantile", "none"] | None = None
    """Tokens whose |score| is not above it get no advantage (thr): scale * least mean score of a correct response;
    scale * the mean of those; the quantile `thr_threshold_value` of |score|; or no threshold."""
    thr_threshold_value: float | None = None
    nthr_eta: float | None = None
    """nthr: factor on the selected tokens of incorrect responses (default: 2 |0.5 - success rate|)."""
    use_token_rewards: bool | None = None
    """critic, or baseline none: where a verifier gives dense rewards, these are paid, not the reward at the end."""
    gamma: float | None = None
    """Discount from one trained token to the next of token rewards without a critic: the advantage of a token is the
    discounted sum of its reward and the later ones. 0: its own reward alone (IRCoCo). A critic has `critic.gamma`."""
    positive_lm_coef: float | None = None
    """critic: weight of the language-model loss on correct rollouts (VAPO); 0 is off."""
    num_iterations: int | None = None
    """Passes over each batch of rollouts."""
    num_mini_batches: int | None = None
    """Optimizer steps per pass; groups are dealt out whole."""
