"""Ragged samples -> packed micro-batches, dealt out over processes. Every process computes the same plan.

Packing changes speed, never the result. A row is as wide as the longest sequence of its micro-batch; shorter sequences
share a row one after another, and each attends only to itself.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from llmrl.train.prefixes import Tree, causal_length, layer_cost, share_prefixes, single_trees, tree_mask
from llmrl.types import MicroBatch, Sample

if TYPE_CHECKING:
    from llmrl.model.parallel import Parallel
    from llmrl.model.policy import Policy
    from llmrl.train.options import TrainConfig

Rows = list[list[int]]
"""One micro-batch: for each row the indices of what lies in it (samples, or trees of samples that share a prefix)."""


def plan_micro_batches(
    lengths: Sequence[int],
    *,
    max_tokens: int,
    num_processes: int = 1,
    packing: bool = True,
    units: Sequence[int] | None = None,
) -> list[list[Rows]]:
    """Decide which process computes which sequences in which forward pass.

    Units of sequences are dealt to processes by estimated cost: the costliest unit goes first, to the process with the
    least work. Each process then fills micro-batches of at most `max_tokens` positions (rows * width), longest
    sequences first.

    Args:
        lengths: tokens of each sequence.
        max_tokens: positions of one micro-batch, padding included. A larger unit gets a micro-batch of its own.
        num_processes: how many processes share the work.
        packing: False gives every sequence a row of its own.
        units: a number for each sequence; sequences with the same number share a micro-batch. By default each sequence
            is a unit of its own.

    Returns:
        The micro-batches of each process. All processes have the same number: shorter lists end in empty micro-batches,
        because processes must run forward and backward passes together.
    """
    members: dict[int, list[int]] = {}
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        members.setdefault(i if units is None else units[i], []).append(i)
    costs = {unit: sum(_cost(lengths[i]) for i in found) for unit, found in members.items()}
    shares: list[list[list[int]]] = [[] for _ in range(num_processes)]
    load = [0.0] * num_processes
    for unit in sorted(members, key=lambda unit: -costs[unit]):
        process = load.index(min(load))
        shares[process].append(members[unit])
        load[process] += costs[unit]
    plans = [_fill_micro_batches(share, lengths, max_tokens, packing) for share in shares]
    longest = max(1, max(len(plan) for plan in plans))
    return [plan + [[]] * (longest - len(plan)) for plan in plans]


def fits(lengths: Sequence[int], *, max_tokens: int, packing: bool = True) -> bool:
    """Return whether sequences of these lengths fit into one micro-batch of `max_tokens` positions."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    width = lengths[order[0]]
    _, rows = _place(order, [], lengths, width, packing)
    return len(rows) * width <= max_tokens


def _cost(length: int) -> float:
    """Estimate the relative cost of a sequence.

    It is the cost of linear layers plus that of attention. For common shapes the two are equal at about 8,000 tokens.
    """
    return length * (1 + length / 8000)


def _fill_micro_batches(
    share: list[list[int]], lengths: Sequence[int], max_tokens: int, packing: bool
) -> list[list[list[int]]]:
    """Fill micro-batches first-fit decreasing.

    Units come in order of their longest sequence, so that the first sequence of a micro-batch sets its width.
    """
    batches: list[Rows] = []
    waiting = sorted(share, key=lambda unit: -lengths[unit[0]])
    while waiting:
        width = lengths[waiting[0][0]]
        max_rows = max_tokens // width
        rows: Rows = []
        space: list[int] = []
        left: list[list[int]] = []
        for unit in waiting:
            places, new_space = _place(unit, space, lengths, width, packing)
            if rows and len(new_space) > max(max_rows, len(rows)):
                left.append(unit)
                continue
            rows += [[] for _ in range(len(new_space) - len(rows))]
            for i, row in zip(unit, places, strict=True):
                rows[row].append(i)
            space = new_space
        batches.append(rows)
        waiting = left
    return batches


def _place(
    unit: list[int], space: list[int], lengths: Sequence[int], width: int, packing: bool
) -> tuple[list[int], list[int]]:
    """Find a row for each sequence of a unit: the first with room, or a new one.

    Returns:
        (row of each sequence, space that is then left in each row).
    """
    space, places = [*space], list[int]()
    for i in unit:
        row = next((r for r, free in enumerate(space) if free >= lengths[i]), None) if packing else None
        if row is None:
            row = len(space)
            space.append(width)
        space[row] -= lengths[i]
        places.append(row)
    return places, space


def build_micro_batch(
    samples: Sequence[Sample],
    rows: Rows,
    *,
    trees: Sequence[Tree] | None = None,
    causal_head: bool = False,
    device: torch.device | str = "cpu",
) -> MicroBatch:
    """Lay one plan entry out in a rectangle, with streams over the trained tokens.

    An empty plan entry gives a micro-batch without trained tokens. Its loss is zero, but its backward pass runs.

    Args:
        samples: all that the indices may refer to.
        rows: indices of `trees`.
        trees: how samples share prefixes; by default they share none.
        causal_head: the model takes masks without rows for a causal beginning (`attention.use_causal_head`). Then rows
            with more than one sequence, or with padding, are faster with a mask. Else only shared prefixes get one.
        device: where the tensors go.
    """
    trees = single_trees(samples) if trees is None else trees
    width = max((sum(trees[i].length for i in row) for row in rows), default=2)
    shape = (max(1, len(rows)), width)
    input_ids, position_ids, segment_ids, branch_ids = (np.zeros(shape, np.int64) for _ in range(4))
    chosen: list[int] = []
    predict_from, targets = list[np.ndarray](), list[np.ndarray]()
    for r, row in enumerate(rows):
        column = 0
        for segment, tree in enumerate((trees[i] for i in row), start=1):
            root, prefix = column, tree.prefix
            segment_ids[r, root : root + tree.length] = segment
            column += prefix
            for branch, i in enumerate(tree.samples, start=1):
                ids = samples[i].input_ids
                input_ids[r, root : root + prefix] = ids[:prefix]
                position_ids[r, root : root + prefix] = np.arange(prefix)
                place = slice(column, column + len(ids) - prefix)
                input_ids[r, place], branch_ids[r, place] = ids[prefix:], branch
                position_ids[r, place] = np.arange(prefix, len(ids))
                # A token is predicted by the hidden state one before it, which may be the last of the prefix.
                trained = np.flatnonzero(samples[i].loss_mask)
                before = trained - 1
                predict_from.append(r * width + np.where(before < prefix, root + before, column - prefix + before))
                targets.append(ids[trained])
                chosen.append(i)
                column = place.stop
    picked = [samples[i] for i in chosen]
    lengths = [len(t) for t in targets]

    def stream(name: str) -> torch.Tensor | None:
        values = [getattr(sample, name) for sample in picked]
        return None if any(v is None for v in values) else to_tensor(_concatenate(values, np.float32), device)

    segments = to_tensor(segment_ids, device)
    # Restarting positions keep packed sequences apart without a mask; branches of a tree need one.
    masked = any(len(trees[i].samples) > 1 for row in rows for i in row)
    head = 0
    if causal_head:
        masked |= any(len(row) > 1 or trees[row[0]].length < width for row in rows)
        head = causal_length([[trees[i] for i in row] for row in rows])
    return MicroBatch(
        input_ids=to_tensor(input_ids, device),
        position_ids=to_tensor(position_ids, device),
        segment_ids=segments,
        attention_mask=tree_mask(segments, to_tensor(branch_ids, device), skip=head) if masked else None,
        targets=to_tensor(_concatenate(targets, np.int64), device),
        predict_from=to_tensor(_concatenate(predict_from, np.int64), device),
        sequence_ids=to_tensor(np.repeat(np.arange(len(picked)), lengths), device),
        sequence_lengths=to_tensor(np.asarray(lengths, np.int64), device),
        advantages=stream("advantages"),  # pyright: ignore[reportArgumentType]
        rollout_logprobs=stream("rollout_logprobs"),  # pyright: ignore[reportArgumentType]
        old_logprobs=stream("old_logprobs"),
        ref_logprobs=stream("ref_logprobs"),
        extras={
            name: to_tensor(_concatenate([s.extras[name] for s in picked], np.float32), device)
            for name in (picked[0].extras if picked else ())
        },
        sample_indices=chosen,
        samples=picked,
    )


class Layout:
    """How a learner lays samples out: this process's share of them, packed, common prefixes computed once.

    Args:
        policy: decides which layouts are right for its model.
        options: `max_tokens_per_micro_batch`, `packing` and `share_prefixes` are read.
        parallel: the processes that share the work.

    Attributes:
        max_tokens: positions of one micro-batch, padding included.
    """

    def __init__(self, policy: Policy, options: TrainConfig, parallel: Parallel) -> None:
        self.policy, self.options, self.parallel = policy, options, parallel
        by_device = 2048 if parallel.device.type == "cpu" else 16384
        self.max_tokens = options.max_tokens_per_micro_batch or by_device

    def micro_batches(
        self, samples: list[Sample], *, whole: Collection[int] = (), all_here: bool = False
    ) -> list[MicroBatch]:
        """Return the micro-batches of this process: equally many on every process.

        Args:
            samples: what to compute.
            whole: groups whose samples have to lie in one micro-batch.
            all_here: compute all samples on this process, whatever the others do.
        """
        trees = self.trees(samples)
        groups = [samples[tree.samples[0]].group for tree in trees]
        plans = plan_micro_batches(
            [tree.length for tree in trees],
            max_tokens=self.max_tokens,
            num_processes=1 if all_here else self.parallel.world,
            packing=self.options.packing,
            units=[group if group in whole else -1 - i for i, group in enumerate(groups)],
        )
        causal_head = self.policy.causal_head and self._supports_masks(samples)
        return [
            build_micro_batch(samples, rows, trees=trees, causal_head=causal_head, device=self.parallel.device)
            for rows in plans[0 if all_here else self.parallel.rank]
        ]

    def trees(self, samples: list[Sample]) -> list[Tree]:
        """Return how samples share prefixes. A tree holds samples of one group."""
        share = self.options.share_prefixes and self._supports_masks(samples)
        return share_prefixes(samples, layer_cost(self.policy)) if share else single_trees(samples)

    def fits(self, samples: list[Sample]) -> bool:
        """Return whether samples lie in one micro-batch together."""
        lengths = [tree.length for tree in self.trees(samples)]
        return fits(lengths, max_tokens=self.max_tokens, packing=self.options.packing)

    def _supports_masks(self, samples: list[Sample]) -> bool:
        return self.policy.supports_masks(max((len(s.input_ids) for s in samples), default=0))


def _concatenate(arrays: list[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype)


def to_tensor(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """Copy an array to a device."""
    tensor: torch.Tensor = torch.from_numpy(np.ascontiguousarray(array))  # pyright: ignore[reportUnknownMemberType]
    return tensor.to(device, non_blocking=True)
