"""What is changed between advantage and loss: KL in the reward, whitening, token masks; and the whole of `prepare`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from llmrl.algo.policy_gradient.algorithm import GRPO
from llmrl.algo.policy_gradient.options import PolicyGradient
from llmrl.config import preset
from llmrl.errors import RunFailed
from llmrl.types import Rollout, RolloutGroup, Score, Status, Task, TrainBatch, Turn

REWARDS = [[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]]
LENGTHS = [[2, 4], [1, 3], [2, 2]]


def make_groups(
    rewards: list[list[float | None]] = REWARDS,  # pyright: ignore[reportArgumentType]
    parts: list[list[dict[str, Any]]] | None = None,
) -> list[RolloutGroup]:
    groups = []
    for p, row in enumerate(rewards):
        task = Task(id=f"t{p}", messages=[])
        rollouts = []
        for g, reward in enumerate(row):
            length = LENGTHS[p][g]
            turn = Turn(
                prompt_ids=[1],
                completion_ids=[2] * length,
                rollout_logprobs=[-1.0] * length,
                finish="stop",
                policy_version=(0, 0),
                message={},
            )
            score = Score(reward=reward, parts=parts[p][g] if parts else {})
            rollouts.append(Rollout(task=task, index=g, turns=[turn], score=score))
        groups.append(RolloutGroup(task=task, rollouts=rollouts))
    return groups


def make(*, rewards: dict[str, float] | None = None, **algo: Any) -> GRPO:
    options = preset(**({"name": "grpo"} | algo))
    assert isinstance(options, PolicyGradient)
    return GRPO(options, max_completion_length=8, rewards=rewards)


def prepared(algorithm: GRPO, **given: Any) -> TrainBatch:
    """A batch with streams: old log-probabilities -1, -2, ... along each sample, reference 0.5 nats below."""
    batch = algorithm.prepare(make_groups(**given), policy_version=3)
    for sample in batch.samples:
        sample.old_logprobs = -np.arange(1, sample.num_tokens + 1, dtype=np.float32)
        sample.ref_logprobs = sample.old_logprobs - 0.5
        sample.extras["old_entropies"] = np.arange(sample.num_tokens, dtype=np.float32) + sample.index
        sample.extras["collisions"] = np.full(sample.num_tokens, 0.5, np.float32)
    return batch


def advantages(batch: TrainBatch) -> list[list[float]]:
    return [sample.advantages.tolist() for sample in batch.samples]


def close(found: list[list[float]], expected: list[list[float]], tolerance: float = 1e-5) -> None:
    assert [len(row) for row in found] == [len(row) for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=tolerance)


def test_kl_in_the_reward_of_a_whole_rollout_comes_before_the_baseline() -> None:
    algorithm = make(name="rloo", kl={"beta": 0.1})
    assert algorithm.needs.ref_logprobs and algorithm.needs.old_logprobs and algorithm.needs.every_sample
    batch = prepared(algorithm)
    algorithm.refine(batch)
    # rewards less 0.1 * 0.5 * length: (0.9, -0.2), (0.95, 0.85), (-0.1, 1.9); leave one out doubles the centred value
    close(advantages(batch), [[1.1] * 2, [-1.1] * 4, [0.1], [-0.1] * 3, [-2.0] * 2, [2.0] * 2])
    assert batch.metrics["kl/ref"] == pytest.approx(0.5)
    assert batch.groups[0].rollouts[1].advantage == pytest.approx(-1.1)


def test_kl_in_the_reward_of_each_token_without_a_baseline() -> None:
    algorithm = make(name="reinforce_pp", kl={"beta": 0.1}, whiten=False)
    batch = prepared(algorithm)
    algorithm.refine(batch)
    expected = [
        [r - 0.05 * (n - t) for t in range(n)]
        for rs, ns in zip(REWARDS, LENGTHS, strict=True)
        for r, n in zip(rs, ns, strict=True)
    ]
    close(advantages(batch), expected)
    whitened = make(name="reinforce_pp", kl={"beta": 0.1})
    batch = prepared(whitened)
    whitened.refine(batch)
    tokens = np.array([x for row in expected for x in row])
    ours = np.concatenate([s.advantages for s in batch.samples])
    np.testing.assert_allclose(ours, (tokens - tokens.mean()) / tokens.std(ddof=1), atol=1e-5)
    assert isinstance(batch.groups[0].rollouts[0].advantage, list)


def test_whitening_needs_no_forward_pass() -> None:
    algorithm = make(name="reinforce_pp_baseline", kl={"beta": 0.0})
    assert not algorithm.needs.refine and not algorithm.needs.ref_logprobs
    batch = algorithm.prepare(make_groups(), policy_version=0)
    tokens = np.concatenate([s.advantages for s in batch.samples])
    assert tokens.mean() == pytest.approx(0, abs=1e-6) and tokens.std(ddof=1) == pytest.approx(1, abs=1e-5)
    assert np.any(batch.samples[2].advantages), "the token mean is not 0, so an agreeing group is shifted off 0"


def test_optimal_token_baseline() -> None:
    algorithm = make(name="optimal_token")
    batch = prepared(algorithm)
    algorithm.refine(batch)
    w = [1 - 2 * math.exp(-t) + 0.5 for t in range(1, 5)]
    energy = np.cumsum(w)
    # both rollouts of the first task have the same energy at t = 0, 1; from t = 2 on only the wrong one is left
    close(advantages(batch)[:2], [[0.5, 0.5], [-0.5, -0.5, 0.0, 0.0]])
    assert energy[1] > 0
    assert all("collisions" not in s.extras for s in batch.samples)


def test_high_entropy_tokens_keep_their_advantage_others_lose_it() -> None:
    algorithm = make(top_entropy_quantile=0.3, baseline={"scale": "none"})
    batch = prepared(algorithm)
    algorithm.refine(batch)
    # entropies of the samples with signal: [0 1] [1 2 3 4] [0 1] [1 2]; the 0.7 quantile is 1.3 + ...: 2 and above stay
    close(advantages(batch), [[0, 0], [0, -0.5, -0.5, -0.5], [0], [0] * 3, [0, 0], [0, 1.0]])
    assert all("old_entropies" not in s.extras for s in batch.samples)


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_covariance_selection(name: str) -> None:
    algorithm = make(name=name, loss={"fraction": 0.1})
    batch = prepared(algorithm)
    before = advantages(batch)
    algorithm.refine(batch)
    if name == "kl_cov":
        close(advantages(batch), before)
        streams = [s.extras["kl_cov"].tolist() for s in batch.samples]
        assert sum(map(sum, streams)) == 1.0
        tokens = [
            (a, lp)
            for s in batch.samples
            if s.advantages.any()
            for a, lp in zip(s.advantages, s.old_logprobs, strict=True)
        ]
        mean_a, mean_lp = np.mean(tokens, axis=0)
        best = max(tokens, key=lambda token: (token[0] - mean_a) * (token[1] - mean_lp))
        chosen = [
            (s.advantages[t], s.old_logprobs[t]) for s in batch.samples for t in np.flatnonzero(s.extras["kl_cov"])
        ]
        assert chosen == [best]
    else:
        changed = [
            (x, y) for a, b in zip(before, advantages(batch), strict=True) for x, y in zip(a, b, strict=True) if x != y
        ]
        assert all(y == 0 for _, y in changed) and len(changed) <= 1


def test_soft_overlong_punishment_shapes_the_reward() -> None:
    algorithm = make(overlong_buffer=0.5, baseline={"scale": "none"})
    batch = algorithm.prepare(make_groups(), policy_version=0)  # limit 8, buffer 4: nothing here is longer than 4
    close(advantages(batch)[:2], [[0.5] * 2, [-0.5] * 4])
    algorithm.max_completion_length = 4  # limit 4, buffer 2: length 4 costs 1, length 3 costs 0.5
    batch = algorithm.prepare(make_groups(), policy_version=0)
    close(advantages(batch), [[1.0] * 2, [-1.0] * 4, [0.25], [-0.25] * 3, [-1.0] * 2, [1.0] * 2])


def test_truncated_rollouts_enter_the_baseline_but_not_the_loss() -> None:
    groups = make_groups()
    groups[0].rollouts[1].status = Status.TRUNCATED_LENGTH
    batch = make(mask_truncated_completions=True, baseline={"scale": "none"}).prepare(groups, policy_version=0)
    assert [(s.group, s.index) for s in batch.samples] == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert batch.samples[0].advantages.tolist() == [0.5, 0.5]


def test_the_kl_of_a_masked_rollout_is_in_the_reward_that_its_group_is_compared_with() -> None:
    algorithm = make(mask_truncated_completions=True, kl={"kind": "reward", "beta": 0.1}, baseline={"scale": "none"})
    groups = make_groups()
    groups[0].rollouts[1].status = Status.TRUNCATED_LENGTH
    batch = algorithm.prepare(groups, policy_version=0)
    assert [s.probe for s in batch.samples] == [False, True, False, False, False, False]
    for s in batch.samples:
        s.old_logprobs = np.full(s.num_tokens, -1.0, np.float32)
        s.ref_logprobs = s.old_logprobs - (3.0 if s.probe else 0.5)
    algorithm.refine(batch)
    assert [(s.group, s.index) for s in batch.samples] == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)]
    # rewards 1 - 0.1 * 0.5 * 2 and 0 - 0.1 * 3 * 4: their mean is -0.15
    close(advantages(batch)[:1], [[0.9 + 0.15] * 2])
    without = make(name="reinforce_pp", mask_truncated_completions=True).prepare(groups, policy_version=0)
    assert not any(s.probe for s in without.samples) and len(without.samples) == 5, "no baseline reads the others"


def test_a_rewards_kl_is_discounted_like_the_rewards() -> None:
    """KL of the tokens 1, 2, 4: with gamma 0.5 the first token answers for 1 + 0.5 * 2 + 0.25 * 4."""
    algorithm = make(baseline={"kind": "token_rewards", "gamma": 0.5}, kl={"kind": "reward", "beta": 0.1})
    groups = make_groups([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    batch = algorithm.prepare(groups, policy_version=0)
    for s in batch.samples:
        s.old_logprobs = np.zeros(s.num_tokens, np.float32)
        s.ref_logprobs = -np.array([1.0, 2.0, 4.0, 0.0][: s.num_tokens], np.float32)
    algorithm.refine(batch)
    close(advantages(batch)[3:4], [[-0.1 * 3.0, -0.1 * 4.0, -0.1 * 4.0]])


def test_rubric_and_outcome_are_mixed_within_the_group() -> None:
    pairs = [[(1.0, 0.375), (1.0, 0.625)], [(0.0, 0.9), (1.0, 0.0)], [(None, 0.5), (1.0, 0.5)]]
    parts = [[{"citation_rubric/outcome": o, "citation_rubric/rubric": r} for o, r in row] for row in pairs]
    algorithm = make(name="c_grpo")
    rewards = algorithm.shaped_rewards(make_groups(parts=parts))
    expected = torch.tensor([[0.7 + 0.3 * 0.6, 1.0], [0.0, 0.7], [math.nan, 1.0]])
    torch.testing.assert_close(rewards, expected, rtol=0, atol=1e-6, equal_nan=True)
    with pytest.raises(RunFailed, match="citation_rubric"):
        algorithm.prepare(make_groups(), policy_version=0)


def test_accuracy_is_the_first_weighted_reward() -> None:
    parts = [[{"format": 1.0, "math": float(g)} for g in range(2)] for _ in REWARDS]
    algorithm = make(name="passk", baseline={"k": 2}, rewards={"format": 0.0, "math": 1.0})
    assert algorithm.correct(make_groups(parts=parts)).tolist() == [[0.0, 1.0]] * 3
    assert make().correct(make_groups()).tolist() == [[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]


def test_several_rewards_are_standardised_apart() -> None:
    parts = [[{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 5.0}], [{"a": 1.0, "b": 1.0}] * 2, [{"a": 0.0, "b": 0.0}] * 2]
    algorithm = make(name="gdpo", rewards={"a": 1.0, "b": 0.5})
    batch = algorithm.prepare(make_groups(parts=parts), policy_version=0)
    # sums of +-0.7071 and half of -+0.7071, divided by the deviation sqrt(2 * 0.125 / 5) of all six
    close(advantages(batch), [[1.5803] * 2, [-1.5803] * 4, [0], [0] * 3, [0] * 2, [0] * 2], 2e-3)


def test_the_punishment_of_length_is_one_of_the_rewards_that_are_kept_apart() -> None:
    """Over two groups of two: a and the penalty are standardized to +-0.7071 in each group that they tell apart."""
    parts = [[{"a": 1.0}, {"a": 0.0}], [{"a": 1.0}] * 2, [{"a": 0.0}, {"a": 0.0}]]
    algorithm = make(name="gdpo", rewards={"a": 1.0}, overlong_buffer=0.5)
    algorithm.max_completion_length = 4  # limit 4, buffer 2: penalties 0, -1; 0, -0.5; 0, 0
    batch = algorithm.prepare(make_groups(parts=parts), policy_version=0)
    sums = np.array([1.4142, -1.4142, 0.7071, -0.7071, 0.0, 0.0])
    expected = sums / sums.std(ddof=1)
    close(advantages(batch), [[e] * s.num_tokens for e, s in zip(expected, batch.samples, strict=True)], 2e-3)
    assert batch.metrics == {"advantage/zero_variance_frac": pytest.approx(1 / 3)}


def test_each_reward_reads_what_a_part_adds_to_the_sum() -> None:
    """A gate and a scale have shaped the terms; rewards of the environment and negative weights count too."""
    groups = make_groups()
    for group in groups:
        for rollout in group.rollouts:
            best = rollout.index == 0
            assert rollout.score is not None
            rollout.score.parts = {"a": 1.0, "b": 7.0, "env/x": float(best)}
            rollout.score.terms = {"a": 1.0, "b": float(not best), "env/x": float(best)}
    found = advantages(make(name="gdpo", rewards={"a": 1.0, "b": -1.0}).prepare(groups, policy_version=0))
    close(found, [[0.9128] * 2, [-0.9128] * 4, [0.9128], [-0.9128] * 3, [0.9128] * 2, [-0.9128] * 2], 1e-3)


def test_groups_without_signal_are_counted_by_their_advantages() -> None:
    def silent(rewards: Any, parts: Any = None, **algo: Any) -> float:
        batch = make(rewards={"a": 1.0}, **algo).prepare(make_groups(rewards, parts), policy_version=0)
        return batch.metrics["advantage/zero_variance_frac"]

    mixed, flat = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]
    assert silent(mixed) == 0 and silent(flat) == 1
    assert silent([[1.0, None], [None, None], [1.0, 0.0]]) == pytest.approx(2 / 3)
    # k of pass@k equals the number of scores, so all advantages are 0 though the rewards differ
    right = [[{"a": reward} for reward in row] for row in mixed]
    assert silent(mixed, right, name="passk", baseline={"k": 2}) == 1
    assert silent(mixed, right, name="passk", baseline={"k": 1}) == 0
    # without a baseline equal rewards do teach, and whitening shifts those of 0 too
    assert silent(flat, baseline="none") == pytest.approx(1 / 3)
    assert silent(flat, name="reinforce_pp") == 0
    assert silent([[1.0, 1.0], [1.0, None], [1.0, 1.0]], name="reinforce_pp") == 1


def test_prompt_mean_knows_the_tokens_of_each_group() -> None:
    batch = make(aggregation="prompt_mean").prepare(make_groups(), policy_version=0)
    assert [s.extras["group_tokens"].tolist() for s in batch.samples] == [
        [6] * 2,
        [6] * 4,
        [4],
        [4] * 3,
        [4] * 2,
        [4] * 2,
    ]


def test_an_adaptive_coefficient_is_part_of_the_state() -> None:
    algorithm = make(kl={"beta": 0.1, "target": 0.05, "horizon": 60})
    algorithm.prepare(make_groups(), policy_version=0)
    algorithm.observe({"kl/ref": 1.0})
    assert algorithm.beta == pytest.approx(0.1 * (1 + 0.2 * 6 / 60))
    other = make(kl={"beta": 0.1, "target": 0.05, "horizon": 60})
    other.load_state_dict(algorithm.state_dict())
    assert other.beta == algorithm.beta
    constant = make(kl={"beta": 0.1})
    constant.observe({"kl/ref": 1.0})
    constant.load_state_dict({"beta": 9.0})
    assert constant.beta == 0.1
