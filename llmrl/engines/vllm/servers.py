"""The `vllm_server` engine: samples from one or many `vllm serve` replicas, on this machine or on others.

Prompt token ids and a `Sampling` in, a `Completion` out as soon as that request is finished. It does not matter who
started the servers; docs/scaling.md describes how.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from llmrl.engines.sampling import check_sampling
from llmrl.engines.vllm.adapters import AdapterFolders
from llmrl.engines.vllm.agreement import Agreement
from llmrl.engines.vllm.delivery import Delivery, NcclDelivery, SharedMemoryDelivery
from llmrl.engines.vllm.digests import differences, sent_adapter, sent_base, sent_weights
from llmrl.engines.vllm.http import ADAPTER_ROUTES, RUN_PREFIX, WEIGHT_ROUTES, VllmServer, open_files
from llmrl.engines.vllm.launch import ServerProcesses, start_servers
from llmrl.engines.vllm.options import VllmConfig, VllmServerConfig
from llmrl.engines.vllm.replicas import ReplicaFailed, ReplicaLost, Replicas
from llmrl.errors import RunFailed, UserError
from llmrl.noise import Limit
from llmrl.types import Adapter, Completion, Sampling, WeightSource

if TYPE_CHECKING:
    from llmrl.engines.options import EngineConfig
    from llmrl.model.options import ModelConfig

DEV_MODE = "with VLLM_SERVER_DEV_MODE=1 in its environment"
FULL = 1.25
"""Requests in flight on a server for each that it computes at once: the next ones are there when it has room."""
OTHER_FILES = 256
"""Files that this process may have open beside its connections."""
MAX_ABORTS = 100
"""A request that pushes have aborted this often is given up, because it would never end."""


class VllmServerEngine:
    """An `Engine` over vLLM servers.

    Every replica serves the same policy version. A replica that is lost costs no rollout (see `Replicas`). A replica
    that returns gets the current weights, and must give the same log-probabilities as the others, before it gets work.

    Args:
        urls: addresses of the servers.
        delivery: how weights travel. Default: through shared memory, for servers on this machine.
        on_update: what happens to running requests when new weights arrive: they finish first (wait), continue under
            the new weights (keep), or are drawn again from the start (abort).
        dtype: type the servers compute in.
        quantized: whether they also round weights to fewer bits.
        api_key: sent to servers that require one.
        slack: see `Replicas`; about the size of a group.
        most: see `Replicas`; requests of this process in flight on one server.
        first: see `Replicas`; a different one in every process.
        request_timeout_s: how long a server may complete nothing.
        health_timeout_s: limit of one health check.
        return_timeout_s: how long requests wait for a replica to return when none is left.
        start_timeout_s: how long to wait for the servers to come up.
        takes_adapters: pushes bring only the adapter; the servers keep the base weights they were started with.
        is_sender: whether this process pushes. The other processes of a distributed run only see what arrived.
        barrier: called after a push; returns when every process of the run has called it.
        say: called with each line that a person should read.
        processes: the servers, if this run started them. They are restarted when they die, and ended by `close`.
    """

    def __init__(
        self,
        urls: list[str],
        *,
        delivery: Delivery | None = None,
        on_update: Literal["wait", "keep", "abort"] = "keep",
        dtype: str = "float32",
        quantized: bool = False,
        api_key: str | None = None,
        slack: int = 8,
        most: int = 1_000_000,
        first: int = 0,
        request_timeout_s: float = 1800.0,
        health_timeout_s: float = 30.0,
        return_timeout_s: float = 600.0,
        start_timeout_s: float = 600.0,
        takes_adapters: bool = False,
        is_sender: bool = True,
        barrier: Callable[[], Any] = lambda: None,
        say: Callable[[str], None] = lambda text: None,
        processes: ServerProcesses | None = None,
    ) -> None:
        if not urls:
            raise UserError("rollout.engine vllm_server needs rollout.server.urls, or rollout.server.num_replicas")
        servers = [
            VllmServer(url, api_key=api_key, health_timeout_s=health_timeout_s, request_timeout_s=request_timeout_s)
            for url in urls
        ]
        most = min(most, max(1, (open_files() - OTHER_FILES) // len(servers)))
        self.replicas = Replicas(
            servers,
            restore=self._restore,
            slack=slack,
            most=most,
            first=first,
            return_timeout_s=return_timeout_s,
            say=say,
        )
        self.delivery = delivery or SharedMemoryDelivery()
        self.on_update, self.start_timeout_s, self.say = on_update, start_timeout_s, say
        self.is_sender, self.barrier, self.processes = is_sender, barrier, processes
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.quantized = quantized
        self.limit: Limit | None = None
        self.agreement = Agreement()
        self.takes_adapters = takes_adapters
        self._adapters = AdapterFolders()
        self._adapter: Path | None = None
        self._num_adapters = 0
        self._base: dict[str, str] | None = None
        self.version: int | None = None
        self.run = f"{RUN_PREFIX}{uuid.uuid4().hex[:8]}"
        """Prefix of the labels this run gives to weights, so that no other run's weights are taken for its own."""
        self._connected = False
        self._temperatures: set[float] = {0.0, 1.0}
        self._closed = False

    @classmethod
    def from_options(
        cls,
        model: ModelConfig,
        options: EngineConfig,
        *,
        log_dir: Path,
        device: torch.device,
        slack: int,
        takes_adapters: bool,
        say: Callable[[str], None],
        is_main: bool = True,
        rank: int = 0,
        world: int = 1,
        broadcast: Callable[[list[str]], list[str]] = lambda urls: urls,
        barrier: Callable[[], Any] = lambda: None,
    ) -> VllmServerEngine:
        """Build the engine of a run, over servers that run already or that its main process starts.

        Args:
            model: what the servers serve.
            options: reads `server`, `vllm` and `max_num_seqs`.
            log_dir: where started servers write their logs.
            device: where the learner holds its weights.
            slack: see `Replicas`; about the size of a group.
            takes_adapters: pushes bring only the adapter.
            say: called with each line that a person should read.
            is_main: whether this is the process that starts the servers and pushes.
            rank: of this process.
            world: number of processes, which share what a server has room for.
            broadcast: returns in every process what the main process passes to it.
            barrier: returns when every process of the run has called it.

        Raises:
            UserError: a model that servers cannot load, or not enough GPUs or ports for them.
        """
        server, vllm = options.server or VllmServerConfig(), options.vllm or VllmConfig()
        urls, processes = list(server.urls), None
        if not urls:
            if is_main:
                processes = start_servers(model, options, log_dir, say=say)
                urls = processes.urls
            urls = broadcast(urls)
        nccl = server.weight_transfer == "nccl" or (server.weight_transfer == "auto" and device.type == "cuda")
        return cls(
            urls,
            delivery=NcclDelivery(host=server.nccl_host, device=device) if nccl else None,
            on_update=vllm.on_update,
            dtype=vllm.dtype or model.dtype,
            quantized=vllm.quantization is not None,
            api_key=os.environ.get(server.api_key_env),
            slack=slack,
            most=max(slack, math.ceil(FULL * options.max_num_seqs / world)),
            first=rank,
            request_timeout_s=server.request_timeout_s,
            health_timeout_s=server.health_timeout_s,
            return_timeout_s=server.return_timeout_s,
            start_timeout_s=vllm.start_timeout_s,
            takes_adapters=takes_adapters,
            is_sender=is_main,
            barrier=barrier,
            say=say,
            processes=processes,
        )

    # --- sampling -------------------------------------------------------------------------------------------------

    async def generate(self, prompt_ids: list[int], sampling: Sampling, *, session: str) -> Completion:
        """Draw one completion; see `Engine.generate`. Cancelling the call ends the request on its server.

        Raises:
            UserError: an empty prompt, an impossible setting, or prompt + max_tokens beyond the servers' length.
            RunFailed: log-probabilities that are not finite, or no server left that could answer.
        """
        if self._closed or self.version is None:
            raise RunFailed("the vllm_server engine is closed" if self._closed else "no weights were pushed yet")
        self._check_request(prompt_ids, sampling)
        await self._check_temperature(sampling.temperature)

        async def work(server: VllmServer) -> Completion:
            return await server.generate(prompt_ids, sampling, session=session)

        for _ in range(MAX_ABORTS):
            completion = await self.replicas.call(work, session=session, prompt=prompt_ids)
            if completion.finish in ("stop", "length"):
                break
        else:
            raise RunFailed(f"session {session!r}: {MAX_ABORTS} pushes in a row aborted this request")
        if not all(map(math.isfinite, completion.logprobs)):
            raise RunFailed(
                f"vLLM gave log-probabilities that are not finite for session {session!r} (prompt of {len(prompt_ids)} "
                f"tokens, weights of version {self.version}): the weights are broken, usually by a diverged update; "
                "lower the learning rate or train in float32"
            )
        return completion

    async def logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        """Return the log-probabilities on which all replicas agree; see `Engine.logprobs`.

        Raises:
            RunFailed: the replicas do not agree; the message names the replica that serves something else.
        """
        while True:
            answers = await self.replicas.each(lambda server: server.logprobs(sequences))
            if answers:
                break
            await self.replicas.wait_for_one()
        self.agreement.limit = None if self.limit is None else self.limit.doubled()
        self.agreement.check(self.version, sequences, [(server.name, answer) for server, answer in answers])
        return answers[0][1]

    async def differing(self, sent: WeightSource | Adapter) -> list[str]:
        """Compare digests of `sent` with those of what every server received and holds; see `Engine.differing`.

        Servers that others have started may be unable to answer. What they compute is compared all the same.
        """
        if not isinstance(sent, Adapter) and self.takes_adapters:
            return await self._differing_base(sent)
        if isinstance(sent, Adapter):
            wanted = sent_adapter(sent, self.dtype)
        else:  # in every process, because gathering sharded weights needs them all
            wanted = sent_weights(sent(), self.dtype, quantized=self.quantized)
        if not self.is_sender:
            return []
        if self.takes_adapters and (different := differences(self._adapters.saved, wanted.parts)):
            return different
        different: list[str] = []
        for server, answers in await self.replicas.each(lambda server: server.holds()):
            if self.takes_adapters and server.adapter != self._adapter_name(self._num_adapters):
                return [f"the adapter itself, which no request to {server.name} asks for"]
            if answers is not None:
                found = server.held.adapter if self.takes_adapters else server.held.weights
                different += [f"{server.name}: {name}" for name in found(wanted, answers)]
        return different

    async def _differing_base(self, sent: WeightSource) -> list[str]:
        """Compare the base with what every server was started from; on each push, since another may take its place."""
        if self._base is None:
            self._base = sent_base(sent(), self.dtype)
        if not self.is_sender:
            return []
        held = await self.replicas.each(lambda server: server.holds())
        found = [(server, server.held.base(self._base, answers or [])) for server, answers in held]
        return [f"{server.name}: {name}" for server, names in found for name in names]

    # --- weights --------------------------------------------------------------------------------------------------

    async def load_weights(self, source: WeightSource, *, version: int) -> None:
        """Serve the weights of `source` from now on, as policy `version`, on every replica.

        Raises:
            UserError: servers that cannot take weights; the message says how to start them.
            RunFailed: names or shapes are not those of the model, or no server is left.
        """
        await self._connect()
        async with self.replicas.lock:
            self.version = version
            if self.is_sender:
                self.delivery.stage(source)
                await self._push()
            else:
                for _ in source():  # gathering sharded weights needs all processes
                    pass
        if not self.replicas.live:
            await self.replicas.wait_for_one()
        await asyncio.to_thread(self.barrier)  # rollouts and requests of this process go on meanwhile
        if not self.is_sender:
            await self._adopt_label()

    async def load_adapter(self, adapter: Adapter, *, version: int) -> None:
        """Serve the base weights with `adapter` from now on, as policy `version`, on every replica.

        Each version has its own name, so running requests finish under the adapter they began with, and nothing has to
        pause.

        Raises:
            UserError: servers that cannot load adapters; the message says how to start them.
            RunFailed: no server is left.
        """
        await self._connect()
        async with self.replicas.lock:
            self.version = version
            self._num_adapters += 1
            if self.is_sender:
                self._adapter, gone = self._adapters.save(adapter)
                await self.replicas.each(self._serve_adapter)
                old = [self._adapter_name(number) for number in gone]
                await self.replicas.each(lambda server: server.unload_adapters(old))
        if not self.replicas.live:
            await self.replicas.wait_for_one()
        await asyncio.to_thread(self.barrier)  # rollouts and requests of this process go on meanwhile
        if not self.is_sender:
            await self._adopt_label()

    async def _serve_adapter(self, server: VllmServer) -> None:
        try:
            await server.load_adapter(self._adapter_name(self._num_adapters), str(self._adapter))
        except ReplicaLost:
            raise
        except (ReplicaFailed, RunFailed) as error:
            await server.check_alive()
            raise UserError(
                f"the vLLM server {server.name} did not load the adapter ({error}): it must be started with "
                "--enable-lora --max-lora-rank R --max-loras 2, and see the folder (set LLMRL_SHARED_MEMORY if it runs "
                "on another machine)"
            ) from None
        await server.set_label(self.label)

    def _adapter_name(self, number: int) -> str:
        return f"{self.run}-adapter-{number}"

    async def sleep(self) -> None:
        """Do nothing: servers do not share their devices with the learner."""

    @property
    def label(self) -> str:
        """Name of the current weights on the servers: RUN/VERSION."""
        return f"{self.run}/{self.version}"

    async def _push(self) -> None:
        """Deliver the staged weights to every live server, while none of them generates."""
        await self.replicas.each(lambda server: server.pause(self.on_update))
        try:
            lost = await self.delivery.deliver(self.replicas.live, self.label)
        finally:
            await self.replicas.each(lambda server: server.resume())
        for server, reason in lost.items():
            self.replicas.lost(server, reason)

    async def _adopt_label(self) -> None:
        """Take what all servers serve as the new version, in a process that does not push."""
        answers = await self.replicas.each(lambda server: server.served_label())
        labels = {label for _, label in answers}
        if len(labels) != 1:
            raise RunFailed(f"after a push the vLLM servers serve different weights: {sorted(labels)}")
        self.run = labels.pop().rpartition("/")[0]
        for server, _ in answers:
            self._expect_current(server)

    def _expect_current(self, server: VllmServer) -> None:
        """Note what `server` serves when it is up to date, in a process that does not push."""
        server.note_label(self.label)
        server.adapter = self._adapter_name(self._num_adapters) if self.takes_adapters else None

    async def _restore(self, server: VllmServer) -> None:
        """Bring a lost server up to date, and check that it is before it gets work."""
        if self.processes is not None:
            self.processes.revive(server.name)
        await server.connect()
        if self.version is None:
            return
        if not self.is_sender:  # the process that pushes brings it up to date
            self._expect_current(server)
            await server.check()
            return
        await server.check_alive()
        if self.takes_adapters:
            # If it only hung, it still has the adapter and would refuse to load it a second time.
            await server.unload_adapters([self._adapter_name(self._num_adapters)])
            await self._serve_adapter(server)
        else:
            await server.pause("abort")
            for reason in (await self.delivery.deliver([server], self.label)).values():
                raise ReplicaLost(reason)
            await server.resume()
        served = self.agreement.last
        if served is not None and served.version == self.version:
            self.agreement.check_one(served, await server.logprobs(served.sequences))

    # --- the servers ----------------------------------------------------------------------------------------------

    async def _connect(self) -> None:
        """Wait, the first time, for the servers to come up, and check that they can do what is needed."""
        self.replicas.watch()
        if self._connected:
            return
        deadline = time.monotonic() + self.start_timeout_s
        for slot in self.replicas.slots:
            await self._connect_one(slot.replica, deadline)
        models = {server.model for server in self.replicas.live}
        if len(models) > 1:
            raise UserError(f"the vLLM servers serve different models: {sorted(models)}")
        self._connected = True

    async def _connect_one(self, server: VllmServer, deadline: float) -> None:
        started = last_report = time.monotonic()
        while True:
            try:
                await server.connect()
                break
            except ReplicaFailed as error:
                if self.processes is not None:
                    self.processes.check()
                now = time.monotonic()
                if now > deadline:
                    raise UserError(
                        f"no vLLM server answers at {server.name} ({error}) after {self.start_timeout_s:g} s "
                        "(rollout.vllm.start_timeout_s): start it with `llmrl serve`, or correct rollout.server.urls"
                    ) from None
                if now - last_report > 10:
                    last_report = now
                    self.say(f"waiting for the vLLM server {server.name}, {now - started:.0f} s so far")
                await asyncio.sleep(0.5)
        if self.takes_adapters:
            server.require(ADAPTER_ROUTES, f"{DEV_MODE}, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1")
        else:
            server.require(WEIGHT_ROUTES, DEV_MODE)

    def _check_request(self, prompt_ids: list[int], sampling: Sampling) -> None:
        check_sampling(sampling)
        if not prompt_ids:
            raise UserError("the prompt is empty: give at least one token (such as the tokenizer's bos token)")
        limits = [server.max_model_len for server in self.replicas.live if server.max_model_len is not None]
        total = len(prompt_ids) + sampling.max_tokens
        if limits and total > min(limits):
            raise UserError(
                f"a prompt of {len(prompt_ids)} tokens and max_tokens {sampling.max_tokens} make {total}, but the "
                f"servers were started with --max-model-len {min(limits)}: raise it or shorten either"
            )

    async def _check_temperature(self, temperature: float) -> None:
        """Check, once per temperature, that servers report log-probabilities of the distribution they sample from."""
        if temperature in self._temperatures:
            return
        self._temperatures.add(temperature)
        for server, applied in await self.replicas.each(lambda server: server.applies_temperature_to_logprobs()):
            if not applied:
                raise UserError(
                    f"{server.name} reports log-probabilities at temperature 1 whatever temperature it samples at, and "
                    f"this run needs temperature {temperature}: start it with --logprobs-mode processed_logprobs"
                )

    async def close(self) -> None:
        """Close connections, remove staged files, and end the servers this run started. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        await self.replicas.close()
        for slot in self.replicas.slots:
            await slot.replica.close()
        self.delivery.close()
        self._adapters.close()
        if self.processes is not None:
            self.processes.close()
