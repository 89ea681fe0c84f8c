"""Whatever is random in training is off in optimizer steps, for every way in which an architecture draws it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmrl import Trainer
from llmrl.errors import UserError
from llmrl.model.load import add_lora
from llmrl.model.modes import evaluating, optimizing, random_parts
from llmrl.tiny import byte_tokenizer
from llmrl.track.files import read_jsonl
from tests.invariance.cases import make_config, make_learner, make_samples, tiny_model, train_batch

pytestmark = pytest.mark.slow

QUESTIONS = [{"question": f"{i}+{i}?", "answer": str(2 * i)} for i in range(8)]
SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": 257,
    "eos_token_id": 257,
    "pad_token_id": 256,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 2},  # modules, and their p read by attention
    "opt": {"ffn_dim": 64, "layerdrop": 0.5, "word_embed_proj_dim": 64, "dropout": 0.3},  # functions; whole layers
    "falcon": {"attention_dropout": 0.3, "hidden_dropout": 0.3, "alibi": False},  # read from the configuration
    "seed_oss": {"attention_dropout": 0.3, "residual_dropout": 0.3, "head_dim": 32, "num_key_value_heads": 1},
    "mixtral": {"router_jitter_noise": 0.3, "num_local_experts": 4, "num_key_value_heads": 1},
    "phimoe": {"router_jitter_noise": 0.5, "num_local_experts": 4, "num_key_value_heads": 1},  # draws its experts
}


def build(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **(SIZES | ARCHITECTURES[name])))


def odd(completion: str) -> float:
    return float(sum(map(ord, completion)) % 2)


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_pass_with_gradient_computes_what_evaluation_does(name: str, recompute: bool) -> None:
    model = build(name)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    torch.manual_seed(0)
    ids = torch.arange(40, 80)[None]

    def passed() -> tuple[torch.Tensor, list[torch.Tensor]]:
        logits = model(input_ids=ids, use_cache=False).logits
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(logits.logsumexp(-1).sum(), trained, allow_unused=True)
        return logits.detach(), [g for g in gradients if g is not None]

    with evaluating(model):
        expected, gradients = passed()
    with optimizing(model, dropout=True):
        assert not torch.equal(passed()[0], expected), "else there is nothing to switch off"
    recomputed = _count_recomputed(model)
    with optimizing(model, dropout=False):
        for _ in range(2):
            found, theirs = passed()
            assert torch.equal(found, expected)
            for one, other in zip(theirs, gradients, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        with evaluating(model):
            pass
        assert torch.equal(passed()[0], expected)
    assert recomputed() == (2 * 3 * 2 if recompute else 0), "2 layers, 3 passes, forward and again for backward"
    assert all(part.training for part in model.modules()), "as it was before"


def _count_recomputed(model: Any) -> Any:
    """Return a function that counts the forward passes of layers under gradient checkpointing."""
    layers = [part for part in model.modules() if getattr(part, "gradient_checkpointing", False) and part is not model]
    counts = [0]

    def count(*_: Any) -> None:
        counts[0] += 1

    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in layers:
        if isinstance(layer, GradientCheckpointingLayer):
            layer.register_forward_pre_hook(count)
    return lambda: counts[0]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gpt2", "gspo", "lora", "kept"])
def test_ratios_are_one_until_something_moves(case: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"train.dropout": True} if case == "kept" else {}
    more: dict[str, Any] = {"processing_class": byte_tokenizer(), "algorithm": "gspo" if case == "gspo" else "grpo"}
    model = build("gpt2")
    if case == "lora":
        config = peft.LoraConfig(r=4, lora_dropout=0.5, target_modules=["c_attn"], init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    settings = {
        "train.output_dir": str(tmp_path / "run"),
        "train.max_steps": 1,
        "train.learning_rate": 0.0,
        "algo.num_mini_batches": 2,
        "algo.kl.beta": 0.1,
        "rollout.num_prompts": 8,
        "rollout.num_generations": 4,
        "rollout.max_completion_length": 12,
        "track.console": "quiet",
    }
    Trainer(settings | options, model=model, reward=odd, train_dataset=QUESTIONS, **more).train()
    (metrics,) = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    if case == "kept":
        assert metrics["loss/ratio/max"] > 1.05
        assert metrics["kl/ref"] > 1e-3
    else:
        assert metrics["loss/ratio/max"] == 1.0
        assert metrics["kl/ref"] == 0.0


def test_recomputation_goes_on_between_references(seed: int) -> None:
    """The full KL evaluates the reference before each micro-batch, which must not end the mode of the step."""
    model = tiny_model()
    model.gradient_checkpointing_enable()  # pyright: ignore
    config = make_config(algo={"kl": {"beta": 0.1, "estimator": "full"}}, train={"max_tokens_per_micro_batch": 30})
    learner, algorithm = make_learner(model, config)
    count = _count_recomputed(model)
    loss, num_micro_batches = algorithm.loss, 0

    def counted(*arguments: Any) -> Any:
        nonlocal num_micro_batches
        num_micro_batches += 1
        return loss(*arguments)

    algorithm.loss = counted  # pyright: ignore
    learner.update(train_batch(make_samples(seed)), algorithm)
    assert num_micro_batches > 2
    assert count() == 2 * 2 * num_micro_batches, "2 layers, forward and again for backward"


@pytest.mark.parametrize("place", ["model.lora", "critic.lora"])
def test_a_dropout_without_effect_is_refused(place: str, tmp_path: Path) -> None:
    options = {
        "train.output_dir": str(tmp_path / "run"),
        "rollout.num_prompts": 8,
        place: {"lora_dropout": 0.1},
        "algo.name": "ppo",
    }
    arguments: dict[str, Any] = {"model": "tiny:qwen2", "reward": odd, "train_dataset": QUESTIONS}
    with pytest.raises(UserError, match=f"{place}.lora_dropout 0.1 is off while train.dropout is false"):
        Trainer(options, **arguments)
    Trainer(options | {"train.dropout": True}, **arguments)


def test_what_is_random_is_named() -> None:
    assert random_parts(build("gpt2"))[:3] == ["attn_pdrop 0.1", "dropout 0.1", "embd_pdrop 0.1"]
    adapted = add_lora(tiny_model(), {"peft_type": "LORA", "lora_dropout": 0.25, "target_modules": ["q_proj"]}, seed=0)
    assert random_parts(adapted) == ["dropout 0.25"]
    assert random_parts(tiny_model()) == []
