"""Value pre-training in the learner: its own passes and learning rate, and a critic that knows what comes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmrl import Trainer
from llmrl.model.attention import last_hidden_states
from llmrl.tiny import build_tiny_model, char_tokenizer, fine_tune
from llmrl.track.files import read_jsonl
from tests.invariance.cases import make_ppo_learner, scored_groups


def rates(*, early_end: int | None = None, **train: Any) -> list[tuple[float, float]]:
    """Learning rates of (policy, critic) in every optimizer step of 5 batches, of which 2 may be value pre-training."""
    learner, algorithm = make_ppo_learner(
        "separate",
        algo={"num_mini_batches": 2, "warmup": {"steps": 2, "iterations": 2}},
        critic={"learning_rate": 0.8},
        train={"max_steps": 5, "learning_rate": 0.1} | train,
    )
    found, step = [], learner.optimizer.step

    def look() -> None:
        policy, critic = learner.optimizer.param_groups
        found.append((policy["lr"], critic["lr"]))
        step()

    learner.optimizer.step = look
    for number in range(5):
        learner.update(algorithm.prepare(scored_groups(number), policy_version=number), algorithm)
        algorithm.observe({"value/explained_variance": 0.0})
        algorithm.policy_frozen = algorithm.policy_frozen and number + 1 != early_end
    return found


def test_learning_rates_of_pre_training_and_of_what_follows() -> None:
    """2 batches of 2 passes of 2 steps fall to 0; the run's schedule fills the 3 batches left, warm-up first."""
    found = rates(lr_scheduler_type="linear", warmup_steps=2)
    assert found[:8] == [(0.0, pytest.approx(0.8 * (1 - k / 8))) for k in range(8)]
    factors = [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert found[8:] == [(pytest.approx(0.1 * f), pytest.approx(0.8 * f)) for f in factors]


def test_when_pre_training_ends_early_the_schedule_fills_what_is_left() -> None:
    found = rates(lr_scheduler_type="linear", early_end=1)
    assert [critic for _, critic in found[:4]] == pytest.approx([0.8, 0.7, 0.6, 0.5])
    assert [policy for policy, _ in found[4:]] == pytest.approx([0.1 * (1 - k / 8) for k in range(8)])


@pytest.mark.parametrize(("kind", "lora"), [("separate", False), ("shared", False), ("adapter", True)])
def test_it_computes_nothing_but_the_critic(kind: str, lora: bool) -> None:
    """Counted: values before the update, then two passes forward and backward of what is trained."""
    learner, algorithm = make_ppo_learner(
        kind, lora=lora, algo={"num_mini_batches": 1, "warmup": {"steps": 1, "iterations": 2}}
    )
    policy, critic = learner.policy, learner.policy.critic
    assert critic is not None
    batch = algorithm.prepare(scored_groups(0), policy_version=0)
    with FlopCounterMode(display=False) as needed:
        (micro_batch,) = learner.layout.micro_batches(batch.samples)
        for trained in (False, True, True):
            with torch.set_grad_enabled(trained and kind != "shared"):  # of a shared trunk only the head is trained
                trunk = critic.trunk or policy.causal_lm.get_decoder()
                hidden = last_hidden_states(
                    trunk, micro_batch.input_ids, micro_batch.position_ids, micro_batch.visibility
                ).flatten(0, 1)[micro_batch.predict_from]
            with torch.set_grad_enabled(trained):
                values = critic.head(hidden)
            if trained:
                values.sum().backward()
    policy.module.zero_grad()
    with FlopCounterMode(display=False) as used:
        metrics = learner.update(batch, algorithm)
    assert used.get_total_flops() == pytest.approx(needed.get_total_flops(), rel=0.01)
    assert metrics["value/loss"] > 0 and "policy/entropy" not in metrics


# --- a whole run ------------------------------------------------------------------------------------------------------


def answering_model(folder: Path, seed: int) -> str:
    """A model that answers additions of digits in one of two forms, `=07 is the sum` and `?07 is the sum`."""
    draw, tokenizer = random.Random(seed), char_tokenizer("0123456789+=? ishteum")
    examples = []
    for _ in range(16 * 120):
        a, b = draw.choices(range(10), k=2)
        examples.append({"prompt": f"{a}+{b}", "completion": f"{draw.choice('=?')}{a + b:02d} is the sum"})
    special: dict[str, Any] = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = build_tiny_model("qwen2", vocab_size=len(tokenizer), seed=seed, **special)
    fine_tune(model, tokenizer, examples, output_dir=folder / "sft", max_steps=120, learning_rate=3e-3, seed=seed)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return str(folder / "model")


def is_sure(completion: str) -> float:
    return float(completion.startswith("="))


@pytest.mark.slow
def test_before_the_first_policy_step_the_critic_explains_the_rewards(tmp_path: Path, seed: int) -> None:
    """The first of 15 tokens decides; 7 batches of 32 rollouts have to be enough for the critic to see that."""
    options = {
        "algo.name": "vapo",
        "critic.learning_rate": 2e-3,
        "algo.warmup.steps": 7,
        "data.prompt_format": "text",
        "rollout.max_completion_length": 16,
        "rollout.num_prompts": 8,
        "rollout.num_generations": 4,
        "train.max_steps": 8,
        "train.output_dir": str(tmp_path / "run"),
        "train.save_steps": 0,
        "train.seed": seed,
        "track.console": "quiet",
    }
    rows = [{"prompt": f"{a}+{b}", "answer": str(a + b)} for a in range(10) for b in range(10)]
    Trainer(options, model=answering_model(tmp_path, seed), reward=is_sure, train_dataset=rows).train()
    steps = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [bool(step["sync/change"]) for step in steps] == [False] * 7 + [True], "the last step moves the policy"
    variances = [step["value/explained_variance"] for step in steps]
    assert variances[-1] > 0.5, variances
