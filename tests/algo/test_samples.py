"""Rollouts -> training samples: whole token lists, for turns that extend each other and turns that do not."""

from __future__ import annotations

import math

import pytest
import torch

from llmrl.algo.samples import reward_matrix, samples_of
from llmrl.types import Rollout, RolloutGroup, Sample, Score, Task, Turn

TASK = Task(id="t-1", messages=[{"role": "user", "content": "?"}])


def turn(prompt_ids: list[int], completion_ids: list[int], first_logprob: float = -1.0) -> Turn:
    return Turn(
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
        rollout_logprobs=[first_logprob - k for k in range(len(completion_ids))],
        finish="stop",
        policy_version=(0, 0),
        message={"role": "assistant", "content": "x"},
    )


def rollout(*turns: Turn, reward: float | None = 1.0, advantage: float | list[float] = 0.5, index: int = 0) -> Rollout:
    return Rollout(task=TASK, index=index, turns=list(turns), score=Score(reward=reward), advantage=advantage)


def group(*rollouts: Rollout) -> RolloutGroup:
    return RolloutGroup(task=TASK, rollouts=list(rollouts))


def plain(sample: Sample) -> tuple[list[int], list[int], list[float], list[float]]:
    return (
        sample.input_ids.tolist(),
        sample.loss_mask.astype(int).tolist(),
        sample.advantages.tolist(),
        sample.rollout_logprobs.tolist(),
    )


def test_one_turn() -> None:
    (sample,) = samples_of([group(rollout(turn([5, 6], [7, 8, 2]), index=3))])
    assert plain(sample) == ([5, 6, 7, 8, 2], [0, 0, 1, 1, 1], [0.5] * 3, [-1.0, -2.0, -3.0])
    assert (sample.group, sample.index, sample.num_tokens) == (0, 3, 3)


def test_turns_that_extend_each_other_are_one_sample() -> None:
    first, second = turn([5, 6], [7, 2]), turn([5, 6, 7, 2, 30, 31], [8, 2], -5.0)
    third = turn([5, 6, 7, 2, 30, 31, 8, 2], [9], -9.0)  # nothing in between
    (sample,) = samples_of([group(rollout(first, second, third, advantage=[0.1, 0.2, 0.3, 0.4, 0.5]))])
    ids, mask, advantages, logprobs = plain(sample)
    assert ids == [5, 6, 7, 2, 30, 31, 8, 2, 9]
    assert mask == [0, 0, 1, 1, 0, 0, 1, 1, 1]
    assert advantages == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert logprobs == [-1.0, -2.0, -5.0, -6.0, -9.0]


def test_a_rewritten_prompt_starts_a_new_sample_with_its_own_advantages() -> None:
    first, second = turn([5, 6], [7, 2]), turn([5, 99, 7, 2, 30], [8, 2], -5.0)
    third = turn([5, 99, 7, 2, 30, 8, 2, 31], [9], -9.0)  # extends the second
    samples = samples_of([group(rollout(first, second, third, advantage=[1.0, 2.0, 3.0, 4.0, 5.0]))])
    assert [plain(s) for s in samples] == [
        ([5, 6, 7, 2], [0, 0, 1, 1], [1.0, 2.0], [-1.0, -2.0]),
        ([5, 99, 7, 2, 30, 8, 2, 31, 9], [0, 0, 0, 0, 0, 1, 1, 0, 1], [3.0, 4.0, 5.0], [-5.0, -6.0, -9.0]),
    ]


def test_a_shortened_context_starts_a_new_sample() -> None:
    samples = samples_of([group(rollout(turn([5, 6], [7, 2]), turn([5, 6, 7], [8])))])
    assert [plain(s)[:2] for s in samples] == [([5, 6, 7, 2], [0, 0, 1, 1]), ([5, 6, 7, 8], [0, 0, 0, 1])]


def test_turns_without_tokens_and_rollouts_without_a_score_give_nothing() -> None:
    unscored, error = rollout(turn([5], [7]), reward=None, index=1), rollout(turn([5], [7]), index=2)
    error.score = None
    kept = rollout(turn([5], []), turn([5, 30], [7]), index=3)
    samples = samples_of([group(unscored, error), group(kept)])
    assert [(s.group, s.index) for s in samples] == [(1, 3)]
    assert plain(samples[0])[:2] == ([5, 30, 7], [0, 0, 1])


def test_order_is_that_of_groups_and_rollouts() -> None:
    groups = [group(*(rollout(turn([5], [g + i]), index=i) for i in range(3))) for g in (10, 20)]
    assert [(s.group, s.index, int(s.input_ids[1])) for s in samples_of(groups)] == [
        (0, 0, 10), (0, 1, 11), (0, 2, 12), (1, 0, 20), (1, 1, 21), (1, 2, 22),
    ]  # fmt: skip


def test_a_wrong_number_of_token_advantages_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"t-1: 2 advantages for 3 completion tokens"):
        samples_of([group(rollout(turn([5], [7, 8, 9]), advantage=[1.0, 2.0]))])


def test_reward_matrix_tells_zero_from_unscored() -> None:
    error = rollout(index=2)
    error.score = None
    zero, one = rollout(reward=0.0), rollout(reward=1.0)
    zero.score = Score(reward=0.0, parts={"format": 0.25})
    one.score = Score(reward=1.0, parts={"format": None})
    rewards = reward_matrix([group(zero, rollout(reward=None), error), group(one, one, zero)])
    nan = math.nan
    expected = torch.tensor([[0.0, nan, nan], [1.0, 1.0, 0.0]])
    torch.testing.assert_close(rewards, expected, rtol=0, atol=0, equal_nan=True)
    parts = reward_matrix([group(zero, one, error)], "format")
    torch.testing.assert_close(parts, torch.tensor([[0.25, nan, nan]]), rtol=0, atol=0, equal_nan=True)
