"""Estimators, losses and masks beyond GRPO's, against constants computed by hand and known gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmrl.algo.ops import advantages as adv
from llmrl.algo.ops import kl, losses, masks

NAN = math.nan
IDS, LENGTHS = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([2, 3])


def close(found: Tensor, expected: list, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), rtol=0, atol=tolerance)


# --- advantages -------------------------------------------------------------------------------------------------------

REWARDS = torch.tensor([[1.0, 0.0, NAN], [1.0, 1.0, 1.0], [3.0, 1.0, 2.0]])


def test_mean_and_scale_are_chosen_independently() -> None:
    raw = math.sqrt(sum((r - 1.25) ** 2 for r in (1, 0, 1, 1, 1, 3, 1, 2)) / 7) + 1e-4
    close(adv.group_advantages(REWARDS, scale="batch"), [[0.5 / raw, -0.5 / raw, 0], [0] * 3, [1 / raw, -1 / raw, 0]])
    centred = math.sqrt((0.25 + 0.25 + 1 + 1) / 7) + 1e-4
    found = adv.group_advantages(REWARDS, scale="batch", batch_std_of="centred")
    close(found, [[0.5 / centred, -0.5 / centred, 0], [0] * 3, [1 / centred, -1 / centred, 0]])
    found = adv.group_advantages(REWARDS, mean="batch", scale="none")
    close(found, [[-0.25, -1.25, 0], [-0.25] * 3, [1.75, -0.25, 0.75]])
    close(adv.group_advantages(REWARDS, mean="none", scale="none"), [[1, 0, 0], [1, 1, 1], [3, 1, 2]])
    own = math.sqrt(0.5) + 1e-4
    found = adv.group_advantages(REWARDS, mean="none", scale="group")
    close(found, [[1 / own, 0, 0], [1, 1, 1], [3 / 1.0001, 1 / 1.0001, 2 / 1.0001]], 1e-5)


def test_leave_one_out() -> None:
    close(adv.leave_one_out(REWARDS), [[1, -1, 0], [0, 0, 0], [1.5, -1.5, 0]])
    close(adv.leave_one_out(torch.tensor([[5.0, NAN]])), [[0, 0]])


def test_length_weighted_baseline() -> None:
    lengths = torch.tensor([[1.0, 3.0, 100.0], [1, 1, 1], [1, 2, 1]])
    close(adv.length_weighted(REWARDS, lengths), [[0.75, -0.25, 0], [0, 0, 0], [1.25, -0.75, 0.25]])


def test_greedy_baseline() -> None:
    close(adv.greedy_baseline(REWARDS, torch.tensor([0.5, 1.0, NAN])), [[0.5, -0.5, 0], [0, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(("k", "correct"), [(1, 1), (2, 1), (2, 2), (3, 1), (4, 2), (4, 4), (4, 0), (5, 1)])
def test_pass_at_k_is_the_mean_over_all_subsets(k: int, correct: int) -> None:
    """Enumerate the k-subsets that contain a rollout: the mean of their (best reward - mean) / deviation."""
    outcomes = [1.0] * correct + [0.0] * (6 - correct)
    subsets = list(itertools.combinations(range(6), k))
    best = [max(outcomes[i] for i in subset) for subset in subsets]
    mean = sum(best) / len(best)
    deviation = math.sqrt(mean * (1 - mean)) + 1e-6
    expected = []
    for i in range(6):
        mine = [b for subset, b in zip(subsets, best, strict=True) if i in subset]
        expected.append((sum(mine) / len(mine) - mean) / deviation)
    found = adv.pass_at_k_advantages(torch.tensor([outcomes]), k)
    close(found, [expected], 1e-4)
    assert abs(found.sum()) < 1e-4


def test_pass_at_k_leaves_out_rollouts_without_a_score() -> None:
    close(adv.pass_at_k_advantages(torch.tensor([[1.0, 0.0, NAN]]), 1), [[1.0, -1.0, 0.0]], 1e-5)
    close(adv.pass_at_k_advantages(torch.tensor([[NAN, NAN]]), 2), [[0.0, 0.0]])


def test_several_rewards() -> None:
    parts = torch.tensor([[[1.0, 0.0], [1.0, 1.0]], [[0.0, 10.0], [NAN, 4.0]]])
    found = adv.multi_reward_advantages(parts, torch.tensor([1.0, 0.5]))
    # Two unequal scores of a group become +-0.7071: 0.7071 - 0.5 * 0.7071 for the first task, 0 for the rest.
    total = [0.35355, -0.35355, 0.0, 0.0]
    mean = sum(total) / 4
    deviation = math.sqrt(sum((x - mean) ** 2 for x in total) / 3) + 1e-4
    close(found.flatten(), [(x - mean) / deviation for x in total], 1e-3)


def test_optimal_token_baseline() -> None:
    logprobs = [torch.tensor([0.5, 0.25]).log(), torch.tensor([0.8]).log()]
    collisions = [torch.tensor([0.5, 0.375]), torch.tensor([0.68])]
    # w = 1 - 2 p + sum p^2: 0.5, 0.875 -> W = 0.5, 1.375; second response 0.08
    found = adv.optimal_token_advantages(torch.tensor([1.0, 0.0]), logprobs, collisions)
    close(found[0], [1 - 0.5 / 0.58, 0.0])
    close(found[1], [-0.5 / 0.58])


def test_returns_to_go_and_whitening() -> None:
    close(adv.returns_to_go(torch.tensor([1.0, 2.0, 4.0])), [7, 6, 4])
    close(adv.returns_to_go(torch.tensor([1.0, 2.0, 4.0]), 0.5), [3, 4, 4])
    close(adv.returns_to_go(torch.tensor([1.0, 2.0, 4.0]), 0.0), [1, 2, 4])
    assert len(adv.returns_to_go(torch.zeros(0), 0.5)) == 0
    rewards = torch.randn(77, generator=torch.Generator().manual_seed(1))
    for gamma in (0.0, 0.3, 0.99, 1.0):
        expected, later = [], 0.0
        for reward in reversed(rewards.tolist()):
            later = reward + gamma * later
            expected.append(later)
        close(adv.returns_to_go(rewards, gamma), expected[::-1], 1e-5)
    close(adv.whiten(torch.tensor([1.0, 2.0, 3.0])), [-1, 0, 1])
    close(adv.whiten(torch.tensor([2.0])), [0])


def test_overlong_penalty() -> None:
    found = adv.overlong_penalty(torch.tensor([[10.0, 16, 18, 20, 25]]), limit=20, buffer=4)
    close(found, [[0, 0, -0.5, -1, -1]])


# --- losses -----------------------------------------------------------------------------------------------------------


def test_dual_and_two_sided_clipping() -> None:
    ratio, advantages = torch.tensor([5.0, 5.0, 0.5]), torch.tensor([-1.0, 1.0, -1.0])
    bounds = {"epsilon": 0.2, "epsilon_high": 0.2}
    close(losses.clipped_surrogate(ratio, advantages, **bounds), [5, -1.2, 0.8])
    close(losses.clipped_surrogate(ratio, advantages, **bounds, dual_clip=3.0), [3, -1.2, 0.8])
    close(losses.clipped_surrogate(ratio, advantages, **bounds, delta=4.0), [4, -1.2, 0.8])


def test_sequence_ratios() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -1.0, -1.0, -1.0], requires_grad=True)
    old = torch.tensor([-2.0, -2.0, -1.0, -2.5, -1.0])
    means = [math.exp(0.5)] * 2 + [math.exp(0.5)] * 3
    ratio = losses.importance_ratio(logprobs, old, IDS, LENGTHS, "sequence")
    close(ratio.detach(), means)
    ratio[0].backward()
    assert logprobs.grad is not None
    close(logprobs.grad, [means[0] / 2] * 2 + [0] * 3)
    logprobs.grad = None
    ratio = losses.importance_ratio(logprobs, old, IDS, LENGTHS, "sequence_token")
    close(ratio.detach(), means)
    ratio[0].backward()
    close(logprobs.grad, [means[0], 0, 0, 0, 0])  # pyright: ignore


def test_gmpo() -> None:
    log_ratio = torch.tensor([1.0, -1.0, -1.0, 0.1, 0.0], requires_grad=True)
    advantages = torch.tensor([2.0, 2.0, -1.0, -1.0, -1.0])
    found = losses.gmpo_loss(log_ratio, advantages, IDS, LENGTHS, epsilon=0.4)
    first, second = math.exp((0.4 - 1) / 2), math.exp((-0.4 + 0.1) / 3)
    close(found.detach(), [-2 * first] * 2 + [second] * 3)
    (found[0] + found[2]).backward()
    assert log_ratio.grad is not None
    close(log_ratio.grad, [0, -first, 0, second / 3, second / 3])


def test_kl_cov_loss() -> None:
    ratio, selected = torch.tensor([1.5, 1.0]), torch.tensor([1.0, 0.0])
    found = losses.kl_cov_loss(ratio, torch.tensor([math.log(1.5), 0.0]), torch.tensor([2.0, 2.0]), selected, coef=0.5)
    close(found, [-3 + 0.5 * math.log(1.5), -2])


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", ["clip", "cispo", "sapo", "gmpo", "vespo", "kl_cov", "sequence", "sequence_token"])
def test_on_policy_every_loss_is_policy_gradient(name: str, sign: float) -> None:
    """At ratio 1 the gradient is -A for each token (spread over the sequence where the ratio is the sequence's)."""
    logprobs = torch.tensor([-1.0, -2.0, -0.5, -1.5, -3.0], requires_grad=True)
    old, advantages = logprobs.detach(), torch.full((5,), sign)
    level = name if name.startswith("sequence") else "token"
    ratio = losses.importance_ratio(logprobs, old, IDS, LENGTHS, level)  # pyright: ignore
    shape = {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0}
    found: dict[str, Callable[[], Tensor]] = {
        "cispo": lambda: losses.cispo_loss(ratio, logprobs, advantages, max_ratio=5.0),
        "sapo": lambda: losses.sapo_loss(ratio, advantages, temperature_pos=1.0, temperature_neg=1.05),
        "gmpo": lambda: losses.gmpo_loss(logprobs - old, advantages, IDS, LENGTHS, epsilon=0.4),
        "vespo": lambda: losses.vespo_loss(logprobs - old, logprobs, advantages, IDS, LENGTHS, **shape),
        "kl_cov": lambda: losses.kl_cov_loss(ratio, logprobs - old, advantages, torch.ones(5), coef=1.0),
    }
    compute = found.get(name, lambda: losses.clipped_surrogate(ratio, advantages, epsilon=0.2, epsilon_high=0.28))
    compute().sum().backward()
    assert logprobs.grad is not None
    close(logprobs.grad, [-sign] * 5)


# --- KL ---------------------------------------------------------------------------------------------------------------


def test_gradients_of_the_estimators_on_a_whole_distribution(seed: int) -> None:
    """k2 in the loss and k3 times the ratio have the gradient of the reverse KL; k1 has none; k3 alone has the
    forward's.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(5, generator=generator, dtype=torch.float64)
    policy, ref_logprobs = logits.log_softmax(0), reference.log_softmax(0)

    def expected_gradient(kind: str, *, times_ratio: bool = False) -> Tensor:
        values = kl.penalty(kind, policy, ref_logprobs)  # pyright: ignore
        if times_ratio:
            values = values * (policy - policy.detach()).exp()
        return torch.autograd.grad((policy.detach().exp() * values).sum(), logits, retain_graph=True)[0]

    reverse = torch.autograd.grad((policy.exp() * (policy - ref_logprobs)).sum(), logits, retain_graph=True)[0]
    forward = torch.autograd.grad((ref_logprobs.exp() * (ref_logprobs - policy)).sum(), logits, retain_graph=True)[0]
    torch.testing.assert_close(expected_gradient("k2"), reverse, rtol=0, atol=1e-10)
    torch.testing.assert_close(expected_gradient("k3", times_ratio=True), reverse, rtol=0, atol=1e-10)
    torch.testing.assert_close(expected_gradient("k3"), forward, rtol=0, atol=1e-10)
    assert expected_gradient("k1").abs().max() < 1e-10


def test_adaptive_coefficient() -> None:
    options = {"target": 0.1, "horizon": 1000, "num_rollouts": 100}
    assert kl.adapted_beta(1.0, 0.11, **options) == pytest.approx(1.01)
    assert kl.adapted_beta(1.0, 5.0, **options) == pytest.approx(1.02)
    assert kl.adapted_beta(1.0, 0.0, **options) == pytest.approx(0.98)
    for num_rollouts in (1_000, 5_000, 65_536):  # at most one horizon in a step: never 0, never negative
        assert kl.adapted_beta(1.0, 0.0, target=0.1, horizon=1000, num_rollouts=num_rollouts) == pytest.approx(0.8)


# --- masks ------------------------------------------------------------------------------------------------------------


def test_high_entropy_mask() -> None:
    assert masks.high_entropy_mask(torch.tensor([3.0, 1.0, 2.0, 0.0, 4.0]), 0.4).tolist() == [
        True,
        False,
        False,
        False,
        True,
    ]
    assert masks.high_entropy_mask(torch.zeros(0), 0.2).tolist() == []


def test_covariance_and_the_tokens_it_selects() -> None:
    covariance = masks.token_covariance(torch.tensor([-1.0, -3.0]), torch.tensor([2.0, 0.0]))
    close(covariance, [1.0, 1.0])
    covariance = torch.tensor([0.5, 2.0, 9.0, 3.0, 4.0, -2.0])
    generator = torch.Generator().manual_seed(0)
    chosen = masks.clip_cov_selection(covariance, 0.34, generator)
    assert chosen.sum() == 2 and set(torch.nonzero(chosen)[:, 0].tolist()) <= {1, 3, 4}
    assert masks.clip_cov_selection(covariance, 1e-4, generator).sum() == 1
    assert masks.clip_cov_selection(torch.zeros(4), 0.5, generator).sum() == 0
    assert masks.kl_cov_selection(covariance, 0.34).tolist() == [False, False, True, False, True, False]


def test_off_policy_sequences_are_dropped_as_a_whole() -> None:
    logprobs, sampler = torch.full((5,), -2.0), torch.tensor([-1.0, -1.0, NAN, -1.9, -2.0])
    for sign, expected in ((-1.0, [False, False, True, True, True]), (1.0, [True] * 5)):
        keep = masks.off_policy_keep(logprobs, sampler, torch.full((5,), sign), IDS, LENGTHS, threshold=0.5)
        assert keep.tolist() == expected
