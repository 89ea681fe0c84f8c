"""The order of tasks: each once per epoch, none twice in a batch, and the same tail after a resume at any point."""

from __future__ import annotations

import json
import os
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from llmrl.data.sampler import Sampler, TaskSampler
from llmrl.errors import UserError
from llmrl.types import Task

SEED = int(os.environ.get("LLMRL_TEST_SEED", "0"))
examples = settings(max_examples=300, deadline=None, database=None)


def make_tasks(count: int, prefix: str = "t") -> list[Task]:
    return [Task(id=f"{prefix}-{i}", messages=[{"role": "user", "content": str(i)}]) for i in range(count)]


def draw_ids(sampler: TaskSampler, sizes: list[int]) -> list[list[str]]:
    return [[task.id for task in sampler.next(n)] for n in sizes]


@st.composite
def schedules(draw: st.DrawFn) -> tuple[int, list[int], int, bool]:
    """Draw (number of tasks, batch sizes, seed, shuffle); sizes vary from batch to batch."""
    count = draw(st.integers(1, 12))
    sizes = draw(st.lists(st.integers(1, count), min_size=1, max_size=25))
    return count, sizes, draw(st.integers(0, 2**40)), draw(st.booleans())


@seed(SEED)
@examples
@given(schedules())
def test_no_batch_has_a_task_twice_and_no_epoch_loses_one(schedule: tuple[int, list[int], int, bool]) -> None:
    count, sizes, sampler_seed, shuffle = schedule
    sampler = TaskSampler(make_tasks(count), seed=sampler_seed, shuffle=shuffle)
    appearances: Counter[str] = Counter()
    epochs = []
    for n in sizes:
        assert sampler.position == len(epochs)
        assert sampler.epoch == len(epochs) // count
        batch = draw_ids(sampler, [n])[0]
        assert len(batch) == len(set(batch)) == n
        for task_id in batch:
            epochs.append(appearances[task_id])
            appearances[task_id] += 1
    # The k-th appearance of a task is its turn in epoch k: epochs follow each other, each with every task.
    assert epochs == [i // count for i in range(len(epochs))]


@seed(SEED)
@examples
@given(schedules(), st.data())
def test_resuming_anywhere_gives_the_same_tail(schedule: tuple[int, list[int], int, bool], data: st.DataObject) -> None:
    count, sizes, sampler_seed, shuffle = schedule
    stop = data.draw(st.integers(0, len(sizes)))
    whole = draw_ids(TaskSampler(make_tasks(count), seed=sampler_seed, shuffle=shuffle), sizes)
    killed = TaskSampler(make_tasks(count), seed=sampler_seed, shuffle=shuffle)
    draw_ids(killed, sizes[:stop])
    state = json.loads(json.dumps(killed.state_dict()))
    draw_ids(killed, sizes[stop:])
    resumed = TaskSampler(make_tasks(count), seed=sampler_seed, shuffle=shuffle)
    draw_ids(resumed, [count] * data.draw(st.integers(0, 2)))
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert resumed.position == sum(sizes[:stop])
    assert draw_ids(resumed, sizes[stop:]) == whole[stop:]


def test_order_is_the_stated_permutation_of_each_epoch() -> None:
    sampler = TaskSampler(make_tasks(50), seed=SEED + 7)
    for epoch in range(3):
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([SEED + 7, epoch])))
        expected = [f"t-{i}" for i in generator.permutation(50)]
        assert draw_ids(sampler, [25, 25]) == [expected[:25], expected[25:]]


def test_epochs_and_seeds_differ() -> None:
    first, second = TaskSampler(make_tasks(50), seed=1), TaskSampler(make_tasks(50), seed=2)
    orders = [*draw_ids(first, [50, 50]), *draw_ids(second, [50, 50])]
    assert len({tuple(order) for order in orders}) == 4


def test_without_shuffling_tasks_come_in_their_order() -> None:
    sampler = TaskSampler(make_tasks(3), seed=0, shuffle=False)
    assert draw_ids(sampler, [2, 3, 1, 1]) == [["t-0", "t-1"], ["t-2", "t-0", "t-1"], ["t-2"], ["t-0"]]


def test_a_task_already_in_the_batch_is_deferred_to_the_next_batch() -> None:
    sampler = TaskSampler(make_tasks(4), seed=0)
    sampler._order = [3, 2, 1, 0]  # of epoch 0; epoch 1 keeps the sampler's permutation
    draw_ids(sampler, [2])
    second = [int(i) for i in np.random.Generator(np.random.Philox(np.random.SeedSequence([0, 1]))).permutation(4)]
    fresh, repeated = [i for i in second if i in (2, 3)], [i for i in second if i in (0, 1)]
    met = [i for i in second[: second.index(fresh[1])] if i in repeated]
    assert draw_ids(sampler, [4]) == [["t-1", "t-0", *(f"t-{i}" for i in fresh)]]
    rest = met + [i for i in repeated if i not in met]
    assert sampler.state_dict()["passed_over"] == met
    assert draw_ids(sampler, [2]) == [[f"t-{i}" for i in rest]]


def test_global_random_state_is_neither_used_nor_changed() -> None:
    np.random.seed(1)
    random.seed(1)
    expected = draw_ids(TaskSampler(make_tasks(20), seed=3), [7, 7, 7])
    state = np.random.get_state()[1].tolist(), random.getstate()
    np.random.seed(2)
    assert draw_ids(TaskSampler(make_tasks(20), seed=3), [7, 7, 7]) == expected
    np.random.seed(1)
    assert (np.random.get_state()[1].tolist(), random.getstate()) == state


def test_update_changes_nothing() -> None:
    sampler: Sampler = TaskSampler(make_tasks(5), seed=0)
    state = sampler.state_dict()
    sampler.update([])
    assert sampler.state_dict() == state


def test_state_stays_small() -> None:
    sampler = TaskSampler(make_tasks(5000), seed=0)
    sampler.next(4999)
    sampler.next(8)
    assert len(json.dumps(sampler.state_dict())) < 300


@pytest.mark.parametrize(
    ("tasks", "arguments", "expected"),
    [
        (make_tasks(4), {"seed": 0}, "num_tasks was 5 and is 4"),
        (make_tasks(5, "u"), {"seed": 0}, "fingerprint was"),
        (make_tasks(5)[::-1], {"seed": 0}, "fingerprint was"),
        (make_tasks(5), {"seed": 1}, "seed was 0 and is 1"),
        (make_tasks(5), {"seed": 0, "shuffle": False}, "shuffle was True and is False"),
    ],
)
def test_a_changed_dataset_is_not_resumed(tasks: list[Task], arguments: dict[str, int], expected: str) -> None:
    state = TaskSampler(make_tasks(5), seed=0).state_dict()
    sampler = TaskSampler(tasks, **arguments)
    before = sampler.state_dict()
    with pytest.raises(UserError, match=expected):
        sampler.load_state_dict(state)
    assert sampler.state_dict() == before


@pytest.mark.parametrize("n", [-1, 0, 4])
def test_impossible_batches_are_refused(n: int) -> None:
    sampler = TaskSampler(make_tasks(3), seed=0)
    for call in (sampler.check, sampler.next):
        with pytest.raises(UserError, match=rf"rollout.num_prompts {n} cannot be drawn from 3 tasks"):
            call(n)
    assert sampler.position == 0
    sampler.check(3)


def test_impossible_tasks_are_refused() -> None:
    with pytest.raises(UserError, match="no tasks"):
        TaskSampler([], seed=0)
    with pytest.raises(UserError, match="2 tasks have the id 't-0'"):
        TaskSampler(make_tasks(2) + make_tasks(1), seed=0)
    with pytest.raises(UserError, match=r"train\.seed is -1"):
        TaskSampler(make_tasks(2), seed=-1)
