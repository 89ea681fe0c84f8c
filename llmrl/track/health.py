"""Loud warnings: the ways in which a run looks alive and learns nothing. Metrics of each step in, messages out."""

from __future__ import annotations

import math
from typing import Any

PATIENCE = 5
"""Steps in a row before a symptom is called a fault."""
LEAST_SAMPLE_SIZE = 0.5
"""Effective sample size, as a share of the tokens, below which most of a batch teaches nothing."""
LEAST_LAMBDA = 0.5
"""Below it the length-adaptive lambda makes advantages of the next few values rather than of the outcome."""
LEAST_CORRELATION = 0.1
"""Of an evaluator with the metric that it stands for."""
LEAST_FALL = 0.02
"""Of a metric's mean since the first step; with an evaluator that has not fallen they drift apart."""


class Health:
    """Watches the metrics of every step. A warning is given once, and again only after the symptom had gone away."""

    def __init__(self, *, on_policy: bool, mismatch_tolerance: float = 0.05) -> None:
        self.on_policy = on_policy
        self.mismatch_tolerance = mismatch_tolerance
        self.streaks: dict[str, int] = {}
        self.first_entropy: float | None = None
        self.first_means: dict[str, float] = {}
        """Means of evaluators and their metrics at the first step that had them, by their keys."""

    def observe(self, metrics: dict[str, float]) -> list[str]:
        """Warnings that this step's metrics give reason for, each with its likely cause and what to do."""
        entropy = metrics.get("policy/entropy", math.nan)
        if self.first_entropy is None and entropy > 0:
            self.first_entropy = entropy
        signal = metrics.get("advantage/zero_variance_frac", 0.0) < 1.0
        reward = metrics.get("reward/mean", math.nan)
        symptoms = {
            "no_signal": (
                not signal,
                f"all rewards inside every group have been equal (mean {reward:.3g}) for {PATIENCE} steps: nothing "
                "is learned. If all are 0, look at rollouts.jsonl: the answer format the reward expects, the length "
                "limit, or the task is too hard; if all are 1, the task is solved",
            ),
            "truncated": (
                metrics.get("rollout/truncated_frac", 0.0) > 0.95,
                "almost every completion is cut off at rollout.max_completion_length: raise it, or check that the "
                "model ends its turn with one of the tokenizer's stop tokens",
            ),
            "unscored": (
                metrics.get("reward/unscored_frac", 0.0) > 0.02,
                "more than 2 % of the rollouts could not be scored; see `error` in rollouts.jsonl",
            ),
            "entropy": (
                self.first_entropy is not None and entropy < 0.02 * self.first_entropy,
                "the policy's entropy has fallen below 2 % of where it began: it hardly explores any more. A higher "
                "algo.epsilon_high, a lower learning rate, or algo.beta > 0 slow this down",
            ),
            "off_policy": (
                metrics.get("kl/mismatch/ess", 1.0) < LEAST_SAMPLE_SIZE,
                f"the policy is far from what sampled: of the rollouts' tokens only a share of "
                f"{metrics.get('kl/mismatch/ess', 1.0):.2g} counts (kl/mismatch/ess). Lower rollout.max_staleness or "
                "the learning rate, or mask what is off (algo.vllm_importance_sampling_mode token_mask)",
            ),
            "lambda": (
                metrics.get("value/lambda", 1.0) < LEAST_LAMBDA,
                f"lambda by length is {metrics.get('value/lambda', 1.0):.2g} on average: advantages are hardly more "
                "than differences of the critic's values. For completions as short as these set critic.lam 0.95, or a "
                "higher critic.length_alpha",
            ),
        }
        symptoms |= self._drift(metrics)
        warnings = [text for name, (present, text) in symptoms.items() if self._fires(name, present, PATIENCE)]
        gap = metrics.get("kl/mismatch/max", 0.0)
        stale = metrics.get("rollout/staleness/max", 0.0) > 0  # then they differ as they should
        off = self.on_policy and not stale and gap > self.mismatch_tolerance
        if self._fires("mismatch", off, 1):
            warnings.append(
                f"sampler and trainer disagree by up to {gap:.3g} nats on tokens of the current policy: check dtypes, "
                "the temperature, and that both run the same weights"
            )
        return warnings

    def _drift(self, metrics: dict[str, float]) -> dict[str, tuple[bool, str]]:
        """For every evaluator that is paid in place of a metric: whether the two go apart."""
        found = {}
        for key in (key for key in metrics if key.endswith("/evaluator/correlation")):
            evaluator = key.removesuffix("/correlation")
            name = evaluator.removesuffix("/evaluator")
            means = [f"{evaluator}/mean", f"{name}/mean"]
            for mean in means:
                self.first_means.setdefault(mean, metrics[mean])
            rise, change = (metrics[mean] - self.first_means[mean] for mean in means)
            advice = (
                "Where the evaluator is what is paid, the policy learns what it likes: train it anew on this policy's "
                "completions, stop earlier, or pay the metric itself (algo.use_token_rewards false)"
            )
            found[f"{evaluator}/drift"] = (
                rise >= 0 and change < -LEAST_FALL,
                f"{evaluator} has risen by {rise:.3f} since the first step while {name} has fallen by {-change:.3f}. "
                + advice,
            )
            found[f"{evaluator}/correlation"] = (
                metrics[key] < LEAST_CORRELATION,
                f"{evaluator} and {name} hardly go together any more (correlation {metrics[key]:.2f} over the step's "
                f"rollouts, below {LEAST_CORRELATION} for {PATIENCE} steps). " + advice,
            )
        return found

    def _fires(self, name: str, present: bool, patience: int) -> bool:
        self.streaks[name] = self.streaks.get(name, 0) + 1 if present else 0
        return self.streaks[name] == patience

    def state_dict(self) -> dict[str, Any]:
        return {"streaks": self.streaks, "first_entropy": self.first_entropy, "first_means": self.first_means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.streaks, self.first_entropy = dict(state["streaks"]), state["first_entropy"]
        self.first_means = dict(state["first_means"])
