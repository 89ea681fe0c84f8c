"""PPO: GRPO's policy loss with advantages from a critic in place of a group's mean.

`prepare` lays out the reward of every token. The learner fills in the critic's values (and log-probabilities, for a KL
penalty in the reward), and `refine` computes advantages and the critic's targets from them.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmrl.algo.ops import values as ops
from llmrl.algo.policy_gradient import refine as steps
from llmrl.algo.policy_gradient.algorithm import PolicyLoss
from llmrl.algo.policy_gradient.refine import View, stream
from llmrl.algo.samples import token_rewards
from llmrl.types import TrainBatch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from llmrl.algo.ppo import options
    from llmrl.types import Counts, ForwardOutputs, MicroBatch, RolloutGroup

REWARDS, OLD_VALUES, RETURNS, LM_WEIGHTS = "token_rewards", "old_values", "returns", "lm_weights"
"""Extra streams: the reward of each token, the critic's values before the update, its targets, and the weights of the
language-model loss."""
QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
"""Quantiles of the advantages before whitening that are logged."""
SETTLED_OVER = 8
"""Batches whose mean explained variance ends value pre-training."""


class PPO(PolicyLoss):
    """Proximal Policy Optimization with a learned critic, and VAPO.

    Args:
        options: the choices.
        max_completion_length, rewards: as in `PolicyLoss`.

    References:
        Schulman et al. 2017, arXiv:1707.06347 (PPO); Yuan et al. 2025, arXiv:2503.01491 (VC-PPO: value pre-training,
        decoupled lambda); Yue et al. 2025, arXiv:2504.05118 (VAPO: length-adaptive lambda, positive-example loss).
    """

    def __init__(
        self, options: options.PPO, *, max_completion_length: int, rewards: dict[str, float] | None = None
    ) -> None:
        super().__init__(options, max_completion_length=max_completion_length, rewards=rewards)
        self.options = options
        self.needs = dataclasses.replace(self._needs(), values=True, every_sample=True, refine=True)
        self.policy_frozen = options.warmup is not None
        self.any_correct = True
        """Whether the batch holds a correct rollout, which the language-model loss can be measured on."""
        self.warmup_variances: list[float] = []
        """Explained variance of each step of value pre-training."""

    # --- stage 4 ---

    def prepare(self, groups: list[RolloutGroup], *, policy_version: int) -> TrainBatch:
        """Lay out the reward of every token, and one sample per rollout; `refine` sets the advantages."""
        rewards = self.shaped_rewards(groups)
        self.num_rollouts = rewards.numel()
        for group, row in zip(groups, rewards, strict=True):
            for rollout, reward in zip(group.rollouts, row, strict=True):
                rollout.advantage = token_rewards(rollout, reward.item(), dense=self.options.use_token_rewards).tolist()
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
        """Compute advantages and the critic's targets, then refine the advantages as GRPO does."""
        if not batch.samples:
            return
        view = View(batch)
        self._estimate(view)
        if self.options.whiten:
            steps.whiten(view)
        self._hold_back(view)

    def _estimate(self, view: View) -> None:
        """Compute advantages with the policy's lambda and targets with the critic's, for all rollouts at once."""
        rollouts, o, metrics = list(view.rollouts.values()), self.options.value, view.batch.metrics
        rewards = ops.pad([stream(samples, REWARDS) for samples in rollouts])
        if self.options.kl_in_reward is not None:
            rewards = rewards - self.beta * ops.pad(list(view.divergences().values()))
        old_values = ops.pad([stream(samples, OLD_VALUES) for samples in rollouts])
        lengths = torch.tensor([sum(s.num_tokens for s in samples) for samples in rollouts])
        lam = self.options.lam
        if lam is None:
            assert o.length_alpha is not None
            lam = ops.length_adaptive_lambda(lengths, o.length_alpha)
            metrics["value/lambda"] = lam.mean().item()
        lam_critic = lam if o.lam_critic is None else o.lam_critic
        if self.policy_frozen:
            lam_critic = 1.0
        advantages = ops.gae(rewards, old_values, gamma=o.gamma, lam=lam)
        targets = old_values + ops.gae(rewards, old_values, gamma=o.gamma, lam=lam_critic)
        outcomes = old_values + ops.gae(rewards, old_values, gamma=o.gamma, lam=1.0)
        for k, samples in enumerate(rollouts):
            view.set_advantages(samples, advantages[k, : lengths[k]])
            for sample, part in zip(samples, steps.split(targets[k, : lengths[k]], samples), strict=True):
                sample.extras[RETURNS] = part.numpy().astype(np.float32)
        tokens = torch.arange(rewards.shape[1]) < lengths[:, None]
        self._measure(metrics, advantages[tokens], old_values[tokens], outcomes[tokens])
        if self.options.positive_lm_coef:
            self._weigh_correct(view.batch)
        for sample in view.batch.samples:
            del sample.extras[REWARDS]

    def _weigh_correct(self, batch: TrainBatch) -> None:
        """Set the weights that turn the mean over all tokens of the batch into that over correct rollouts' tokens."""
        correct, samples = self.correct(batch.groups), batch.samples
        right = {
            (p, rollout.index)
            for p, group in enumerate(batch.groups)
            for g, rollout in enumerate(group.rollouts)
            if correct[p, g].item() == 1
        }
        chosen = sum(s.num_tokens for s in samples if (s.group, s.index) in right)
        self.any_correct = chosen > 0
        weight = sum(s.num_tokens for s in samples) / max(1, chosen)
        for s in samples:
            s.extras[LM_WEIGHTS] = np.full_like(s.advantages, weight if (s.group, s.index) in right else 0.0)

    def _measure(self, metrics: dict[str, float], advantages: Tensor, old_values: Tensor, outcomes: Tensor) -> None:
        """Log how well the critic predicted `outcomes` (the rewards still to come), and the advantages' quantiles."""
        levels = np.quantile(advantages.numpy(), QUANTILES)
        if self.options.warmup is not None:
            metrics["value/warmup_steps"] = float(len(self.warmup_variances) + self.policy_frozen)
        metrics |= {
            "value/explained_variance": ops.explained_variance(old_values, outcomes),
            "value/mean": old_values.mean().item(),
            "return/mean": outcomes.mean().item(),
            "return/std": outcomes.std(correction=0).item(),
            "advantage/mean": advantages.mean().item(),
            "advantage/std": advantages.std(correction=0).item(),
            **{f"advantage/p{100 * q:02.0f}": float(v) for q, v in zip(QUANTILES, levels, strict=True)},
        }

    # --- stage 5 ---

    def loss(self, outputs: ForwardOutputs, batch: MicroBatch, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
        """Add up GRPO's loss on these advantages, the critic's error, and the loss on tokens of correct rollouts."""
        if outputs.values is None:
            raise ValueError("PPO needs the critic's values")
        total, metrics = super().loss(outputs, batch, counts)
        if self.options.positive_lm_coef:
            nll = -(outputs.logprobs * _extra(batch, LM_WEIGHTS)).sum() / counts.num_tokens
            total = total + self.options.positive_lm_coef * nll
            if self.any_correct:
                metrics["loss/positive_lm"] = nll.detach()
        value_loss, found = self.value_loss(outputs.values, batch, counts)
        return total + value_loss, metrics | found

    def value_loss(
        self, values: Float[Tensor, " M"], batch: MicroBatch, counts: Counts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the critic's error, times its coefficient."""
        old_values, returns = _extra(batch, OLD_VALUES), _extra(batch, RETURNS)
        clip = 0.0 if self.policy_frozen else self.options.value.clip
        errors, clipped = ops.value_loss(values, old_values, returns, clip=clip)
        loss = errors.sum() / counts.num_tokens
        coefficient = 1.0 if self.options.value.coef is None else self.options.value.coef
        return coefficient * loss, {"value/loss": loss.detach(), "value/clip_frac": clipped.sum() / counts.num_tokens}

    # --- value pre-training ---

    def observe(self, metrics: dict[str, float]) -> list[str]:
        """End value pre-training when the explained variance has settled, or its steps are used up."""
        if not self.policy_frozen:
            return super().observe(metrics)
        warmup = self.options.warmup
        assert warmup is not None
        self.warmup_variances.append(metrics.get("value/explained_variance", float("nan")))
        recent = self.warmup_variances[-SETTLED_OVER:]
        mean, done = sum(recent) / len(recent), len(self.warmup_variances)
        settled = len(recent) == SETTLED_OVER and mean >= warmup.explained_variance
        self.policy_frozen = not settled and done < warmup.steps
        if self.policy_frozen:
            return []
        wanted = f"(wanted: {warmup.explained_variance:g})"
        how = "has settled" if settled else "stops at algo.warmup.steps"
        return [f"value pre-training {how} after {done} steps, explained variance {mean:.2f} {wanted}"]

    @property
    def passes(self) -> int:
        """Passes over the current batch: value pre-training has its own number."""
        warmup = self.options.warmup
        return warmup.iterations if self.policy_frozen and warmup is not None else self.num_iterations

    @property
    def num_frozen_updates(self) -> int:
        """Optimizer steps of value pre-training, if it does not end early."""
        warmup = self.options.warmup
        return 0 if warmup is None else warmup.steps * warmup.iterations * self.num_mini_batches

    def state_dict(self) -> dict[str, Any]:
        """Return GRPO's state and the progress of value pre-training."""
        return super().state_dict() | {
            "policy_frozen": self.policy_frozen,
            "warmup_variances": self.warmup_variances,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore from `state_dict`."""
        super().load_state_dict(state)
        self.policy_frozen, self.warmup_variances = state["policy_frozen"], list(state["warmup_variances"])


def _extra(batch: MicroBatch, name: str) -> Tensor:
    """Return a stream that every sample carries; a micro-batch without samples carries none."""
    return batch.extras[name] if len(batch.advantages) else batch.advantages
