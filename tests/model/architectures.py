"""Tiny random models of more architectures than `llmrl.tiny` has, among them mixtures of experts."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 61
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
MIXTURES = (
    *("qwen3_moe", "mixtral", "olmoe", "gpt_oss", "qwen2_moe", "granitemoe", "phimoe", "deepseek_v2", "deepseek_v3"),
    *(
        "glm4_moe",
        "ernie4_5_moe",
        "hunyuan_v1_moe",
        "qwen3_next",
        "qwen3_5_moe_text",
        "llama4_text",
        "minimax",
        "jamba",
    ),
)
DENSE = ("gemma3_text", "phi3", "olmo2", "granite", "cohere2", "gpt2", "gpt_neox", "bloom", "falcon", "qwen3_5_text")


def build(arch: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Build a float32 model in eval mode whose logits are not all alike."""
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if arch in MIXTURES:
        fields |= EXPERTS
    if arch == "gpt2":
        fields |= {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128}
    if arch == "falcon":
        del fields["head_dim"]
    attention = "eager" if arch in ("gpt_oss", "bloom") else "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(arch, **(fields | overrides))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return model
