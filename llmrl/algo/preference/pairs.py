"""Scored groups -> which rollouts are preferred to which; and a micro-batch -> tensors over its pairs.

A rollout that is in several pairs is computed once: pairs are index tensors over the rollouts of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from llmrl.algo.preference.hierarchy import HierarchicalPreference, net_wins, parts_of
from llmrl.types import Preference, Sample

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from llmrl.config import PreferenceConfig
    from llmrl.types import MicroBatch, RolloutGroup

Pair = tuple[int, int]
"""(better, worse): positions in a group's `rollouts`."""


def choose_pairs(groups: Sequence[RolloutGroup], config: PreferenceConfig) -> list[list[Pair]]:
    """The pairs of each group. Rollouts without a score are in none.

    By reward, a pair is decided when the rewards differ by more than `min_margin`; with a `hierarchy`, when that
    decides it, its margins taken over the whole batch. `best_worst` keeps one pair of a group: the rollout with the
    most net wins against the one with the fewest, if that pair is decided (ties go to the first); `all` keeps all.
    """
    hierarchy = HierarchicalPreference(config.hierarchy) if config.hierarchy else None
    everything = [parts_of(rollout) for group in groups for rollout in group.rollouts]
    margins = hierarchy.margins(everything) if hierarchy else []
    found = []
    for group in groups:
        items = [parts_of(rollout) for rollout in group.rollouts]
        if hierarchy:
            scored = [{} if item.get("reward") is None else item for item in items]
            decided = hierarchy.pairs(scored, margins)
        else:
            decided = _decided_by_reward([item.get("reward") for item in items], config.min_margin or 0.0)
        found.append(decided if config.pairs == "all" else _extremes(decided, len(items)))
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
    """The samples of rollouts that are in a pair, the preferred ones told to what."""
    indices = [[rollout.index for rollout in group.rollouts] for group in groups]
    used = {(g, indices[g][place]) for g, of_group in enumerate(pairs) for pair in of_group for place in pair}
    preferred: dict[tuple[int, int], list[int]] = {}
    for g, of_group in enumerate(pairs):
        for better, worse in of_group:
            preferred.setdefault((g, indices[g][better]), []).append(indices[g][worse])
    kept = [sample for sample in samples if (sample.group, sample.index) in used]
    for sample in kept:
        worse = preferred.pop((sample.group, sample.index), [])  # the rollout's first sample gets them
        sample.preferences = [Preference(over=index) for index in worse]
    return kept


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """The R rollouts of a micro-batch and the K preferences among them."""

    of_token: Int[Tensor, " M"]
    """Which rollout each trained token belongs to."""
    lengths: Int[Tensor, " R"]
    """Trained tokens."""
    chosen: Int[Tensor, " K"]
    rejected: Int[Tensor, " K"]
    samples: list[Sample]
    """[R] the first sample of each."""
    preferences: list[Preference]
    """[K]"""

    def sum(self, stream: Float[Tensor, " M"]) -> Float[Tensor, " R"]:
        """Sum of a stream over each rollout's tokens."""
        return stream.new_zeros(len(self.samples)).index_add(0, self.of_token, stream)

    def shared(self, stream: Float[Tensor, " M"], *, tail: float) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
        """LD-DPO: sums over the first min(lengths) tokens of each pair plus `tail` times the rest, chosen and rejected.

        Source: Liu et al. 2024, arXiv:2409.06411, equation 11.
        """
        limits = torch.minimum(self.lengths[self.chosen], self.lengths[self.rejected])
        order = torch.argsort(self.of_token, stable=True)  # a rollout's samples need not lie behind each other
        starts = self.lengths.cumsum(0) - self.lengths
        sums = []
        for rollouts in (self.chosen, self.rejected):
            lengths = self.lengths[rollouts]
            pair = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
            place = torch.arange(len(pair), device=pair.device) - (lengths.cumsum(0) - lengths)[pair]
            tokens = stream[order[starts[rollouts][pair] + place]]
            weights = torch.where(place < limits[pair], 1.0, tail)
            sums.append(tokens.new_zeros(len(lengths)).index_add(0, pair, tokens * weights))
        return sums[0], sums[1]


def rollouts_of(batch: MicroBatch) -> Rollouts:
    """The rollouts of a micro-batch (one may be several sequences) and the preferences among them."""
    places: dict[tuple[int, int], int] = {}
    firsts: list[Sample] = []
    of_sequence = []
    for sample in batch.samples:
        key = (sample.group, sample.index)
        if key not in places:
            places[key] = len(places)
            firsts.append(sample)
        of_sequence.append(places[key])
    found = [(sample, preference) for sample in batch.samples for preference in sample.preferences]
    device = batch.targets.device

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    of_token = tensor(of_sequence)[batch.sequence_ids]
    return Rollouts(
        of_token=of_token,
        lengths=torch.bincount(of_token, minlength=len(firsts)),
        chosen=tensor([places[sample.group, sample.index] for sample, _ in found]),
        rejected=tensor([places[sample.group, preference.over] for sample, preference in found]),
        samples=firsts,
        preferences=[preference for _, preference in found],
    )


def count_pairs(samples: Sequence[Sample]) -> tuple[int, int]:
    """(preferences, trained tokens of preferred rollouts, once per preference): the denominators of pair losses."""
    lengths: dict[tuple[int, int], int] = {}
    for sample in samples:
        key = (sample.group, sample.index)
        lengths[key] = lengths.get(key, 0) + sample.num_tokens
    preferred = [(lengths[s.group, s.index], len(s.preferences)) for s in samples]
    return sum(count for _, count in preferred), sum(length * count for length, count in preferred)
