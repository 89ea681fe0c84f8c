"""GRPO: group-relative advantages and a clipped policy-gradient loss, with an optional KL penalty."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmrl.algo.advantages import flat_groups, group_advantages
from llmrl.algo.algorithm import Needs, reward_matrix, samples_of
from llmrl.algo.kl import k3
from llmrl.algo.losses import clip_masks, clipped_surrogate, token_ratio
from llmrl.algo.reduce import aggregate
from llmrl.types import TrainBatch

if TYPE_CHECKING:
    from torch import Tensor

    from llmrl.config import AlgoConfig
    from llmrl.types import Counts, ForwardOutputs, MicroBatch, RolloutGroup


class GRPO:
    """Group Relative Policy Optimization and its nearest relatives; which one is configuration.

    References:
        Shao et al. 2024, arXiv:2402.03300.
    """

    def __init__(self, config: AlgoConfig, *, max_completion_length: int) -> None:
        self.config = config
        self.max_completion_length = max_completion_length
        self.epsilon_high = config.epsilon if config.epsilon_high is None else config.epsilon_high
        self.needs = Needs(ref_logprobs=config.beta > 0, every_sample=config.beta > 0)

    def prepare(self, groups: list[RolloutGroup], *, policy_version: int) -> TrainBatch:
        """Stage 4: the group-relative advantage of every rollout, and one sample per rollout."""
        rewards = reward_matrix(groups)
        advantages = group_advantages(rewards, scale=self.config.scale_rewards)
        for group, row in zip(groups, advantages.tolist(), strict=True):
            for rollout, advantage in zip(group.rollouts, row, strict=True):
                rollout.advantage = advantage
        return TrainBatch(
            samples=samples_of(groups),
            num_groups=len(groups),
            max_completion_length=self.max_completion_length,
            policy_version=policy_version,
            metrics={"advantage/zero_variance_frac": flat_groups(rewards).float().mean().item()},
        )

    def loss(self, outputs: ForwardOutputs, batch: MicroBatch, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 5: clipped surrogate plus beta * k3, aggregated as `loss_type` says."""
        logprobs, advantages = outputs.logprobs, batch.advantages
        # Without old_logprobs the policy is the one that took the batch: the ratio is 1, its gradient is not zero.
        old_logprobs = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        ratio = token_ratio(logprobs, old_logprobs)
        bounds = {"epsilon": self.config.epsilon, "epsilon_high": self.epsilon_high}
        token_losses = clipped_surrogate(ratio, advantages, **bounds)
        low, high = clip_masks(ratio.detach(), advantages, **bounds)
        metrics = {
            "loss/clip_low_frac": low.sum() / counts.num_tokens,
            "loss/clip_high_frac": high.sum() / counts.num_tokens,
            "loss/ratio/max": ratio.detach().max() if ratio.numel() else ratio.new_zeros(()),
        }
        if self.config.beta > 0:
            if batch.ref_logprobs is None:
                raise ValueError("beta > 0 needs ref_logprobs in the batch")
            penalty = k3(logprobs, batch.ref_logprobs)
            token_losses = token_losses + self.config.beta * penalty
            metrics["kl/ref"] = penalty.detach().sum() / counts.num_tokens
        return aggregate(token_losses, batch, counts, self.config.loss_type), metrics
