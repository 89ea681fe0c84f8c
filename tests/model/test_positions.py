"""Positions that depend on the longest sequence of a batch are not used."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmrl.config import TrainConfig
from llmrl.engines.hf.engine import HFEngine
from llmrl.errors import RunFailed, UserError
from llmrl.model.parallel import Parallel
from llmrl.model.policy import Policy
from llmrl.model.positions import longest_exact
from llmrl.train.packing import Layout
from llmrl.types import Sample, Sampling
from tests.invariance.cases import VOCABULARY, tiny_model

ORIGINAL = 24


def long_rope(kind: str) -> Any:
    """A model made for 24 tokens and stretched to 96, or to any length."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": ORIGINAL}
    rope = {"rope_type": kind, "rope_theta": 1e4} | (factors if kind == "longrope" else {"factor": 4.0})
    longest = 96 if kind == "longrope" else ORIGINAL
    config = AutoConfig.for_model(
        "phi3" if kind == "longrope" else "llama",
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=longest,
        original_max_position_embeddings=ORIGINAL,
        rope_parameters=rope,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def sample(length: int) -> Sample:
    zeros = np.zeros(length - 1, np.float32)
    ids = np.arange(length) % VOCABULARY
    return Sample(
        input_ids=ids, loss_mask=np.arange(length) > 0, advantages=zeros, rollout_logprobs=zeros, group=0, index=0
    )


def test_other_models_have_no_such_length() -> None:
    assert longest_exact(tiny_model().config) is None  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_longer_sequences_are_refused_and_the_message_names_the_options(kind: str) -> None:
    policy = Policy(long_rope(kind), temperature=1.0, keep_reference=False)
    assert longest_exact(policy.model_config) == policy.longest == ORIGINAL
    layout = Layout(policy, TrainConfig(output_dir="unused"), Parallel.alone())
    assert len(layout.micro_batches([sample(ORIGINAL), sample(5)])) == 1
    with pytest.raises(RunFailed, match=r"25 tokens, but beyond 24 .* rollout.max_completion_length"):
        layout.micro_batches([sample(ORIGINAL + 1), sample(5)])
    engine = HFEngine(policy.model_config, weights=policy.weights)
    with pytest.raises(UserError, match=r"24 positions .* data.max_prompt_length"):
        asyncio.run(engine.generate([1, 2, 3], Sampling(max_tokens=22, seed=0), session="s"))
    drawn = asyncio.run(engine.generate([1, 2, 3], Sampling(max_tokens=21, seed=0), session="s"))
    expected = policy.sequence_logprobs([[1, 2, 3, *drawn.token_ids]])[0][2:]
    assert drawn.logprobs == pytest.approx(expected, abs=1e-5)


def test_a_model_that_caps_its_scores_runs_on_a_kernel_that_does_so() -> None:
    """transformers' `sdpa` leaves the cap out; its `eager` is the reference."""
    model: Any = tiny_model("gemma2", attn_logit_softcapping=0.05, attn_implementation="eager")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        model.set_attn_implementation("sdpa")
        uncapped = model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    assert (uncapped - expected).abs().max() > 1e-3, "the cap does not matter here"
    policy = Policy(model, temperature=1.0, keep_reference=False)
    engine = HFEngine(policy.model_config, weights=policy.weights, attn_implementation="sdpa")
    for found in (policy.sequence_logprobs(ids.tolist()), asyncio.run(engine.logprobs(ids.tolist()))):
        assert found[0] == pytest.approx(expected.tolist(), abs=1e-4)
