"""The `vllm` engine: vLLM beside the trainer, its core in a process of its own.

Prompt token ids and a `Sampling` in, a `Completion` out as soon as that request is finished.

vLLM's core never runs inside the trainer's process: there it would draw from torch's random numbers at every step,
replace `torch.set_num_threads`, join and later destroy the trainer's process group, and hold the interpreter while the
learner works. What is left here is vLLM's client, on an event loop in a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import tempfile
import threading
import warnings
from collections.abc import Coroutine, Iterator
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmrl.config.vllm import VllmConfig
from llmrl.errors import RunFailed, UserError
from llmrl.rollout.token_sampling import check_sampling
from llmrl.rollout.vllm_transfer import RECEIVER_ARGS, REFUSED, StagedWeights
from llmrl.types import Completion, Sampling

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.v1.engine.async_llm import AsyncLLM

    from llmrl.rollout.engine import WeightSource

SHARE_BESIDE_TRAINER = 0.4
"""Of a GPU's memory, where the trainer uses the same GPU."""
CPU_CACHE_BYTES = 512 << 20
CPU_BLOCK_SIZE = 32
"""A multiple of it is what vLLM's kernels for CPUs want; the smallest shares most of a prompt."""
SMALLEST_TEMPERATURE = 0.01
"""vLLM raises lower temperatures to this one, silently."""


class VllmEngine:
    """An `Engine` over vLLM on this machine, with its own copy of the weights.

    It starts with random weights and serves nothing before the first `load_weights`. Each request has its own seed and
    its own random numbers, so its tokens do not depend on what else is in the batch; requests with equal prompts share
    its computation through vLLM's prefix cache.

    Args:
        config: of the model.
        options: `rollout.vllm`.
        dtype: of the policy; what vLLM computes in unless the options say otherwise.
        max_num_seqs: requests decoded together.
        device: of the trainer: `cpu`, or the GPU that vLLM shares with it.
        trust_remote_code: whether the architecture's code comes with the model.
        path: folder or hub id to take the architecture from; default: `config` alone.

    Raises:
        UserError: vLLM is not installed, or refuses the model or the options.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        options: VllmConfig | None = None,
        dtype: str = "float32",
        max_num_seqs: int = 128,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
        path: str | None = None,
    ) -> None:
        self.options = options or VllmConfig()
        self.vocab_size = config.get_text_config().vocab_size
        self.device = torch.device(device)
        self.version: int | None = None
        self._staged = StagedWeights()
        self._count = 0
        self._closed: str | None = None
        self._stopped = False
        self._thread = LoopThread("vllm engine")
        try:
            with tempfile.TemporaryDirectory(prefix="llmrl-") as folder:
                if path is None:
                    config.save_pretrained(folder)
                arguments = engine_arguments(self.options, path or folder, dtype, self.device.type, max_num_seqs)
                arguments["trust_remote_code"] = trust_remote_code
                head_dim = _head_dim(config) if self.device.type == "cpu" else None
                self._llm = self._thread.run(_start(arguments, head_dim), self.options.start_timeout_s)
        except FutureTimeout:
            self._thread.stop()
            raise RunFailed(f"vLLM did not start within {self.options.start_timeout_s:g} s") from None
        except BaseException:
            self._thread.stop()
            raise
        self.max_model_len: int = self._llm.model_config.max_model_len

    async def generate(self, prompt_ids: list[int], sampling: Sampling, *, session: str) -> Completion:
        """Draw one completion; see `Engine.generate`. Cancelling the call frees its place.

        Raises:
            UserError: an empty prompt, a token outside the vocabulary, an impossible setting, or prompt + max_tokens
                beyond the engine's length.
            RunFailed: log-probabilities that are not finite, or an engine that is closed or dead.
        """
        self._check_open()
        if self.version is None:
            raise RunFailed("the vllm engine has no weights yet: push them first")
        self._check_request(prompt_ids, sampling)
        return await self._thread.call(self._generate(prompt_ids, sampling, session))

    async def logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        """Log-probabilities (temperature 1) of each token after the first; see `Engine.logprobs`."""
        self._check_open()
        for sequence in sequences:
            self._check_tokens(sequence)
        return await self._thread.call(self._logprobs(sequences))

    async def load_weights(self, source: WeightSource, *, version: int) -> None:
        """Serve the weights of `source` from now on, as policy `version`.

        `source` is gone through once. Names and shapes are checked in vLLM's process before any weight changes.

        Raises:
            RunFailed: names are missing, unexpected or wrongly shaped (the old weights are still served), or vLLM
                failed.
        """
        self._check_open()
        staged = self._staged.stage(source)
        await self._thread.call(self._load(staged, version))
        self.version = version

    async def close(self) -> None:
        """End vLLM's processes. Requests that still wait fail with RunFailed. Safe to call twice."""
        if self._stopped:
            return
        self._stopped, self._closed = True, "it is closed"
        await asyncio.to_thread(self._shutdown)

    def _shutdown(self) -> None:
        with contextlib.suppress(FutureTimeout):
            self._thread.run(_stop(self._llm), 60)
        self._thread.stop()
        self._staged.close()

    # --- requests -------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed is not None:
            raise RunFailed(f"the vllm engine serves no requests: {self._closed}")

    def _check_request(self, prompt_ids: list[int], sampling: Sampling) -> None:
        check_sampling(sampling)
        if 0 < sampling.temperature < SMALLEST_TEMPERATURE:
            raise UserError(f"temperature {sampling.temperature}: vLLM knows 0 and from {SMALLEST_TEMPERATURE} upwards")
        self._check_tokens(prompt_ids)
        total = len(prompt_ids) + sampling.max_tokens
        if total > self.max_model_len:
            raise UserError(
                f"a prompt of {len(prompt_ids)} tokens and max_tokens {sampling.max_tokens} make {total}, but vLLM "
                f"was started for {self.max_model_len}: raise rollout.vllm.max_model_len or shorten either"
            )

    def _check_tokens(self, token_ids: list[int]) -> None:
        if not token_ids:
            raise UserError("the prompt is empty: give at least one token (such as the tokenizer's bos token)")
        if min(token_ids) < 0 or max(token_ids) >= self.vocab_size:
            raise UserError(
                f"token ids from {min(token_ids)} to {max(token_ids)} do not fit the model's vocabulary of "
                f"{self.vocab_size}: tokenizer and model do not belong together"
            )

    async def _generate(self, prompt_ids: list[int], sampling: Sampling, session: str) -> Completion:
        output = (await self._final(prompt_ids, sampling_params(sampling))).outputs[0]
        token_ids, logprobs = list(output.token_ids), sampled_logprobs(output.logprobs)
        if not all(map(math.isfinite, logprobs)):
            raise RunFailed(
                f"vLLM gave log-probabilities that are not finite for session {session!r} (prompt of "
                f"{len(prompt_ids)} tokens, weights of version {self.version}): the weights are broken, usually by a "
                "diverged update; lower the learning rate or train in float32"
            )
        spans = [(int(span.version), span.end - span.start) for span in output.weight_versions or []]
        versions = [version for version, _ in spans] or [self.version or 0]
        return Completion(
            token_ids=token_ids,
            logprobs=logprobs,
            finish=finish_of(output.finish_reason),
            policy_version=(min(versions), max(versions)),
            version_spans=spans,
        )

    async def _logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        outputs = await asyncio.gather(*[self._final(sequence, params) for sequence in sequences])
        return [
            [row[token].logprob for token, row in zip(sequence[1:], output.prompt_logprobs[1:], strict=True)]
            for sequence, output in zip(sequences, outputs, strict=True)
        ]

    async def _final(self, prompt_ids: list[int], params: Any) -> Any:
        """The finished output of one request."""
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        self._count += 1
        last = None
        try:
            async for output in self._llm.generate({"prompt_token_ids": prompt_ids}, params, str(self._count)):
                last = output
        except (EngineDeadError, EngineGenerateError) as error:
            raise RunFailed(f"vLLM's process has died or failed; its log is above ({error!r})") from error
        return last

    # --- weights --------------------------------------------------------------------------------------------------

    async def _load(self, staged: dict[str, Any], version: int) -> None:
        """Between a pause and a resume: no step may see half of the weights."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest

        if self.version is None:
            await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info={}))
        await self._llm.pause_generation(mode=self.options.on_update, clear_cache=True)
        try:
            await self._llm.start_weight_update()
            await self._llm.update_weights(WeightTransferUpdateRequest(update_info=staged))
            await self._llm.finish_weight_update(str(version))
        except Exception as error:
            if REFUSED not in str(error):  # vLLM may hold half of the weights: the next step would kill it
                self._closed = f"loading the weights of version {version} failed half-way"
            raise RunFailed(f"vLLM did not take the weights of version {version}: {_cause(error)}") from error
        finally:
            if self._closed is None:
                await self._llm.resume_generation()


def engine_arguments(options: VllmConfig, model: str, dtype: str, device: str, max_num_seqs: int) -> dict[str, Any]:
    """Arguments of vLLM's `EngineArgs` for an engine that serves `model`'s architecture to a trainer."""
    on_cpu = device == "cpu"
    arguments: dict[str, Any] = {
        "model": model,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "dtype": options.dtype or dtype,
        "max_num_seqs": max_num_seqs,
        "tensor_parallel_size": options.tensor_parallel_size,
        "data_parallel_size": options.data_parallel_size,
        "max_model_len": options.max_model_len,
        "enable_prefix_caching": options.enable_prefix_caching,
        "enforce_eager": on_cpu if options.enforce_eager is None else options.enforce_eager,
        "quantization": options.quantization,
        "speculative_config": options.speculative_config,
        "kv_cache_memory_bytes": options.kv_cache_memory_bytes,
        "disable_log_stats": True,
        **RECEIVER_ARGS,
    }
    if on_cpu:
        arguments["kv_cache_memory_bytes"] = options.kv_cache_memory_bytes or CPU_CACHE_BYTES
        arguments["block_size"] = CPU_BLOCK_SIZE
    else:
        share = options.gpu_memory_utilization
        arguments["gpu_memory_utilization"] = SHARE_BESIDE_TRAINER if share is None else share
        arguments["enable_sleep_mode"] = options.enable_sleep_mode
    return arguments | options.extra


def sampling_params(sampling: Sampling) -> Any:
    """Our request in vLLM's words: ids only, one log-probability per token, the stop token kept, no text."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=True,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def sampled_logprobs(logprobs: Any) -> list[float]:
    """One number per sampled token, from vLLM's flat list, in which each token has a row of one entry."""
    return [logprobs.logprobs[start] for start in logprobs.start_indices]


def finish_of(reason: str | None) -> Any:
    """Give vLLM's finish reason in our words; what is neither stop nor length is a request that was given up."""
    return reason if reason in ("stop", "length") else "abort"


async def _start(arguments: dict[str, Any], cpu_head_dim: int | None) -> AsyncLLM:
    """Start vLLM's process; this one's environment and random numbers are as before afterwards."""
    with undisturbed(vllm_environment("gpu" if cpu_head_dim is None else "cpu")):
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise UserError(
                f"rollout.engine vllm: vLLM cannot be imported ({error}). On a GPU: pip install 'llmrl[vllm]'; without "
                "one see the README, section vLLM on a CPU"
            ) from error
        if cpu_head_dim is not None:
            from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

            if cpu_head_dim not in (known := CPUAttentionBackend.get_supported_head_sizes()):
                raise UserError(
                    f"vLLM on a CPU has no attention for heads of width {cpu_head_dim}, only {known}: use "
                    "rollout.engine hf for this model"
                )
        try:
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"vLLM did not start: {error}") from error


def _head_dim(config: PretrainedConfig) -> int:
    text = config.get_text_config()
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


async def _stop(llm: AsyncLLM) -> None:
    llm.shutdown()


def vllm_environment(device: str) -> dict[str, str]:
    """Environment variables vLLM's processes start with; what the user has set stays."""
    wanted = {"VLLM_NO_USAGE_STATS": "1"}
    if device == "cpu":
        # Its warnings are about libraries it wants preloaded. Asking for log-probabilities compiles a kernel at the
        # first request unless dynamo is off; threads bound to cores would fight over the same ones. "Multiprocessing"
        # would put the model into a second process below that of the core, which is apart from ours in any case.
        wanted |= {
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "TORCHDYNAMO_DISABLE": "1",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }
    else:
        wanted["VLLM_LOGGING_LEVEL"] = "WARNING"
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


@contextlib.contextmanager
def undisturbed(environment: dict[str, str]) -> Iterator[None]:
    """Set variables for what is inside; put environment, random numbers and thread settings back afterwards."""
    before, numbers = dict(os.environ), (random.getstate(), np.random.get_state(), torch.get_rng_state())
    set_num_threads = torch.set_num_threads
    os.environ.update(environment)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # importing vLLM gives several, about its own code
            yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)
        random.setstate(numbers[0])
        np.random.set_state(numbers[1])
        torch.set_rng_state(numbers[2])
        torch.set_num_threads = set_num_threads


class LoopThread:
    """An event loop in a thread of its own."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    async def call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine there and await it here; cancelling one cancels the other."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self.loop))

    def run(self, coroutine: Coroutine[Any, Any, Any], timeout: float) -> Any:
        """Run a coroutine there and block until it is done."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout)

    def stop(self) -> None:
        """Cancel what runs there and end the thread."""
        if not self._thread.is_alive():
            return
        with contextlib.suppress(FutureTimeout):
            self.run(_cancel_all(), 10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)


def _cause(error: BaseException) -> str:
    """Give vLLM's message without what its remote call put before it."""
    text = str(error)
    return text[text.index(REFUSED) :] if REFUSED in text else text


async def _cancel_all() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
