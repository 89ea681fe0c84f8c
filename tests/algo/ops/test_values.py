"""Advantages, targets and value losses against a literal double loop, hand-computed constants and TRL's arithmetic."""

from __future__ import annotations

import importlib.metadata
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmrl.algo.ops import values
from llmrl.algo.ops.advantages import whiten


def ragged(seed: int, *, count: int = 7, longest: int = 12) -> tuple[list[Tensor], list[Tensor]]:
    """Draw rewards and values of rollouts of 1 to `longest` tokens."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest + 1, count)
    return tuple([torch.from_numpy(random.standard_normal(n)) for n in lengths] for _ in range(2))  # pyright: ignore


def double_loop(rewards: Tensor, old_values: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t = sum_l (gamma lambda)^l delta_{t + l}, term by term."""
    length = len(rewards)
    advantages = []
    for t in range(length):
        total = 0.0
        for step in range(t, length):
            after = old_values[step + 1].item() if step + 1 < length else 0.0
            delta = rewards[step].item() + gamma * after - old_values[step].item()
            total += (gamma * lam) ** (step - t) * delta
        advantages.append(total)
    return torch.tensor(advantages, dtype=torch.float64)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.9), (0.9, 0.0), (1.0, 1.0), (0.5, 1.0)])
def test_gae_equals_the_double_loop_of_its_definition(gamma: float, lam: float, seed: int) -> None:
    rewards, old = ragged(seed)
    found = values.gae(values.pad(rewards), values.pad(old), gamma=gamma, lam=lam)
    for row, r, v in zip(found, rewards, old, strict=True):
        torch.testing.assert_close(row[: len(r)], double_loop(r, v, gamma, lam), rtol=0, atol=1e-12)
        assert not row[len(r) :].any(), "what lies behind a row's end has no advantage"


def test_gae_by_hand() -> None:
    """gamma 0.5, lambda 0.5. Values 1, 2, 4; reward 8 at the end: deltas 0, 0, 4; advantages 0.25, 1, 4."""
    found = values.gae(torch.tensor([[0.0, 0.0, 8.0]]), torch.tensor([[1.0, 2.0, 4.0]]), gamma=0.5, lam=0.5)
    assert found.tolist() == [[0.25, 1.0, 4.0]]
    dense = values.gae(torch.tensor([[1.0, -1.0, 8.0]]), torch.tensor([[1.0, 2.0, 4.0]]), gamma=0.5, lam=0.5)
    assert dense.tolist() == [[1.0, 0.0, 4.0]]  # deltas 1, -1, 4: 1 - 1/4 + 4/16, -1 + 1, 4


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.5, 1.0))
def test_lambda_one_gives_the_remaining_rewards(draw: int, gamma: float) -> None:
    rewards, old = ragged(draw, count=3)
    found = values.pad(old) + values.gae(values.pad(rewards), values.pad(old), gamma=gamma, lam=1.0)
    for row, r in zip(found, rewards, strict=True):
        for t in range(len(r)):
            expected = sum(gamma ** (s - t) * r[s].item() for s in range(t, len(r)))
            assert row[t].item() == pytest.approx(expected, abs=1e-10), "whatever the critic says"


def test_a_lambda_for_each_row(seed: int) -> None:
    rewards, old = ragged(seed)
    lam = torch.rand(len(rewards), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    together = values.gae(values.pad(rewards), values.pad(old), gamma=0.97, lam=lam)
    for row, r, v, one in zip(together, rewards, old, lam, strict=True):
        torch.testing.assert_close(row[: len(r)], double_loop(r, v, 0.97, one.item()), rtol=0, atol=1e-12)


def test_length_adaptive_lambda() -> None:
    found = values.length_adaptive_lambda(torch.tensor([0, 1, 20, 40, 200, 10_000]), 0.05)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 0.0, 0.5, 0.9, 0.998]).double())
    lam = values.length_adaptive_lambda(torch.tensor([10_000]), 0.05).item()
    assert 1 / (1 - lam) == pytest.approx(0.05 * 10_000), "sum of lambda^t, the horizon, grows with the length"


def test_value_loss_and_its_gradient_by_hand() -> None:
    """Target 1, old value 0, clip 0.2: 0.1 is within it; 0.5 is clipped; -0.5 moved the wrong way and is not."""
    now = torch.tensor([0.1, 0.5, -0.5, 0.2], requires_grad=True)
    losses, clipped = values.value_loss(now, torch.zeros(4), torch.ones(4), clip=0.2)
    torch.testing.assert_close(losses, torch.tensor([0.81, 0.64, 2.25, 0.64]) / 2)
    assert clipped.tolist() == [False, True, False, False]
    losses.sum().backward()
    assert now.grad is not None
    torch.testing.assert_close(now.grad[:3], torch.tensor([-0.9, 0.0, -1.5]))
    free, none = values.value_loss(now, torch.zeros(4), torch.ones(4), clip=0.0)
    torch.testing.assert_close(free, torch.tensor([0.81, 0.25, 2.25, 0.64]) / 2)
    assert not none.any()


def test_value_loss_gradient_is_the_finite_difference(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    now, old, target = (torch.randn(50, generator=generator, dtype=torch.float64) for _ in range(3))
    now.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: values.value_loss(v, old, target, clip=0.3)[0], now)


def test_explained_variance() -> None:
    target = torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert values.explained_variance(target, target) == 1.0
    assert values.explained_variance(torch.full((4,), 0.3), target) == pytest.approx(0.0, abs=1e-7)
    assert values.explained_variance(target + 5, target) == 1.0, "it is blind to a constant error"
    assert values.explained_variance(1 - target, target) == pytest.approx(-3.0)
    assert values.explained_variance(torch.tensor([0.25, 0.75, 0.25, 0.75]), target) == pytest.approx(0.75)
    assert math.isnan(values.explained_variance(target, torch.ones(4)))
    assert math.isnan(values.explained_variance(target[:0], target[:0]))


# --- TRL 1.12.0, the last version with PPO ----------------------------------------------------------------------------

REWARDS = [[0.0, 0.5, 0.0, 1.0], [0.25, 0.0, -1.0, 0.0]]
VALUES = [[0.1, 0.4, -0.2, 0.8], [0.5, -0.3, 0.2, 0.0]]
LENGTHS = [4, 3]
"""The second row's last column is padding."""
FROM_TRL = {
    "returns": [[1.3789750, 1.4304999, 0.9900000, 1.0], [-0.6580000, -0.9400000, -1.0, 0.0]],
    "advantages": [[1.0705665, 0.8448988, 0.9897585, 0.0906297], [-1.1427206, -0.6722674, -1.1808655, 0.0]],
}
"""What TRL 1.12.0's `ppo_trainer.py` computes from them with gamma 1 and lam 0.95: its loop, then `masked_whiten`."""


def test_returns_and_whitened_advantages_are_those_of_trl() -> None:
    rewards, old = torch.tensor(REWARDS).double(), torch.tensor(VALUES).double()
    tokens = torch.arange(4) < torch.tensor(LENGTHS)[:, None]
    advantages = values.gae(rewards, old, gamma=1.0, lam=0.95)
    expected = torch.tensor(FROM_TRL["returns"]).double()[tokens]
    torch.testing.assert_close((advantages + old)[tokens], expected, rtol=0, atol=1e-6)
    expected = torch.tensor(FROM_TRL["advantages"]).double()[tokens]
    torch.testing.assert_close(whiten(advantages[tokens]), expected, rtol=0, atol=1e-6)


@pytest.mark.skipif(importlib.metadata.version("trl") != "1.12.0", reason="TRL removed PPO in 1.13")
def test_whitening_is_trls_function(seed: int) -> None:
    from trl.experimental.ppo.ppo_trainer import masked_whiten  # pyright: ignore

    rows = torch.randn(5, 9, generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(9) < torch.tensor([9, 1, 4, 7, 2])[:, None]
    torch.testing.assert_close(whiten(rows[mask]), masked_whiten(rows, mask)[mask])
