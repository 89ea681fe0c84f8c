"""Group-relative advantages against constants computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from llmrl.algo.ops.advantages import flat_groups, group_advantages

NAN = math.nan


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        # mean 1/2, unbiased deviation sqrt(4 * 0.25 / 3) = 0.5773503
        ([1.0, 0.0, 0.0, 1.0], [0.8658756, -0.8658756, -0.8658756, 0.8658756]),
        # mean 2, unbiased deviation sqrt(2): the unscored one is left out
        ([3.0, NAN, 1.0], [0.7070568, 0.0, -0.7070568]),
        # mean 1, deviations (3, -1, -1, -1), unbiased deviation 2
        ([4.0, 0.0, 0.0, 0.0], [1.4999250, -0.4999750, -0.4999750, -0.4999750]),
        ([0.3, 0.3, 0.3], [0.0, 0.0, 0.0]),
        ([5.0, NAN, NAN], [0.0, 0.0, 0.0]),
        ([NAN, NAN], [0.0, 0.0]),
    ],
)
def test_scaled_by_the_groups_deviation(rewards: list[float], expected: list[float]) -> None:
    torch.testing.assert_close(group_advantages(torch.tensor([rewards])), torch.tensor([expected]), rtol=0, atol=1e-6)


def test_unscaled_is_the_distance_to_the_mean() -> None:
    rewards = torch.tensor([[4.0, 0.0, 0.0, 0.0], [3.0, NAN, 1.0, NAN], [7.0, NAN, NAN, NAN], [0.1, 0.1, 0.1, 0.1]])
    expected = torch.tensor([[3.0, -1.0, -1.0, -1.0], [1.0, 0.0, -1.0, 0.0], [0.0] * 4, [0.0] * 4])
    torch.testing.assert_close(group_advantages(rewards, scale="none"), expected, rtol=0, atol=0)


def test_constant_groups_are_exactly_zero_even_where_their_mean_is_rounded() -> None:
    rewards = torch.full((1, 7), 0.1)
    assert (rewards - rewards.sum() / 7).abs().max() > 0, "the mean must round for this case to say anything"
    assert torch.equal(group_advantages(rewards), torch.zeros(1, 7))
    assert torch.equal(group_advantages(rewards, scale="none"), torch.zeros(1, 7))


def test_groups_do_not_affect_each_other(seed: int) -> None:
    rewards = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
    rewards[2, 3] = NAN
    rewards[4] = 1.0
    together = group_advantages(rewards)
    alone = torch.cat([group_advantages(row[None]) for row in rewards])
    assert torch.equal(together, alone)


def test_sums_to_zero_and_does_not_depend_on_an_offset_of_the_rewards(seed: int) -> None:
    rewards = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed))
    advantages = group_advantages(rewards)
    torch.testing.assert_close(advantages.sum(dim=1), torch.zeros(8), rtol=0, atol=1e-5)
    torch.testing.assert_close(group_advantages(rewards + 3.0), advantages, rtol=1e-4, atol=1e-5)
    assert torch.equal(advantages.argmax(dim=1), rewards.argmax(dim=1))


def test_flat_groups() -> None:
    rewards = torch.tensor([[1.0, 1.0], [1.0, 0.0], [NAN, 1.0], [NAN, NAN], [0.0, 0.0], [-1.0, 1.0]])
    assert flat_groups(rewards).tolist() == [True, False, True, True, True, False]
