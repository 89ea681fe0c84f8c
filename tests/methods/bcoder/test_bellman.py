"""B-Coder's operator on a three-state chain by hand, its parametrisation, and the reward it implies."""

from __future__ import annotations

import math

import pytest
import torch

from llmrl.methods.bcoder.bellman import (
    MAX_REWARD,
    SOUND_SOFTABS,
    advantage,
    bellman_targets,
    capped_value,
    next_in_sequence,
    per_sequence,
    raw_of_value,
    recovered_reward,
    softabs,
    td_loss,
)

GAMMA = 0.9


@pytest.fixture
def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# States 0 -> 1 -> 2 -> end; two actions in each; Q and the fixed q's greedy action a^ as given.
#   state  Q(s, a0)  Q(s, a1)  a^
#     0      0.5       0.2      0
#     1      0.3       0.7      0      <- the best action of Q is a1: the operator must not take it
#     2      0.1      -0.4      1      <- likewise a0
CHAIN_Q = torch.tensor([[0.5, 0.2], [0.3, 0.7], [0.1, -0.4]])
ANCHORS = torch.tensor([0, 0, 1])


def test_targets_of_a_three_state_chain_by_hand() -> None:
    anchor_q = CHAIN_Q.gather(1, ANCHORS[:, None])[:, 0]  # 0.5, 0.3, -0.4
    rewards = torch.tensor([0.0, 0.0, 1.0])
    targets = bellman_targets(rewards, anchor_q, torch.zeros(3, dtype=torch.int64), gamma=GAMMA)
    # 0 + 0.9 * 0.3,  0 + 0.9 * -0.4,  1 + nothing behind the end
    assert targets.tolist() == pytest.approx([0.27, -0.36, 1.0])
    optimistic = rewards + GAMMA * torch.tensor([0.7, 0.1, 0.0])
    assert not torch.allclose(targets, optimistic), "the maximum over Q is what the operator avoids"


def test_two_chains_do_not_see_each_other() -> None:
    ids = torch.tensor([0, 0, 1, 1, 1])
    assert next_in_sequence(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), ids).tolist() == [2.0, 0.0, 4.0, 5.0, 0.0]


def test_repeated_application_converges_to_the_value_of_the_fixed_policy() -> None:
    """Value iteration under B^q where actions matter: it finds the fixed policy's return, not the best one's."""
    reward = {(0, 0): 0.0, (0, 1): 0.0, (1, 0): 0.0, (1, 1): 0.0, (2, 0): -1.0, (2, 1): 1.0}
    q = torch.zeros(3, 2)
    fixed = torch.tensor([0, 0, 0])  # always a0: in the end -1, though a1 gives +1
    for _ in range(4):
        new = q.clone()
        for action in (0, 1):
            rewards = torch.tensor([reward[s, action] for s in range(3)])
            anchor_q = q.gather(1, fixed[:, None])[:, 0]
            new[:, action] = bellman_targets(rewards, anchor_q, torch.zeros(3, dtype=torch.int64), gamma=GAMMA)
        q = new
    assert q[2].tolist() == pytest.approx([-1.0, 1.0])
    assert q[1].tolist() == pytest.approx([-0.9, -0.9])
    assert q[0].tolist() == pytest.approx([-0.81, -0.81])


def test_the_operator_is_a_contraction(random: torch.Generator) -> None:
    ids = torch.tensor([0] * 5 + [1] * 3)
    rewards, one, other = (torch.randn(8, generator=random) for _ in range(3))
    gap = bellman_targets(rewards, one, ids, gamma=GAMMA) - bellman_targets(rewards, other, ids, gamma=GAMMA)
    assert gap.abs().max() <= GAMMA * (one - other).abs().max() + 1e-6


def test_targets_carry_no_gradient() -> None:
    anchor_q = torch.tensor([1.0, 2.0], requires_grad=True)
    assert not bellman_targets(torch.zeros(2), anchor_q, torch.zeros(2, dtype=torch.int64), gamma=1.0).requires_grad


def test_the_policy_of_q_is_the_language_model(random: torch.Generator) -> None:
    """Softmax(Q / alpha) = softmax(l) whatever V is, and the greedy token has A = 0 (the dueling identity)."""
    logits, values, alpha = torch.randn(6, 9, generator=random), torch.randn(6, generator=random), 0.7
    every = torch.stack([advantage(logits, torch.full((6,), a), alpha) for a in range(9)], dim=1)
    assert torch.allclose(((every + values[:, None]) / alpha).softmax(-1), logits.softmax(-1), atol=1e-6)
    assert every.amax(1).abs().max() == 0
    assert (every <= 0).all()


def test_td_loss_by_hand() -> None:
    q = torch.tensor([0.0, 1.0, 2.0], requires_grad=True)
    loss = td_loss(q, torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0, 0, 1]), torch.tensor([2, 1]))
    assert loss.tolist() == [0.5, 0.0, 4.0]
    loss.sum().backward()
    assert q.grad is not None
    assert q.grad.tolist() == [-1.0, 0.0, 4.0]


def test_softabs_is_sound_by_default_and_not_as_printed() -> None:
    zero = torch.zeros(())
    assert softabs(zero).item() == pytest.approx(0, abs=1e-7)
    assert capped_value(zero).item() == pytest.approx(MAX_REWARD)
    printed = capped_value(zero, const=math.log(2)).item()
    assert printed == pytest.approx(1 - 2 * math.log(2))  # -0.386: no program could be worth +1
    far = torch.tensor([40.0, -40.0])
    assert softabs(far).tolist() == pytest.approx([20 + SOUND_SOFTABS] * 2)  # slope 1/2
    assert (capped_value(torch.linspace(-50, 50, 201)) <= MAX_REWARD + 1e-6).all()


@pytest.mark.parametrize("value", [0.0, 0.5, -1.0, -3.0])
def test_raw_of_value_is_the_inverse_of_the_cap(value: float) -> None:
    assert capped_value(torch.tensor(raw_of_value(value))).item() == pytest.approx(value, abs=1e-5)


def test_raw_of_value_keeps_away_from_where_the_slope_vanishes() -> None:
    for const in (SOUND_SOFTABS, math.log(2)):
        raw = torch.tensor(raw_of_value(1.0, const), requires_grad=True)
        capped_value(raw, const).backward()
        assert raw.grad is not None and abs(raw.grad) > 0.1


def test_the_recovered_reward_undoes_the_operator(random: torch.Generator) -> None:
    """With Q a fixed point of B^q the exact form gives the rewards back."""
    rewards = torch.tensor([0.0, 0.0, 0.0, -0.3])
    ids = torch.zeros(4, dtype=torch.int64)
    advantages = -torch.rand(4, generator=random)
    values, anchor_advantages = torch.zeros(4), -torch.rand(4, generator=random)
    for t in reversed(range(4)):  # V such that A + V = r + gamma (V' + A'(anchor))
        following = 0.0 if t == 3 else (values[t + 1] + anchor_advantages[t + 1]).item()
        values[t] = rewards[t] + GAMMA * following - advantages[t]
    found = recovered_reward(advantages, values, ids, gamma=GAMMA, anchor_advantages=anchor_advantages)
    assert torch.allclose(found, rewards, atol=1e-6)


def test_the_sum_telescopes(random: torch.Generator) -> None:
    """R = V_0 + sum_t A_t + (1 - gamma) sum_{t>0} V_t."""
    ids = torch.tensor([0, 0, 0, 1, 1])
    advantages, values = -torch.rand(5, generator=random), torch.randn(5, generator=random)
    sums = per_sequence(recovered_reward(advantages, values, ids, gamma=GAMMA), ids, 2)
    first = values[0] + advantages[:3].sum() + (1 - GAMMA) * values[1:3].sum()
    second = values[3] + advantages[3:].sum() + (1 - GAMMA) * values[4]
    assert torch.allclose(sums, torch.stack([first, second]), atol=1e-6)
