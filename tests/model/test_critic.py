"""The critic's three kinds: what is trained, what is shared, what leaves the trainer, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmrl import Trainer
from llmrl.model.parallel import Parallel
from llmrl.run.checkpoint import load_checkpoint, save_checkpoint
from llmrl.track.files import read_jsonl
from llmrl.train.influence import GroupScores
from llmrl.train.learner import Learner
from llmrl.train.packing import build_micro_batch
from llmrl.train.selfcheck import check_forward
from llmrl.types import Counts, TrainBatch
from tests.invariance.cases import (
    Outcome,
    assert_same,
    make_ppo_learner,
    make_samples,
    scored_groups,
    trained_parameters,
    update_and_look,
)

pytestmark = pytest.mark.slow

KINDS = [("separate", False), ("separate", True), ("shared", False), ("shared", True), ("adapter", True)]
IDS = ["separate", "separate, lora", "shared", "shared, lora", "adapter"]
every_kind = pytest.mark.parametrize(("kind", "lora"), KINDS, ids=IDS)


def one_step(**more: Any) -> dict[str, Any]:
    return {"algo": {"num_mini_batches": 1} | more.pop("algo", {}), **more}


def batch_of(algorithm: Any, seed: int) -> TrainBatch:
    return algorithm.prepare(scored_groups(seed), policy_version=0)


def update(kind: str, lora: bool, seed: int, **options: Any) -> Outcome:
    learner, algorithm = make_ppo_learner(kind, lora=lora, **options)
    return update_and_look(learner, algorithm, batch_of(algorithm, seed))


def sides(values: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split by name into (the policy's, the critic's)."""
    policy = {name: value for name, value in values.items() if not name.startswith("critic.")}
    return policy, {name: value for name, value in values.items() if name.startswith("critic.")}


# --- values -----------------------------------------------------------------------------------------------------------


@every_kind
def test_values_are_of_the_state_before_each_token(kind: str, lora: bool, seed: int) -> None:
    """Through the plain modules, one sequence at a time: head(trunk(ids))[t - 1] for the token at t."""
    learner, _ = make_ppo_learner(kind, lora=lora)
    policy, samples = learner.policy, make_samples(seed)
    critic = policy.module.critic
    assert critic is not None
    check_forward(policy)
    assert policy.can_share_prefixes
    outputs = policy.forward(build_micro_batch(samples, [[0, 1, 2], [3], [4, 5, 6, 7], [8]]))
    expected = []
    for sample in samples:
        ids = torch.from_numpy(sample.input_ids)
        trunk = critic.trunk or policy.module.causal_lm.get_decoder()
        values = trunk(ids[None]).last_hidden_state[0] @ critic.head.weight + critic.head.bias
        expected.append(values[[t - 1 for t in range(len(ids)) if sample.loss_mask[t]]])
    assert outputs.values is not None
    torch.testing.assert_close(outputs.values, torch.cat(expected), rtol=0, atol=1e-5)
    alone = policy.values(build_micro_batch(samples, [[0, 1, 2], [3], [4, 5, 6, 7], [8]]))
    torch.testing.assert_close(alone, outputs.values, rtol=0, atol=1e-6)


@every_kind
@pytest.mark.parametrize("arch", ["qwen2", "gemma"])
def test_layout_changes_nothing(kind: str, lora: bool, arch: str, seed: int) -> None:
    """Padded = packed = one at a time = shared prompts."""

    def run(check: bool, **train: Any) -> Outcome:
        learner, algorithm = make_ppo_learner(
            kind, lora=lora, arch=arch, temperature=0.9, **one_step(train=train, algo={"positive_lm_coef": 0.1})
        )
        if check:  # finds out that prefixes can be shared
            check_forward(learner.policy)
            assert learner.policy.can_share_prefixes
        return update_and_look(learner, algorithm, batch_of(algorithm, seed))

    padded = run(False, packing=False)
    assert padded.metrics["policy/grad_norm"] > 1e-3 and padded.metrics["value/grad_norm"] > 1e-3
    for check, train in ((False, {}), (False, {"max_tokens_per_micro_batch": 1}), (True, {})):
        found = run(check, **train)
        assert_same(found, padded)
        for key in ("value/loss", "value/explained_variance", "value/grad_norm", "return/std", "advantage/p90"):
            assert found.metrics[key] == pytest.approx(padded.metrics[key], abs=1e-5, rel=1e-5), key


# --- gradients --------------------------------------------------------------------------------------------------------


def value_gradients(kind: str, lora: bool, seed: int, *, alone: bool, **critic: Any) -> dict[str, Tensor]:
    """Return the gradients of the value loss: of values that come with the policy's passes, or `alone`."""
    learner, algorithm = make_ppo_learner(kind, lora=lora, critic=critic)
    batch = batch_of(algorithm, seed)
    learner._fill(batch.samples, algorithm, GroupScores(learner.layout, algorithm, batch))
    algorithm.refine(batch)
    (micro_batch,) = learner.layout.micro_batches(batch.samples)
    values = learner.policy.values(micro_batch) if alone else learner.policy.forward(micro_batch).values
    assert values is not None
    counts = Counts(num_tokens=1, num_sequences=1, num_groups=1, max_completion_length=1)
    algorithm.value_loss(values, micro_batch, counts)[0].backward()
    named = learner.policy.module.named_parameters()
    return {name: parameter.grad for name, parameter in named if parameter.grad is not None}


@every_kind
def test_where_the_gradient_of_the_value_loss_goes(kind: str, lora: bool, seed: int) -> None:
    gradients = value_gradients(kind, lora, seed, alone=False)
    policy, critic = sides(gradients)
    assert all(gradient.abs().max() > 0 for name, gradient in critic.items() if "k_proj.bias" not in name)
    if kind == "shared":
        assert set(critic) == {"critic.head.weight", "critic.head.bias"}
        assert any(gradient.abs().max() > 0 for gradient in policy.values())
        assert not sides(value_gradients(kind, lora, seed, alone=False, train_trunk=False))[0]
    else:
        assert not policy
    alone = value_gradients(kind, lora, seed, alone=True)
    assert alone.keys() == critic.keys()
    for name, gradient in critic.items():
        torch.testing.assert_close(alone[name], gradient, rtol=1e-5, atol=1e-6)
    adapters = ["lora_" in name for name in critic if ".head." not in name]
    assert all(adapters) if kind == "adapter" else not any(adapters), "a separate critic is trained whole by default"


def test_a_separate_critic_may_be_trained_through_adapters(seed: int) -> None:
    from llmrl.config import LoraConfig

    outcome = update("separate", False, seed, **one_step(critic={"lora": LoraConfig(r=2)}))
    _, critic = sides(outcome.gradients)
    assert all("lora_" in name or ".head." in name for name in critic) and len(critic) > 2


@every_kind
def test_before_the_first_policy_step_the_policy_does_not_move(kind: str, lora: bool, seed: int) -> None:
    """And Adam has not counted a step for it: its first step is the one it would have taken without pre-training."""
    options = one_step(algo={"warmup": {"steps": 2}}, train={"weight_decay": 0.1})
    learner, algorithm = make_ppo_learner(kind, lora=lora, **options)
    before = trained_parameters(learner)
    for step in range(2):
        metrics = learner.update(batch_of(algorithm, seed + step), algorithm)
        assert "policy/grad_norm" not in metrics or metrics["policy/grad_norm"] == 0
        algorithm.observe(metrics)
    assert not algorithm.policy_frozen
    after = trained_parameters(learner)
    assert all(torch.equal(after[name], before[name]) for name in sides(before)[0])
    assert all(not torch.equal(after[name], before[name]) for name in ("critic.head.weight", "critic.head.bias"))
    states = learner.optimizer.optimizer.state
    assert not any(parameter in states for parameter in learner.policy_parameters)
    learner.update(batch_of(algorithm, seed), algorithm)
    moved = trained_parameters(learner)
    assert any(not torch.equal(moved[name], before[name]) for name in sides(before)[0])


@every_kind
def test_the_critic_has_its_own_learning_rate(kind: str, lora: bool, seed: int) -> None:
    learner, algorithm = make_ppo_learner(kind, lora=lora, **one_step(critic={"learning_rate": 0.0}))
    before = trained_parameters(learner)
    learner.update(batch_of(algorithm, seed), algorithm)
    policy, critic = sides(before)
    after = trained_parameters(learner)
    assert all(torch.equal(after[name], value) for name, value in critic.items())
    assert any(not torch.equal(after[name], value) for name, value in policy.items())
    assert [group["lr"] for group in learner.optimizer.param_groups] == [0.1, 0.0]


def test_a_large_value_loss_does_not_shorten_the_policys_step(seed: int) -> None:
    options = one_step(train={"max_grad_norm": 1e-3})
    learner, algorithm = make_ppo_learner("separate", **options)
    update_and_look(learner, algorithm, batch_of(algorithm, seed))
    learner, algorithm = make_ppo_learner("separate", **options)
    kept: dict[str, list[float]] = {"policy": [], "critic": []}
    step = learner.optimizer.step

    def look() -> None:
        for side, parameters in (("policy", learner.policy_parameters), ("critic", learner.critic_parameters)):
            norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
            kept[side].append(norm.item())
        step()

    learner.optimizer.step = look
    learner.update(batch_of(algorithm, seed), algorithm)
    assert kept["policy"] == [pytest.approx(1e-3, rel=1e-2)] and kept["critic"] == [pytest.approx(1e-3, rel=1e-2)]


# --- what is shared, what leaves --------------------------------------------------------------------------------------


def test_an_adapter_critic_holds_no_second_base() -> None:
    learner, _ = make_ppo_learner("adapter", lora=True)
    module = learner.policy.module
    assert module.critic is not None
    base = {id(p) for p in module.model.parameters() if not p.requires_grad}
    own = {name for name, p in module.critic.named_parameters() if id(p) not in base}
    assert base and all("lora_" in name or name.startswith("head.") for name in own)
    assert all(not p.requires_grad for p in module.critic.parameters() if id(p) in base)


@every_kind
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient checkpointing"])
def test_policy_and_critic_do_not_see_each_others_adapters(
    kind: str, lora: bool, checkpointing: bool, seed: int
) -> None:
    """Log-probabilities, entropies and weights for engines are those of a policy without a critic; switching the
    policy's adapters off for the reference leaves the critic as it was."""
    learner, algorithm = make_ppo_learner(kind, lora=lora, **one_step(algo={"kl": {"kind": "reward", "beta": 0.1}}))
    policy = learner.policy
    if checkpointing:
        policy.module.causal_lm.gradient_checkpointing_enable()
        if policy.module.critic is not None and policy.module.critic.trunk is not None:
            policy.module.critic.trunk.gradient_checkpointing_enable()  # pyright: ignore
    weights = {name: tensor.clone() for name, tensor in policy.weights()}
    assert not any("critic" in name for name in weights)
    outcome = update_and_look(learner, algorithm, batch_of(algorithm, seed))
    plain, same = make_ppo_learner(kind, lora=lora, **one_step(algo={"kl": {"kind": "reward", "beta": 0.1}}))
    for name, tensor in plain.policy.weights():
        assert torch.equal(tensor, weights[name]), name
    assert_same(outcome, update_and_look(plain, same, batch_of(same, seed)))
    samples = make_samples(seed)
    rows = build_micro_batch(samples, [[i] for i in range(len(samples))])
    alone, critic = policy.forward(rows), policy.module.critic
    policy.reference_logprobs(rows)
    again = policy.forward(rows)
    assert critic is not None and alone.values is not None and again.values is not None
    assert torch.equal(alone.values, again.values) and again.values.requires_grad
    policy.module.critic = None
    assert torch.equal(policy.forward(rows).logprobs, alone.logprobs) and policy.forward(rows).values is None


# --- checkpoints ------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("warmup_steps", [1, 3], ids=["after pre-training", "inside pre-training"])
def test_training_goes_on_with_the_same_bits(
    kind: str, lora: bool, warmup_steps: int, tmp_path: Path, seed: int
) -> None:
    """From a checkpoint after the second of four batches."""
    options: dict[str, Any] = {"algo": {"num_mini_batches": 2, "num_iterations": 2, "warmup": {"steps": warmup_steps}}}
    options["train"] = {"adam_epsilon": 1e-3, "max_steps": 4, "lr_scheduler_type": "linear"}

    def run(learner: Learner, algorithm: Any, steps: range) -> list[dict[str, float]]:
        reports = []
        for step in steps:
            batch = batch_of(algorithm, seed + step)
            reports.append(learner.update(batch, algorithm) | batch.metrics)
            algorithm.observe(reports[-1])
        return reports

    def files(action: Callable[..., Any], learner: Learner, **more: Any) -> Any:
        return action(policy=learner.policy, learner=learner, parallel=Parallel.alone(), **more)

    learner, algorithm = make_ppo_learner(kind, lora=lora, **options)
    run(learner, algorithm, range(2))
    folder = files(
        lambda **parts: save_checkpoint(tmp_path, 2, **parts),
        learner,
        state={"algorithm": algorithm.state_dict()},
        keep=1,
    )
    expected = run(learner, algorithm, range(2, 4))
    assert "critic.head.weight" in load_file(folder / "weights.safetensors")
    resumed, other = make_ppo_learner(kind, lora=lora, **options)
    with torch.no_grad():
        for parameter in resumed.parameters:
            parameter.add_(1.0)
    state = files(lambda **parts: load_checkpoint(folder, **parts), resumed)
    other.load_state_dict(state["algorithm"])
    assert run(resumed, other, range(2, 4)) == expected
    found = trained_parameters(resumed)
    for name, parameter in trained_parameters(learner).items():
        assert torch.equal(found[name], parameter), name


# --- whole runs -------------------------------------------------------------------------------------------------------


def letters(completion: str) -> float:
    return sum(character.isalpha() for character in completion) / 16


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "train.output_dir": str(folder),
        "train.max_steps": 3,
        "train.learning_rate": 1e-3,
        "train.save_steps": 2,
        "rollout.num_prompts": 4,
        "rollout.num_generations": 2,
        "rollout.max_completion_length": 8,
        "track.console": "quiet",
        "algo.name": "vapo",
        "algo.warmup.steps": 1,
        **{key.replace("__", "."): value for key, value in more.items()},
    }


ROWS = [{"prompt": f"Count to {i}", "answer": str(i)} for i in range(24)]


@every_kind
def test_a_run_is_recorded_resumed_and_saved_without_its_critic(kind: str, lora: bool, tmp_path: Path) -> None:
    more = {"critic__kind": kind, "model__lora": {"r": 4} if lora else None}

    def run(folder: Path, steps: int, **rest: Any) -> None:
        options = settings(folder, train__max_steps=steps, **more, **rest)
        Trainer(options, model="tiny:qwen2", reward=letters, train_dataset=ROWS).train()

    run(tmp_path / "whole", 3)
    run(tmp_path / "cut", 2)
    run(tmp_path / "cut", 3, train__resume_from_checkpoint="last")
    whole, cut = (
        [
            {k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))}
            for row in read_jsonl(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("whole", "cut")
    )
    assert whole == cut
    assert [row["value/warmup_steps"] for row in whole] == [1, 1, 1]
    assert whole[0]["sync/change"] == 0 < whole[1]["sync/change"], "pre-training leaves what is served as it was"
    assert {"value/loss", "value/clip_frac", "value/grad_norm", "advantage/p50", "return/mean"} <= whole[2].keys()
    saved = load_file(tmp_path / "whole" / "model" / ("adapter_model.safetensors" if lora else "model.safetensors"))
    assert not any("critic" in name for name in saved)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_it_learns(kind: str, tmp_path: Path, seed: int) -> None:
    """A random model is rewarded for letters, which go from one character in four to most of what it writes."""
    more = {"algo__name": "ppo", "algo__num_mini_batches": 2, "algo__warmup": None, "critic__kind": kind}
    more |= {"train__max_steps": 16, "train__save_steps": 0, "train__seed": seed, "rollout__num_prompts": 8}
    more |= {"train__learning_rate": 3e-3, "rollout__num_generations": 4}
    Trainer(settings(tmp_path / "run", **more), model="tiny:qwen2", reward=letters, train_dataset=ROWS).train()
    rewards = [row["reward/mean"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15, rewards
