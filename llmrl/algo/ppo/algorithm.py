"""PPO: a critic's values in place of a group's mean. Rewards of tokens -> advantages and targets -> two losses.

It is GRPO's policy loss with everything that goes with it; what differs is where advantages come from. `prepare` lays
out the reward of every token. Once the learner has filled in the critic's values (and log-probabilities, for a KL
penalty in the reward), `refine` makes advantages and the critic's targets of them.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmrl.algo.ops import kl, values
from llmrl.algo.policy_gradient.algorithm import GRPO
from llmrl.algo.policy_gradient.refine import Refinement, stream
from llmrl.algo.samples import token_rewards
from llmrl.types import TrainBatch

if TYPE_CHECKING:
    from torch import Tensor

    from llmrl.config import AlgoConfig, CriticConfig
    from llmrl.types import Counts, ForwardOutputs, MicroBatch, RolloutGroup, Sample

REWARDS, OLD_VALUES, RETURNS, LM_WEIGHTS = "token_rewards", "old_values", "returns", "lm_weights"
"""Extra streams: what is paid for each token; the critic's view before the update; its target; weights of the
language-model loss."""
QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
"""Of the advantages before whitening, in the metrics."""
SETTLED_OVER = 8
"""Batches whose mean explained variance ends value pre-training."""


class PPO(GRPO):
    """Proximal Policy Optimization with a learned critic, and VAPO.

    Args:
        config: the policy's side; gaps are filled from its preset.
        critic: the critic's side, without gaps (`resolve_critic`).
        max_completion_length, rewards: as in `GRPO`.

    References:
        Schulman et al. 2017, arXiv:1707.06347 (PPO); Yuan et al. 2025, arXiv:2503.01491 (VC-PPO: value pre-training,
        decoupled lambda); Yue et al. 2025, arXiv:2504.05118 (VAPO: length-adaptive lambda, positive-example loss).
    """

    def __init__(
        self,
        config: AlgoConfig,
        critic: CriticConfig,
        *,
        max_completion_length: int,
        rewards: dict[str, float] | None = None,
    ) -> None:
        super().__init__(config, max_completion_length=max_completion_length, rewards=rewards)
        self.critic: Any = critic
        self.needs = dataclasses.replace(self.needs, values=True, every_sample=True, refine=True)
        self.policy_frozen = critic.warmup_steps > 0  # pyright: ignore[reportOptionalOperand]
        self.warmup_variances: list[float] = []
        """Explained variance of each step of value pre-training."""

    # --- stage 4 ---

    def prepare(self, groups: list[RolloutGroup], *, policy_version: int) -> TrainBatch:
        """Stage 4: the reward of every token, and one sample per rollout; advantages come with `refine`."""
        rewards = self.shaped_rewards(groups)
        self.num_rollouts = rewards.numel()
        for group, row in zip(groups, rewards.tolist(), strict=True):
            for rollout, reward in zip(group.rollouts, row, strict=True):
                rollout.advantage = token_rewards(rollout, reward, dense=self.config.use_token_rewards).tolist()
        samples = self._samples(groups)
        for s in samples:
            s.extras[REWARDS], s.advantages = s.advantages, np.zeros_like(s.advantages)
        for group in groups:
            for rollout in group.rollouts:
                rollout.advantage = 0.0
        return TrainBatch(
            samples=samples,
            num_groups=len(groups),
            max_completion_length=self.max_completion_length,
            policy_version=policy_version,
            groups=groups,
        )

    def refine(self, batch: TrainBatch) -> None:
        """Advantages and the critic's targets from token rewards and values; then what GRPO does to advantages."""
        if batch.samples:
            ValueRefinement(self, batch).run()

    # --- stage 5 ---

    def loss(self, outputs: ForwardOutputs, batch: MicroBatch, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 5: GRPO's loss on these advantages, the critic's error, and the language-model loss on correct
        rollouts. While the policy is frozen, the critic's error alone.
        """
        if outputs.values is None:
            raise ValueError("PPO needs the critic's values")
        if self.policy_frozen:
            total, metrics = 0.0 * outputs.logprobs.sum(), {}
        else:
            total, metrics = super().loss(outputs, batch, counts)
            if self.config.positive_lm_coef:
                nll = -(outputs.logprobs * _extra(batch, LM_WEIGHTS)).sum() / counts.num_tokens
                total = total + self.config.positive_lm_coef * nll
                metrics["loss/positive_lm"] = nll.detach()
        old_values, returns = _extra(batch, OLD_VALUES), _extra(batch, RETURNS)
        clip = 0.0 if self.policy_frozen else self.critic.value_clip
        errors, clipped = values.value_loss(outputs.values, old_values, returns, clip=clip)
        value_loss = errors.sum() / counts.num_tokens
        coefficient = 1.0 if self.critic.vf_coef is None else self.critic.vf_coef
        metrics |= {"value/loss": value_loss.detach(), "value/clip_frac": clipped.sum() / counts.num_tokens}
        return total + coefficient * value_loss, metrics

    # --- value pre-training ---

    def observe(self, metrics: dict[str, float]) -> list[str]:
        """End value pre-training when the explained variance has settled, or its steps are used up."""
        if not self.policy_frozen:
            return super().observe(metrics)
        self.warmup_variances.append(metrics.get("value/explained_variance", float("nan")))
        recent = self.warmup_variances[-SETTLED_OVER:]
        mean, done, limit = sum(recent) / len(recent), len(self.warmup_variances), self.critic.warmup_steps
        settled = len(recent) == SETTLED_OVER and mean >= self.critic.warmup_explained_variance
        self.policy_frozen = not settled and done < limit
        if self.policy_frozen:
            return []
        wanted = f"(wanted: {self.critic.warmup_explained_variance:g})"
        how = "has settled" if settled else "stops at critic.warmup_steps"
        return [f"value pre-training {how} after {done} steps, explained variance {mean:.2f} {wanted}"]

    @property
    def passes(self) -> int:
        """Passes over the batch at hand: value pre-training has its own number."""
        return self.critic.warmup_iterations if self.policy_frozen else self.num_iterations

    @property
    def num_frozen_updates(self) -> int:
        """Optimizer steps of value pre-training, if it takes all of its steps."""
        return self.critic.warmup_steps * self.critic.warmup_iterations * self.num_mini_batches

    def state_dict(self) -> dict[str, Any]:
        """GRPO's, and where value pre-training stands."""
        return super().state_dict() | {
            "policy_frozen": self.policy_frozen,
            "warmup_variances": self.warmup_variances,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        super().load_state_dict(state)
        self.policy_frozen, self.warmup_variances = state["policy_frozen"], list(state["warmup_variances"])


class ValueRefinement(Refinement):
    """`refine` for a batch whose samples carry token rewards and values."""

    algorithm: PPO

    def estimate(self) -> None:
        """Advantages (lambda of the policy) and targets (lambda of the critic) of all rollouts at once."""
        rollouts, critic = list(self.rollouts.values()), self.algorithm.critic
        rewards = values.pad([stream(samples, REWARDS) for samples in rollouts])
        if self.config.kl_in == "reward":
            rewards = rewards - self.algorithm.beta * self._divergence(rollouts)
        old_values = values.pad([stream(samples, OLD_VALUES) for samples in rollouts])
        lengths = torch.tensor([sum(s.num_tokens for s in samples) for samples in rollouts])
        lam = critic.lam if critic.lam is not None else values.length_adaptive_lambda(lengths, critic.length_alpha)
        if critic.length_alpha is not None:
            self.batch.metrics["value/lambda"] = lam.mean().item()
        lam_critic = lam if critic.lam_critic is None else critic.lam_critic
        if self.algorithm.policy_frozen:
            lam_critic = 1.0
        advantages = values.gae(rewards, old_values, gamma=critic.gamma, lam=lam)
        targets = old_values + values.gae(rewards, old_values, gamma=critic.gamma, lam=lam_critic)
        outcomes = old_values + values.gae(rewards, old_values, gamma=critic.gamma, lam=1.0)
        for k, samples in enumerate(rollouts):
            self._set(samples, advantages[k, : lengths[k]])
            parts = targets[k, : lengths[k]].split([s.num_tokens for s in samples])
            for sample, part in zip(samples, parts, strict=True):
                sample.extras[RETURNS] = part.numpy().astype(np.float32)
        tokens = torch.arange(rewards.shape[1]) < lengths[:, None]
        self._measure(advantages[tokens], old_values[tokens], outcomes[tokens])
        if self.config.positive_lm_coef:
            self._weigh_correct()
        for sample in self.batch.samples:
            del sample.extras[REWARDS]

    def _divergence(self, rollouts: list[list[Sample]]) -> Tensor:
        """k1 of every token, for the KL penalty in its reward."""
        rows = [kl.k1(stream(samples, "old_logprobs"), stream(samples, "ref_logprobs")) for samples in rollouts]
        self.batch.metrics["kl/ref"] = torch.cat(rows).mean().item()
        return values.pad(rows)

    def _weigh_correct(self) -> None:
        """Weights with which the mean over all tokens of the batch is the mean over tokens of correct rollouts."""
        correct, groups = self.algorithm.correct(self.batch.groups), self.batch.groups
        right = {
            (p, rollout.index)
            for p, group in enumerate(groups)
            for g, rollout in enumerate(group.rollouts)
            if correct[p, g].item() == 1
        }
        samples = self.batch.samples
        chosen = sum(s.num_tokens for s in samples if (s.group, s.index) in right)
        weight = sum(s.num_tokens for s in samples) / max(1, chosen)
        for s in samples:
            s.extras[LM_WEIGHTS] = np.full_like(s.advantages, weight if (s.group, s.index) in right else 0.0)

    def _measure(self, advantages: Tensor, old_values: Tensor, outcomes: Tensor) -> None:
        """How well the critic knew what came (`outcomes`: rewards still to come), and what advantages look like."""
        levels = np.quantile(advantages.numpy(), QUANTILES)
        if self.algorithm.critic.warmup_steps:
            done = len(self.algorithm.warmup_variances) + self.algorithm.policy_frozen
            self.batch.metrics["value/warmup_steps"] = float(done)
        self.batch.metrics |= {
            "value/explained_variance": values.explained_variance(old_values, outcomes),
            "value/mean": old_values.mean().item(),
            "return/mean": outcomes.mean().item(),
            "return/std": outcomes.std(correction=0).item(),
            "advantage/mean": advantages.mean().item(),
            "advantage/std": advantages.std(correction=0).item(),
            **{f"advantage/p{100 * q:02.0f}": float(v) for q, v in zip(QUANTILES, levels, strict=True)},
        }


def _extra(batch: MicroBatch, name: str) -> Tensor:
    """A stream that every sample carries; a micro-batch without samples has none."""
    return batch.extras[name] if len(batch.advantages) else batch.advantages
