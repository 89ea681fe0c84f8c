"""PPO's token rewards, advantages, targets and losses against numbers worked out by hand; its options at parse time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from llmrl.algo.policy_gradient.options import Clip
from llmrl.algo.ppo.algorithm import LM_WEIGHTS, OLD_VALUES, PPO, RETURNS, REWARDS, SETTLED_OVER, token_rewards
from llmrl.algo.ppo.options import PPO as PPOOptions
from llmrl.algo.ppo.options import PRESETS
from llmrl.config import PRESETS as ALL_PRESETS
from llmrl.config import AdapterCritic, Config, LoraConfig, check, complete, findings, from_dotted
from llmrl.config.describe import describe
from llmrl.errors import UserError
from llmrl.run.methods import make_algorithm
from llmrl.train.packing import build_micro_batch
from llmrl.types import (
    Counts,
    ForwardOutputs,
    Rollout,
    RolloutGroup,
    Sample,
    Score,
    Status,
    Task,
    TrainBatch,
    Turn,
)

TASK = Task(id="t", messages=[])


def make_config(*, name: str = "ppo", critic: Any = None, lora: bool = False, limit: int = 512, **algo: Any) -> Config:
    """A completed configuration; the parser refuses what an option class does not read."""
    given: dict[str, Any] = {"model.path": "m", "data.path": "d", "rollout.max_completion_length": limit}
    given |= {"rewards": [{"fn": "rewards/r.py:r"}], "algo": {"name": name, **algo}}
    given |= {"critic": critic} if critic is not None else {}
    given |= {"model.lora": {"r": 4}} if lora else {}
    return from_dotted(given)


def ppo(*, name: str = "ppo", critic: Any = None, **algo: Any) -> PPO:
    config = make_config(name=name, critic=critic, limit=10, **({"whiten": False} | algo))
    check(config)
    found = make_algorithm(config)
    assert isinstance(found, PPO)
    return found


def rollout(*lengths: int, reward: float | None = 1.0, index: int = 0, extends: bool = True, **score: Any) -> Rollout:
    """Turns of these many tokens. Each turn's prompt is what came before and one observed token, or not (`extends`)."""
    turns, seen = [], [9, 9]
    for number, length in enumerate(lengths):
        ids = list(range(length))
        turns.append(
            Turn(
                prompt_ids=seen if extends else [7, number],
                completion_ids=ids,
                rollout_logprobs=[-1.0] * length,
                finish="stop",
                policy_version=(0, 0),
                message={"role": "assistant", "content": ""},
            )
        )
        seen = [*seen, *ids, 8]
    return Rollout(task=TASK, index=index, turns=turns, score=Score(reward=reward, **score))


def refined(algorithm: PPO, rollouts: list[Rollout], old_values: list[list[float]], **streams: float) -> TrainBatch:
    """Prepare and refine one group; `old_values` and `streams` stand for what the learner fills in."""
    group = RolloutGroup(task=TASK, rollouts=rollouts)
    batch = algorithm.prepare([group], policy_version=0)
    assert all(not sample.advantages.any() for sample in batch.samples)
    for sample, row in zip(batch.samples, old_values, strict=True):
        sample.extras[OLD_VALUES] = np.asarray(row, np.float32)
        for name, value in streams.items():
            setattr(sample, name, np.full(sample.num_tokens, value, np.float32))
    algorithm.refine(batch)
    return batch


# --- rewards ----------------------------------------------------------------------------------------------------------


def test_what_is_paid_for_each_token() -> None:
    assert token_rewards(rollout(2, 1, reward=0.5), 0.25, dense=True).tolist() == [0, 0, 0.25], "shaped, at the end"
    dense = rollout(2, 1, reward=1.0, token_rewards=[0.5, -0.5, 2.0])
    assert token_rewards(dense, 1.0, dense=True).tolist() == [0.5, -0.5, 2.0], "in place of the reward"
    assert token_rewards(dense, 0.5, dense=True).tolist() == [0.5, -0.5, 1.5], "a punishment of length stays"
    assert token_rewards(dense, 1.0, dense=False).tolist() == [0, 0, 1]
    assert token_rewards(rollout(2, reward=None), float("nan"), dense=True).tolist() == [0, 0]
    assert token_rewards(rollout(0), 1.0, dense=True).tolist() == []


def test_the_length_punishment_is_paid_at_the_end() -> None:
    batch = ppo(overlong_buffer=0.5).prepare([RolloutGroup(task=TASK, rollouts=[rollout(8)])], policy_version=0)
    np.testing.assert_allclose(batch.samples[0].extras[REWARDS], [0] * 7 + [1 - 3 / 5], atol=1e-6)


# --- advantages and targets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extends", [True, False], ids=["one sample", "a sample per turn"])
def test_observations_are_skipped_when_bootstrapping(extends: bool) -> None:
    """The value behind turn 1's last token is the one before turn 2's first, however the context was rewritten."""
    algorithm = ppo(value={"gamma": 0.5, "lam": 0.5})
    batch = refined(algorithm, [rollout(2, 1, reward=8.0, extends=extends)], [[1, 2, 4]] if extends else [[1, 2], [4]])
    assert len(batch.samples) == (1 if extends else 2)
    assert np.concatenate([s.advantages for s in batch.samples]).tolist() == [0.25, 1.0, 4.0]
    assert np.concatenate([s.extras[RETURNS] for s in batch.samples]).tolist() == [1.25, 3.0, 8.0]
    assert batch.groups[0].rollouts[0].advantage == [0.25, 1.0, 4.0]
    assert all(REWARDS not in s.extras for s in batch.samples)


def test_policy_and_critic_have_lambdas_of_their_own() -> None:
    given, old = [rollout(3, reward=1.0)], [[0.5, 0.25, 0.5]]
    batch = refined(ppo(value={"lam": 0.0, "lam_critic": 1.0}), given, old)
    assert batch.samples[0].advantages.tolist() == [-0.25, 0.25, 0.5], "one step ahead"
    assert batch.samples[0].extras[RETURNS].tolist() == [1.0, 1.0, 1.0], "what came in the end"
    both = refined(ppo(value={"lam": 0.0}), given, old)
    assert both.samples[0].extras[RETURNS].tolist() == [0.25, 0.5, 1.0]


def test_lambda_by_length() -> None:
    """alpha 0.5: a rollout of 4 tokens has lambda 0.5, one of 2 has 0."""
    batch = refined(ppo(value={"length_alpha": 0.5}), [rollout(4), rollout(2, index=1)], [[0.0] * 4, [0.0] * 2])
    assert batch.samples[0].advantages.tolist() == [0.125, 0.25, 0.5, 1.0]
    assert batch.samples[1].advantages.tolist() == [0.0, 1.0]
    assert batch.metrics["value/lambda"] == 0.25
    assert "value/lambda" not in refined(ppo(), [rollout(2)], [[0.0] * 2]).metrics


def test_kl_in_the_reward() -> None:
    algorithm = ppo(value={"lam": 1.0}, kl={"kind": "reward", "beta": 0.5})
    assert algorithm.needs.ref_logprobs and algorithm.needs.old_logprobs
    batch = refined(algorithm, [rollout(3)], [[0.0] * 3], old_logprobs=-1.0, ref_logprobs=-1.5)
    np.testing.assert_allclose(batch.samples[0].advantages, [1 - 0.75, 1 - 0.5, 1 - 0.25])
    assert batch.metrics["kl/ref"] == pytest.approx(0.5)


def test_advantages_are_whitened_and_targets_are_not() -> None:
    batch = refined(ppo(whiten=True), [rollout(3), rollout(2, reward=0.0, index=1)], [[0.5] * 3, [0.5] * 2])
    advantages = np.concatenate([s.advantages for s in batch.samples])
    assert advantages.mean() == pytest.approx(0, abs=1e-6)
    assert advantages.std(ddof=1) == pytest.approx(1, abs=1e-6)
    assert batch.samples[0].extras[RETURNS][-1] == 1.0
    assert abs(batch.metrics["advantage/mean"]) < 0.5, "measured before whitening"


def test_metrics_of_the_critic() -> None:
    batch = refined(ppo(), [rollout(2), rollout(2, reward=0.0, index=1)], [[0.5, 1.0], [0.5, 0.0]])
    assert batch.metrics["value/explained_variance"] == pytest.approx(1 - 0.125 / 0.25)
    assert (batch.metrics["return/mean"], batch.metrics["return/std"]) == (0.5, 0.5)
    levels = [batch.metrics[f"advantage/p{p}"] for p in ("01", "10", "25", "50", "75", "90", "99")]
    assert levels == sorted(levels) and levels[0] < 0 < levels[-1]


def test_unscored_and_truncated_rollouts_are_left_out() -> None:
    cut = rollout(2, index=1)
    cut.status = Status.TRUNCATED_LENGTH
    batch = refined(ppo(mask_truncated_completions=True), [rollout(1), cut, rollout(2, reward=None, index=2)], [[0.0]])
    assert [s.index for s in batch.samples] == [0]
    empty = ppo().prepare([RolloutGroup(task=TASK, rollouts=[rollout(2, reward=None)])], policy_version=0)
    ppo().refine(empty)
    assert empty.samples == []


# --- losses -----------------------------------------------------------------------------------------------------------

COUNTS = Counts(num_tokens=4, num_sequences=2, num_groups=1, max_completion_length=10)


def micro_batch(**extras: list[float]):
    """Ratios 2, 0.5, 1, 1.5 with advantages 1, -2, -2, -2; values 0 before, targets 1."""
    samples = []
    for part, advantage in ((slice(0, 1), 1.0), (slice(1, 4), -2.0)):
        ratios = np.asarray([2.0, 0.5, 1.0, 1.5])[part]
        length = len(ratios)
        samples.append(
            Sample(
                input_ids=np.arange(length + 2),
                loss_mask=np.array([False, False] + [True] * length),
                advantages=np.full(length, advantage, np.float32),
                rollout_logprobs=np.zeros(length, np.float32),
                group=0,
                index=0,
                old_logprobs=(-1 - np.log(ratios)).astype(np.float32),
                extras={
                    OLD_VALUES: np.zeros(length, np.float32),
                    RETURNS: np.ones(length, np.float32),
                    **{name: np.asarray(row[part], np.float32) for name, row in extras.items()},
                },
            )
        )
    return build_micro_batch(samples, [[0, 1]])


def outputs() -> ForwardOutputs:
    return ForwardOutputs(
        logprobs=torch.full((4,), -1.0, requires_grad=True),
        entropy=torch.zeros(4),
        values=torch.tensor([0.1, 0.5, -0.5, 0.0], requires_grad=True),
    )


POLICY = (-1.2 + 1.6 + 2.0 + 3.0) / 4
VALUE = (0.81 + 0.64 + 2.25 + 1.0) / 2 / 4
GRAD_POLICY = [0.0, 0.0, 2.0 / 4, 3.0 / 4]
GRAD_VALUE = [-0.9 / 4, 0.0, -1.5 / 4, -1.0 / 4]


@pytest.mark.parametrize(("options", "weight"), [({}, 1.0), ({"critic": "shared", "value": {"coef": 0.25}}, 0.25)])
def test_losses_and_gradients_by_hand(options: dict[str, Any], weight: float) -> None:
    out = outputs()
    assert out.values is not None
    loss, metrics = ppo(**options).loss(out, micro_batch(), COUNTS)
    assert loss.item() == pytest.approx(POLICY + weight * VALUE, abs=1e-6)
    assert metrics["value/loss"].item() == pytest.approx(VALUE, abs=1e-6)
    assert metrics["value/clip_frac"].item() == pytest.approx(1 / 4)
    assert metrics["loss/clip_low_frac"].item() == metrics["loss/clip_high_frac"].item() == pytest.approx(1 / 4)
    loss.backward()
    torch.testing.assert_close(out.logprobs.grad, torch.tensor(GRAD_POLICY), rtol=0, atol=1e-6)
    torch.testing.assert_close(out.values.grad, weight * torch.tensor(GRAD_VALUE), rtol=0, atol=1e-6)


def test_positive_examples_are_imitated() -> None:
    """The mean of -log p over the tokens of correct rollouts: 1 of 4 tokens, so its weight is 4 of num_tokens."""
    algorithm = ppo(positive_lm_coef=0.5)
    batch = refined(algorithm, [rollout(1), rollout(3, reward=0.0, index=1)], [[0.0], [0.0] * 3])
    weights = [s.extras[LM_WEIGHTS].tolist() for s in batch.samples]
    assert weights == [[4.0], [0.0, 0.0, 0.0]]
    out = outputs()
    loss, metrics = algorithm.loss(out, micro_batch(**{LM_WEIGHTS: [4.0, 0.0, 0.0, 0.0]}), COUNTS)
    assert metrics["loss/positive_lm"].item() == pytest.approx(1.0)
    assert loss.item() == pytest.approx(POLICY + VALUE + 0.5, abs=1e-6)
    loss.backward()
    torch.testing.assert_close(out.logprobs.grad, torch.tensor(GRAD_POLICY) - torch.tensor([0.5, 0, 0, 0]))
    nobody = refined(algorithm, [rollout(1, reward=0.0)], [[0.0]])
    assert nobody.samples[0].extras[LM_WEIGHTS].tolist() == [0.0]


def test_a_micro_batch_without_samples_has_a_loss_of_zero() -> None:
    nothing = ForwardOutputs(logprobs=torch.zeros(0), entropy=torch.zeros(0), values=torch.zeros(0))
    loss, metrics = ppo(positive_lm_coef=0.5).loss(nothing, build_micro_batch([], []), COUNTS)
    assert loss.item() == 0 and not any(value.item() for value in metrics.values())


# --- value pre-training -----------------------------------------------------------------------------------------------


def test_the_policy_waits_until_the_critic_has_settled() -> None:
    algorithm = ppo(value={"lam": 0.0}, warmup={"steps": 12, "explained_variance": 0.5})
    assert algorithm.policy_frozen
    out = outputs()
    assert out.values is not None
    loss, metrics = algorithm.value_loss(out.values, micro_batch(), COUNTS)
    assert loss.item() == pytest.approx((0.81 + 0.25 + 2.25 + 1.0) / 2 / 4, abs=1e-6), "nothing is clipped"
    assert metrics.keys() == {"value/loss", "value/clip_frac"}
    batch = refined(algorithm, [rollout(2)], [[0.5, 0.5]])
    assert batch.samples[0].extras[RETURNS].tolist() == [1.0, 1.0], "whatever lambda is afterwards"
    assert batch.metrics["value/warmup_steps"] == 1
    assert SETTLED_OVER == 8
    for step, variance in enumerate([0.9, float("nan"), 0.3, *[0.6] * 6, 0.9], start=1):
        said = algorithm.observe({"value/explained_variance": variance})
        assert algorithm.policy_frozen == (step < 10), "the mean of the last 8 is what counts"
    (line,) = said  # pyright: ignore
    assert "settled after 10 steps, explained variance 0.60" in line
    assert refined(algorithm, [rollout(2)], [[0.5, 0.5]]).metrics["value/warmup_steps"] == 10
    assert algorithm.observe({"value/explained_variance": 0.0}) == [] and not algorithm.policy_frozen
    other = ppo(warmup={"steps": 9})
    other.load_state_dict(algorithm.state_dict())
    assert not other.policy_frozen and other.warmup_variances[-1] == 0.9


def test_pre_training_ends_at_its_limit() -> None:
    algorithm = ppo(warmup={"steps": 2})
    assert algorithm.observe({"value/explained_variance": 0.9}) == []
    (line,) = algorithm.observe({"value/explained_variance": 0.9})
    assert "stops at algo.warmup.steps after 2 steps" in line and not algorithm.policy_frozen
    assert SETTLED_OVER > 2


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_sound_and_completing_it_twice_changes_nothing(name: str) -> None:
    config = make_config(name=name)
    check(config)
    assert complete(config) == config
    assert config.algo == PRESETS[name]
    assert config.critic is not None and config.critic.learning_rate == config.train.learning_rate


def test_presets_with_a_critic_are_those_of_the_family() -> None:
    assert {name for name, options in ALL_PRESETS.items() if isinstance(options, PPOOptions)} == set(PRESETS)
    assert {name for name in ALL_PRESETS if complete(Config(algo=ALL_PRESETS[name])).critic} == set(PRESETS)  # pyright: ignore


def test_vapo() -> None:
    o = ppo(name="vapo").options
    assert isinstance(o.loss, Clip)
    assert (o.loss.epsilon, o.loss.high, o.positive_lm_coef, o.aggregation, o.beta) == (0.2, 0.28, 0.1, "dapo", 0.0)
    assert o.warmup is not None
    assert (o.value.length_alpha, o.lam, o.value.lam_critic, o.warmup.steps) == (0.05, None, 1.0, 50)
    given = ppo(name="vapo", value={"lam": 0.9, "length_alpha": None}).options
    assert given.lam == 0.9, "what is given wins"


def test_a_lambda_by_length_that_is_small_for_every_answer_is_reported() -> None:
    """alpha 0.05: at most 32 tokens give lambda 1 - 1 / 1.6, 40 tokens 0.5."""
    *_, caution = describe(make_config(name="vapo", limit=32))
    assert "with at most 32 tokens lambda is at most 0.38" in caution
    assert not any("tokens lambda" in line for line in describe(make_config(name="vapo", limit=40)))
    _, critic = describe(make_config(name="ppo"))
    assert critic == "critic separate: learning_rate 1e-06"


def test_an_adapter_critic_takes_the_policys_shape() -> None:
    config = make_config(critic={"kind": "adapter"}, lora=True)
    assert isinstance(config.critic, AdapterCritic) and config.critic.lora == config.model.lora == LoraConfig(r=4)


def test_a_shared_trunk_weighs_the_value_loss() -> None:
    def weight(critic: Any, **algo: Any) -> float | None:
        options = make_config(critic=critic, **algo).algo
        assert isinstance(options, PPOOptions)
        return options.value.coef

    assert weight("shared") == 0.1
    assert weight("shared", value={"coef": 0.3}) == 0.3
    assert weight({"kind": "shared", "train_trunk": False}) is None
    assert weight("separate") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "grpo", "critic": {"kind": "separate"}}, "critic.kind: algo.name grpo does not read it"),
        ({"name": "grpo", "baseline": "critic"}, "algo.baseline.kind 'critic': not one of group, batch, none"),
        ({"baseline": "group"}, "algo.baseline: not read by what was chosen, but by algo.name grpo"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "now algo.baseline.kind each_reward"),
        ({"scale_rewards": "group"}, "algo.scale_rewards: now algo.baseline.scale"),
        ({"name": "grpo", "positive_lm_coef": 0.1}, "but by algo.name ppo, algo.name vapo"),
        ({"loss": {"ratio": "sequence"}}, "but a critic gives every token its own advantage"),
        ({"loss": "gmpo"}, "algo.loss gmpo takes one advantage per sequence, but a critic gives every token its own"),
        ({"dynamic_sampling": {}}, "algo.dynamic_sampling: not read by what was chosen, but by algo.name grpo"),
        ({"token_weighting": "thr"}, "algo.token_weighting: not read by what was chosen, but by algo.name grpo"),
        ({"rubric": {"alpha": 0.3}}, "algo.rubric: not read by what was chosen, but by algo.name grpo"),
        ({"kl": {"kind": "reward", "estimator": "k3"}}, "algo.kl.estimator: not read by what was chosen, but by kind"),
        ({"positive_lm_coef": -1.0}, "algo.positive_lm_coef is -1.0: must be at least 0"),
        ({"critic": {"kind": "adapter"}}, "nothing describes it: set critic.lora"),
        ({"critic": {"kind": "shared", "path": "x"}}, "critic.path: not read by what was chosen, but by kind separate"),
        ({"critic": {"train_trunk": True}}, "critic.train_trunk: not read by what was chosen, but by kind shared"),
        (
            {"critic": {"kind": "shared", "train_trunk": False}, "value": {"coef": 1.0}},
            "algo.value.coef 1.0 weighs the value loss beside the policy loss on a shared trunk",
        ),
        ({"value": {"coef": 1.0}}, "on a shared trunk: set critic.kind shared"),
        (
            {"value": {"lam": 0.9, "length_alpha": 0.1}},
            "algo.value.lam and algo.value.length_alpha are two ways",
        ),
        ({"name": "vapo", "value": {"lam": 0.9}}, "set one to null"),
        ({"critic": {"warmup_explained_variance": 0.5}}, "now algo.warmup.explained_variance"),
        ({"critic": {"warmup_iterations": 2}}, "critic.warmup_iterations: now algo.warmup.iterations"),
        ({"warmup": {"steps": 2, "iterations": 0}}, "algo.warmup.iterations is 0: must be at least 1"),
        ({"warmup": {"steps": 0}}, "algo.warmup.steps is 0: must be at least 1"),
        ({"value": {"gamma": 1.5}}, "algo.value.gamma is 1.5: must be at most 1"),
        ({"value": {"clip": -0.1}}, "algo.value.clip is -0.1: must be at least 0"),
        ({"value": {"length_alpha": 0.0}}, "algo.value.length_alpha is 0.0: must be above 0"),
        ({"warmup": {"explained_variance": 1.5}}, "algo.warmup.explained_variance is 1.5: must be at most 1"),
        ({"warmup": {"steps": 100}}, "leaves nothing of train.max_steps 100"),
    ],
)
def test_contradictions_are_reported_at_parse_time(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match="configuration:") as caught:
        check(make_config(**options))
    assert message in str(caught.value)


def test_one_rollout_per_task_is_enough() -> None:
    config = make_config()
    config = replace(config, rollout=replace(config.rollout, num_generations=1))
    assert findings(config) == []
