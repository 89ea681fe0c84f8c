"""Scored groups -> pairs of rollouts, one preferred to the other; and a micro-batch -> tensors over its pairs.

A rollout that is in several pairs is computed once: pairs are index tensors over the rollouts of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from llmrl.algo.preference import options
from llmrl.algo.preference.hierarchy import HierarchicalPreference, net_wins, parts_of
from llmrl.types import Preference, Sample

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from llmrl.types import MicroBatch, RolloutGroup

Pair = tuple[int, int]
"""(better, worse): positions in a group's `rollouts`."""


def choose_pairs(groups: Sequence[RolloutGroup], config: options.DPO | options.OnlineDPO) -> list[list[Pair]]:
    """Return the pairs of each group. Rollouts without a score are in none.

    A row of a dataset is one pair: its rewards are 1 and 0. Among rollouts, a pair is decided when the rewards differ
    by more than `min_margin`; with a `hierarchy`, when that decides, with margins taken over the whole batch.
    `best_worst` keeps one pair of a group: the rollout with the most net wins against the one with the fewest, if that
    pair is decided (the first of equals is taken); `all` keeps every decided pair.
    """
    if isinstance(config, options.DPO):
        config = options.OnlineDPO()  # two completions: the best and the worst are the chosen and the rejected one
    hierarchy = HierarchicalPreference(config.hierarchy) if config.hierarchy else None
    items = [[parts_of(rollout) for rollout in group.rollouts] for group in groups]
    margins = hierarchy.margins([item for group in items for item in group]) if hierarchy else []
    found: list[list[Pair]] = []
    for group in items:
        if hierarchy:
            scored = [{} if item.get("reward") is None else item for item in group]
            decided = hierarchy.pairs(scored, margins)
        else:
            decided = _decided_by_reward([item.get("reward") for item in group], config.min_margin)
        found.append(decided if config.pairs == "all" else _extremes(decided, len(group)))
    return found


def _decided_by_reward(rewards: Sequence[float | None], margin: float) -> list[Pair]:
    known = [(i, reward) for i, reward in enumerate(rewards) if reward is not None]
    return [(i, j) for i, a in known for j, b in known if a - b > margin]


def _extremes(decided: list[Pair], count: int) -> list[Pair]:
    if not decided:
        return []
    wins = net_wins(decided, count)
    pair = (wins.index(max(wins)), wins.index(min(wins)))
    return [pair] if pair in decided else []


def attach_pairs(
    samples: Sequence[Sample], groups: Sequence[RolloutGroup], pairs: Sequence[list[Pair]]
) -> list[Sample]:
    """Return the samples of rollouts that are in a pair; those of preferred rollouts carry the `Preference`s."""
    indices = [[rollout.index for rollout in group.rollouts] for group in groups]
    used = {(g, indices[g][place]) for g, chosen in enumerate(pairs) for pair in chosen for place in pair}
    preferred: dict[tuple[int, int], list[int]] = {}
    for g, chosen in enumerate(pairs):
        for better, worse in chosen:
            preferred.setdefault((g, indices[g][better]), []).append(indices[g][worse])
    kept = [sample for sample in samples if (sample.group, sample.index) in used]
    for sample in kept:
        # `pop`: a rollout of several samples counts once, so its first sample gets its preferences.
        worse = preferred.pop((sample.group, sample.index), [])
        sample.preferences = [Preference(over=index) for index in worse]
    return kept


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """The R rollouts of a micro-batch and the K preferences among them."""

    rollout_ids: Int[Tensor, " M"]
    """Which rollout each trained token belongs to."""
    lengths: Int[Tensor, " R"]
    """Number of trained tokens of each."""
    chosen: Int[Tensor, " K"]
    rejected: Int[Tensor, " K"]
    samples: list[Sample]
    """[R] First sample of each rollout."""
    preferences: list[Preference]
    """[K] Where the pairs come from."""

    def sum(self, stream: Float[Tensor, " M"]) -> Float[Tensor, " R"]:
        """Sum a stream over each rollout's tokens."""
        return stream.new_zeros(len(self.samples)).index_add(0, self.rollout_ids, stream)

    def shared(self, stream: Float[Tensor, " M"], *, tail: float) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
        """Sum the first min(lengths) tokens of each pair plus `tail` times the rest, chosen and rejected (LD-DPO).

        Source: Liu et al. 2024, arXiv:2409.06411, equation 11.
        """
        limits = torch.minimum(self.lengths[self.chosen], self.lengths[self.rejected])
        order = torch.argsort(self.rollout_ids, stable=True)  # a rollout's samples may lie apart in the micro-batch
        starts = self.lengths.cumsum(0) - self.lengths
        sums: list[Tensor] = []
        for rollouts in (self.chosen, self.rejected):
            lengths = self.lengths[rollouts]
            pair = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
            place = torch.arange(len(pair), device=pair.device) - (lengths.cumsum(0) - lengths)[pair]
            tokens = stream[order[starts[rollouts][pair] + place]]
            weights = torch.where(place < limits[pair], 1.0, tail)
            sums.append(tokens.new_zeros(len(lengths)).index_add(0, pair, tokens * weights))
        return sums[0], sums[1]


def rollouts_of(batch: MicroBatch) -> Rollouts:
    """Collect the rollouts of a micro-batch (one may be several sequences) and the preferences among them."""
    places: dict[tuple[int, int], int] = {}
    firsts: list[Sample] = []
    sequences: list[int] = []
    for sample in batch.samples:
        key = (sample.group, sample.index)
        if key not in places:
            places[key] = len(places)
            firsts.append(sample)
        sequences.append(places[key])
    found = [(sample, preference) for sample in batch.samples for preference in sample.preferences]
    device = batch.targets.device

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    rollout_ids = tensor(sequences)[batch.sequence_ids]
    return Rollouts(
        rollout_ids=rollout_ids,
        lengths=torch.bincount(rollout_ids, minlength=len(firsts)),
        chosen=tensor([places[sample.group, sample.index] for sample, _ in found]),
        rejected=tensor([places[sample.group, preference.over] for sample, preference in found]),
        samples=firsts,
        preferences=[preference for _, preference in found],
    )


def count_pairs(samples: Sequence[Sample]) -> tuple[int, int]:
    """Return the denominators of pair losses: preferences, and tokens of preferred rollouts, once per preference."""
    lengths: dict[tuple[int, int], int] = {}
    for sample in samples:
        key = (sample.group, sample.index)
        lengths[key] = lengths.get(key, 0) + sample.num_tokens
    preferred = [(lengths[s.group, s.index], len(s.preferences)) for s in samples]
    return sum(count for _, count in preferred), sum(length * count for length, count in preferred)
