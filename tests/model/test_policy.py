"""The policy: the weights it gives to engines, its reference, and how models load."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrl.config import LoraConfig, ModelConfig
from llmrl.errors import RunFailed, UserError
from llmrl.model.load import add_lora, load_model, load_tokenizer
from llmrl.model.policy import Policy
from llmrl.run.methods import language_policy
from llmrl.train.packing import build_micro_batch
from tests.invariance.cases import (
    make_config,
    make_lora,
    make_samples,
    move,
    tiny_model,
)


def policy_of(model: torch.nn.Module, *, keep_reference: bool = False) -> Policy:
    return Policy(model, temperature=1.0, keep_reference=keep_reference)


# --- adapters ---


def test_fresh_adapters_change_nothing_are_seeded_and_alone_are_trained() -> None:
    ids = torch.arange(10)[None]
    expected = tiny_model()(input_ids=ids).logits
    state = torch.get_rng_state()
    first, again = (add_lora(tiny_model(), LoraConfig(r=4), seed=3) for _ in range(2))
    other = add_lora(tiny_model(), LoraConfig(r=4), seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first(input_ids=ids).logits, expected)
    trained = [name for name, parameter in first.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert all(torch.equal(first.get_parameter(name), again.get_parameter(name)) for name in trained)
    assert not all(torch.equal(first.get_parameter(name), other.get_parameter(name)) for name in trained)


def test_impossible_target_modules_are_refused() -> None:
    with pytest.raises(UserError, match="nowhere"):
        add_lora(tiny_model(), LoraConfig(target_modules=["nowhere"]), seed=0)


# --- reference ---


@pytest.mark.parametrize("kind", ["whole", "fresh adapter", "trained adapter", "dora"])
def test_the_reference_is_the_model_of_the_start(kind: str, seed: int) -> None:
    model = {
        "whole": tiny_model,
        "fresh adapter": lambda: add_lora(tiny_model(), LoraConfig(r=4), seed=0),
        "trained adapter": lambda: make_lora(tiny_model()),
        "dora": lambda: make_lora(tiny_model(), use_dora=True),
    }[kind]()
    batch = build_micro_batch(make_samples(seed), [[0, 1], [2]])
    policy = policy_of(model, keep_reference=True)
    start = policy.forward(batch).logprobs.detach()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    move(policy.module, seed=1)
    moved = policy.forward(batch).logprobs.detach()
    reference = policy.reference_logprobs(batch)
    torch.testing.assert_close(reference, start, rtol=0, atol=1e-6)
    assert not reference.requires_grad
    assert (moved - start).abs().max() > 0.01
    assert torch.equal(policy.forward(batch).logprobs, moved), "the policy has its own weights back"
    if kind != "whole":
        assert policy._reference is None, "adapters need no second copy of the model"
        kept = policy._reference_adapter
        assert (kept is None) == (kind == "fresh adapter"), "nor of adapters without effect"
        assert all("lora_" in name and torch.equal(before[name], tensor) for name, tensor in (kept or {}).items())


def test_the_reference_becomes_the_policys_adapter(seed: int) -> None:
    batch = build_micro_batch(make_samples(seed), [[0, 1], [2]])
    policy = policy_of(add_lora(tiny_model(), LoraConfig(r=4), seed=0), keep_reference=True)
    assert policy.reference_state() == {}
    move(policy.module, seed=1)
    expected = policy.forward(batch).logprobs.detach()
    policy.move_reference(1.0)
    move(policy.module, seed=2)
    assert torch.equal(policy.reference_logprobs(batch), expected)
    again = policy_of(add_lora(tiny_model(), LoraConfig(r=4), seed=0), keep_reference=True)
    again.load_reference_state(policy.reference_state())
    assert torch.equal(again.reference_logprobs(batch), expected)
    with pytest.raises(RunFailed, match="no reference model was kept"):
        policy.move_reference(0.5)


def test_a_reference_that_was_not_kept_is_an_error() -> None:
    batch = build_micro_batch(make_samples(0), [[0]])
    with pytest.raises(RunFailed, match="no reference model was kept"):
        policy_of(tiny_model()).reference_logprobs(batch)


def test_sequence_logprobs_are_the_models_own_at_temperature_one(seed: int) -> None:
    model = make_lora(tiny_model(), lora_dropout=0.5)
    policy = Policy(model, temperature=0.5, keep_reference=False)
    sequences = [sample.input_ids.tolist() for sample in make_samples(seed)[:3]]
    model.eval()
    expected = []
    for ids in sequences:
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        expected.append([logits[t - 1].log_softmax(-1)[ids[t]].item() for t in range(1, len(ids))])
    policy.wrapped.train()
    found = policy.sequence_logprobs(sequences)
    assert policy.wrapped.training
    for ours, row in zip(found, expected, strict=True):
        assert ours == pytest.approx(row, abs=1e-5)


# --- loading ---


def test_loading_tiny_and_missing_models(tmp_path: Any) -> None:
    config = ModelConfig(path="tiny:qwen3", dtype="bfloat16", attn_implementation="eager")
    tokenizer = load_tokenizer(config)
    model, again = (load_model(config, tokenizer, seed=5) for _ in range(2))
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    saved = ModelConfig(path=str(tmp_path), dtype="float32")
    loaded = load_model(saved, load_tokenizer(saved), seed=0)
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.float())
    missing = ModelConfig(path=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere"):
        load_tokenizer(missing)
    with pytest.raises(UserError, match="nowhere"):
        load_model(missing, tokenizer, seed=0)
    with pytest.raises(UserError, match="gpt9"):
        load_model(ModelConfig(path="tiny:gpt9"), tokenizer, seed=0)


def test_a_float32_head_is_that_of_policy_reference_and_saved_model(seed: int, tmp_path: Path) -> None:
    """`model.float32_head` under bfloat16: log-probabilities of unrounded logits, wherever the head is used."""
    config = replace(make_config(), model=ModelConfig(path="unused", dtype="bfloat16", float32_head=True))
    policy = language_policy(config, tiny_model(seed=seed).bfloat16(), None, keep_reference=True)
    batch = build_micro_batch(make_samples(seed), [[0, 1, 2], [3]])
    with torch.no_grad():
        found = policy.forward(batch)
        hidden, weight = policy._hidden(policy.module, batch), policy.module.head().weight
        exact = (hidden.double() @ weight.to(hidden.dtype).double().T).log_softmax(1)
    assert hidden.dtype == torch.bfloat16
    expected = exact.gather(1, batch.targets[:, None])[:, 0]
    torch.testing.assert_close(found.logprobs.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(policy.reference_logprobs(batch).double(), expected, rtol=0, atol=1e-5)
    collisions = exact.exp().square().sum(1)
    torch.testing.assert_close(policy.collisions(batch).double(), collisions, rtol=1e-4, atol=1e-6)
    there = policy.reference_head(batch)
    kl = policy.forward(batch, reference=there).kl
    assert kl is not None and kl.abs().max() < 1e-5, "the reference is the policy itself here"
    policy.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["head_dtype"] == "float32", "vLLM reads it there"
    rounded = Policy(tiny_model(seed=seed).bfloat16(), temperature=1.0, keep_reference=False, dtype=torch.bfloat16)
    with torch.no_grad():
        assert (rounded.forward(batch).logprobs.double() - expected).abs().max() > 1e-3
