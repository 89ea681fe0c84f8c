"""Lengths of sequences -> which process computes which of them together. Every process computes the same plan.

Planning costs about N log N. It sees lengths alone: a length is that of a sequence, or of a tree of sequences.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Sequence

Rows = list[list[int]]
"""One micro-batch: for each row the indices of what lies in it (samples, or trees of samples that share a prefix)."""

LOOKS = 1000
"""A micro-batch is full when this many units did not fit into the room that was left."""


def plan_micro_batches(
    lengths: Sequence[int],
    *,
    max_tokens: int,
    num_processes: int = 1,
    packing: bool = True,
    one_row: bool = False,
    units: Sequence[int] | None = None,
) -> list[list[Rows]]:
    """Decide which process computes which sequences in which forward pass.

    Units of sequences are dealt to processes by estimated cost: the costliest unit goes first, to the process with the
    least work. Each process then fills micro-batches of at most `max_tokens` positions (rows * width) first-fit
    decreasing: longest sequences first, each into the first row with room.

    Args:
        lengths: tokens of each sequence.
        max_tokens: positions of one micro-batch, padding included. A larger unit gets a micro-batch of its own.
        num_processes: how many processes share the work.
        packing: False gives every sequence a row of its own.
        one_row: a micro-batch is a single row, up to `max_tokens` wide, without padding. Otherwise its rows are as wide
            as its longest sequence.
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
    loads = [(0.0, process) for process in range(num_processes)]
    for unit in sorted(members, key=lambda unit: -costs[unit]):
        load, process = heapq.heappop(loads)
        shares[process].append(members[unit])
        heapq.heappush(loads, (load + costs[unit], process))
    plans = [_fill_micro_batches(share, lengths, max_tokens, packing=packing, one_row=one_row) for share in shares]
    longest = max(1, max(len(plan) for plan in plans))
    return [plan + [[]] * (longest - len(plan)) for plan in plans]


def fits(lengths: Sequence[int], *, max_tokens: int, packing: bool = True, one_row: bool = False) -> bool:
    """Return whether sequences of these lengths fit into one micro-batch of `max_tokens` positions."""
    (rows,), *_ = plan_micro_batches(
        lengths, max_tokens=max_tokens, packing=packing, one_row=one_row, units=[0] * len(lengths)
    )
    return num_positions(rows, lengths) <= max_tokens


def num_positions(rows: Rows, lengths: Sequence[int]) -> int:
    """Return rows * width of a micro-batch."""
    return len(rows) * max((sum(lengths[i] for i in row) for row in rows), default=0)


def _cost(length: int) -> float:
    """Estimate the relative cost of a sequence.

    It is the cost of linear layers plus that of attention. For common shapes the two are equal at about 8,000 tokens.
    """
    return length * (1 + length / 8000)


class _MicroBatch:
    """A micro-batch that is being filled.

    Attributes:
        rows: what lies in each row.
        free: tokens that it still has room for, in all.
        room: an upper bound on the length of a sequence that still fits.
    """

    def __init__(self, width: int, max_rows: int, *, packing: bool) -> None:
        self.width, self.max_rows, self.packing = width, max_rows, packing
        self.rows: Rows = []
        self.space: list[int] = []
        self.free = width * max(1, max_rows)

    @property
    def room(self) -> int:
        return self.width if len(self.rows) < self.max_rows else max(self.space)

    def add(self, unit: list[int], lengths: Sequence[int]) -> bool:
        """Place each sequence of a unit into the first row with room or a new one, or place none. Returns which."""
        space, places = [*self.space], list[int]()
        for i in unit:
            row = next((r for r, free in enumerate(space) if free >= lengths[i]), len(space))
            if row == len(space):
                space.append(self.width)
            space[row] -= lengths[i] if self.packing else self.width
            places.append(row)
        if self.rows and len(space) > max(self.max_rows, len(self.rows)):
            return False
        self.rows += [[] for _ in range(len(space) - len(self.rows))]
        for i, row in zip(unit, places, strict=True):
            self.rows[row].append(i)
        self.space = space
        self.free = sum(space) + self.width * max(0, self.max_rows - len(space))
        return True


def _fill_micro_batches(
    share: list[list[int]], lengths: Sequence[int], max_tokens: int, *, packing: bool, one_row: bool
) -> list[Rows]:
    """Fill micro-batches with the units of one process, the largest that is left first."""
    totals = [sum(lengths[i] for i in unit) for unit in share]
    sizes = totals if one_row else [lengths[unit[0]] for unit in share]
    order = sorted(range(len(share)), key=lambda place: -sizes[place])
    units, totals, decreasing = [share[i] for i in order], [totals[i] for i in order], [-sizes[i] for i in order]
    waiting = _Waiting(len(units))
    batches: list[Rows] = []
    while (place := waiting.first_from(0)) < len(units):
        size = -decreasing[place]
        width, max_rows = (max(size, max_tokens), 1) if one_row else (size, max_tokens // size)
        batch, looks = _MicroBatch(width, max_rows, packing=packing), 0
        while place < len(units) and looks < LOOKS:
            if (not batch.rows or totals[place] <= batch.free) and batch.add(units[place], lengths):
                waiting.remove(place)
            else:
                looks += 1
            place = waiting.first_from(max(place + 1, bisect_left(decreasing, -batch.room)))
        batches.append(batch.rows)
    return batches


class _Waiting:
    """The places 0 .. count - 1 that are left. Looking for the next one takes about constant time (a disjoint set)."""

    def __init__(self, count: int) -> None:
        self.after = [*range(count + 1)]

    def remove(self, place: int) -> None:
        self.after[place] = place + 1

    def first_from(self, place: int) -> int:
        """Return the first place that is left at `place` or behind it; `count` if none is."""
        found = place
        while self.after[found] != found:
            found = self.after[found]
        while self.after[place] != found:
            self.after[place], place = found, self.after[place]
        return found
