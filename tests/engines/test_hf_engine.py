"""The hf engine against transformers: exact log-probabilities, scheduling, weights, and what happens on errors."""

from __future__ import annotations

import asyncio
import copy
import inspect
import itertools
import os
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llmrl.engines.hf import engine as engine_module
from llmrl.engines.hf import fast as hf_fast
from llmrl.engines.hf.engine import HFEngine
from llmrl.engines.hf.fast import FastDecoder
from llmrl.engines.hf.generic import CACHE_NAMES, GenericDecoder
from llmrl.engines.sampling import uniform_stream
from llmrl.errors import RunFailed, UserError
from llmrl.types import Completion, Sampling

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("LLMRL_TEST_SEED", "0"))
VOCABULARY = 61
FAST = ["qwen2", "qwen3", "llama", "mistral", "gemma"]
GENERIC = ["gemma2", "mistral-sliding", "gpt2", "bloom", "lfm2"]
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
VARIANTS = {
    "mistral-sliding": ("mistral", {"sliding_window": 8}),
    "gemma2": ("gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 8}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),  # convolution states cannot be padded
    "qwen2-untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3-untied": ("qwen3", {"tie_word_embeddings": False}),
    "llama-untied": ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    "gemma-one-kv-head": ("gemma", {"num_key_value_heads": 1, "head_dim": 16}),
}

EAGER = {"bloom": "eager", "gemma2": "eager"}
"""Families without sdpa: bloom has none, and it cannot soft-cap attention as gemma2 does."""


@cache
def tiny(name: str, seed: int = SEED) -> PreTrainedModel:
    """A small random model, norm gains and biases off their initial values."""
    arch, changes = VARIANTS.get(name, (name, {}))
    base = BASE if arch not in ("gpt2", "bloom") else {k: v for k, v in BASE.items() if k not in ("head_dim",)}
    config = AutoConfig.for_model(arch, **(base | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kernel = {"attn_implementation": EAGER[name]} if name in EAGER else {}
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **kernel).eval()
        for parameter in model.parameters():
            parameter.data += 0.15 * torch.randn_like(parameter)
    return model


def weights_of(model: PreTrainedModel) -> Callable[[], Iterable[tuple[str, Tensor]]]:
    return lambda: model.named_parameters()


def engine_of(name: str, *, seed: int = SEED, **kwargs) -> HFEngine:
    model = tiny(name, seed)
    if name in EAGER:
        kwargs.setdefault("attn_implementation", EAGER[name])
    return HFEngine(model.config, weights=weights_of(model), **kwargs)


@torch.no_grad()
def forward_logprobs(model: PreTrainedModel, prompt: list[int], completion: list[int], temperature=1.0) -> Tensor:
    """Log-probability of each completion token by one plain forward pass."""
    ids = torch.tensor([prompt + completion])
    logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def prompt_of(length: int, salt: int = 0) -> list[int]:
    return [(7 * i + 13 * salt + i * i) % VOCABULARY for i in range(length)]


async def draw(engine: HFEngine, requests: list[tuple[list[int], Sampling]]) -> list[Completion]:
    return await asyncio.gather(*[engine.generate(p, s, session=f"session {i}") for i, (p, s) in enumerate(requests)])


def mixed_requests(temperature: float = 1.0) -> list[tuple[list[int], Sampling]]:
    """Groups of equal prompts and single ones, prompts of 1 to 30 tokens, completions of 1 to 25."""
    lengths = [3, 3, 3, 3, 17, 17, 1, 30, 30, 30, 4, 9, 9, 2, 17, 12]
    return [
        (prompt_of(n, salt=n), Sampling(max_tokens=1 + (5 * i) % 25, temperature=temperature, seed=SEED + i))
        for i, n in enumerate(lengths)
    ]


def assert_exact(model: PreTrainedModel, requests, completions, temperature=1.0) -> None:
    for (prompt, sampling), completion in zip(requests, completions, strict=True):
        assert len(completion.token_ids) == len(completion.logprobs) == sampling.max_tokens
        expected = forward_logprobs(model, prompt, completion.token_ids, temperature)
        assert (torch.tensor(completion.logprobs) - expected).abs().max() < 1e-5


CASES = [
    (name, "auto") for name in [*FAST, *GENERIC, "qwen2-untied", "qwen3-untied", "llama-untied", "gemma-one-kv-head"]
]
CASES += [(name, "generic") for name in FAST]


@pytest.mark.parametrize(("name", "decoder"), CASES)
def test_logprobs_equal_a_plain_forward_pass(name, decoder):
    engine = engine_of(name, decoder=decoder, max_num_seqs=7)
    generic = decoder == "generic" or name in GENERIC
    assert isinstance(engine._decoder, GenericDecoder if generic else FastDecoder)
    requests = mixed_requests()
    assert_exact(tiny(name), requests, asyncio.run(draw(engine, requests)))


@pytest.mark.parametrize(("name", "decoder"), CASES)
def test_greedy_tokens_equal_generate(name, decoder):
    prompts = [prompt_of(n, salt=n) for n in (5, 5, 11, 2)]
    requests = [(prompt, Sampling(max_tokens=20, temperature=0)) for prompt in prompts]
    completions = asyncio.run(draw(engine_of(name, decoder=decoder), requests))
    for prompt, completion in zip(prompts, completions, strict=True):
        reference = tiny(name).generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=20
        )
        assert completion.token_ids == reference[0, len(prompt) :].tolist()
    assert_exact(tiny(name), requests, completions)


@pytest.mark.parametrize("decoder", ["fast", "generic"])
def test_logprobs_belong_to_the_tempered_distribution(decoder):
    requests = mixed_requests(temperature=0.6)
    completions = asyncio.run(draw(engine_of("qwen2", decoder=decoder), requests))
    assert_exact(tiny("qwen2"), requests, completions, temperature=0.6)


@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_a_seed_gives_the_same_tokens_whatever_shares_its_batch(name):
    requests = [(prompt_of(3 + i % 6, salt=i % 6), Sampling(max_tokens=4 + i % 17, seed=i)) for i in range(40)]
    engine = engine_of(name, seed=0, max_num_seqs=7)
    in_forty = asyncio.run(draw(engine, requests))
    in_five = asyncio.run(draw(engine, requests[:5]))
    for i in range(5):
        [alone] = asyncio.run(draw(engine, requests[i : i + 1]))
        assert alone.token_ids == in_five[i].token_ids == in_forty[i].token_ids
    assert len({tuple(c.token_ids) for c in in_forty}) > 30


@pytest.mark.parametrize("decoder", ["fast", "generic"])
def test_the_same_submissions_give_the_same_bits(decoder):
    requests = mixed_requests()
    runs = [asyncio.run(draw(engine_of("qwen2", decoder=decoder, max_num_seqs=5), requests)) for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("decoder", ["fast", "generic"])
def test_a_long_stream_of_requests_stays_exact_and_its_memory_bounded(decoder, monkeypatch):
    engine = engine_of("qwen2", decoder=decoder, max_num_seqs=5)
    requests = [
        (prompt_of(1 + (11 * i) % 23, salt=i % 9), Sampling(max_tokens=1 + (29 * i) % 90, seed=SEED + i))
        for i in range(60)
    ]
    columns = []
    step = engine._decoder.step

    def watched(tokens: Tensor) -> Tensor:
        logits = step(tokens)
        fast = decoder == "fast"
        columns.append(engine._decoder.suffix.num_columns if fast else engine._decoder.cohorts[0].mask.shape[1])
        return logits

    monkeypatch.setattr(engine._decoder, "step", watched)
    assert_exact(tiny("qwen2"), requests, asyncio.run(draw(engine, requests)))
    longest = max(len(prompt) + sampling.max_tokens for prompt, sampling in requests)
    assert len(columns) > 5 * longest
    assert max(columns) < (2.5 * longest if decoder == "fast" else longest + 1)


def test_a_group_larger_than_a_lane_is_exact(monkeypatch):
    count = 2 * hf_fast.LANE_ROWS + 3
    engine = engine_of("qwen3", decoder="fast", max_num_seqs=count + 4)
    requests = [(prompt_of(9), Sampling(max_tokens=6 + i % 9, seed=SEED + i)) for i in range(count)]
    requests += [(prompt_of(4, salt=i), Sampling(max_tokens=12, seed=SEED + i)) for i in range(4)]
    lanes = []
    step = engine._decoder.step
    monkeypatch.setattr(
        engine._decoder, "step", lambda tokens: lanes.append(len(engine._decoder.lanes)) or step(tokens)
    )
    assert_exact(tiny("qwen3"), requests, asyncio.run(draw(engine, requests)))
    assert lanes[0] == 3 + 4 and lanes[-1] < 3 + 4


@pytest.mark.parametrize("decoder", ["fast", "generic"])
def test_equal_prompts_are_computed_once(decoder, monkeypatch):
    engine = engine_of("llama", decoder=decoder)
    seen = []
    original = engine._decoder._prefill
    monkeypatch.setattr(
        engine._decoder,
        "_prefill",
        lambda batch: seen.extend(getattr(item, "prompt", item) for item in batch) or original(batch),
    )
    requests = [(prompt_of(6, salt=i % 3), Sampling(max_tokens=3, seed=i)) for i in range(24)]
    asyncio.run(draw(engine, requests))
    assert sorted(seen) == sorted(tuple(prompt_of(6, salt=i)) for i in range(3))


def test_a_group_admitted_in_parts_shares_its_prompt(monkeypatch):
    engine = engine_of("llama", decoder="fast", max_num_seqs=3)
    seen = []
    original = engine._decoder._prefill
    monkeypatch.setattr(engine._decoder, "_prefill", lambda lanes: seen.extend(lanes) or original(lanes))
    requests = [(prompt_of(6), Sampling(max_tokens=4, seed=SEED + i)) for i in range(12)]
    assert_exact(tiny("llama"), requests, asyncio.run(draw(engine, requests)))
    assert len(seen) == 1


def test_stop_tokens_end_a_completion_and_belong_to_it():
    engine = engine_of("qwen2")
    stops = (5, 17, 40, 41, 42)
    requests = [
        (prompt_of(4, salt=i % 4), Sampling(max_tokens=30, seed=SEED + i, stop_token_ids=stops if i % 2 else ()))
        for i in range(32)
    ]
    completions = asyncio.run(draw(engine, requests))
    stopped = 0
    for (prompt, sampling), completion in zip(requests, completions, strict=True):
        expected = forward_logprobs(tiny("qwen2"), prompt, completion.token_ids)
        assert (torch.tensor(completion.logprobs) - expected).abs().max() < 1e-5
        assert not set(completion.token_ids[:-1]) & set(sampling.stop_token_ids)
        ends_in_stop = completion.token_ids[-1] in sampling.stop_token_ids
        assert completion.finish == ("stop" if ends_in_stop else "length")
        assert ends_in_stop or len(completion.token_ids) == 30
        stopped += ends_in_stop
    assert stopped >= 4


@pytest.mark.parametrize("decoder", ["fast", "generic"])
def test_token_t_is_drawn_with_number_t_of_the_requests_own_stream(decoder):
    engine = engine_of("qwen2", decoder=decoder, max_num_seqs=5)
    requests = mixed_requests()
    for (prompt, sampling), completion in zip(requests, asyncio.run(draw(engine, requests)), strict=True):
        with torch.no_grad():
            logits = tiny("qwen2")(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
        probabilities = logits.double().softmax(-1)
        tokens = torch.tensor(completion.token_ids)[:, None]
        upper = probabilities.cumsum(-1).gather(1, tokens)[:, 0]
        uniforms = torch.from_numpy(uniform_stream(sampling.seed, sampling.max_tokens))
        assert (uniforms < upper + 1e-5).all()
        assert (uniforms > upper - probabilities.gather(1, tokens)[:, 0] - 1e-5).all()


def test_frequencies_of_the_engines_own_random_stream_match_softmax():
    count, prompt = 6000, prompt_of(5)
    engine = engine_of("qwen2", max_num_seqs=500)
    requests = [(prompt, Sampling(max_tokens=1, seed=SEED * count + i, temperature=1.3)) for i in range(count)]
    tokens = torch.tensor([c.token_ids[0] for c in asyncio.run(draw(engine, requests))])
    with torch.no_grad():
        logits = tiny("qwen2")(torch.tensor([prompt])).logits[0, -1].double() / 1.3
    expected = logits.softmax(0) * count
    observed = torch.bincount(tokens, minlength=VOCABULARY).double()
    rare = expected < 10  # pooled, so that every cell is large enough for the approximation
    cells = [(observed[~rare], expected[~rare]), (observed[rare].sum()[None], expected[rare].sum()[None])]
    statistic = sum(((o - e) ** 2 / e.clamp(min=1e-9)).sum() for o, e in cells)
    degrees = int((~rare).sum())
    assert degrees > 5
    # A chi-square with this many degrees of freedom exceeds this with probability about 1e-6 (Wilson-Hilferty).
    assert statistic < degrees * (1 - 2 / (9 * degrees) + 4.75 * (2 / (9 * degrees)) ** 0.5) ** 3


def test_completions_arrive_as_they_finish_and_the_loop_keeps_running():
    async def scenario() -> tuple[list[int], int]:
        engine, order, ticks = engine_of("qwen2"), [], 0
        lengths = [60, 3, 20, 1]

        async def one(i: int) -> None:
            await engine.generate(prompt_of(5, salt=i), Sampling(max_tokens=lengths[i], seed=i), session="s")
            order.append(lengths[i])

        tasks = [asyncio.create_task(one(i)) for i in range(4)]
        while not all(task.done() for task in tasks):
            ticks += 1
            await asyncio.sleep(0)
        return order, ticks

    order, ticks = asyncio.run(scenario())
    assert order == [1, 3, 20, 60]
    assert ticks >= 60


@pytest.mark.parametrize("name", ["qwen2", "qwen3-untied", "gemma", "gemma2"])
def test_engine_logprobs_equal_a_plain_forward_pass(name, monkeypatch):
    monkeypatch.setattr(hf_fast, "LOGITS_ELEMENTS", 5 * VOCABULARY)
    monkeypatch.setattr("llmrl.engines.hf.generic.LOGPROB_TOKENS", 7)
    engine = engine_of(name)
    sequences = [prompt_of(n, salt=n) for n in (30, 2, 17, 1, 8)]
    for sequence, row in zip(sequences, asyncio.run(engine.logprobs(sequences)), strict=True):
        assert len(row) == len(sequence) - 1
        if row:
            expected = forward_logprobs(tiny(name), sequence[:1], sequence[1:])
            assert (torch.tensor(row) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("decoder", ["fast", "generic"])
def test_new_weights_are_served(decoder):
    old, new = tiny("qwen2"), tiny("qwen2", SEED + 1)
    engine = engine_of("qwen2", decoder=decoder)
    sequence = prompt_of(12)

    def served() -> Tensor:
        return torch.tensor(asyncio.run(engine.logprobs([sequence]))[0])

    before = served()
    assert (before - forward_logprobs(old, sequence[:1], sequence[1:])).abs().max() < 1e-5
    asyncio.run(engine.load_weights(weights_of(new), version=1))
    expected = forward_logprobs(new, sequence[:1], sequence[1:])
    assert (served() - expected).abs().max() < 1e-5
    assert (before - expected).abs().max() > 1e-2
    requests = mixed_requests()
    completions = asyncio.run(draw(engine, requests))
    assert_exact(new, requests, completions)
    assert {completion.policy_version for completion in completions} == {(1, 1)}


@pytest.mark.parametrize("decoder", ["fast", "generic"])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model.layers.1.self_attn.k_proj.bias": None}, "missing: model.layers.1.self_attn.k_proj.bias"),
        ({"model.extra": torch.ones(2)}, r"unexpected: model\.extra \(2,\)"),
        ({"model.layers.1.self_attn.k_proj.bias": torch.ones(3)}, r"wrong shape: .*k_proj.bias \(3,\), expected"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_served_any_more(decoder, changed, message):
    engine = engine_of("qwen2", decoder=decoder)
    weights = {n: t for n, t in (dict(weights_of(tiny("qwen2"))()) | changed).items() if t is not None}
    with pytest.raises(RunFailed, match=message):
        asyncio.run(engine.load_weights(weights.items, version=1))
    assert engine.version == 0
    with pytest.raises(RunFailed, match="parts of two policies"):
        asyncio.run(draw(engine, mixed_requests()[:1]))


def test_weights_are_copied_not_shared():
    model = tiny("qwen2", SEED + 2)
    engine = HFEngine(model.config, weights=weights_of(model))
    sequence = prompt_of(9)
    before = asyncio.run(engine.logprobs([sequence]))
    saved = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert asyncio.run(engine.logprobs([sequence])) == before
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(saved[name])


def test_a_source_that_stops_halfway_breaks_the_engine_loudly():
    engine = engine_of("qwen2")

    def source() -> Iterable[tuple[str, Tensor]]:
        yield from itertools.islice(weights_of(tiny("qwen2"))(), 5)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        asyncio.run(engine.load_weights(source, version=1))
    with pytest.raises(RunFailed, match="halfway"):
        asyncio.run(draw(engine, mixed_requests()[:1]))


def test_a_push_reads_its_source_once():
    """With adapters every tensor of the source costs a merge."""
    engine, reads = engine_of("qwen2"), 0

    def source() -> Iterable[tuple[str, Tensor]]:
        nonlocal reads
        reads += 1
        return weights_of(tiny("qwen2", SEED + 1))()

    asyncio.run(engine.load_weights(source, version=1))
    assert reads == 1


@pytest.mark.parametrize("decoder", ["fast", "generic"])
def test_policy_version_spans_an_update_in_flight(decoder):
    async def scenario() -> tuple[Completion, Completion]:
        engine = engine_of("qwen2", decoder=decoder)
        prompt = prompt_of(8)
        running = asyncio.create_task(engine.generate(prompt, Sampling(max_tokens=40, seed=SEED), session="a"))
        for _ in range(12):
            await asyncio.sleep(0)
        await engine.load_weights(weights_of(tiny("qwen2", SEED + 1)), version=3)
        late = asyncio.create_task(engine.generate(prompt, Sampling(max_tokens=15, seed=SEED), session="b"))
        return await running, await late

    running, late = asyncio.run(scenario())
    assert running.policy_version == (0, 3) and late.policy_version == (3, 3)
    # The late request must not read the prompt that older weights stored.
    expected = forward_logprobs(tiny("qwen2", SEED + 1), prompt_of(8), late.token_ids)
    assert (torch.tensor(late.logprobs) - expected).abs().max() < 1e-5
    early = forward_logprobs(tiny("qwen2"), prompt_of(8), running.token_ids)
    agree = (torch.tensor(running.logprobs) - early).abs() < 1e-5
    assert agree[:5].all() and not agree.all()


def test_an_error_in_a_step_reaches_every_caller_and_the_engine_recovers(monkeypatch):
    engine = engine_of("qwen2", max_num_seqs=3)
    requests = mixed_requests()

    async def scenario() -> list[object]:
        return await asyncio.gather(*[engine.generate(p, s, session="s") for p, s in requests], return_exceptions=True)

    with monkeypatch.context() as patch:
        patch.setattr(engine._decoder, "step", lambda tokens: 1 / 0)
        results = asyncio.run(scenario())
    finished = [r for r in results if isinstance(r, Completion)]
    assert all(len(r.token_ids) == 1 for r in finished)
    assert sum(isinstance(r, ZeroDivisionError) for r in results) == len(results) - len(finished) > 10
    assert_exact(tiny("qwen2"), requests, asyncio.run(draw(engine, requests)))


@pytest.mark.parametrize("decoder", ["fast", "generic"])
def test_broken_weights_stop_the_run_and_leave_no_trace(decoder):
    engine = engine_of("qwen2", decoder=decoder)
    requests = mixed_requests()
    asyncio.run(draw(engine, requests))

    def broken() -> Iterable[tuple[str, Tensor]]:
        for name, tensor in tiny("qwen2").named_parameters():
            yield name, tensor * (torch.nan if name == "model.layers.0.mlp.up_proj.weight" else 1)

    asyncio.run(engine.load_weights(broken, version=1))
    with pytest.raises(RunFailed, match=r"NaN or infinite logits for token 1 .* session 'session 0' .* version 1"):
        asyncio.run(draw(engine, requests))
    asyncio.run(engine.load_weights(weights_of(tiny("qwen2")), version=2))
    assert_exact(tiny("qwen2"), requests, asyncio.run(draw(engine, requests)))


def test_cancelling_a_call_frees_its_row():
    async def scenario() -> tuple[HFEngine, list[Completion]]:
        engine = engine_of("qwen2", max_num_seqs=3)
        calls = [
            asyncio.create_task(engine.generate(p, Sampling(max_tokens=30, seed=i), session="s"))
            for i, (p, _) in enumerate(mixed_requests()[:6])
        ]
        for _ in range(8):
            await asyncio.sleep(0)
        calls[1].cancel()  # running
        calls[4].cancel()  # waiting
        for _ in range(3):
            await asyncio.sleep(0)
        assert len(engine._rows) == 3 and len(engine._waiting) == 1
        return engine, await asyncio.gather(*[calls[i] for i in (0, 2, 3, 5)])

    engine, completions = asyncio.run(scenario())
    assert not engine._rows and not engine._waiting
    prompts = mixed_requests()
    requests = [(prompts[i][0], Sampling(max_tokens=30, seed=i)) for i in (0, 2, 3, 5)]
    assert_exact(tiny("qwen2"), requests, completions)


def test_close_fails_what_waits_and_may_be_called_twice():
    async def scenario() -> list[object]:
        engine = engine_of("qwen2", max_num_seqs=2)
        calls = [asyncio.create_task(engine.generate(p, s, session="s")) for p, s in mixed_requests(1.0)[3:]]
        for _ in range(6):
            await asyncio.sleep(0)
        await engine.close()
        await engine.close()
        with pytest.raises(RunFailed, match="closed"):
            await engine.generate([1], Sampling(max_tokens=1), session="s")
        return await asyncio.gather(*calls, return_exceptions=True)

    results = asyncio.run(scenario())
    assert any(isinstance(result, RunFailed) and "closed" in str(result) for result in results)
    assert all(isinstance(result, (RunFailed, Completion)) for result in results)


def test_impossible_requests_are_refused_with_the_numbers():
    engine = engine_of("qwen2")

    def ask(prompt: list[int], **kwargs) -> None:
        asyncio.run(engine.generate(prompt, Sampling(**({"max_tokens": 1} | kwargs)), session="s"))

    with pytest.raises(UserError, match=r"100 tokens and max_tokens 29 make 129, .* 128 positions"):
        ask(prompt_of(100), max_tokens=29)
    with pytest.raises(UserError, match="empty"):
        ask([])
    with pytest.raises(UserError, match=f"to {VOCABULARY} do not fit the model's vocabulary of {VOCABULARY}"):
        ask([1, VOCABULARY])
    with pytest.raises(UserError, match="temperature"):
        ask([1], temperature=-0.5)
    ask(prompt_of(100), max_tokens=28)


def test_the_fast_decoder_refuses_what_it_does_not_support():
    with pytest.raises(UserError, match="gemma2"):
        engine_of("gemma2", decoder="fast")
    with pytest.raises(UserError, match="sliding_window 8"):
        engine_of("mistral-sliding", decoder="fast")
    with pytest.raises(UserError, match=r"bloom.*sdpa.*try eager"):
        engine_of("bloom", attn_implementation="sdpa")
    short = engine_of("mistral-sliding", max_model_len=8)
    assert isinstance(short._decoder, FastDecoder)
    with pytest.raises(UserError, match="8 positions"):
        asyncio.run(short.generate([1, 2, 3], Sampling(max_tokens=6), session="s"))


def test_a_model_without_keys_and_values_is_refused():
    config = AutoConfig.for_model("mamba", vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_config(config).eval()
    # Until transformers 5.23 for lack of a cache; from 5.24 on it takes one, but then computes something else.
    with pytest.raises((UserError, RunFailed), match="cannot serve 'mamba'"):
        HFEngine(model.config, weights=weights_of(model), attn_implementation="eager")


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_the_cache_goes_by_either_name(name, monkeypatch):
    model = tiny("llama")
    forward = type(model).forward
    (own,) = (n for n in CACHE_NAMES if n in inspect.signature(forward).parameters)

    def older(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, **rest):
        return forward(self, input_ids, attention_mask, position_ids, **{own: past_key_values}, **rest)

    def newer(self, input_ids, attention_mask=None, position_ids=None, cache=None, **rest):
        return forward(self, input_ids, attention_mask, position_ids, **{own: cache}, **rest)

    monkeypatch.setattr(type(model), "forward", newer if name == "cache" else older)
    requests = mixed_requests()
    assert_exact(model, requests, asyncio.run(draw(engine_of("llama", decoder="generic"), requests)))


def test_scaled_rotary_embeddings_go_to_the_generic_decoder():
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    config = AutoConfig.for_model("llama", **(BASE | {"rope_parameters": rope}))
    model = AutoModelForCausalLM.from_config(config).eval()
    engine = HFEngine(config, weights=weights_of(model))
    assert isinstance(engine._decoder, GenericDecoder)
    requests = mixed_requests()
    assert_exact(model, requests, asyncio.run(draw(engine, requests)))


def test_the_self_check_falls_back_to_the_generic_decoder_with_a_warning(monkeypatch):
    monkeypatch.setattr(
        FastDecoder, "_rotations", lambda self, positions: torch.ones(len(positions), 4, dtype=torch.complex64)
    )
    with pytest.warns(UserWarning, match="generic decoder is used"):
        engine = engine_of("llama")
    assert isinstance(engine._decoder, GenericDecoder)
    with pytest.raises(RunFailed, match="differ from transformers'"):
        engine_of("llama", decoder="fast")


def test_building_an_engine_leaves_the_callers_randomness_alone():
    torch.manual_seed(SEED)
    expected = torch.rand(3)
    torch.manual_seed(SEED)
    engine_of("qwen2")
    engine_of("gemma2")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("decoder", ["fast", "generic"])
def test_bfloat16_stays_near_float32(decoder):
    engine = engine_of("qwen3", decoder=decoder, dtype=torch.bfloat16)
    requests = mixed_requests()
    for (prompt, _), completion in zip(requests, asyncio.run(draw(engine, requests)), strict=True):
        expected = forward_logprobs(tiny("qwen3"), prompt, completion.token_ids)
        assert (torch.tensor(completion.logprobs) - expected).abs().max() < 0.15


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("decoder", ["fast", "generic"])
def test_a_float32_head_rounds_no_logit_to_bfloat16(decoder: str, marked: bool) -> None:
    """Against the decoder's own hidden states times its own weights in float32."""
    model, tokens = tiny("llama"), prompt_of(9)
    config = copy.deepcopy(model.config)
    if marked:
        config.head_dtype = "float32"
    engine = HFEngine(config, weights=weights_of(model), dtype=torch.bfloat16, decoder=decoder)  # pyright: ignore
    found: Any = engine._decoder
    logits = found.admit([tuple(tokens)])[0]
    if decoder == "fast":
        hidden, weight = found.lane_hidden[0], found.weights.head
    else:
        hidden = found.model.get_decoder()(torch.tensor([tokens])).last_hidden_state[0, -1]
        weight = found.model.get_output_embeddings().weight
    exact = hidden.float() @ weight.float().T
    assert hidden.dtype == weight.dtype == torch.bfloat16
    if marked:
        torch.testing.assert_close(logits, exact, rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(logits.float(), logits.bfloat16().float()) and not torch.allclose(logits.float(), exact)
    asyncio.run(engine.close())


@pytest.mark.parametrize("name", ["qwen2", "mistral-sliding"])
def test_long_prompts_are_admitted_in_parts_between_which_the_loop_turns(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = mixed_requests()
    wanted = asyncio.run(draw(engine_of(name), requests))
    monkeypatch.setattr(engine_module, "ADMITTED_TOKENS", 20)
    engine, turns = engine_of(name), 0
    sizes: list[tuple[int, int]] = []
    admit = engine._decoder.admit

    def noting(prompts: Any) -> Tensor:
        sizes.append((sum(map(len, set(prompts))), turns))
        return admit(prompts)

    monkeypatch.setattr(engine._decoder, "admit", noting)

    async def main() -> list[Completion]:
        async def turn() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        heart = asyncio.ensure_future(turn())
        found = await draw(engine, requests)
        heart.cancel()
        return found

    found = asyncio.run(main())
    assert len(sizes) > 4 and all(tokens <= 30 for tokens, _ in sizes), "a single prompt may be longer"
    assert all(later > earlier for (_, earlier), (_, later) in itertools.pairwise(sizes))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.token_ids == theirs.token_ids
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-5)
