"""Every metric once: its key, unit, meaning, and which way is good.

Keys are `stage/name[/stat]`. A part in braces stands for a name that a run gives: `reward/{part}/mean` describes
`reward/math_answer/mean`. Everything that shows or watches a metric takes its key from here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Metric:
    """What one key, or one pattern of keys, means."""

    key: str
    unit: str
    """`share` lies between 0 and 1; `reward` is the unit of the rewards; `1` has no unit."""
    meaning: str
    better: Literal["up", "down", "none"]
    """Which way is good; `none` where that depends."""


METRICS: dict[str, Metric] = {}
"""By key or pattern, in the order of a step's stages."""


def find(key: str) -> Metric | None:
    """Return the row that describes `key`, or None for a metric of the user's own (TRL's `log_metric`)."""
    if key in METRICS:
        return METRICS[key]
    return next((metric for metric in METRICS.values() if _pattern(metric.key).fullmatch(key)), None)


def _pattern(key: str) -> re.Pattern[str]:
    literals = re.split(r"\{\w+\}", key)
    return re.compile(".+".join(map(re.escape, literals)))


def _add(key: str, unit: str, meaning: str, better: Literal["up", "down", "none"] = "none") -> str:
    METRICS[key] = Metric(key, unit, meaning, better)
    return key


# --- 2 rollout --------------------------------------------------------------------------------------------------------

_add("rollout/drawn_groups", "groups", "Groups sampled for this step, those that dynamic sampling left out included.")
_add("rollout/num_tokens", "tokens", "Completion tokens of all rollouts of the step.")
LENGTH = _add("rollout/length/mean", "tokens", "Mean number of completion tokens per rollout.")
_add("rollout/length/max", "tokens", "Completion tokens of the longest rollout.")
TRUNCATED = _add("rollout/truncated_frac", "share", "Rollouts cut off by a limit on tokens, turns or prompt.", "down")
_add("rollout/error_frac", "share", "Rollouts that the engine or the environment could not finish.", "down")
_add("rollout/staleness/mean", "versions", "Mean number of weight syncs since a rollout's oldest token.", "down")
STALENESS = _add("rollout/staleness/max", "versions", "Weight syncs since the oldest token of any rollout.", "down")

# --- 3 verify ---------------------------------------------------------------------------------------------------------

REWARD = _add("reward/mean", "reward", "Mean reward of the scored rollouts.", "up")
_add("reward/std", "reward", "Standard deviation of the reward over all scored rollouts.")
UNSCORED = _add("reward/unscored_frac", "share", "Rollouts without a reward: abstentions, errors and failures.", "down")
ABSTAINED = _add("reward/abstained_frac", "share", "Rollouts that no reward judged: not counted as wrong.", "down")
_add("reward/error_frac", "share", "Rollouts whose reward failed with an error.", "down")
PASS_1 = _add("reward/pass@1", "share", "Mean share of a task's scored rollouts that are correct.", "up")
_add("reward/pass@{k}", "share", "Chance that at least one of k rollouts of a task is correct.", "up")
_add("reward/maj@{k}", "share", "Chance that the most frequent answer among k rollouts is correct.", "up")
CORRELATION = "/evaluator/correlation"
_add("reward/{part}" + CORRELATION, "1", "Pearson correlation of an evaluator with the metric it predicts.", "up")
_add("source/{source}/reward", "reward", "Mean reward of the tasks of one source, where a batch has several.", "up")
_add("reward/{part}/mean", "reward", "Mean of one reward, or of one part of it, before weights and scales.", "up")
_add("judge/questions", "count", "Questions put to the judge since the start, cached ones included.")
_add("judge/cache_hits", "count", "Questions answered from the cache.")
_add("judge/format_retries", "count", "Questions repeated because the judge's answer could not be read.", "down")
_add("judge/unreadable", "count", "Questions given up after unreadable answers: abstentions.", "down")
_add("judge/canaries", "count", "Questions with a known answer, asked to check the judge.")
_add("judge/canary_failures", "count", "Questions with a known answer that the judge got wrong.", "down")
_add("judge/transport_retries", "count", "Requests repeated after a network or server error.", "down")
_add("judge/given_up", "count", "Questions given up because the judge stayed away: abstentions.", "down")
_add("judge/calls", "count", "Requests that the judge's endpoint answered.")
_add("judge/input_tokens", "tokens", "Prompt tokens billed by the judge's endpoint.")
_add("judge/output_tokens", "tokens", "Completion tokens billed by the judge's endpoint.")
_add("judge/cost", "currency", "Cost of all calls at the configured prices.", "down")

# --- 4 advantage ------------------------------------------------------------------------------------------------------

NO_SIGNAL = _add(
    "advantage/zero_variance_frac", "share", "Groups whose advantages are all 0, so that they teach nothing.", "down"
)
_add("advantage/mean", "reward", "Mean advantage over tokens, before whitening.")
_add("advantage/std", "reward", "Standard deviation of the advantage over tokens, before whitening.")
_add("advantage/p{q}", "reward", "Percentile q of the advantage over tokens, before whitening.")
_add("advantage/covariance", "nats * reward", "Mean covariance of log-probability and advantage.")
_add("return/mean", "reward", "Mean discounted reward still to come, over tokens.", "up")
_add("return/std", "reward", "Standard deviation of that reward over tokens.")
_add("preference/num_pairs", "pairs", "Preference pairs of the step.")
_add("preference/desirable_frac", "share", "Completions labeled desirable.")

# --- 5 loss: policy ---------------------------------------------------------------------------------------------------

_add("loss/total", "loss", "The loss that is minimized; in policy gradients its size says nothing about progress.")
# Metrics of tokens are means over those that are computed: groups without signal are not.
_add("loss/ratio/max", "1", "Largest probability ratio of the policy to the policy that took the batch.")
_add("loss/clip_low_frac", "share", "Computed tokens without gradient because the ratio fell below the lower bound.")
_add("loss/clip_high_frac", "share", "Computed tokens whose ratio rose above the upper bound.")
_add("loss/off_policy_frac", "share", "Computed tokens masked because their sequence is too far off-policy.", "down")
_add("loss/sampler_weight", "1", "Mean importance weight that corrects for the sampler; 1 where both agree.")
_add("loss/sampler_truncated_frac", "share", "Computed tokens whose sampler weight was cut to its bounds.", "down")
_add("loss/sampler_masked_frac", "share", "Computed tokens dropped: sampler weight out of bounds.", "down")
_add("loss/positive_lm", "nats", "Language-modeling loss on correct rollouts (VAPO), where there are any.", "down")
ENTROPY = _add("policy/entropy", "nats", "Mean entropy of the next-token distribution over computed tokens.")
GRAD_NORM = _add("policy/grad_norm", "1", "Norm of the policy's gradient before clipping.")
_add("policy/lr", "1", "Learning rate of the policy.")
_add("policy/skipped_updates", "count", "Optimizer steps skipped so far: gradient not finite.", "down")
_add("train/computed_frac", "share", "Sequences with a gradient; the others were not computed.")
_add("kl/ref", "nats", "KL divergence of the policy from the reference, per token.")
_add("kl/mismatch", "nats", "KL divergence of the trainer from the sampler on the same tokens.", "down")
MISMATCH = _add("kl/mismatch/gap", "nats", "Mean absolute difference of the two log-probabilities.", "down")
_add("kl/mismatch/max", "nats", "Largest difference between the two log-probabilities of a token.", "down")
_add("kl/mismatch/ratio/max", "1", "Largest probability ratio of trainer to sampler.", "down")
SAMPLE_SIZE = _add("kl/mismatch/ess", "share", "Effective sample size, as a share of the tokens.", "up")
_add("thr/p", "1", "Current p of Token Hidden Reward: above 0 favors exploitation, below 0 exploration.")
_add("thr/scored_tokens", "tokens", "Tokens that Token Hidden Reward scored.")
_add("thr/kept_tokens", "tokens", "Scored tokens above the threshold.")
_add("thr/kept_frac", "share", "Scored tokens above the threshold, as a share.")

# --- 5 loss: critic ---------------------------------------------------------------------------------------------------

_add("value/loss", "reward^2", "Loss of the critic, a squared error.", "down")
_add("value/clip_frac", "share", "Values for which the clipped error is the larger one.")
EXPLAINED = _add("value/explained_variance", "share", "Share of the returns' variance that the critic predicts.", "up")
_add("value/mean", "reward", "Mean value of the states.")
LAMBDA = _add("value/lambda", "1", "Mean lambda of the policy's advantage estimate where it depends on the length.")
_add("value/warmup_steps", "steps", "Steps that trained the critic alone so far.")
_add("value/grad_norm", "1", "Norm of the critic's gradient before clipping.")

# --- 5 loss: preferences and B-Coder ----------------------------------------------------------------------------------

_add("preference/accuracy", "share", "Pairs whose chosen completion has the higher implicit reward.", "up")
_add("preference/margin", "nats", "Mean implicit reward of the chosen completion minus that of the rejected one.", "up")
_add("preference/chosen_reward", "nats", "Mean implicit reward of chosen completions.")
_add("preference/rejected_reward", "nats", "Mean implicit reward of rejected completions.")
_add("preference/signed_reward", "nats", "Mean implicit reward, negated for undesirable completions.", "up")
_add("preference/kl", "nats", "Reference point of KTO.")
_add("loss/q", "reward^2", "Bellman error of Q.", "down")
_add("loss/adv", "reward", "Advantage of the given programs, which should be 0.", "down")
_add("loss/ce", "nats", "Negative log-likelihood of the given programs.", "down")
_add("value/target/mean", "reward", "Mean Bellman target.")
_add("value/q/max", "reward", "Largest Q of the step; growth without end means overestimation.")

# --- 6 weight sync, evaluation, time ----------------------------------------------------------------------------------

_add("sync/gap", "nats", "Mean difference between engine and trainer on the probes after the sync.", "down")
EXPLAINED_GAP = _add("sync/limit", "nats", "The largest mean difference that rounding explains.")
_add("sync/max_gap", "nats", "Largest difference between engine and trainer on the probes after the sync.", "down")
_add("sync/change", "nats", "Largest change on the probes since the previous sync; 0: no update.")
_add("eval/pass@{k}", "share", "Chance that at least one of k rollouts of a held-out task is correct.", "up")
_add("eval/reward", "reward", "Mean reward of the scored rollouts of held-out tasks.", "up")
_add("eval/accuracy", "share", "preference/accuracy on held-out rows.", "up")
_add("eval/margin", "nats", "preference/margin on held-out pairs.", "up")
_add("eval/chosen_reward", "nats", "preference/chosen_reward on held-out pairs.")
_add("eval/rejected_reward", "nats", "preference/rejected_reward on held-out pairs.")
_add("eval/signed_reward", "nats", "preference/signed_reward on held-out rows.", "up")
_add("eval/kl", "nats", "preference/kl on held-out rows.")
_add("eval/loss", "loss", "The loss on held-out rows.", "down")
STEP_SECONDS = _add("time/step_s", "seconds", "Wall-clock time of the step.", "down")
_add("time/rollout_s", "seconds", "Time until the step's rollouts were scored.", "down")
_add("time/update_s", "seconds", "Time of advantages, losses and optimizer steps.", "down")
_add("time/sync_s", "seconds", "Time of the weight sync, its proof included.", "down")
_add("time/receipt_s", "seconds", "Time that the proof of the weight sync took.", "down")
_add("perf/tokens_per_s", "tokens/s", "Completion tokens of the step per second of the step.", "up")
