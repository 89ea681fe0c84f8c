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
from torch import nn

from llmrl.model.attention import Kernel

if TYPE_CHECKING:
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

    Sharing is not always cheaper: with a mask, attention also computes the pairs between branches, which the mask then
    hides. On a GPU the time of attention follows this count (docs/performance.md).
    """

    per_token: float
    """Multiply-adds of the linear layers for one token."""
    per_pair: float
    """Multiply-adds of attention for one (query, key) pair."""
    skips_hidden: bool = False
    """Attention skips what the mask hides (FlexAttention)."""

    def of(self, tree: Tree, samples: Sequence[Sample]) -> float:
        """Return the cost of a tree of these samples.

        Attention is causal inside the prefix; a branch sees the prefix and, causally, itself. With a plain mask every
        branch costs as if it saw the whole tree.
        """
        prefix, behind = tree.prefix, tree.length - tree.prefix
        if self.skips_hidden or len(tree.samples) == 1:
            seen = sum((len(samples[i].input_ids) - prefix) ** 2 for i in tree.samples) / 2 + prefix * behind
        else:
            seen = behind * tree.length
        return tree.length * self.per_token + (prefix * prefix / 2 + seen) * self.per_pair


def layer_cost(policy: Policy) -> Cost:
    """Return what one decoder layer of the policy computes per token and per pair of tokens."""
    config, model = policy.text_config, policy.causal_lm
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    embeddings.add(id(policy.module.head().weight))
    inside = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in embeddings)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Cost(
        per_token=inside / config.num_hidden_layers,
        per_pair=2.0 * head_dim * config.num_attention_heads,
        skips_hidden=policy.kernel is Kernel.BLOCKS,
    )


def single_trees(samples: Sequence[Sample]) -> list[Tree]:
    """Return a tree for every sample."""
    return [Tree(samples=(i,), prefix=0, length=len(sample.input_ids)) for i, sample in enumerate(samples)]


def share_prefixes(samples: Sequence[Sample], cost: Cost, *, max_tokens: int) -> list[Tree]:
    """Lay the samples of each group out as trees, with the number of branches per tree that makes the group cheapest.

    Args:
        samples: samples of one group carry the same `group` number.
        cost: of one layer of the model.
        max_tokens: no tree is longer, unless a single sample is.

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
        layouts = [_branch(samples, members, prefix, num, max_tokens) for num in _branch_counts(len(members), prefix)]
        trees += min(layouts, key=lambda layout: sum(cost.of(tree, samples) for tree in layout))
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


def _branch(
    samples: Sequence[Sample], members: list[int], prefix: int, num_branches: int, max_tokens: int
) -> list[Tree]:
    """Deal `members`, in order, into trees of up to `num_branches` branches and `max_tokens` tokens."""
    parts: list[list[int]] = []
    length = 0
    for i in members:
        behind = len(samples[i].input_ids) - prefix
        if not parts or len(parts[-1]) == num_branches or length + behind > max_tokens:
            parts.append([])
            length = prefix
        parts[-1].append(i)
        length += behind
    return [_tree(samples, part, prefix if len(part) > 1 else 0) for part in parts]


def _tree(samples: Sequence[Sample], part: list[int], prefix: int) -> Tree:
    length = prefix + sum(len(samples[i].input_ids) - prefix for i in part)
    return Tree(samples=tuple(part), prefix=prefix, length=length)


def causal_length(rows: Sequence[Sequence[Tree]]) -> int:
    """Return how many positions at the beginning of every row are plainly causal, or 0 if less than half of them.

    With at least half, two attention calls (one for the beginning, one for the rest) are cheaper than one with a mask.
    """
    widths = [sum(tree.length for tree in row) for row in rows]
    heads = [row[0].prefix if len(row[0].samples) > 1 else row[0].length for row in rows]
    return min(heads) if rows and 2 * min(heads) >= max(widths) else 0
