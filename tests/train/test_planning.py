"""Planning: properties of the plan, and first-fit decreasing against a literal one."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrl.train.planning import fits, plan_micro_batches

LENGTHS = st.lists(st.integers(2, 200), max_size=40)
PLANS = {
    "lengths": LENGTHS,
    "max_tokens": st.integers(1, 600),
    "num_processes": st.integers(1, 5),
    "packing": st.booleans(),
}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(**PLANS)
def test_plan(lengths: list[int], max_tokens: int, num_processes: int, packing: bool) -> None:
    options = {"max_tokens": max_tokens, "num_processes": num_processes, "packing": packing}
    plans = plan_micro_batches(lengths, **options)
    assert plans == plan_micro_batches(list(lengths), **options), "every rank must compute the same plan"
    assert len(plans) == num_processes
    assert len({len(plan) for plan in plans}) == 1, "processes run their backward passes together"
    micro_batches = [rows for plan in plans for rows in plan]
    assert sorted(i for rows in micro_batches for row in rows for i in row) == list(range(len(lengths)))
    for rows in micro_batches:
        if not rows:
            continue
        assert all(rows), "a row without a sequence is only padding"
        widths = [sum(lengths[i] for i in row) for row in rows]
        longest = max(lengths[i] for row in rows for i in row)
        assert max(widths) == longest, "a row must not be wider than the longest sequence"
        single = len(rows) == 1 and len(rows[0]) == 1
        assert longest * len(rows) <= max_tokens or single or len(rows) == 1, "over the budget"
        assert longest <= max_tokens or len(rows) == 1
        if not packing:
            assert all(len(row) == 1 for row in rows)
    for plan in plans:
        filled = [bool(rows) for rows in plan]
        assert filled == sorted(filled, reverse=True), "empty micro-batches come last"


@settings(max_examples=50, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(2, 50), min_size=8, max_size=40), num_processes=st.integers(2, 4))
def test_processes_share_the_work(lengths: list[int], num_processes: int) -> None:
    plans = plan_micro_batches(lengths, max_tokens=100, num_processes=num_processes)
    loads = [sum(lengths[i] for rows in plan for row in rows for i in row) for plan in plans]
    assert max(loads) - min(loads) <= max(lengths) + 1, "greedy dealing leaves at most one sequence between them"


def test_packing_fills_rows_and_not_packing_pads() -> None:
    lengths = [10, 6, 4, 5, 5, 3]
    assert plan_micro_batches(lengths, max_tokens=100) == [[[[0], [1, 2], [3, 4], [5]]]]
    assert plan_micro_batches(lengths, max_tokens=100, packing=False) == [[[[0], [1], [3], [4], [2], [5]]]]
    assert plan_micro_batches(lengths, max_tokens=20) == [[[[0], [1, 2]], [[3], [4], [5]]]]
    assert plan_micro_batches([], max_tokens=20, num_processes=2) == [[[]], [[]]]
    assert plan_micro_batches([50, 9], max_tokens=20, packing=False) == [[[[0]], [[1]]]]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data(), **PLANS)
def test_units_stay_whole(
    lengths: list[int], max_tokens: int, num_processes: int, packing: bool, data: st.DataObject
) -> None:
    units = data.draw(st.lists(st.integers(0, 8), min_size=len(lengths), max_size=len(lengths)))
    options = {"max_tokens": max_tokens, "num_processes": num_processes, "packing": packing}
    plans = plan_micro_batches(lengths, units=units, **options)
    assert len({len(plan) for plan in plans}) == 1
    micro_batches = [rows for plan in plans for rows in plan if rows]
    found = [i for rows in micro_batches for row in rows for i in row]
    assert sorted(found) == list(range(len(lengths)))
    holds = [{units[i] for row in rows for i in row} for rows in micro_batches]
    assert sum(map(len, holds)) == len(set(units)), "no unit in two micro-batches"
    for rows, inside in zip(micro_batches, holds, strict=True):
        longest = max(lengths[i] for row in rows for i in row)
        assert max(sum(lengths[i] for i in row) for row in rows) == longest
        if longest * len(rows) > max_tokens:
            members = {unit: [lengths[i] for i in found if units[i] == unit] for unit in inside}
            assert any(not fits(m, max_tokens=max_tokens, packing=packing) for m in members.values()), "over the budget"


def test_whether_a_unit_fits_and_where_it_goes() -> None:
    assert fits([6, 4, 3], max_tokens=18, packing=False)
    assert not fits([6, 4, 3], max_tokens=17, packing=False)
    assert fits([6, 4, 2], max_tokens=12)
    assert not fits([6, 4, 3], max_tokens=17)
    lengths, units = [6, 4, 5, 2], [0, 1, 1, 0]
    assert plan_micro_batches(lengths, max_tokens=12) == [[[[0], [2]], [[1], [3]]]], "without units as they come"
    assert plan_micro_batches(lengths, max_tokens=12, units=units) == [[[[0], [3]], [[2], [1]]]]
    assert plan_micro_batches(lengths, max_tokens=1, units=units) == [[[[0], [3]], [[2], [1]]]], "whole, over the limit"


def first_fit_decreasing(units: list[list[int]], max_tokens: int, packing: bool) -> list[list[list[int]]]:
    """Fill one micro-batch after another, walking through all units that are left. Units hold lengths."""
    batches = []
    waiting = sorted((sorted(unit, reverse=True) for unit in units), key=lambda unit: -unit[0])
    while waiting:
        width = waiting[0][0]
        rows: list[list[int]] = []
        left = []
        for unit in waiting:
            tried = [[*row] for row in rows]
            for length in unit:
                room = [row for row in tried if packing and sum(row) + length <= width]
                (room[0] if room else tried.append([]) or tried[-1]).append(length)
            if not rows or len(tried) <= max(max_tokens // width, len(rows)):
                rows = tried
            else:
                left.append(unit)
        batches.append(rows)
        waiting = left
    return batches


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    units=st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=4), max_size=25),
    max_tokens=st.integers(1, 200),
    packing=st.booleans(),
)
def test_micro_batches_are_filled_first_fit_decreasing(units: list[list[int]], max_tokens: int, packing: bool) -> None:
    lengths = [length for unit in units for length in unit]
    numbers = [number for number, unit in enumerate(units) for _ in unit]
    # The order among equal units is that of their cost; lengths alone say what lies where.
    costs = [sum(length * (1 + length / 8000) for length in unit) for unit in units]
    order = sorted(range(len(units)), key=lambda number: -costs[number])
    dealt = [units[number] for number in order]
    (plan,) = plan_micro_batches(lengths, max_tokens=max_tokens, packing=packing, units=numbers)
    found = [[[lengths[i] for i in row] for row in rows] for rows in plan]
    assert found == (first_fit_decreasing(dealt, max_tokens, packing) or [[]])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(lengths=LENGTHS, max_tokens=st.integers(1, 600), num_processes=st.integers(1, 5), data=st.data())
def test_one_row(lengths: list[int], max_tokens: int, num_processes: int, data: st.DataObject) -> None:
    units = data.draw(st.lists(st.integers(0, 8), min_size=len(lengths), max_size=len(lengths)))
    options = {"max_tokens": max_tokens, "num_processes": num_processes, "units": units, "one_row": True}
    plans = plan_micro_batches(lengths, **options)
    assert plans == plan_micro_batches([*lengths], **options)
    assert len({len(plan) for plan in plans}) == 1
    full = [rows for plan in plans for rows in plan if rows]
    assert sorted(i for rows in full for row in rows for i in row) == [*range(len(lengths))]
    for rows in full:
        assert len(rows) == 1
        inside = {units[i] for i in rows[0]}
        assert sum(lengths[i] for i in rows[0]) <= max_tokens or len(inside) == 1
    holds = [{units[i] for i in rows[0]} for rows in full]
    assert sum(map(len, holds)) == len(set(units)), "no unit in two micro-batches"
    assert fits([3, 4, 5], max_tokens=12, one_row=True) and not fits([3, 4, 5], max_tokens=11, one_row=True)


def test_one_row_is_filled_to_the_bound_although_its_longest_sequence_is_short() -> None:
    assert plan_micro_batches([4, 3, 3, 2, 2], max_tokens=7, one_row=True) == [[[[0, 1]], [[2, 3, 4]]]]
    assert plan_micro_batches([9, 3, 3], max_tokens=7, one_row=True) == [[[[0]], [[1, 2]]]]


def test_planning_looks_at_each_sequence_few_times() -> None:
    """Counted, not timed: how often a length is read grows with the number of sequences, not with its square."""

    class Counted(list[int]):
        reads = 0

        def __getitem__(self, i):  # pyright: ignore
            Counted.reads += 1
            return super().__getitem__(i)

    reads = []
    for count in (1000, 4000):
        random = np.random.default_rng(0)
        lengths = Counted(np.maximum(16, random.lognormal(6, 0.8, count)).astype(int).tolist())
        Counted.reads = 0
        plan_micro_batches(lengths, max_tokens=4096)
        reads.append(Counted.reads)
    assert reads[1] < 6 * reads[0]
