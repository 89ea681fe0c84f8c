"""Small models, random samples and learners that the invariance, oracle and train tests share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmrl.algo.base import Algorithm
from llmrl.config import (
    AdapterCritic,
    Config,
    LoraConfig,
    RolloutConfig,
    SeparateCritic,
    SharedCritic,
    TrainConfig,
    complete,
    preset,
)
from llmrl.model.critic import build_critic
from llmrl.model.load import add_lora
from llmrl.model.parallel import Parallel
from llmrl.model.policy import Policy
from llmrl.run.methods import make_algorithm
from llmrl.tiny import build_tiny_model
from llmrl.train.learner import Learner
from llmrl.types import Rollout, RolloutGroup, Sample, Score, Task, TrainBatch, Turn

VOCABULARY = 61
MAX_COMPLETION_LENGTH = 16
CRITICS = {"separate": SeparateCritic, "shared": SharedCritic, "adapter": AdapterCritic}
"""Classes by `critic.kind`."""


def tiny_model(arch: str = "qwen2", *, seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """Build a model of a few thousand parameters, with weights large enough for its log-probabilities to differ."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "num_kv_heads": 1, "num_layers": 2}
    model = build_tiny_model(arch, vocab_size=VOCABULARY, seed=seed, **(sizes | overrides))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def make_samples(seed: int, *, groups: int = 3, size: int = 3) -> list[Sample]:
    """Make ragged samples.

    Groups share their prompt, except for one rollout in five. Some samples have an observation inside, and one in four
    has no advantage.
    """
    random = np.random.default_rng(seed)
    samples = []
    for group in range(groups):
        shared = random.integers(0, VOCABULARY, random.integers(2, 8))
        for index in range(size):
            prompt = random.integers(0, VOCABULARY, 5) if (group * size + index) % 5 == 4 else shared
            first, seen, second = random.integers([1, 0, 0], [9, 4, 6])
            mask = np.array([False] * len(prompt) + [True] * first + [False] * seen + [True] * second)
            num_tokens = int(mask.sum())
            rest = random.integers(0, VOCABULARY, len(mask) - len(prompt))
            advantage = 0.0 if (group * size + index) % 4 == 3 else random.standard_normal()
            samples.append(
                Sample(
                    input_ids=np.concatenate([prompt, rest]),
                    loss_mask=mask,
                    advantages=np.full(num_tokens, advantage, np.float32),
                    rollout_logprobs=random.uniform(-5, -3, num_tokens).astype(np.float32),
                    group=group,
                    index=index,
                )
            )
    return samples


def train_batch(samples: list[Sample]) -> TrainBatch:
    return TrainBatch(
        samples=[replace(sample) for sample in samples],
        num_groups=1 + max(sample.group for sample in samples),
        max_completion_length=MAX_COMPLETION_LENGTH,
        policy_version=0,
    )


def make_config(
    output_dir: str | Path = "unused",
    *,
    algo: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    max_completion_length: int = MAX_COMPLETION_LENGTH,
) -> Config:
    """Make a configuration. `adam_epsilon` is large: a small one would blow up the rounding of tiny gradients."""
    defaults: dict[str, Any] = {"learning_rate": 0.1, "adam_epsilon": 1.0, "max_grad_norm": 0.0}
    return Config(
        rollout=RolloutConfig(max_completion_length=max_completion_length),
        algo=preset(**({"name": "grpo"} | (algo or {}))),
        train=TrainConfig(output_dir=str(output_dir), **(defaults | (train or {}))),
    )


def make_lora(model: torch.nn.Module, *, seed: int = 0, **options: Any) -> torch.nn.Module:
    """Add adapters that already do something; peft starts them at zero."""
    wrapped = add_lora(model, LoraConfig(**({"r": 4, "lora_alpha": 4} | options)), seed=seed)
    generator = torch.Generator().manual_seed(seed + 2)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return wrapped


def grpo(*, max_completion_length: int = MAX_COMPLETION_LENGTH, **algo: Any) -> Algorithm:
    """Build the algorithm of these options as a run would."""
    return make_algorithm(make_config(algo=algo, max_completion_length=max_completion_length))


def make_learner(
    model: torch.nn.Module,
    config: Config,
    *,
    parallel: Parallel | None = None,
    temperature: float = 1.0,
    dtype: torch.dtype | None = None,
    moved: bool = True,
) -> tuple[Learner, Algorithm]:
    algorithm = make_algorithm(config)
    policy = Policy(model, temperature=temperature, keep_reference=algorithm.needs.reference, dtype=dtype)
    if algorithm.needs.reference and moved:
        move(policy.module, seed=5)  # away from the reference, so that the penalty has a gradient
    return Learner(policy, config.train, parallel or Parallel.alone()), algorithm  # pyright: ignore


def make_ppo_learner(
    kind: str, *, lora: bool = False, seed: int = 0, parallel: Parallel | None = None, **options: Any
) -> tuple[Learner, Algorithm]:
    """Build PPO with a critic of this kind, whose head and adapters are not at zero as they would be at the start.

    Args:
        kind: `critic.kind`.
        lora: train adapters of the policy.
        seed: of the model.
        parallel: by default this process alone.
        options: `algo`, `critic`, `model` and `train` options as dictionaries, `arch`, `temperature`.
    """
    config = make_config(algo={"name": "ppo"} | options.get("algo", {}), train=options.get("train"))
    config = complete(
        replace(
            config,
            model=replace(
                config.model, lora=LoraConfig(r=4, lora_alpha=4) if lora else None, **options.get("model", {})
            ),
            critic=CRITICS[kind](**({"learning_rate": 0.2} | options.get("critic", {}))),
        )
    )
    assert isinstance(config, Config) and config.critic is not None
    model: Any = tiny_model(options.get("arch", "qwen2"), seed=seed)
    critic = build_critic(config.critic, config.model, model, tokenizer=None, seed=config.train.seed)  # pyright: ignore
    generator = torch.Generator().manual_seed(seed + 3)
    with torch.no_grad():
        for name, parameter in critic.named_parameters():
            if "lora_B" in name or "head" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model = make_lora(model) if lora else model
    algorithm = make_algorithm(config)
    policy = Policy(
        model,
        temperature=options.get("temperature", 1.0),
        keep_reference=algorithm.needs.reference,
        critic=critic,
        dtype=getattr(torch, config.model.dtype),
    )
    rate = config.critic.learning_rate
    learner = Learner(policy, config.train, parallel or Parallel.alone(), critic_learning_rate=rate)  # pyright: ignore
    return learner, algorithm


def scored_groups(seed: int, *, count: int = 3, size: int = 3) -> list[RolloutGroup]:
    """Make groups with a common prompt and rewards of all kinds, some of them dense.

    Of three rollouts one has a second turn after an observation, and one a rewritten context.
    """
    random = np.random.default_rng(seed)
    groups = []
    for number in range(count):
        task, prompt = Task(id=f"t{number}", messages=[]), random.integers(0, VOCABULARY, 5).tolist()
        rollouts = []
        for index in range(size):
            turns: list[Turn] = []
            for _ in range(1 if index == 0 else 2):
                ids = random.integers(0, VOCABULARY, int(random.integers(1, 7))).tolist()
                seen = prompt if not turns else [*turns[0].prompt_ids, *turns[0].completion_ids, 3, 4]
                turns.append(
                    Turn(
                        prompt_ids=[7, *seen] if turns and index == 2 else seen,
                        completion_ids=ids,
                        rollout_logprobs=random.uniform(-5, -3, len(ids)).tolist(),
                        finish="stop",
                        policy_version=(0, 0),
                        message={},
                    )
                )
            num_tokens = sum(len(turn.completion_ids) for turn in turns)
            dense = random.standard_normal(num_tokens).tolist() if (number + index) % 3 == 2 else None
            score = Score(reward=float(random.integers(0, 2)), token_rewards=dense)
            rollouts.append(Rollout(task=task, index=index, turns=turns, score=score))
        groups.append(RolloutGroup(task=task, rollouts=rollouts))
    return groups


def move(module: torch.nn.Module, *, seed: int) -> None:
    """Take a small random step with all trained parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for p in module.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)


def trained_parameters(learner: Learner) -> dict[str, Tensor]:
    named = learner.policy.module.named_parameters()
    return {name: parameter.detach().clone() for name, parameter in named if parameter.requires_grad}


@dataclass
class Outcome:
    """What one optimizer step did."""

    metrics: dict[str, float]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]


def update_and_look(learner: Learner, algorithm: Algorithm, samples: list[Sample] | TrainBatch) -> Outcome:
    """Run `Learner.update` and keep the gradients that the (last) optimizer step saw."""
    gradients: dict[str, Tensor] = {}
    clip = learner._clip

    def look_and_clip() -> dict[str, Tensor]:
        for name, parameter in learner.policy.module.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, f"{name} got no gradient"
                gradients[name] = parameter.grad.clone()
        return clip()

    learner._clip = look_and_clip  # pyright: ignore
    batch = train_batch(samples) if isinstance(samples, list) else samples
    metrics = learner.update(batch, algorithm) | batch.metrics
    return Outcome(metrics, gradients, trained_parameters(learner))


def assert_same(found: Outcome, expected: Outcome, *, tolerance: float = 1e-6) -> None:
    """Check loss, gradient norm, gradients and parameters; the tolerance is relative where values are above 1."""
    for key in ("loss/total", "policy/grad_norm"):
        assert found.metrics[key] == pytest.approx(expected.metrics[key], rel=tolerance, abs=tolerance), key
    for what in ("gradients", "parameters"):
        ours, theirs = getattr(found, what), getattr(expected, what)
        assert ours.keys() == theirs.keys()
        sizes = {name: max(1.0, theirs[name].abs().max().item()) for name in ours}
        gaps = {name: (ours[name] - theirs[name]).abs().max().item() / sizes[name] for name in ours}
        worst = max(gaps, key=lambda name: gaps[name])
        assert gaps[worst] <= tolerance, f"{what} of {worst} differ by {gaps[worst]:.2g}"
