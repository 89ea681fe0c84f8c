"""What engines are sent: the tensors that `save_pretrained` would write, with adapters of every kind merged in."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmrl.engines.hf.engine import HFEngine
from llmrl.errors import UserError
from llmrl.model.policy import Policy
from llmrl.model.rounding import computing_in
from llmrl.model.weights import checkpoint_shapes, checkpoint_weights, memory_weights
from llmrl.tiny import TINY_ARCHS
from tests.invariance.cases import make_config, make_learner, make_lora, make_samples, tiny_model, train_batch
from tests.model.architectures import DENSE, MIXTURES, build

pytestmark = pytest.mark.slow


def policy_of(model: torch.nn.Module) -> Policy:
    return Policy(model, temperature=1.0, keep_reference=False)


def model_of(arch: str, *, tied: bool | None = None) -> PreTrainedModel:
    overrides = {} if tied is None else {"tie_word_embeddings": tied}
    return build(arch, **overrides) if arch not in TINY_ARCHS else tiny_model(arch, **overrides)


def saved(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# --- names ---


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", [*TINY_ARCHS, *DENSE, *MIXTURES])
def test_engines_are_sent_what_save_pretrained_writes(arch: str, tied: bool, tmp_path: Path) -> None:
    model = model_of(arch, tied=tied)
    for folder in (tmp_path / "made", tmp_path / "loaded"):
        expected = saved(model, folder)
        pushed = list(policy_of(model).weights())
        assert not any(tensor.requires_grad for _, tensor in pushed)
        assert len(dict(pushed)) == len(pushed)
        assert same(dict(pushed), expected)
        wanted = checkpoint_shapes(model.config)
        assert wanted is not None
        assert {name: tuple(tensor.shape) for name, tensor in expected.items()} in wanted
        in_memory = dict(memory_weights(model, pushed))
        left_out = {name for name in model.all_tied_weights_keys if name not in in_memory}
        assert same(in_memory, {name: t for name, t in model.state_dict().items() if name not in left_out})
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_a_language_model_out_of_a_larger_one_keeps_its_prefix(tmp_path: Path) -> None:
    """Its checkpoint calls layers `model.language_model.layers`; transformers saves them so again."""
    text = build("qwen3_5_text", layer_types=["linear_attention", "full_attention"])
    renamed = {name.replace("model.", "model.language_model.", 1): t for name, t in text.state_dict().items()}
    folder = tmp_path / "larger"
    text.save_pretrained(folder, state_dict=renamed)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = saved(model, tmp_path / "again")
    assert any(name.startswith("model.language_model.") for name in expected)
    assert same(dict(checkpoint_weights(model, merged=True)), expected)
    wanted = checkpoint_shapes(model.config)
    assert wanted is not None
    assert {name: tuple(tensor.shape) for name, tensor in expected.items()} in wanted
    assert served_gap(policy_of(model)) < 1e-5


def test_weights_after_an_update_are_the_new_ones(seed: int) -> None:
    for model in (tiny_model(), make_lora(tiny_model())):
        learner, algorithm = make_learner(model, make_config())
        name = "model.layers.0.mlp.up_proj.weight"
        old = {n: t.clone() for n, t in learner.policy.weights()}[name]
        learner.update(train_batch(make_samples(seed)), algorithm)
        assert not torch.equal(dict(learner.policy.weights())[name], old)


def test_weights_come_one_layer_at_a_time() -> None:
    """A consumer that stops early does not pay for merging the rest, and never holds more than a layer."""
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
        assert next(name for name, _ in pushed if name.startswith("model.layers.")).startswith("model.layers.0.")
        assert merged == 7  # the linear layers of one block
        list(pushed)
    assert merged == 14


# --- adapters ---


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options)


def resized(*, tied: bool) -> PreTrainedModel:
    """Two tokens were added to the vocabulary."""
    model = tiny_model(tie_word_embeddings=tied)
    model.resize_token_embeddings(model.config.vocab_size + 2)
    return model


def experts(arch: str, *further: str) -> tuple[Any, LoraConfig]:
    names = ["experts.gate_up_proj", "experts.down_proj", *further]
    return (lambda: build(arch)), lora(target_modules=["q_proj"], target_parameters=names)


def tied() -> PreTrainedModel:
    return tiny_model()


def untied() -> PreTrainedModel:
    return tiny_model(tie_word_embeddings=False)


NEW = [61, 62]
ADAPTERS: dict[str, tuple[Any, Any]] = {
    "linear": (tied, lora(target_modules="all-linear")),
    "linear, gemma": (lambda: tiny_model("gemma"), lora(target_modules="all-linear")),
    "rslora": (tied, lora(target_modules="all-linear", use_rslora=True)),
    "dora": (tied, lora(target_modules="all-linear", use_dora=True)),
    "dropout": (tied, lora(target_modules="all-linear", lora_dropout=0.5)),
    "lora_bias": (tied, lora(target_modules=["q_proj"], lora_bias=True)),
    "bias": (tied, lora(target_modules=["q_proj"], bias="all")),
    "pissa": (tied, lora(target_modules="all-linear", init_lora_weights="pissa")),
    "patterns": (tied, lora(target_modules="all-linear", rank_pattern={"q_proj": 8}, alpha_pattern={"k_proj": 32})),
    "embedding, tied": (tied, lora(target_modules=["embed_tokens", "q_proj"])),
    "embedding, untied": (untied, lora(target_modules=["embed_tokens", "q_proj"])),
    "head, tied": (tied, lora(target_modules=["lm_head", "q_proj"])),
    "head, untied": (untied, lora(target_modules=["lm_head", "q_proj"])),
    "both, tied": (tied, lora(target_modules=["lm_head", "embed_tokens", "q_proj"])),
    "both, kept tied": (tied, lora(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)),
    "copied embedding, tied": (tied, lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"])),
    "copied head, tied": (tied, lora(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "copied both, tied": (tied, lora(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])),
    "copied both, untied": (untied, lora(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])),
    "copied both, kept tied": (
        tied,
        lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "copied norms": (tied, lora(target_modules=["q_proj"], modules_to_save=["input_layernorm", "norm"])),
    "copied block": (tied, lora(target_modules=["q_proj"], modules_to_save=["mlp"])),
    "new tokens, tied": (lambda: resized(tied=True), lora(target_modules=["q_proj"], trainable_token_indices=NEW)),
    "new tokens, untied": (lambda: resized(tied=False), lora(target_modules=["q_proj"], trainable_token_indices=NEW)),
    "new tokens of both": (
        lambda: resized(tied=False),
        lora(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": NEW, "lm_head": NEW}),
    ),
    "new tokens alone": (
        lambda: resized(tied=True),
        peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=NEW),
    ),
    "gpt2": (lambda: build("gpt2"), lora(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "experts, qwen3": experts("qwen3_moe"),
    "experts, mixtral": experts("mixtral", "gate.weight"),
    "experts, gpt_oss": experts("gpt_oss"),
    "experts, by default": (lambda: build("qwen3_moe"), lora(target_modules="all-linear")),
    "shared experts": (lambda: build("qwen2_moe"), lora(target_modules="all-linear")),
    "ia3": (
        tied,
        peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
    ),
}
UNTIES = {"embedding, tied", "head, tied", "both, tied", "both, kept tied"} | {
    name for name in ADAPTERS if name.startswith("copied") and name.endswith(" tied") and "kept" not in name
}
"""Adapters that make one of two tied weights differ from the other."""


def adapted(kind: str, seed: int) -> Any:
    """Return a model with an adapter of this kind after some training."""
    make, config = ADAPTERS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(make(), config)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
    return wrapped.eval()


def tokens_of(model: Any, seed: int) -> Tensor:
    size = model.config.get_text_config().vocab_size
    ids = torch.randint(size, (2, 11), generator=torch.Generator().manual_seed(seed))
    ids[:, 3:5] = torch.tensor([size - 1, size - 2])  # the new ones, where there are some
    return ids


@torch.no_grad()
def plain_logprobs(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]


def served_gap(policy: Policy, seed: int = 0) -> float:
    """Largest difference (nats) between an engine that was sent the weights and the model's plain forward pass."""
    model = policy.module.model.eval()
    ids = tokens_of(policy.causal_lm, seed)
    config = policy.served_config
    engine = HFEngine(config, weights=policy.weights, attn_implementation=policy.model_config._attn_implementation)
    served = torch.tensor(asyncio.run(engine.logprobs(ids.tolist())))
    return (served - plain_logprobs(model, ids)).abs().max().item()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ADAPTERS)
def test_what_is_served_is_the_adapted_model(kind: str, seed: int) -> None:
    wrapped = adapted(kind, seed)
    policy = policy_of(wrapped)
    before = {name: tensor.clone() for name, tensor in wrapped.state_dict().items()}
    assert served_gap(policy, seed) < 1e-5
    assert all(torch.equal(tensor, before[name]) for name, tensor in wrapped.state_dict().items())
    assert policy.served_config.tie_word_embeddings == (policy.model_config.tie_word_embeddings and kind not in UNTIES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_learner_computes_with_the_adapted_model_and_its_base(kind: str, seed: int) -> None:
    """Its own head reads the weight of the output head, which an adapter may have changed."""
    wrapped = adapted(kind, seed)
    policy, ids = policy_of(wrapped), tokens_of(wrapped, seed)
    learner = torch.tensor(policy.sequence_logprobs(ids.tolist()))
    wrapped.eval()
    expected = plain_logprobs(wrapped, ids)
    assert (learner - expected).abs().max() < 1e-5
    with policy.without_adapter():
        base = torch.tensor(policy.sequence_logprobs(ids.tolist()))
        wrapped.eval()
        assert (base - plain_logprobs(wrapped, ids)).abs().max() < 1e-5
    assert (base - expected).abs().max() > 1e-3 or kind == "bias", "the adapter must do something"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_adapted_experts_compute_in_another_type_and_again_in_their_own(dtype: torch.dtype, seed: int) -> None:
    """peft swaps their weights while they run, and so does the cast to the type of computation."""
    policy = policy_of(adapted("experts, by default", seed))
    ids = tokens_of(policy.causal_lm, seed).tolist()
    policy.causal_lm.set_experts_implementation("eager")  # transformers' other ways have no float64
    before = torch.tensor(policy.sequence_logprobs(ids))
    with computing_in(policy.module, dtype):
        other = torch.tensor(policy.sequence_logprobs(ids))
    assert (other - before).abs().mean() < (1e-5 if dtype == torch.float64 else 0.1)
    assert torch.equal(torch.tensor(policy.sequence_logprobs(ids)), before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["linear", "embedding, tied", "copied embedding, tied", "experts, qwen3", "gpt2"])
def test_base_weights_are_the_model_before_the_adapter(kind: str, seed: int, tmp_path: Path) -> None:
    expected = saved(ADAPTERS[kind][0](), tmp_path)
    assert same(dict(policy_of(adapted(kind, seed)).base_weights()), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", ["head, tied", "head, untied", "both, tied", "copied head, tied", "new tokens, tied", "new tokens of both"]
)
def test_gradients_of_an_adapted_head_are_those_of_the_plain_loss(kind: str, seed: int) -> None:
    wrapped = adapted(kind, seed)
    policy, ids = policy_of(wrapped), tokens_of(wrapped, seed)[:1]
    policy.module.eval()
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    places = torch.arange(ids.shape[1])
    ours = policy.module(ids, places[None], places[:-1], ids[0, 1:])["logprobs"].sum()
    found = torch.autograd.grad(ours, list(trained.values()), allow_unused=True)
    plain = wrapped(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
    expected = torch.autograd.grad(plain, list(trained.values()), allow_unused=True)
    for name, ours, theirs in zip(trained, found, expected, strict=True):
        assert ours is not None and theirs is not None, name
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_computed_or_served_is_refused() -> None:
    with pytest.raises(UserError, match="output head .* plain LoRA"):
        policy_of(peft.get_peft_model(untied(), lora(target_modules=["lm_head"], use_dora=True)))
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(UserError, match="change the prompt"):
        policy_of(peft.get_peft_model(tied(), prompt))
    policy = policy_of(peft.get_peft_model(tied(), lora(target_modules=["o_proj"], lora_bias=True)))
    assert "lora_bias adds a bias to" in str(policy.merge_obstacle())
    assert policy_of(make_lora(tied())).merge_obstacle() is None


def test_a_model_that_gives_itself_as_its_trunk_computes_as_it_does_alone(seed: int) -> None:
    policy = policy_of(build("llama4_text", seed=seed))
    ids = tokens_of(policy.causal_lm, seed)
    assert (
        torch.tensor(policy.sequence_logprobs(ids.tolist())) - plain_logprobs(policy.causal_lm, ids)
    ).abs().max() < 1e-5
    assert served_gap(policy, seed) < 1e-5


def test_a_model_with_a_cache_of_its_own_is_refused_by_the_hf_engine() -> None:
    policy = policy_of(build("minimax"))
    with pytest.raises(UserError, match="cannot serve 'minimax'.*another rollout.engine"):
        HFEngine(policy.served_config, weights=policy.weights)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("linear", None),
        ("rslora", None),
        ("dropout", None),
        ("dora", "use_dora"),
        ("bias", "bias"),
        ("lora_bias", "lora_bias"),
        ("pissa", "init_lora_weights"),
        ("patterns", "alpha_pattern, rank_pattern"),
        ("embedding, untied", "embed_tokens"),
        ("head, untied", "lm_head"),
        ("copied block", "modules_to_save"),
        ("new tokens, tied", "trainable_token_indices"),
        ("experts, qwen3", "target_parameters"),
        ("experts, by default", "target_parameters"),
        ("gpt2", "fan_in_fan_out"),
        ("ia3", "IA3"),
    ],
)
def test_adapters_that_vllm_cannot_serve_apart_are_known(kind: str, reason: str | None, seed: int) -> None:
    obstacle = policy_of(adapted(kind, seed)).adapter_obstacle()
    assert obstacle is None if reason is None else reason in str(obstacle)
