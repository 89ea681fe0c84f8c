"""Ragged samples -> packed micro-batches, made one at a time.

Packing changes speed, never the result. Where attention takes a mask, a row is as wide as the longest sequence of its
micro-batch; shorter sequences share a row one after another. Where it takes boundaries or blocks (FlashAttention,
FlexAttention), a micro-batch is a single row without padding. Each sequence attends only to itself.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from llmrl.errors import RunFailed
from llmrl.model.attention import Kernel
from llmrl.model.positions import SHORTEN
from llmrl.train.planning import Rows, fits, num_positions, plan_micro_batches
from llmrl.train.prefixes import Tree, causal_length, layer_cost, share_prefixes, single_trees
from llmrl.types import MicroBatch, Sample, Visibility

if TYPE_CHECKING:
    from llmrl.model.parallel import Parallel
    from llmrl.model.policy import Policy
    from llmrl.train.options import TrainConfig


def build_micro_batch(
    samples: Sequence[Sample],
    rows: Rows,
    *,
    trees: Sequence[Tree] | None = None,
    own_masks: bool = False,
    device: torch.device | str = "cpu",
) -> MicroBatch:
    """Lay one plan entry out in a rectangle, with streams over the trained tokens.

    An empty plan entry gives a micro-batch without trained tokens. Its loss is zero, but its backward pass runs.

    Args:
        samples: all that the indices may refer to.
        rows: indices of `trees`.
        trees: how samples share prefixes; by default they share none.
        own_masks: masks of ours keep all sequences of a row apart, which is faster on some models (`Policy.own_masks`).
            Else they are for shared prefixes only, and transformers goes by restarting positions.
        device: where the tensors go.
    """
    trees = single_trees(samples) if trees is None else trees
    width = max((sum(trees[i].length for i in row) for row in rows), default=2)
    shape = (max(1, len(rows)), width)
    shared = any(len(trees[i].samples) > 1 for row in rows for i in row)
    alone = not shared and all(len(row) == 1 for row in rows)
    input_ids, position_ids, segment_ids, branch_ids = (np.zeros(shape, np.int64) for _ in range(4))
    if alone:  # positions go on in the padding, so that transformers finds no second sequence there to mask
        position_ids[:] = np.arange(width)
    chosen: list[int] = []
    predict_from, targets = list[np.ndarray](), list[np.ndarray]()
    begins: list[int] = []
    for r, row in enumerate(rows):
        column = 0
        for segment, tree in enumerate((trees[i] for i in row), start=1):
            root, prefix = column, tree.prefix
            begins.append(r * width + root)
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

    own_masks = own_masks or shared  # positions cannot keep branches apart
    boundaries = np.array([*begins, shape[0] * width], np.int32)
    visibility = Visibility(
        segment_ids=to_tensor(segment_ids, device),
        branch_ids=to_tensor(branch_ids, device) if own_masks else None,
        causal_head=causal_length([[trees[i] for i in row] for row in rows]),
        boundaries=None if shared or not begins else to_tensor(boundaries, device),
        longest=int(np.diff(boundaries).max(initial=0)),
        alone=alone,
    )
    return MicroBatch(
        input_ids=to_tensor(input_ids, device),
        position_ids=to_tensor(position_ids, device),
        visibility=visibility,
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
        largest: positions of the largest micro-batch that the user was told of, because it is above `max_tokens`.
    """

    def __init__(self, policy: Policy, options: TrainConfig, parallel: Parallel) -> None:
        self.policy, self.options, self.parallel = policy, options, parallel
        by_device = 2048 if parallel.device.type == "cpu" else 16384
        self.max_tokens = options.max_tokens_per_micro_batch or by_device
        self.largest = 0

    def micro_batches(
        self, samples: list[Sample], *, whole: Collection[int] = (), all_here: bool = False
    ) -> MicroBatches:
        """Return the micro-batches of this process: equally many on every process.

        Args:
            samples: what to compute.
            whole: groups whose samples have to lie in one micro-batch.
            all_here: compute all samples on this process, whatever the others do.
        """
        self._check_length(samples)
        trees = self.trees(samples)
        groups = [samples[tree.samples[0]].group for tree in trees]
        lengths = [tree.length for tree in trees]
        plans = plan_micro_batches(
            lengths,
            max_tokens=self.max_tokens,
            num_processes=1 if all_here else self.parallel.world,
            packing=self.packing,
            one_row=self.one_row,
            units=[group if group in whole else -1 - i for i, group in enumerate(groups)],
        )
        self._check_bound(plans, lengths)
        own_masks = self.policy.own_masks and self._supports_masks(samples)
        device = self.parallel.device
        build = partial(build_micro_batch, samples, trees=trees, own_masks=own_masks, device=device)
        return MicroBatches(plans[0 if all_here else self.parallel.rank], build, ahead=device.type != "cpu")

    def trees(self, samples: list[Sample]) -> list[Tree]:
        """Return how samples share prefixes. A tree holds samples of one group."""
        if not self.options.share_prefixes or not self._supports_masks(samples):
            return single_trees(samples)
        return share_prefixes(samples, layer_cost(self.policy), max_tokens=self.max_tokens)

    def fits(self, samples: list[Sample]) -> bool:
        """Return whether samples lie in one micro-batch together."""
        lengths = [tree.length for tree in self.trees(samples)]
        return fits(lengths, max_tokens=self.max_tokens, packing=self.packing, one_row=self.one_row)

    @property
    def packing(self) -> bool:
        """Whether sequences share rows: `check_forward` may have found that this model cannot."""
        return self.options.packing and self.policy.can_pack

    @property
    def one_row(self) -> bool:
        """Whether a micro-batch is a single row without padding.

        Flattened, the rows of a recurrent model would run into each other; such a model is not packed at all.
        """
        return self.packing and self.policy.kernel is not Kernel.MASKED

    def _check_length(self, samples: list[Sample]) -> None:
        longest, limit = max((len(sample.input_ids) for sample in samples), default=0), self.policy.longest
        if limit is not None and longest > limit:
            raise RunFailed(
                f"a sequence has {longest} tokens, but beyond {limit} this model's positions depend on the longest "
                f"sequence of a micro-batch (rope_type longrope or dynamic): {SHORTEN}"
            )

    def _supports_masks(self, samples: list[Sample]) -> bool:
        return self.policy.supports_masks(max((len(s.input_ids) for s in samples), default=0))

    def _check_bound(self, plans: list[list[Rows]], lengths: list[int]) -> None:
        """Tell the user of the largest micro-batch that the bound on memory could not keep small."""
        largest = max((rows for plan in plans for rows in plan), key=lambda rows: num_positions(rows, lengths))
        size = num_positions(largest, lengths)
        if size <= max(self.max_tokens, self.largest) or not self.parallel.is_main:
            return
        self.largest = size
        alone = sum(map(len, largest)) == 1
        what = "one sequence" if alone else "the sequences of one group, which are compared with each other,"
        warnings.warn(
            f"a micro-batch has {size} tokens, more than train.max_tokens_per_micro_batch {self.max_tokens}: {what} "
            "cannot be split. If memory runs out, shorten rollouts (rollout.max_completion_length) or prompts",
            stacklevel=4,
        )


class MicroBatches:
    """The micro-batches of one pass. Their number is known; each is made when it is its turn.

    Args:
        plan: what lies in each.
        build: makes one.
        ahead: make each while the device computes the one before, so that it does not wait for layout and copy.
    """

    def __init__(self, plan: list[Rows], build: Callable[[Rows], MicroBatch], *, ahead: bool) -> None:
        self.plan, self.build, self.ahead = plan, build, ahead

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[MicroBatch]:
        made: deque[MicroBatch] = deque()
        for rows in self.plan:
            made.append(self.build(rows))
            if len(made) > self.ahead:
                yield made.popleft()
        yield from made


def _concatenate(arrays: list[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype)


def to_tensor(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """Copy an array to a device. A GPU does not wait for it: the copy leaves from pinned memory."""
    tensor: torch.Tensor = torch.from_numpy(np.ascontiguousarray(array))  # pyright: ignore[reportUnknownMemberType]
    pinned = tensor.pin_memory() if torch.device(device).type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)
