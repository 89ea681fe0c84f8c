"""B-Coder: stored programs and their outcomes -> Bellman errors of a Q function made of the language model's logits.

Off-policy: nothing is sampled while it trains. Stage `value` learns V_phi of the model as it is; stage `policy` learns
the logits and a residual value, with the greedy tokens of the model before training in the targets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llmrl.algo.base import Algorithm, Needs
from llmrl.algo.samples import samples_of
from llmrl.methods.bcoder import bellman
from llmrl.methods.bcoder.options import PolicyStage
from llmrl.types import TrainBatch

if TYPE_CHECKING:
    from torch import Tensor

    from llmrl.methods.bcoder.options import BCoderOptions
    from llmrl.types import Counts, ForwardOutputs, MicroBatch, RolloutGroup

REWARDS, REAL = "rewards", "real"
"""Streams: the reward of each token; 1 on the tokens of right programs of the dataset, 0 on those of samples."""


class BCoder(Algorithm):
    """B-Coder's two stages.

    Args:
        options: the choices.
        max_completion_length: recorded in the batch.

    References:
        Yu et al. 2024, arXiv:2310.03173.
    """

    def __init__(self, options: BCoderOptions, *, max_completion_length: int) -> None:
        self.options = options
        self.num_iterations, self.num_mini_batches = options.num_iterations, options.num_mini_batches
        self.max_completion_length = max_completion_length
        self.needs = Needs(every_sample=True, policy_streams=True)

    def prepare(self, groups: list[RolloutGroup], *, policy_version: int) -> TrainBatch:
        """Lay out the reward of each token of each program, and mark the right programs of the dataset."""
        for group in groups:
            for rollout in group.rollouts:
                rollout.advantage = 0.0
        samples = samples_of(groups)
        by_place = {(p, r.index): r for p, group in enumerate(groups) for r in group.rollouts}
        for sample in samples:
            rollout = by_place[sample.group, sample.index]
            assert rollout.score is not None and rollout.score.reward is not None
            rewards = np.zeros(sample.num_tokens, np.float32)
            rewards[-1] = rollout.score.reward
            real = np.full(sample.num_tokens, float(rollout.score.info["real"]), np.float32)
            sample.extras = {REWARDS: rewards, REAL: real}
        return TrainBatch(
            samples=samples,
            num_groups=len(groups),
            max_completion_length=self.max_completion_length,
            policy_version=policy_version,
            groups=groups,
            sampled=False,
        )

    def loss(self, outputs: ForwardOutputs, batch: MicroBatch, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute L_V, or L_ft = q_coef L_Q + adv_coef L_adv + ce_coef L_ce (section 4.4), each a mean over programs.

        L_adv and L_ce are means over right programs of the dataset (a share `real_frac` of all) of sums over tokens.
        """
        o, ids = self.options, batch.sequence_ids
        assert outputs.values is not None
        advantages, values = o.alpha * outputs.extras["advantages"], outputs.values
        q = advantages + values
        anchor_q = o.alpha * outputs.extras["anchor_advantages"] + values
        targets = bellman.bellman_targets(batch.extras[REWARDS], anchor_q, ids, gamma=o.gamma)
        q_loss = bellman.td_loss(q, targets, ids, batch.sequence_lengths).sum() / counts.num_sequences
        total, real = q_loss, batch.extras[REAL]
        metrics = {
            "loss/q": q_loss.detach(),
            "value/mean": values.detach().sum() / counts.num_tokens,
            "value/target/mean": targets.sum() / counts.num_tokens,
            "value/q/max": q.detach().max() if len(q) else q.new_full((), -np.inf),
        }
        if isinstance(o.stage, PolicyStage):
            num_real = max(1.0, o.real_frac * counts.num_sequences)
            q_coef, adv_coef, ce_coef = o.coefs
            adv_loss = (advantages.abs() * real).sum() / num_real
            ce_loss = -(outputs.logprobs * real).sum() / num_real
            total = q_coef * q_loss + adv_coef * adv_loss + ce_coef * ce_loss
            metrics |= {"loss/adv": adv_loss.detach(), "loss/ce": ce_loss.detach()}
        return total, metrics
