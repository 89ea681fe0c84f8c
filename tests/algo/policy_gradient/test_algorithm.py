"""GRPO's prepare and loss against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from llmrl.algo.base import Algorithm
from llmrl.train.packing import build_micro_batch
from llmrl.types import Counts, ForwardOutputs, MicroBatch, Rollout, RolloutGroup, Sample, Score, Task, Turn
from tests.invariance.cases import grpo as make_grpo

COUNTS = Counts(num_tokens=8, num_sequences=4, num_groups=2, max_completion_length=10)
RATIO = [2.0, 0.5, 1.0, 1.5]
# A = 1 for the first sequence (1 token), -2 for the second (3 tokens); epsilon 0.2, epsilon_high 0.28
TOKEN_LOSSES = [-1.28, 1.6, 2.0, 3.0]
K3 = 0.5 - 1 + math.log(2)


def micro_batch(*, old: bool = True, ref: bool = False) -> MicroBatch:
    streams = []
    for length, advantage, ratios in ((1, 1.0, RATIO[:1]), (3, -2.0, RATIO[1:])):
        streams.append(
            Sample(
                input_ids=np.arange(length + 2),
                loss_mask=np.array([False, False] + [True] * length),
                advantages=np.full(length, advantage, np.float32),
                rollout_logprobs=np.zeros(length, np.float32),
                group=0,
                index=0,
                old_logprobs=(-1 - np.log(ratios)).astype(np.float32) if old else None,
                ref_logprobs=np.full(length, -1 - math.log(2), np.float32) if ref else None,
            )
        )
    return build_micro_batch(streams, [[0, 1]])


def grpo(**algo: object) -> Algorithm:
    return make_grpo(max_completion_length=10, loss={"epsilon": 0.2, "epsilon_high": 0.28}, **algo)


def outputs() -> ForwardOutputs:
    return ForwardOutputs(logprobs=torch.full((4,), -1.0, requires_grad=True), entropy=torch.zeros(4))


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [("dapo", 5.32 / 8), ("grpo", (-1.28 + 6.6 / 3) / 4), ("dr_grpo", 5.32 / 40)],
)
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_loss_constants(aggregation: str, expected: float, beta: float) -> None:
    penalty = {"dapo": 4 * K3 / 8, "grpo": 2 * K3 / 4, "dr_grpo": 4 * K3 / 40}[aggregation]
    loss, metrics = grpo(aggregation=aggregation, kl={"beta": beta}).loss(outputs(), micro_batch(ref=beta > 0), COUNTS)
    assert loss.item() == pytest.approx(expected + beta * penalty, abs=1e-6)
    assert metrics["loss/clip_low_frac"].item() == pytest.approx(1 / 8)
    assert metrics["loss/clip_high_frac"].item() == pytest.approx(1 / 8)
    assert metrics["loss/ratio/max"].item() == pytest.approx(2.0, rel=1e-6)
    if beta:
        assert metrics["kl/ref"].item() == pytest.approx(4 * K3 / 8, abs=1e-6)
    else:
        assert "kl/ref" not in metrics


def test_gradient_is_zero_where_clipped_and_follows_the_advantage_elsewhere() -> None:
    out = outputs()
    grpo(aggregation="dapo").loss(out, micro_batch(), COUNTS)[0].backward()
    torch.testing.assert_close(out.logprobs.grad, torch.tensor([0.0, 0.0, 2.0 / 8, 3.0 / 8]), rtol=0, atol=1e-6)


def test_penalty_still_pulls_where_the_surrogate_is_clipped() -> None:
    out = outputs()
    grpo(aggregation="dapo", kl={"beta": 0.5}).loss(out, micro_batch(ref=True), COUNTS)[0].backward()
    pull = 0.5 * (1 - 0.5) / 8  # beta * (1 - exp(-d)) / num_tokens with d = ln 2
    expected = torch.tensor([0.0, 0.0, 2.0 / 8, 3.0 / 8]) + pull
    torch.testing.assert_close(out.logprobs.grad, expected, rtol=0, atol=1e-6)


def test_without_old_logprobs_the_ratio_is_one_and_the_gradient_is_not_zero() -> None:
    out = outputs()
    loss, metrics = grpo(aggregation="dapo").loss(out, micro_batch(old=False), COUNTS)
    loss.backward()
    assert loss.item() == pytest.approx((-1 + 2 + 2 + 2) / 8)
    assert metrics["loss/ratio/max"].item() == 1.0
    assert out.logprobs.grad is not None
    assert out.logprobs.grad.tolist() == pytest.approx([-1 / 8, 2 / 8, 2 / 8, 2 / 8])


def test_an_empty_micro_batch_has_a_loss_of_zero() -> None:
    empty = ForwardOutputs(logprobs=torch.zeros(0, requires_grad=True), entropy=torch.zeros(0))
    for beta in (0.0, 0.1):
        loss, metrics = grpo(kl={"beta": beta}).loss(empty, build_micro_batch([], []), COUNTS)
        assert loss.item() == 0.0
        assert all(value.item() == 0.0 for value in metrics.values())
        assert all(value.device == empty.logprobs.device for value in metrics.values())


def test_beta_without_reference_is_an_error() -> None:
    with pytest.raises(ValueError, match="ref_logprobs"):
        grpo(kl={"beta": 0.1}).loss(outputs(), micro_batch(), COUNTS)


def test_what_it_needs() -> None:
    assert not grpo().needs.ref_logprobs
    assert not grpo().needs.every_sample
    assert grpo(kl={"beta": 0.1}).needs.ref_logprobs
    assert grpo(kl={"beta": 0.1}).needs.every_sample, "a sample without advantage still has the penalty's gradient"


@pytest.mark.parametrize(
    ("bounds", "expected"), [({"epsilon": 0.3}, -1.3), ({"epsilon": 0.3, "epsilon_high": 0.0}, -1.0)]
)
def test_the_upper_bound_is_epsilon_unless_given(bounds: dict[str, float], expected: float) -> None:
    batch = micro_batch()
    batch.advantages = torch.tensor([1.0, 0.0, 0.0, 0.0])  # the ratio of the first token is 2
    loss, _ = make_grpo(aggregation="dapo", loss=bounds).loss(outputs(), batch, COUNTS)
    assert loss.item() == pytest.approx(expected / 8)


def groups(rewards: list[list[float | None]]) -> list[RolloutGroup]:
    built = []
    for number, row in enumerate(rewards):
        task = Task(id=f"t{number}", messages=[])
        rollouts = []
        for index, reward in enumerate(row):
            turn = Turn(
                prompt_ids=[1],
                completion_ids=[2] * (index + 1),
                rollout_logprobs=[-1.0] * (index + 1),
                finish="stop",
                policy_version=(0, 0),
                message={},
            )
            rollouts.append(Rollout(task=task, index=index, turns=[turn], score=Score(reward=reward)))
        built.append(RolloutGroup(task=task, rollouts=rollouts))
    return built


def test_prepare_sets_every_advantage_and_keeps_scored_rollouts_only() -> None:
    batch_groups = groups([[1.0, 0.0, None], [1.0, 1.0, 1.0], [None, 0.5, None], [0.0, 0.0, 4.0]])
    batch = grpo(baseline={"scale": "none"}).prepare(batch_groups, policy_version=7)
    expected = [[0.5, -0.5, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [-4 / 3, -4 / 3, 8 / 3]]
    for group, row in zip(batch_groups, expected, strict=True):
        assert [rollout.advantage for rollout in group.rollouts] == pytest.approx(row)
    kept = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (3, 0), (3, 1), (3, 2)]
    assert [(s.group, s.index) for s in batch.samples] == kept
    for s in batch.samples:
        assert s.advantages.tolist() == pytest.approx([expected[s.group][s.index]] * (s.index + 1))
    assert (batch.num_groups, batch.max_completion_length, batch.policy_version) == (4, 10, 7)
    assert batch.metrics == {"advantage/zero_variance_frac": 0.5}


def test_prepare_divides_by_the_deviation_when_asked() -> None:
    batch = grpo(baseline={"scale": "group"}).prepare(groups([[3.0, None, 1.0]]), policy_version=0)
    assert [float(s.advantages[0]) for s in batch.samples] == pytest.approx([0.7070568, -0.7070568], abs=1e-6)
