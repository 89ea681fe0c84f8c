"""Token Hidden Reward's scores, computed where the hidden states are: a whole group on one process.

With one optimizer step per batch they come out of the forward pass that trains on the group, just before its loss; then
they cost a few small products. Where several steps use the batch they are computed before the first, together with the
old log-probabilities. Either way every process ends with the same scores and advantages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from llmrl.algo.ops.token_hidden_reward import influence, influence_matrix, prediction_errors
from llmrl.algo.policy_gradient.refine import INFLUENCE, INFLUENCE_WEIGHTS

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from llmrl.algo.base import Algorithm
    from llmrl.model.policy import Policy
    from llmrl.types import ForwardOutputs, MicroBatch, Sample, TrainBatch


def groups_to_score(samples: list[Sample]) -> dict[int, list[int]]:
    """The groups with a weight above 0, each with its samples, by index."""
    groups: dict[int, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(sample.group, []).append(index)
    return {
        group: found
        for group, found in groups.items()
        if any(samples[i].extras[INFLUENCE_WEIGHTS].any() for i in found)
    }


@torch.no_grad()
def group_influence(
    policy: Policy,
    hidden: Float[Tensor, "M H"],
    logprobs: Float[Tensor, " M"],
    targets: Int[Tensor, " M"],
    weights: Float[Tensor, " M"],
) -> Float[Tensor, " M"]:
    """Influence of each token of a group, from what the output head saw of it."""
    vocabulary, columns = targets.unique(return_inverse=True)
    errors = prediction_errors(policy.restricted_probabilities(hidden, logprobs, vocabulary, columns), columns)
    hidden = hidden.float()
    with torch.autocast(hidden.device.type, enabled=False):
        return influence(errors, hidden, influence_matrix(errors, hidden, weights))


class Reweighting:
    """Scores and reweights groups while they are trained on, each whole in one micro-batch.

    Args:
        policy: whose forward passes they are.
        algorithm: does the reweighting.
        batch: of the step.
        samples: what `MicroBatch.sample_indices` count.
        groups: which groups are scored here.

    Attributes:
        found: the influences of each sample scored on this process, by its index.
    """

    def __init__(
        self, policy: Policy, algorithm: Algorithm, batch: TrainBatch, samples: list[Sample], groups: set[int]
    ) -> None:
        self.policy, self.algorithm, self.batch = policy, algorithm, batch
        self.samples, self.groups = samples, groups
        self.found: dict[int, np.ndarray] = {}

    def apply(self, micro_batch: MicroBatch, outputs: ForwardOutputs) -> None:
        """Reweight the groups that are in a micro-batch, whose advantages change with them.

        Args:
            micro_batch: before its loss is computed.
            outputs: of its forward pass, hidden states included.
        """
        group_of = [self.samples[i].group for i in micro_batch.sample_indices]
        present = sorted(self.groups.intersection(group_of))
        if not present:
            return
        assert outputs.hidden is not None
        lengths = micro_batch.sequence_lengths
        logprobs, weights = outputs.logprobs.detach(), micro_batch.extras[INFLUENCE_WEIGHTS]
        numbers = torch.tensor(group_of, device=weights.device).repeat_interleave(lengths)
        influences = torch.zeros_like(logprobs)
        for group in present:
            places = torch.nonzero(numbers == group)[:, 0]
            hidden, targets = outputs.hidden[places], micro_batch.targets[places]
            influences[places] = group_influence(self.policy, hidden, logprobs[places], targets, weights[places])
        pieces = influences.cpu().split(lengths.tolist())
        by_index = zip(micro_batch.sample_indices, group_of, pieces, strict=True)
        self._reweight({index: piece.numpy() for index, group, piece in by_index if group in self.groups})
        advantages = np.concatenate([self.samples[i].advantages for i in micro_batch.sample_indices])
        micro_batch.advantages = torch.from_numpy(advantages).to(weights.device)

    def adopt(self, found: dict[int, np.ndarray]) -> None:
        """Reweight what other processes scored, so that every process records the same."""
        self._reweight({index: values for index, values in found.items() if index not in self.found})

    def _reweight(self, found: dict[int, np.ndarray]) -> None:
        members: dict[int, list[Sample]] = {}
        for index in sorted(found):
            sample = self.samples[index]
            sample.extras[INFLUENCE] = found[index]
            members.setdefault(sample.group, []).append(sample)
        for samples in members.values():
            self.algorithm.reweight(self.batch, samples)
        self.found |= found
