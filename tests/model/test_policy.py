"""The policy: the weights it gives to engines, its reference, and how models load."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmrl.config import LoraConfig, ModelConfig
from llmrl.errors import RunFailed, UserError
from llmrl.model.load import add_lora, load_model, load_tokenizer
from llmrl.model.policy import Policy
from llmrl.train.packing import build_micro_batch
from tests.invariance.cases import (
    make_config,
    make_learner,
    make_lora,
    make_samples,
    move,
    tiny_model,
    train_batch,
)

ARCHS = ["qwen2", "qwen3", "llama", "gemma", "gemma2"]
ADAPTERS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}, "dropout": {"lora_dropout": 0.5}}


def policy_of(model: torch.nn.Module, *, keep_reference: bool = False) -> Policy:
    return Policy(model, temperature=1.0, keep_reference=keep_reference)


# --- weights ---


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ARCHS)
def test_weights_of_a_whole_model_are_its_state_dict(arch: str, tied: bool) -> None:
    model = tiny_model(arch, tie_word_embeddings=tied)
    pushed = list(policy_of(model).weights())
    names = [name for name, _ in pushed]
    assert len(names) == len(set(names))
    expected = dict(model.state_dict())
    if tied:
        del expected["lm_head.weight"]
        assert "model.embed_tokens.weight" in names
    assert set(names) == set(expected)
    for name, tensor in pushed:
        assert torch.equal(tensor, expected[name]), name
        assert not tensor.requires_grad


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("arch", ["qwen2", "gemma"])
def test_merged_weights_give_the_logits_of_the_adapted_model(arch: str, adapter: str, seed: int) -> None:
    wrapped = make_lora(tiny_model(arch), lora_alpha=16, **ADAPTERS[adapter])
    policy = policy_of(wrapped)
    before = {name: parameter.clone() for name, parameter in wrapped.named_parameters()}
    wrapped.train()  # where the learner leaves it
    pushed = {name: tensor.clone() for name, tensor in policy.weights()}
    assert wrapped.training
    served = tiny_model(arch, seed=99)
    missing, unexpected = served.load_state_dict(pushed, strict=False)
    assert unexpected == []
    assert missing == ["lm_head.weight"]  # tied
    assert torch.equal(served.lm_head.weight, served.model.embed_tokens.weight)

    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(seed))
    wrapped.eval()
    with torch.no_grad():
        ours, expected = served(input_ids=ids).logits, wrapped(input_ids=ids).logits
        plain = tiny_model(arch)(input_ids=ids).logits
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)
    assert (expected - plain).abs().max() > 0.05, "the adapter must do something for this to say anything"
    for name, parameter in wrapped.named_parameters():
        assert torch.equal(parameter, before[name]), f"{name} was written to"


def test_weights_after_an_update_are_the_new_ones(seed: int) -> None:
    for model in (tiny_model(), make_lora(tiny_model())):
        learner, algorithm = make_learner(model, make_config())
        name = "model.layers.0.mlp.up_proj.weight"
        old = {n: t.clone() for n, t in learner.policy.weights()}[name]
        learner.update(train_batch(make_samples(seed)), algorithm)
        assert not torch.equal(dict(learner.policy.weights())[name], old)


def test_weights_come_one_layer_at_a_time() -> None:
    """A consumer that stops early does not pay for merging the rest."""
    policy = policy_of(make_lora(tiny_model()))
    merged = 0
    first = next(layer for _, layer in policy.module.causal_lm.named_modules() if hasattr(layer, "lora_A"))
    merge = type(first).merge

    def count(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal merged
        merged += 1
        merge(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(first), "merge", count)
        pushed = policy.weights()
        next(pushed)
        assert merged == 1
        list(pushed)
    assert merged == 14  # 7 linear layers in each of 2 blocks


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


@pytest.mark.parametrize(
    ("target_modules", "message"), [(["nowhere"], "nowhere"), (["lm_head", "q_proj"], "output head")]
)
def test_impossible_target_modules_are_refused(target_modules: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_lora(tiny_model(), LoraConfig(target_modules=target_modules), seed=0)


# --- reference ---


def test_the_reference_is_the_model_of_the_start(seed: int) -> None:
    samples = make_samples(seed)
    batch = build_micro_batch(samples, [[0, 1], [2]])
    plain = policy_of(tiny_model()).forward(batch).logprobs.detach()
    whole = policy_of(tiny_model(), keep_reference=True)
    move(whole.module, seed=1)
    adapted = policy_of(make_lora(tiny_model()), keep_reference=True)
    for policy in (whole, adapted):
        reference = policy.reference_logprobs(batch)
        torch.testing.assert_close(reference, plain, rtol=0, atol=1e-6)
        assert not reference.requires_grad
        assert (policy.forward(batch).logprobs - plain).abs().max() > 0.01
    assert adapted._reference is None, "adapters need no second copy of the model"


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
