"""Packing: properties of the plan, and micro-batches against a literal loop."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrl.train.packing import build_micro_batch, fits, plan_micro_batches
from llmrl.types import Sample

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


def make_samples(seed: int, count: int) -> list[Sample]:
    random = np.random.default_rng(seed)
    samples = []
    for number in range(count):
        mask = np.concatenate([[False], random.random(random.integers(1, 12)) < 0.5])
        mask[-1] = True
        m = int(mask.sum())
        streams = random.standard_normal((5, m)).astype(np.float32)
        samples.append(
            Sample(
                input_ids=random.integers(1, 1000, len(mask)),
                loss_mask=mask,
                advantages=streams[0],
                rollout_logprobs=streams[1],
                group=number,
                index=0,
                extras={"returns": streams[2]},
                old_logprobs=streams[3],
                ref_logprobs=streams[4],
            )
        )
    return samples


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 12), max_tokens=st.integers(1, 80), packing=st.booleans())
def test_micro_batches_against_a_literal_loop(seed: int, count: int, max_tokens: int, packing: bool) -> None:
    samples = make_samples(seed, count)
    (plan,) = plan_micro_batches([len(s.input_ids) for s in samples], max_tokens=max_tokens, packing=packing)
    for rows in plan:
        batch = build_micro_batch(samples, rows)
        chosen = [i for row in rows for i in row]
        assert batch.sample_indices == chosen
        assert batch.sequence_lengths.tolist() == [samples[i].num_tokens for i in chosen]
        for name, found in (
            ("advantages", batch.advantages),
            ("rollout_logprobs", batch.rollout_logprobs),
            ("old_logprobs", batch.old_logprobs),
            ("ref_logprobs", batch.ref_logprobs),
        ):
            expected = np.concatenate([getattr(samples[i], name) for i in chosen])
            np.testing.assert_array_equal(found.numpy(), expected, err_msg=name)
        returns = np.concatenate([samples[i].extras["returns"] for i in chosen])
        np.testing.assert_array_equal(batch.extras["returns"].numpy(), returns)
        assert_layout(samples, rows, batch)


def assert_layout(samples: list[Sample], rows: list[list[int]], batch) -> None:
    """Walk the rectangle cell by cell."""
    height, width = batch.input_ids.shape
    targets, predict_from, sequence_ids, number = [], [], [], 0
    for r, row in enumerate(rows):
        cells = [(0, 0, 0)] * width
        column = 0
        for segment, i in enumerate(row):
            for t, token in enumerate(samples[i].input_ids.tolist()):
                cells[column] = (token, t, segment + 1)
                if samples[i].loss_mask[t]:
                    targets.append(token)
                    predict_from.append(r * width + column - 1)
                    sequence_ids.append(number)
                    assert t > 0
                column += 1
            number += 1
        found = zip(
            batch.input_ids[r].tolist(), batch.position_ids[r].tolist(), batch.segment_ids[r].tolist(), strict=True
        )
        assert list(found) == cells
    assert height == len(rows)
    assert batch.targets.tolist() == targets
    assert batch.predict_from.tolist() == predict_from
    assert batch.sequence_ids.tolist() == sequence_ids


def test_an_empty_micro_batch_is_a_rectangle_without_trained_tokens() -> None:
    batch = build_micro_batch(make_samples(0, 3), [])
    assert batch.input_ids.shape == (1, 2)
    assert batch.segment_ids.tolist() == [[0, 0]]
    for stream in (batch.targets, batch.predict_from, batch.sequence_ids, batch.advantages, batch.rollout_logprobs):
        assert stream.shape == (0,)
    assert batch.sample_indices == []
    assert batch.input_ids.dtype == batch.predict_from.dtype == torch.int64


def test_a_stream_that_one_sample_lacks_is_absent() -> None:
    samples = make_samples(0, 2)
    samples[1].old_logprobs = None
    batch = build_micro_batch(samples, [[0], [1]])
    assert batch.old_logprobs is None
    assert batch.ref_logprobs is not None


def test_the_example_in_the_types() -> None:
    def sample(ids: list[int], mask: list[int]) -> Sample:
        stream = np.zeros(sum(mask), np.float32)
        return Sample(
            input_ids=np.array(ids),
            loss_mask=np.array(mask, bool),
            advantages=stream,
            rollout_logprobs=stream,
            group=0,
            index=0,
        )

    batch = build_micro_batch([sample([5, 6, 7], [0, 0, 1]), sample([8, 9], [0, 1]), sample([1] * 6, [0] * 5 + [1])],
                              [[2], [0, 1]])  # fmt: skip
    assert batch.input_ids[1].tolist() == [5, 6, 7, 8, 9, 0]
    assert batch.position_ids[1].tolist() == [0, 1, 2, 0, 1, 0]
    assert batch.segment_ids[1].tolist() == [1, 1, 1, 2, 2, 0]
    assert batch.targets.tolist() == [1, 7, 9]
    assert batch.predict_from.tolist() == [4, 6 + 1, 6 + 3]
