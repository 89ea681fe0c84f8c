"""Sequences with a common beginning -> trees: the beginning once, the rest as branches that do not see each other.

A group's rollouts share their prompt. Laid out as [prompt | completion 1 | completion 2 | ...] with positions that
restart behind the prompt and a mask that lets a token see the prompt and its own branch, the prompt is computed once
instead of G times, with the same log-probabilities and gradients.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor

    from llmrl.model.policy import Policy
    from llmrl.types import Sample


@dataclass(frozen=True, kw_only=True, slots=True)
class Tree:
    """Samples laid out together. A tree of a single sample shares no prefix."""

    samples: tuple[int, ...]
    """Indices of the samples."""
    prefix: int
    """Tokens they share at the beginning, which are computed once. None of them is trained."""
    length: int
    """Tokens of the whole layout."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Arithmetic of one layer, to decide what is worth sharing.

    Sharing is not always cheaper: attention also computes the pairs between branches, which the mask then hides.
    """

    per_token: float
    """Multiply-adds of the linear layers for one token."""
    per_pair: float
    """Multiply-adds of attention for one (query, key) pair."""

    def of(self, tree: Tree) -> float:
        """Return the cost of a tree: causal attention inside its prefix, and from its branches to everything."""
        shared = len(tree.samples) > 1
        causal = tree.prefix if shared else tree.length
        pairs = causal * causal / 2 + (tree.length - causal) * tree.length
        return tree.length * self.per_token + pairs * self.per_pair


def layer_cost(policy: Policy) -> Cost:
    """Return what one decoder layer of the policy computes per token and per pair of tokens."""
    config, model = policy.text_config, policy.causal_lm
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    embeddings.add(id(policy.module.head().weight))
    inside = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in embeddings)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Cost(per_token=inside / config.num_hidden_layers, per_pair=2.0 * head_dim * config.num_attention_heads)


def single_trees(samples: Sequence[Sample]) -> list[Tree]:
    """Return a tree for every sample."""
    return [Tree(samples=(i,), prefix=0, length=len(sample.input_ids)) for i, sample in enumerate(samples)]


def share_prefixes(samples: Sequence[Sample], cost: Cost) -> list[Tree]:
    """Lay the samples of each group out as trees, with the number of branches per tree that makes the group cheapest.

    Args:
        samples: samples of one group carry the same `group` number.
        cost: of one layer of the model.

    Returns:
        Trees that hold every sample once. Where sharing does not pay (long completions, short prompts), each sample is
        a tree of its own.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for i, sample in enumerate(samples):
        groups[sample.group].append(i)
    trees: list[Tree] = []
    for members in groups.values():
        prefix = _common_prefix([samples[i] for i in members])
        layouts = [_branch(samples, members, prefix, num) for num in _branch_counts(len(members), prefix)]
        trees += min(layouts, key=lambda layout: sum(cost.of(tree) for tree in layout))
    return trees


def _common_prefix(samples: Sequence[Sample]) -> int:
    """Return how many tokens all samples share before any of them has a trained token."""
    first = samples[0].input_ids
    length = min(int(np.argmax(sample.loss_mask)) for sample in samples)
    for sample in samples[1:]:
        different = np.flatnonzero(sample.input_ids[:length] != first[:length])
        length = int(different[0]) if len(different) else length
    return length


def _branch_counts(num_samples: int, prefix: int) -> list[int]:
    """Return the numbers of branches per tree that are worth trying: 1, 2, 4, ... and all."""
    powers = [1 << k for k in range(num_samples.bit_length()) if 1 << k < num_samples]
    return [*powers, num_samples] if prefix else [1]


def _branch(samples: Sequence[Sample], members: list[int], prefix: int, num_branches: int) -> list[Tree]:
    """Deal `members`, in order, into trees of `num_branches`."""
    trees: list[Tree] = []
    for start in range(0, len(members), num_branches):
        chosen = tuple(members[start : start + num_branches])
        shared = prefix if len(chosen) > 1 else 0
        length = shared + sum(len(samples[i].input_ids) - shared for i in chosen)
        trees.append(Tree(samples=chosen, prefix=shared, length=length))
    return trees


def causal_length(rows: Sequence[Sequence[Tree]]) -> int:
    """Return how many positions at the beginning of every row are plainly causal, or 0 if less than half of them.

    With at least half, two attention calls (one for the beginning, one for the rest) are cheaper than one with a mask.
    """
    widths = [sum(tree.length for tree in row) for row in rows]
    heads = [row[0].prefix if len(row[0].samples) > 1 else row[0].length for row in rows]
    return min(heads) if rows and 2 * min(heads) >= max(widths) else 0


def tree_mask(
    segment_ids: Int[Tensor, "B T"], branch_ids: Int[Tensor, "B T"], *, skip: int = 0
) -> Bool[Tensor, "B 1 S T"]:
    """Return which keys (last axis) each query may see: itself and earlier ones of its own branch or its tree's prefix.

    Args:
        segment_ids: the tree of each position; 0 is padding, which sees only itself so that no softmax is empty.
        branch_ids: 0 in a tree's prefix, otherwise the number of the branch in its tree.
        skip: leave out the rows of the first `skip` queries (S = T - skip).
    """
    queries, length = segment_ids[:, skip:, None], segment_ids.shape[1]
    same_tree = queries == segment_ids[:, None, :]
    visible = (branch_ids[:, None, :] == 0) | (branch_ids[:, skip:, None] == branch_ids[:, None, :])
    places = torch.arange(length, device=segment_ids.device)
    causal, itself = places[skip:, None] >= places, places[skip:, None] == places
    return (same_tree & visible & causal & ((queries != 0) | itself))[:, None]
