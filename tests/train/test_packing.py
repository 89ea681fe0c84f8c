"""Micro-batches against a literal loop, made one at a time; what lies above the bound is said."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrl.train import packing
from llmrl.train.learner import Learner
from llmrl.train.packing import MicroBatches, build_micro_batch
from llmrl.train.planning import plan_micro_batches
from llmrl.types import MicroBatch, Sample
from tests.invariance.cases import make_config, make_learner, tiny_model


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
    alone = all(len(row) == 1 for row in rows)
    for r, row in enumerate(rows):
        cells = [(0, column if alone else 0, 0) for column in range(width)]
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


def learner_of(**train: Any) -> Learner:
    return make_learner(tiny_model(), make_config(train=train))[0]


def test_micro_batches_are_made_when_it_is_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = learner_of(max_tokens_per_micro_batch=12)
    samples = make_samples(1, 9)
    made = list[int]()

    def build(*inputs: Any, **options: Any) -> MicroBatch:
        made.append(len(made))
        return build_micro_batch(*inputs, **options)

    monkeypatch.setattr(packing, "build_micro_batch", build)
    batches = learner.layout.micro_batches(samples)
    assert len(batches) > 3 and not made, "the plan comes first"
    for number, _ in enumerate(batches, start=1):
        assert len(made) == number
    assert len(made) == len(batches)
    found = sorted(i for batch in batches for i in batch.sample_indices)
    assert found == [*range(9)]


def test_ahead_makes_the_next_micro_batch_before_it_gives_one() -> None:
    made: list[Any] = []
    batches = MicroBatches([[[0]], [[1]], [[2]]], lambda rows: made.append(rows) or rows, ahead=True)  # pyright: ignore
    counts = [(batch, len(made)) for batch in batches]
    assert counts == [([[0]], 2), ([[1]], 3), ([[2]], 3)]


def test_what_cannot_be_split_is_said_once() -> None:
    samples = make_samples(2, 6)
    for number, sample in enumerate(samples):
        sample.group = number // 2
    longest = max(len(s.input_ids) for s in samples)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner_of(max_tokens_per_micro_batch=longest).layout.micro_batches(samples)
    for bound, whole, said in ((longest - 1, (), "one sequence"), (longest, (0, 1, 2), "the sequences of one group")):
        layout = learner_of(max_tokens_per_micro_batch=bound).layout
        with pytest.warns(UserWarning, match=f"more than train.max_tokens_per_micro_batch {bound}: {said}"):
            layout.micro_batches(samples, whole=whole)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            layout.micro_batches(samples, whole=whole)
