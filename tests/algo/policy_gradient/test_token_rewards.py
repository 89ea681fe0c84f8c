"""Rewards of single tokens without a critic (IRCoCo, REINFORCE): advantages, loss and gradient by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmrl.algo.policy_gradient.algorithm import GRPO
from llmrl.config import Config, DataConfig, ModelConfig, RewardConfig, RolloutConfig, check, preset
from llmrl.errors import UserError
from llmrl.run.methods import make_algorithm
from llmrl.train.packing import build_micro_batch
from llmrl.types import Counts, ForwardOutputs, Rollout, RolloutGroup, Score, Task, TrainBatch, Turn

TASK = Task(id="t", messages=[])
DENSE = [[0.5, -0.25, 0.0], [0.125, 0.0]]


def make_config(name: str = "ircoco", size: int = 2, **algo: object) -> Config:
    return Config(
        model=ModelConfig(path="m"),
        data=DataConfig(path="d"),
        rollout=RolloutConfig(num_generations=size, max_completion_length=4),
        rewards=[RewardConfig(fn="rewards/r.py:r")],
        algo=preset(name, **algo),
    )


def prepared(dense: list[list[float]] | None, rewards: list[float | None], **algo: object) -> TrainBatch:
    config = make_config(**algo)  # pyright: ignore
    check(config)
    rollouts = []
    for index, (reward, tokens) in enumerate(zip(rewards, DENSE, strict=True)):
        turn = Turn(
            prompt_ids=[9, 9],
            completion_ids=list(range(len(tokens))),
            rollout_logprobs=[-1.0] * len(tokens),
            finish="stop",
            policy_version=(0, 0),
            message={"role": "assistant", "content": ""},
        )
        score = Score(reward=reward, token_rewards=None if dense is None else dense[index])
        rollouts.append(Rollout(task=TASK, index=index, turns=[turn], score=score))
    return make_algorithm(config).prepare([RolloutGroup(task=TASK, rollouts=rollouts)], policy_version=0)


def advantages(batch: TrainBatch) -> list[list[float]]:
    return [sample.advantages.tolist() for sample in batch.samples]


def test_every_token_has_its_own_reward_for_advantage() -> None:
    batch = prepared(DENSE, [0.9, 0.1])
    assert advantages(batch) == DENSE
    assert batch.metrics["advantage/zero_variance_frac"] == 0, "equal rewards are no lack of signal here"
    assert prepared([[0.0] * 3, [0.0] * 2], [0.9, 0.1]).metrics["advantage/zero_variance_frac"] == 1
    assert batch.metrics["advantage/mean"] == pytest.approx(0.375 / 5)
    assert batch.metrics["advantage/std"] == pytest.approx(np.std([x for row in DENSE for x in row]))


def test_rewards_to_come_and_a_reward_at_the_end() -> None:
    assert advantages(prepared(DENSE, [0.9, 0.1], baseline={"gamma": 1.0})) == [[0.25, -0.25, 0.0], [0.125, 0.0]]
    assert advantages(prepared(DENSE, [0.9, 0.1], baseline={"gamma": 0.5})) == [[0.375, -0.25, 0.0], [0.125, 0.0]]
    assert advantages(prepared(None, [1.0, 0.5], baseline={"gamma": 0.5})) == [[0.25, 0.5, 1.0], [0.25, 0.5]]
    assert advantages(prepared(DENSE, [1.0, 0.5], baseline="none")) == [[1.0] * 3, [0.5] * 2]


def test_what_was_not_scored_is_not_trained_and_a_punishment_of_length_is_kept() -> None:
    assert advantages(prepared(DENSE, [None, 0.1])) == DENSE[1:]
    punished = advantages(prepared(DENSE, [0.9, 0.1], overlong_buffer=0.5))
    np.testing.assert_allclose(punished[0], [0.5, -0.25, -0.5], atol=1e-6)
    assert punished[1] == DENSE[1]


def test_the_loss_is_the_papers() -> None:
    """-(1/T) sum_t r_t log pi(y_t), averaged over completions; its gradient, as the policy is the one that sampled."""
    batch = prepared(DENSE, [0.9, 0.1])
    micro = build_micro_batch(batch.samples, [[0, 1]])
    logprobs = torch.tensor([-0.5, -1.0, -2.0, -0.1, -3.0], requires_grad=True)
    counts = Counts(num_tokens=5, num_sequences=2, num_groups=1, max_completion_length=4)
    algorithm = make_algorithm(make_config())
    assert isinstance(algorithm, GRPO) and not algorithm.needs.refine and not algorithm.needs.old_logprobs
    loss, _ = algorithm.loss(ForwardOutputs(logprobs=logprobs, entropy=torch.zeros(5)), micro, counts)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    weights = torch.tensor([-r / len(row) / 2 for row in DENSE for r in row])
    (expected,) = torch.autograd.grad((weights * logprobs).sum(), logprobs)
    torch.testing.assert_close(gradient, expected)


def test_one_completion_of_a_task_is_enough() -> None:
    check(make_config(size=1))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "grpo", "use_token_rewards": True}, "algo.use_token_rewards: now algo.baseline token_rewards"),
        ({"baseline": {"scale": "batch"}}, "algo.baseline.scale: not read by what was chosen, but by kind group"),
        ({"baseline": {"kind": "none", "gamma": 0.0}}, "algo.baseline.gamma: not read by what was chosen, but by"),
        ({"baseline": {"gamma": 1.5}}, "algo.baseline.gamma is 1.5: must be at most 1"),
        ({"loss": {"ratio": "sequence"}}, "algo.baseline token_rewards gives every token its own advantage"),
        ({"loss": "gmpo"}, "algo.loss gmpo takes one advantage per sequence"),
        ({"name": "ppo", "gamma": 0.5}, "or algo.value.gamma (ppo)"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as error:
        check(make_config(**options))  # pyright: ignore
    assert said in str(error.value)


def test_reinforce_pays_dense_rewards_where_told_to() -> None:
    options = {"whiten": False, "kl": {"beta": 0.0}}
    assert advantages(prepared(DENSE, [0.9, 0.1], name="reinforce_pp", **options)) == [
        [pytest.approx(0.9)] * 3,
        [pytest.approx(0.1)] * 2,
    ]
    told = prepared(DENSE, [0.9, 0.1], name="reinforce_pp", baseline="token_rewards", **options)
    assert advantages(told) == [[0.25, -0.25, 0.0], [0.125, 0.0]]
