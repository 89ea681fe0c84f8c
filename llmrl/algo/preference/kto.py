"""KTO: single completions with a label, desirable or not, compared with a reference point of the whole batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from llmrl.algo.base import Algorithm, Needs
from llmrl.algo.ops import preference_losses as losses
from llmrl.algo.options import sampling_batches
from llmrl.algo.preference import loss_options, options
from llmrl.algo.preference.dpo import ref_sync
from llmrl.algo.samples import mismatched_samples, samples_of
from llmrl.types import Sample, TrainBatch

if TYPE_CHECKING:
    from torch import Tensor

    from llmrl.types import Counts, ForwardOutputs, MicroBatch, RolloutGroup


DATASET_THRESHOLD = 0.5
"""A dataset's labels arrive as rewards of 1 and 0."""


class KTO(Algorithm):
    """Kahneman-Tversky Optimization, and APO-zero for completions without a partner.

    The reference point is an estimate over all completions of the batch, on all processes, under the policy that takes
    the batch: one value, the same for every micro-batch and mini-batch. (TRL takes one per micro-batch.)

    Args:
        config: the family's options for single completions.

    References:
        Ethayarajh et al. 2024, arXiv:2402.01306; D'Oosterlinck et al. 2024, arXiv:2408.06266.
    """

    def __init__(self, config: options.KTO | options.OnlineKTO) -> None:
        self.config = config
        self.num_iterations, self.num_mini_batches = config.num_iterations, config.num_mini_batches
        self.kl = 0.0
        self.estimates_kl = isinstance(config.loss, loss_options.KtoLoss)
        online = config if isinstance(config, options.OnlineKTO) else None
        self.needs = Needs(
            ref_logprobs=True,
            every_sample=True,
            refine=self.estimates_kl,
            ref_sync=ref_sync(config),
            sampling_batches=sampling_batches(online.dynamic_sampling if online else None),
        )

    def prepare(self, groups: list[RolloutGroup], *, policy_version: int) -> TrainBatch:
        """Stage 4: label completions (advantage 1 or -1); for `kto`, also put others behind their prompts.

        A dataset says which; of rollouts those of the group before are taken.
        """
        threshold = self.config.desirable_above if isinstance(self.config, options.OnlineKTO) else DATASET_THRESHOLD
        for group in groups:
            for rollout in group.rollouts:
                reward = None if rollout.score is None else rollout.score.reward
                rollout.advantage = 0.0 if reward is None else 1.0 if reward > threshold else -1.0
        samples = samples_of(groups)
        desirable = sum(bool(s.advantages[0] > 0) for s in samples)
        probes = (mismatched_samples(groups) or mismatched(samples)) if self.estimates_kl else []
        return TrainBatch(
            samples=samples + probes,
            num_groups=len(groups),
            policy_version=policy_version,
            metrics={"preference/desirable_frac": desirable / max(1, len(samples))},
            groups=groups,
            sampled=isinstance(self.config, options.OnlineKTO),
        )

    def refine(self, batch: TrainBatch) -> None:
        """Set the reference point from the mismatched completions, and remove these from the batch."""
        probes = [s for s in batch.samples if s.probe]
        batch.samples = [s for s in batch.samples if not s.probe]
        ratios: list[float] = []
        for s in probes:
            assert s.old_logprobs is not None and s.ref_logprobs is not None
            ratios.append(float((s.old_logprobs - s.ref_logprobs).sum(dtype=np.float64)))
        self.kl = losses.kto_reference_point(torch.tensor(ratios)).item()

    def loss(self, outputs: ForwardOutputs, batch: MicroBatch, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 5: compute this micro-batch's share of the weighted mean over all completions."""
        c = self.config.loss
        assert batch.ref_logprobs is not None
        token_ratios = outputs.logprobs - batch.ref_logprobs
        ratios = token_ratios.new_zeros(len(batch.samples)).index_add(0, batch.sequence_ids, token_ratios)
        labels = [bool(sample.advantages[0] > 0) for sample in batch.samples]
        desirable = torch.tensor(labels, dtype=torch.bool, device=ratios.device)
        if isinstance(c, loss_options.KtoLoss):
            each = losses.kto_loss(ratios, desirable, beta=c.beta, kl=self.kl)
        else:
            each = losses.apo_zero_unpaired_loss(ratios, desirable, beta=c.beta)
        each = each * torch.where(desirable, c.desirable_weight, c.undesirable_weight)
        rewards = c.beta * ratios.detach()
        total = counts.num_sequences
        metrics = {
            "preference/accuracy": ((rewards > c.beta * self.kl) == desirable).sum() / total,
            "preference/signed_reward": (rewards * torch.where(desirable, 1.0, -1.0)).sum() / total,
            "preference/kl": torch.full_like(each, self.kl).sum() / total,
        }
        return each.sum() / total, metrics


def mismatched(samples: list[Sample]) -> list[Sample]:
    """Put the completions of each group behind the prompts of the next group, and the last group's behind the first's.

    With one rollout per group this is TRL's rotation by one, over the whole batch. A single group has no other prompt:
    the result is empty.
    """
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample)
    ordered = list(groups.values())
    if len(ordered) < 2:
        return []
    found: list[Sample] = []
    for here, before in zip(ordered, ordered[-1:] + ordered[:-1], strict=True):
        for i, sample in enumerate(here):
            other = before[i % len(before)]
            start, begin = (int(np.argmax(s.loss_mask)) for s in (sample, other))
            found.append(
                Sample(
                    input_ids=np.concatenate([sample.input_ids[:start], other.input_ids[begin:]]),
                    loss_mask=np.concatenate([sample.loss_mask[:start], other.loss_mask[begin:]]),
                    advantages=np.zeros(other.num_tokens, np.float32),
                    rollout_logprobs=np.zeros(other.num_tokens, np.float32),
                    group=sample.group,
                    index=sample.index,
                    probe=True,
                )
            )
    return found
