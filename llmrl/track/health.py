"""Loud warnings about runs that look alive and learn nothing: metrics of each step in, messages out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from llmrl.track import names
from llmrl.types import RolloutGroup, Score

PATIENCE = 5
"""Consecutive steps with a symptom before it is reported."""
MISMATCH_MARGIN = 2.0
"""Warn when sampler and trainer differ by more than this many times what rounding explains on the probes: rollouts at a
higher temperature consist of less likely tokens, on which rounding shows more."""
MIN_SAMPLE_SIZE = 0.5
"""Warn when the effective sample size, as a share of the tokens, falls below this: most of a batch teaches nothing."""
MIN_LAMBDA = 0.5
"""Warn when the length-adaptive lambda falls below this: advantages then depend on the next few values rather than on
the outcome."""
MIN_CORRELATION = 0.1
"""Warn when the correlation of an evaluator with the metric it stands for falls below this."""
MIN_DROP = 0.02
"""Warn when a metric has dropped by more than this since the first step while its evaluator has not."""


class Health:
    """Watch the metrics of every step. Each warning is given once, and again only after its symptom has gone away.

    Args:
        on_policy: every batch is trained on by the policy that sampled it, in one optimizer step.
    """

    def __init__(self, *, on_policy: bool) -> None:
        self.on_policy = on_policy
        self.explained_gap = math.inf
        """The largest mean difference between sampler and trainer (nats) that rounding explained at the last push."""
        self.streaks: dict[str, int] = {}
        """Consecutive steps that showed each symptom, by its name."""
        self.first_entropy: float | None = None
        self.first_means: dict[str, float] = {}
        """Means of evaluators and their metrics at the first step that had them, by metric key."""

    def observe(self, metrics: dict[str, float], groups: Sequence[RolloutGroup] = ()) -> list[str]:
        """Return the warnings that this step gives reason for, each with its likely cause and a fix.

        Args:
            metrics: the step's metrics.
            groups: the step's scored groups, to name the tasks that were not judged.
        """
        entropy = metrics.get(names.ENTROPY, math.nan)
        if self.first_entropy is None and entropy > 0:
            self.first_entropy = entropy
        reward = metrics.get(names.REWARD, math.nan)
        known = "" if math.isnan(reward) else f"(mean reward {reward:.3g}) "  # nothing may have been scored
        abstained = metrics.get(names.ABSTAINED, 0.0)
        sample_size, lam = metrics.get(names.SAMPLE_SIZE, 1.0), metrics.get(names.LAMBDA, 1.0)
        symptoms = {
            "no_signal": (
                metrics.get(names.NO_SIGNAL, 0.0) >= 1.0,
                f"all advantages have been 0 {known}for {PATIENCE} steps, so nothing is learned: the rewards within "
                "every group are equal, or too few rollouts have a score. If all rewards are 0, look at "
                "rollouts.jsonl: the answer format that the reward expects, the length limit, or a task that is too "
                "hard; if all are 1, the task is solved",
            ),
            "truncated": (
                metrics.get(names.TRUNCATED, 0.0) > 0.95,
                "almost every completion is cut off at rollout.max_completion_length: raise it, or check that the "
                "model ends its turn with one of the tokenizer's stop tokens",
            ),
            "unscored": (
                # Abstentions have their own warning.
                metrics.get(names.UNSCORED, 0.0) - abstained > 0.02,
                "more than 2 % of the rollouts could not be scored; see `error` in rollouts.jsonl",
            ),
            "abstained": (abstained > 0, _abstentions(abstained, groups)),
            "entropy": (
                self.first_entropy is not None and entropy < 0.02 * self.first_entropy,
                "the policy's entropy has fallen below 2 % of its first value: it hardly explores any more. A higher "
                "algo.loss.epsilon_high, a lower learning rate, or algo.kl.beta > 0 slow this down",
            ),
            "off_policy": (
                sample_size < MIN_SAMPLE_SIZE,
                f"the policy is far from the one that sampled: the rollouts' tokens are worth only a share of "
                f"{sample_size:.2g} ({names.SAMPLE_SIZE}). Lower rollout.max_staleness or the learning rate, or mask "
                "the tokens that are off (algo.sampler with kind weights and outside mask)",
            ),
            "lambda": (
                lam < MIN_LAMBDA,
                f"the length-adaptive lambda is {lam:.2g} on average: advantages are hardly more than differences of "
                "the critic's values. For completions this short set algo.value.lam 0.95, or a higher "
                "algo.value.length_alpha",
            ),
        }
        symptoms |= self._evaluators(metrics)
        warnings = [text for name, (present, text) in symptoms.items() if self._fires(name, present, PATIENCE)]
        gap = metrics.get(names.MISMATCH, 0.0)
        # Tokens from older weights are expected to differ.
        stale = metrics.get(names.STALENESS, 0.0) > 0
        apart = self.on_policy and not stale and gap > MISMATCH_MARGIN * self.explained_gap
        explained, self.explained_gap = self.explained_gap, metrics.get(names.EXPLAINED_GAP, self.explained_gap)
        if self._fires("mismatch", apart, 1):
            warnings.append(
                f"sampler and trainer disagree by {gap:.3g} nats on average about tokens of the current policy "
                f"(rounding explains {explained:.3g}): check the temperature, and that both compute the same model: "
                "dropout, positions beyond what the model was made for, the length of its window"
            )
        return warnings

    def _evaluators(self, metrics: dict[str, float]) -> dict[str, tuple[bool, str]]:
        """Return the symptoms of every evaluator that stands for a metric: does it still agree with it?"""
        found = {}
        for key in (key for key in metrics if key.endswith(names.CORRELATION)):
            evaluator = key.removesuffix("/correlation")
            name = evaluator.removesuffix("/evaluator")
            means = [f"{evaluator}/mean", f"{name}/mean"]
            for mean in means:
                self.first_means.setdefault(mean, metrics[mean])
            rise, change = (metrics[mean] - self.first_means[mean] for mean in means)
            advice = (
                "If the evaluator is what is paid, the policy learns what the evaluator likes: retrain it on this "
                "policy's completions, stop earlier, or pay the metric itself (algo.use_token_rewards false)"
            )
            found[f"{evaluator}/drift"] = (
                rise >= 0 and change < -MIN_DROP,
                f"{evaluator} has risen by {rise:.3f} since the first step while {name} has fallen by {-change:.3f}. "
                + advice,
            )
            found[f"{evaluator}/correlation"] = (
                metrics[key] < MIN_CORRELATION,
                f"{evaluator} and {name} hardly agree any more (correlation {metrics[key]:.2f} over the step's "
                f"rollouts, below {MIN_CORRELATION} for {PATIENCE} steps). " + advice,
            )
        return found

    def _fires(self, name: str, present: bool, patience: int) -> bool:
        self.streaks[name] = self.streaks.get(name, 0) + 1 if present else 0
        return self.streaks[name] == patience

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"streaks": self.streaks, "first_entropy": self.first_entropy, "first_means": self.first_means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore from `state_dict`."""
        self.streaks, self.first_entropy = dict(state["streaks"]), state["first_entropy"]
        self.first_means = dict(state["first_means"])


def _abstentions(share: float, groups: Sequence[RolloutGroup]) -> str:
    """Describe the rollouts of a step that no reward judged: how many, and up to three tasks with the reason."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    scores = [(rollout.task.id, rollout.score) for rollout in rollouts if rollout.score is not None]
    reasons = {task: _reason(score) for task, score in scores if score.reward is None and score.error is None}
    num = sum(score.reward is None and score.error is None for _, score in scores)
    many = f"{num} of {len(rollouts)} rollouts" if num else f"a share of {share:.2g} of the rollouts"
    shown = "".join(f"\n  {task}: {reason}" for task, reason in [*reasons.items()][:3])
    return (
        f"for {PATIENCE} steps rewards have abstained; in this step {many} were not judged. They are not counted as "
        "wrong: they are left out of means and baselines, so these tasks teach less or nothing. Set "
        f"verify.max_abstained_frac to stop the run when there are too many{shown}"
    )


def _reason(score: Score) -> str:
    """Return who abstained, and why where the reward gives a reason in its info."""
    texts = []
    for name in score.info.get("abstained", []):
        info = score.info.get(name)
        details = info if isinstance(info, dict) else {}
        why = details.get("reason") or details.get("problem") or details.get("gate")
        texts.append(f"{name} ({why})" if why else str(name))
    return ", ".join(texts) or "no reason given"
