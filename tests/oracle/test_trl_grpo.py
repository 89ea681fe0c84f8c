"""GRPO against TRL's trainer on one frozen batch: log-probabilities, advantages, losses, gradients.

TRL sees left-padded prompts and right-padded completions; this project sees the same token ids without padding, packed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from llmrl.algo.ops.advantages import group_advantages
from llmrl.model.policy import Policy
from llmrl.tiny import build_tiny_model, byte_tokenizer
from llmrl.train.packing import build_micro_batch
from llmrl.types import Counts, Sample
from tests.invariance.cases import grpo

BATCH, PROMPT, COMPLETION, TEMPERATURE = 6, 7, 9, 0.9
EPSILON, EPSILON_HIGH = 0.2, 0.28


@dataclass
class Frozen:
    """One batch in both layouts."""

    trl: dict[str, Tensor]
    samples: list[Sample]
    counts: Counts


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> GRPOTrainer:
    folder = tmp_path_factory.mktemp("trl")
    tokenizer = byte_tokenizer()
    model = build_tiny_model(
        "qwen2", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, eos_token_id=257, pad_token_id=256
    )
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    arguments = GRPOConfig(
        output_dir=str(folder / "out"),
        bf16=False,
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=False,
        per_device_train_batch_size=BATCH,
        num_generations=3,
        max_completion_length=COMPLETION,
        temperature=TEMPERATURE,
        epsilon=EPSILON,
        epsilon_high=EPSILON_HIGH,
        use_bias_correction_kl=False,
        disable_dropout=True,
    )
    built = GRPOTrainer(
        model=str(folder / "model"),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["a", "b", "c"] * 2}),
        processing_class=tokenizer,
    )
    built.current_gradient_accumulation_steps = 1
    built.model.train()
    assert next(built.model.parameters()).dtype == torch.float32
    return built


def freeze(seed: int, trainer: GRPOTrainer, *, old: bool, ref: bool) -> Frozen:
    """Random ragged sequences; old and reference log-probabilities differ enough for some tokens to be clipped."""
    random = np.random.default_rng(seed)
    prompts = [random.integers(0, 256, random.integers(1, PROMPT + 1)) for _ in range(BATCH)]
    completions = [random.integers(0, 256, random.integers(1, COMPLETION + 1)) for _ in range(BATCH)]
    completions[0] = random.integers(0, 256, COMPLETION)
    advantages = random.standard_normal(BATCH).astype(np.float32)
    inputs = {
        "prompt_ids": padded(prompts, PROMPT, left=True),
        "prompt_mask": padded([np.ones(len(p), np.int64) for p in prompts], PROMPT, left=True, fill=0),
        "completion_ids": padded(completions, COMPLETION),
        "completion_mask": padded([np.ones(len(c), np.int64) for c in completions], COMPLETION, fill=0),
        "advantages": torch.from_numpy(advantages),
        "num_items_in_batch": torch.tensor(sum(map(len, completions))),
    }
    now = trl_logprobs(trainer, inputs)[0].detach()
    noise = {name: torch.from_numpy(random.normal(0, 0.4, now.shape).astype(np.float32)) for name in ("old", "ref")}
    if old:
        inputs["old_per_token_logps"] = now + noise["old"]
    if ref:
        inputs["ref_per_token_logps"] = now + noise["ref"]
    samples = []
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        length = len(completion)
        samples.append(
            Sample(
                input_ids=np.concatenate([prompt, completion]),
                loss_mask=np.array([False] * len(prompt) + [True] * length),
                advantages=np.full(length, advantages[i], np.float32),
                rollout_logprobs=np.zeros(length, np.float32),
                group=i // 3,
                index=i % 3,
                old_logprobs=(now + noise["old"])[i, :length].numpy() if old else None,
                ref_logprobs=(now + noise["ref"])[i, :length].numpy() if ref else None,
            )
        )
    counts = Counts(
        num_tokens=sum(map(len, completions)), num_sequences=BATCH, num_groups=2, max_completion_length=COMPLETION
    )
    return Frozen(inputs, samples, counts)


def padded(rows: list[np.ndarray], width: int, *, left: bool = False, fill: int = 256) -> Tensor:
    out = torch.full((len(rows), width), fill)
    for r, row in enumerate(rows):
        out[r, width - len(row) if left else 0 : width if left else len(row)] = torch.from_numpy(row)
    return out


def trl_logprobs(trainer: GRPOTrainer, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """TRL's log-probabilities and entropies [B, C]."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    found = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, COMPLETION, compute_entropy=True)
    return found[0], found[1]


def our_policy(trainer: GRPOTrainer) -> Policy:
    return Policy(trainer.model, temperature=TEMPERATURE, keep_reference=False)


def test_log_probabilities_and_entropies(trainer: GRPOTrainer, seed: int) -> None:
    frozen = freeze(seed, trainer, old=False, ref=False)
    batch = build_micro_batch(frozen.samples, [[0, 1], [2, 3, 4], [5]])
    outputs = our_policy(trainer).forward(batch)
    mask = frozen.trl["completion_mask"].bool()
    logprobs, entropies = trl_logprobs(trainer, frozen.trl)
    torch.testing.assert_close(outputs.logprobs, logprobs[mask], rtol=0, atol=5e-6)
    torch.testing.assert_close(outputs.entropy, entropies[mask], rtol=0, atol=5e-6)


@pytest.mark.parametrize("old", [False, True], ids=["on-policy", "old"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_loss_and_gradients(trainer: GRPOTrainer, loss_type: str, beta: float, old: bool, seed: int) -> None:
    frozen = freeze(seed, trainer, old=old, ref=beta > 0)
    trainer.loss_type, trainer.beta = loss_type, beta
    theirs, their_gradients = gradients(trainer, trainer._compute_loss(trainer.model, frozen.trl))

    options = {
        "aggregation": loss_type,
        "kl": {"beta": beta},
        "loss": {"epsilon": EPSILON, "epsilon_high": EPSILON_HIGH},
    }
    algorithm = grpo(max_completion_length=COMPLETION, **options)
    batch = build_micro_batch(frozen.samples, [[0], [1, 2, 3], [4, 5]])
    loss, metrics = algorithm.loss(our_policy(trainer).forward(batch), batch, frozen.counts)
    ours, our_gradients = gradients(trainer, loss)

    assert abs(ours - theirs) <= 1e-6
    assert their_gradients.keys() == our_gradients.keys()
    assert max(g.abs().max().item() for g in their_gradients.values()) > 1e-3
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    if old:
        assert metrics["loss/clip_high_frac"] + metrics["loss/clip_low_frac"] > 0, "no token was clipped: an easy case"


def gradients(trainer: GRPOTrainer, loss: Tensor) -> tuple[float, dict[str, Tensor]]:
    trainer.model.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("scale", ["group", "none"])
def test_advantages(trainer: GRPOTrainer, scale: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through TRL's own path from rewards (some of them None) to advantages, with generation replaced."""
    random = np.random.default_rng(seed)
    rewards: list[Any] = [float(x) for x in random.standard_normal(BATCH)]
    rewards[1] = None
    frozen = freeze(seed, trainer, old=False, ref=False)
    theirs = trl_advantages(trainer, frozen, rewards, scale, monkeypatch)
    matrix = torch.tensor([np.nan if r is None else r for r in rewards]).view(-1, 3)
    ours = group_advantages(matrix, scale=scale).flatten()  # pyright: ignore
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert ours[1] == 0


@pytest.mark.parametrize("rewards", [[1.0, 1.0, 1.0, 0.0, 1.0, 0.0], [None, None, 2.0, None, None, None]])
def test_advantages_of_groups_without_signal(
    trainer: GRPOTrainer, rewards: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = freeze(0, trainer, old=False, ref=False)
    theirs = trl_advantages(trainer, frozen, rewards, "group", monkeypatch)
    matrix = torch.tensor([np.nan if r is None else r for r in rewards]).view(-1, 3)
    torch.testing.assert_close(group_advantages(matrix).flatten(), theirs, rtol=0, atol=1e-6)


def trl_advantages(
    trainer: GRPOTrainer, frozen: Frozen, rewards: list, scale: str, monkeypatch: pytest.MonkeyPatch
) -> Tensor:
    completions = [s.input_ids[s.loss_mask].tolist() for s in frozen.samples]
    monkeypatch.setattr(trainer, "_generate_single_turn", lambda *_args, **_kwargs: (completions, None))
    monkeypatch.setattr(trainer, "reward_funcs", [lambda completions, **_: rewards])
    monkeypatch.setattr(trainer, "scale_rewards", scale)
    monkeypatch.setattr(trainer, "beta", 0.0)
    return trainer._generate_and_score_completions([{"prompt": "a"}] * BATCH)["advantages"]
