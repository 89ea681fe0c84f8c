"""Three steps of GRPO on random models of several families, whose logits are as large as those of pretrained ones."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import torch

from llmrl import Trainer
from llmrl.errors import LlmrlError
from studies.receipts import STEPS, VOWELS, numbers, resumed, table

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "gemma3_text": {"query_pre_attn_scalar": 64, "sliding_window": 512},
    "qwen3_next": {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    },
    "lfm2": {"block_dim": 256, "block_ff_dim": 512, "block_auto_adjust_ff_dim": False, "conv_dim": 256},
}
HYBRIDS = ("qwen3_next", "lfm2")
"""With layers that remember, for which vLLM caches prefixes only if it computes prompts in parts: not on a CPU."""
LARGEST_LOGIT = 30.0
"""What SmolLM2 and Qwen2.5 give for their likeliest tokens."""
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}


def build(family: str, folder: Path) -> Path:
    """Save a random model with a tokenizer; weights are spread so that its tokens differ in more than rounding."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from llmrl.tiny import byte_tokenizer

    tokenizer = byte_tokenizer()
    fields = SIZES | HEADS | FAMILIES[family] | {"vocab_size": 384, "max_position_embeddings": 1024}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **fields, **ends, tie_word_embeddings=False)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        logits = model(input_ids=torch.arange(256)[None]).logits
        model.get_output_embeddings().weight.mul_(LARGEST_LOGIT / logits.abs().max())
    model.save_pretrained(folder / family)
    tokenizer.save_pretrained(folder / family)
    return folder / family


def run(model: Path, output: Path, engine: str, dtype: str, trained: str) -> dict[str, Any]:
    """Train a few steps; return the numbers of the receipts."""
    shutil.rmtree(output, ignore_errors=True)
    settings: dict[str, Any] = {
        "model.dtype": dtype,
        "rollout.engine": engine,
        "rollout.num_prompts": 2,
        "rollout.num_generations": 4,
        "rollout.max_completion_length": 48,
        "train.max_steps": STEPS,
        "train.learning_rate": 1e-6 if trained == "whole" else 2e-5,
        "train.output_dir": str(output),
    }
    if engine == "vllm" and model.name in HYBRIDS:
        settings["rollout.vllm.enable_prefix_caching"] = False
    if trained == "LoRA":
        settings |= {"model.lora.r": 32, "model.lora.lora_alpha": 64}
    questions = [{"question": f"What is {i} and {i}?", "answer": str(2 * i)} for i in range(16)]
    Trainer(settings, model=str(model), reward=f"{VOWELS}:vowels", train_dataset=questions).train()
    return numbers(output)


def main(folder: Path) -> None:
    """Run what `folder` does not hold yet, and print the table."""

    def one(family: str, engine: str, dtype: str, trained: str) -> dict[str, Any]:
        try:
            return run(build(family, folder), folder / f"{family}-{engine}-{dtype}-{trained}", engine, dtype, trained)
        except LlmrlError as error:
            return {"refused": str(error).splitlines()[0]}

    rows = itertools.product(FAMILIES, ("hf", "vllm"), ("bfloat16", "float32"), ("whole", "LoRA"))
    table(resumed(folder / "families.jsonl", ("family", "engine", "type", "trained"), rows, one))
