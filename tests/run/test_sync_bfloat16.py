"""Proofs in bfloat16 on logits of real size: every healthy pair passes, every planted fault is caught.

The models are tiny and random, their output heads scaled until the largest logit is 30, as it is in pretrained models.
Updates are as small as those of a learning rate of 1e-6: no log-probability shows them in bfloat16.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from llmrl.engines.hf.engine import HFEngine
from llmrl.errors import RunFailed
from llmrl.model.policy import Policy
from llmrl.run.sync import WeightSync
from llmrl.train.selfcheck import check_forward
from llmrl.types import WeightSource
from tests.invariance.cases import VOCABULARY, make_lora, tiny_model

SEED = int(os.environ.get("LLMRL_TEST_SEED", "0"))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYER = "model.layers.1.mlp.down_proj.weight"
FAULTS = ["dropped", "one version old", "one module stale", "head stale", "one module permuted"]
FAULTS += ["base served", "adapter twice"]
SMOLLM2 = os.environ.get("LLMRL_SMOLLM2", "")


def real_logits(model: Any, largest: float = 30.0) -> Any:
    """Scale the output head of a model until its largest logit is that of a pretrained one."""
    with torch.no_grad():
        logits = model(input_ids=torch.arange(VOCABULARY)[None]).logits
        model.get_output_embeddings().weight.mul_(largest / logits.abs().max())
    return model


def mixture_of_experts(seed: int) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=VOCABULARY, num_key_value_heads=1, head_dim=16, eos_token_id=None, **sizes, **experts
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def dense(seed: int) -> Any:
    return tiny_model("qwen3", seed=seed, num_layers=4, tie_word_embeddings=False)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEED, SEED + 3))
@pytest.mark.parametrize("engine_dtype", DTYPES)
@pytest.mark.parametrize("learner_dtype", DTYPES)
@pytest.mark.parametrize("make", [dense, mixture_of_experts])
def test_every_healthy_pair_passes(
    make: Callable[[int], Any], learner_dtype: str, engine_dtype: str, seed: int
) -> None:
    policy = Policy(real_logits(make(seed)).to(DTYPES[learner_dtype]), temperature=1.0, keep_reference=False)
    assert check_forward(policy) == []
    engine = HFEngine(policy.model_config, weights=policy.weights, dtype=DTYPES[engine_dtype])
    receipt = asyncio.run(WeightSync(policy, engine).push(0))
    assert receipt.mean_gap <= receipt.limit < 0.5


class Faulty(HFEngine):
    """Loads something else than it was given."""

    fault = ""
    before: dict[str, Tensor] = {}
    base: WeightSource | None = None

    async def load_weights(self, source: WeightSource, *, version: int) -> None:
        given = {name: tensor.clone() for name, tensor in source()}
        old, self.before = self.before, given
        if self.fault == "dropped":
            return
        await super().load_weights(lambda: self.changed(given, old), version=version)

    def changed(self, given: dict[str, Tensor], old: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        base = dict(self.base()) if self.base is not None else {}
        stale = {"one module stale": LAYER, "head stale": "lm_head.weight"}.get(self.fault)
        for name, tensor in given.items():
            if self.fault == "one version old" or name == stale:
                yield name, old[name]
            elif self.fault == "one module permuted" and name == LAYER:
                yield name, tensor.flip(0)
            elif self.fault == "base served":
                yield name, base[name]
            elif self.fault == "adapter twice":
                yield name, 2 * tensor - base[name]
            else:
                yield name, tensor


@pytest.mark.slow
@pytest.mark.parametrize("learner_dtype", DTYPES)
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_caught_however_small_the_update(fault: str, learner_dtype: str) -> None:
    """The update moves one weight of the layer and one of the head (or of an adapter) by a single bfloat16 step."""
    adapted = fault in ("base served", "adapter twice")
    model = real_logits(dense(SEED)).to(DTYPES[learner_dtype])
    policy = Policy(make_lora(model) if adapted else model, temperature=1.0, keep_reference=False)
    engine = Faulty(policy.model_config, weights=policy.weights, dtype=torch.bfloat16)
    engine.base = policy.base_weights if adapted else None
    sync = WeightSync(policy, engine)
    asyncio.run(sync.push(0))
    engine.fault = fault
    with torch.no_grad():
        for name in ("model.layers.1.mlp.down_proj", "lm_head"):
            layer: Any = policy.causal_lm.get_submodule(name)
            weight = layer.get_base_layer().weight if hasattr(layer, "get_base_layer") else layer.weight
            weight[3, 5] *= 1 + 2.0**-7
    with pytest.raises(RunFailed, match="weight sync: after pushing policy version 1"):
        asyncio.run(sync.push(1))
    engine.fault = ""
    assert asyncio.run(sync.push(2)).version == 2


HYBRID = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16} | {
    "linear_value_head_dim": 16
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_whose_layers_remember_the_neighbor_is_not_packed(dtype: str) -> None:
    """Linear attention runs over the whole row, whatever the positions say."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "qwen3_5_text", vocab_size=VOCABULARY, num_key_value_heads=1, head_dim=16, eos_token_id=None, **sizes, **HYBRID
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    policy = Policy(model.eval(), temperature=1.0, keep_reference=False)
    [note] = check_forward(policy)
    assert "train.packing is off for this run" in note and "see each other" in note
    assert not policy.can_pack and not policy.can_share_prefixes


pretrained = pytest.mark.skipif(not SMOLLM2, reason="LLMRL_SMOLLM2 names no folder with SmolLM2-135M-Instruct")


def smollm2(dtype: str) -> tuple[Policy, Faulty, WeightSync]:
    """The pretrained model, and an engine that serves it in bfloat16 after a first push."""
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=DTYPES[dtype])
    policy = Policy(model, temperature=1.0, keep_reference=False)
    assert check_forward(policy) == []
    engine = Faulty(policy.model_config, weights=policy.weights, dtype=torch.bfloat16)
    sync = WeightSync(policy, engine)
    receipt = asyncio.run(sync.push(0))
    assert receipt.mean_gap <= receipt.limit < 0.25, "a single permuted projection makes 0.25 nats (layer 15's queries)"
    return policy, engine, sync


@pytest.mark.slow
@pretrained
@pytest.mark.parametrize("learner_dtype", DTYPES)
def test_a_pretrained_model_passes_and_its_smallest_update_is_missed_if_it_does_not_arrive(learner_dtype: str) -> None:
    policy, engine, sync = smollm2(learner_dtype)
    layer: Any = policy.causal_lm.get_submodule(LAYER.removesuffix(".weight"))
    for version, fault in ((1, ""), (2, "one module stale"), (3, "dropped")):
        with torch.no_grad():
            layer.weight[3, 5] *= 1 + 2.0**-7
        engine.fault = fault
        if not fault:
            asyncio.run(sync.push(version))
            continue
        with pytest.raises(RunFailed, match=f"in 1 tensors .{LAYER}"):
            asyncio.run(sync.push(version))


@pytest.mark.slow
@pretrained
@pytest.mark.parametrize("name", ["layers.15.self_attn.q_proj", "layers.10.self_attn.k_proj", "layers.28.mlp.up_proj"])
def test_one_wrong_projection_shows_in_what_a_pretrained_model_computes(name: str) -> None:
    """As if the content were right and the engine put it in the wrong place."""
    policy, engine, sync = smollm2("bfloat16")

    async def nothing(_sent: Any) -> list[str]:
        return []

    engine.differing = nothing  # type: ignore[method-assign]
    wrong = f"model.{name}.weight"
    asyncio.run(
        HFEngine.load_weights(
            engine, lambda: ((n, t.flip(0) if n == wrong else t) for n, t in policy.weights()), version=1
        )
    )
    with pytest.raises(RunFailed, match="match no earlier version"):
        engine.fault = "dropped"
        asyncio.run(sync.push(1))
