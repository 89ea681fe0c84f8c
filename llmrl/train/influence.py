"""Token Hidden Reward's scores, computed where the hidden states are: a whole group on one process.

With one optimizer step per batch they come out of the forward pass that trains on the group, just before its loss; then
they cost a few small products. Where several steps use the batch, they are computed before the first one, together with
the old log-probabilities. Either way every process ends with the same scores and advantages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from llmrl.algo.ops.token_hidden_reward import influence, influence_matrix, prediction_errors
from llmrl.algo.policy_gradient.refine import INFLUENCE, INFLUENCE_WEIGHTS
from llmrl.model.modes import evaluating
from llmrl.train.packing import to_tensor
from llmrl.train.planning import plan_micro_batches
from llmrl.train.streams import Found, share_streams, split

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from llmrl.algo.base import Algorithm
    from llmrl.model.policy import Policy
    from llmrl.train.packing import Layout
    from llmrl.types import ForwardOutputs, MicroBatch, Sample, TrainBatch


class GroupScores:
    """Scores the groups of one batch, before it is trained on or while it is.

    It does nothing unless the algorithm needs the influence of tokens.

    Args:
        layout: how samples become micro-batches.
        algorithm: reweights a group by its scores.
        batch: of the update at hand.

    Attributes:
        waiting: groups that are left to the forward pass that trains on them. Each has to be whole in one micro-batch.
    """

    def __init__(self, layout: Layout, algorithm: Algorithm, batch: TrainBatch) -> None:
        self.layout, self.policy, self.parallel = layout, layout.policy, layout.parallel
        self.algorithm, self.batch = algorithm, batch
        self.waiting: set[int] = set()
        self.found: dict[int, np.ndarray] = {}

    def score_first(self, samples: list[Sample], *, with_old: bool) -> list[Sample]:
        """Score the groups that cannot wait for their forward pass, with the policy as it is now.

        Groups can wait where one optimizer step uses the batch, nothing else is asked of the policy as it is now, and
        they fit into one micro-batch.

        Args:
            samples: those that have a gradient.
            with_old: set the old log-probabilities too, which the same forward pass gives.

        Returns:
            The samples that were not scored.
        """
        if not self.algorithm.needs.influence:
            return samples
        groups = _groups_to_score(samples)
        if not with_old and self.algorithm.steps_per_batch == 1:
            self.waiting = {g for g, members in groups.items() if self.layout.fits([samples[i] for i in members])}
        now = [members for group, members in groups.items() if group not in self.waiting]
        scored = self._score(samples, now, with_old=with_old)
        return [sample for index, sample in enumerate(samples) if index not in scored]

    def apply(self, micro_batch: MicroBatch, outputs: ForwardOutputs, samples: list[Sample]) -> None:
        """Score and reweight the waiting groups in a micro-batch, whose advantages change with them.

        Args:
            micro_batch: before its loss is computed.
            outputs: of its forward pass, hidden states included.
            samples: what `MicroBatch.sample_indices` count.
        """
        group_of = [samples[i].group for i in micro_batch.sample_indices]
        present = sorted(self.waiting.intersection(group_of))
        if not present:
            return
        assert outputs.hidden is not None
        lengths = [sample.num_tokens for sample in micro_batch.samples]
        logprobs, weights = outputs.logprobs.detach(), micro_batch.extras[INFLUENCE_WEIGHTS]
        numbers = to_tensor(np.repeat(group_of, lengths), weights.device)
        influences = torch.zeros_like(logprobs)
        for group in present:
            places = torch.nonzero(numbers == group)[:, 0]
            hidden, targets = outputs.hidden[places], micro_batch.targets[places]
            influences[places] = _group_influence(self.policy, hidden, logprobs[places], targets, weights[places])
        pieces = split(influences.cpu().numpy(), lengths)
        by_index = zip(micro_batch.sample_indices, group_of, pieces, strict=True)
        self._reweight({index: piece for index, group, piece in by_index if group in self.waiting}, samples)
        advantages = np.concatenate([samples[i].advantages for i in micro_batch.sample_indices])
        micro_batch.advantages = to_tensor(advantages, weights.device)

    def finish(self, samples: list[Sample]) -> None:
        """Reweight what other processes scored in this step, so that every process records the same."""
        if not self.waiting:
            return
        found = dict(self.parallel.gather_objects([*self.found.items()]))
        self._reweight({index: values for index, values in found.items() if index not in self.found}, samples)
        self.found = {}

    def _reweight(self, found: dict[int, np.ndarray], samples: list[Sample]) -> None:
        members: dict[int, list[Sample]] = {}
        for index in sorted(found):
            sample = samples[index]
            sample.extras[INFLUENCE] = found[index]
            members.setdefault(sample.group, []).append(sample)
        for group in members.values():
            self.algorithm.reweight(self.batch, group)
        self.found |= found

    @torch.no_grad()
    def _score(self, samples: list[Sample], groups: list[list[int]], *, with_old: bool) -> set[int]:
        """Set the influences (and the old log-probabilities) of the samples of groups, which are given by indices.

        A group is whole on one process, which holds the hidden states of one group at a time. Returns which samples.
        """
        tokens = [sum(len(samples[i].input_ids) for i in indices) for indices in groups]
        plans = plan_micro_batches(tokens, max_tokens=1, num_processes=self.parallel.world, packing=False)
        found: Found = {}
        with evaluating(self.policy.wrapped):
            for number in (i for rows in plans[self.parallel.rank] for row in rows for i in row):
                self._score_group(samples, groups[number], found)
        if not with_old:
            for streams in found.values():
                del streams["old_logprobs"]
        return set(share_streams(self.parallel, samples, found))

    def _score_group(self, samples: list[Sample], indices: list[int], found: Found) -> None:
        micro_batches = [*self.layout.micro_batches([samples[i] for i in indices], all_here=True)]
        # Processes score different numbers of groups, so these passes must not wait for each other.
        outputs = [self.policy.forward(batch, with_hidden=True, past_wrapper=True) for batch in micro_batches]
        order = [indices[i] for micro_batch in micro_batches for i in micro_batch.sample_indices]
        ends = np.cumsum([samples[index].num_tokens for index in order])
        logprobs = torch.cat([output.logprobs for output in outputs])
        scores = _group_influence(
            self.policy,
            torch.cat([output.hidden for output in outputs if output.hidden is not None]),
            logprobs,
            torch.cat([micro_batch.targets for micro_batch in micro_batches]),
            torch.cat([micro_batch.extras[INFLUENCE_WEIGHTS] for micro_batch in micro_batches]),
        )
        streams = torch.stack([scores, logprobs]).cpu().numpy()
        for index, part in zip(order, np.split(streams, ends[:-1], axis=1), strict=True):
            found[index] = {INFLUENCE: part[0], "old_logprobs": part[1]}


def _groups_to_score(samples: list[Sample]) -> dict[int, list[int]]:
    """Return the groups that have a weight above 0, each with the indices of its samples."""
    groups: dict[int, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(sample.group, []).append(index)
    return {
        group: found
        for group, found in groups.items()
        if any(samples[i].extras[INFLUENCE_WEIGHTS].any() for i in found)
    }


@torch.no_grad()
def _group_influence(
    policy: Policy,
    hidden: Float[Tensor, "M H"],
    logprobs: Float[Tensor, " M"],
    targets: Int[Tensor, " M"],
    weights: Float[Tensor, " M"],
) -> Float[Tensor, " M"]:
    """Compute the influence of each token of a group from what the output head saw of it."""
    vocabulary, columns = cast("tuple[Tensor, Tensor]", targets.unique(return_inverse=True))  # pyright: ignore
    errors = prediction_errors(policy.restricted_probabilities(hidden, logprobs, vocabulary, columns), columns)
    hidden = hidden.float()
    return influence(errors, hidden, influence_matrix(errors, hidden, weights))
