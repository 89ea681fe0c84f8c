"""The `vllm` engine: vLLM beside the trainer, its core in a separate process.

Prompt token ids and a `Sampling` in, a `Completion` out as soon as that request is finished.

vLLM's core never runs inside the trainer's process. There it would draw from torch's random numbers at every step,
replace `torch.set_num_threads`, join and later destroy the trainer's process group, and hold the interpreter lock while
the learner works. Only vLLM's client runs here, on an event loop in its own thread.
"""

# pyright: reportMissingImports=false
# (vLLM is an extra)
from __future__ import annotations

import asyncio
import contextlib
import math
import os
import tempfile
from collections.abc import Coroutine
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING, Any

import torch

from llmrl.engines.sampling import check_sampling, check_tokens
from llmrl.engines.vllm.adapters import AdapterFolders, save_base
from llmrl.engines.vllm.digests import Held, differences, sent_adapter, sent_base, sent_weights
from llmrl.engines.vllm.options import VllmConfig
from llmrl.engines.vllm.start import LoopThread, engine_arguments, save_config, start, stop
from llmrl.engines.vllm.transfer import REFUSED, StagedWeights
from llmrl.errors import RunFailed, UserError
from llmrl.model.positions import longest_exact
from llmrl.noise import Limit
from llmrl.types import Adapter, Completion, Sampling, WeightSource

if TYPE_CHECKING:
    from transformers import PretrainedConfig


SMALLEST_TEMPERATURE = 0.01
"""vLLM silently raises lower temperatures to this one."""


class VllmEngine:
    """An `Engine` over vLLM on this machine, with its own copy of the weights.

    It serves nothing before the first push. Each request has its own seed and random numbers, so its tokens do not
    depend on what else is in the batch. Requests with equal prompts share its computation through vLLM's prefix cache.

    Args:
        config: transformers' configuration of the model.
        options: `rollout.vllm`.
        dtype: type of the policy. vLLM computes in it unless the options name another one.
        max_num_seqs: requests decoded together.
        device: the trainer's device: `cpu`, or the GPU that vLLM shares with it.
        trust_remote_code: whether the architecture's code comes with the model.
        path: folder or hub id to take the architecture from. Default: only `config`.
        base: the weights under the adapters. If given, the engine keeps them and each push brings only an adapter
            (`load_adapter`); otherwise each push brings all weights (`load_weights`).
        lora_rank: largest rank of those adapters.

    Raises:
        UserError: vLLM is not installed, or refuses the model or the options.
        RunFailed: vLLM took longer than `start_timeout_s` to start.
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
        base: WeightSource | None = None,
        lora_rank: int = 16,
    ) -> None:
        self.options = options or VllmConfig()
        self.device = torch.device(device)
        if self.options.weight_transfer == "ipc":
            if self.device.type != "cuda":
                raise UserError("rollout.vllm.weight_transfer ipc needs a GPU: leave it at shared_memory")
            os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # handles are pickled, between our own processes
        if self.options.enable_sleep_mode and self.device.type == "cpu":
            raise UserError("rollout.vllm.enable_sleep_mode: vLLM cannot sleep on a CPU; leave it out")
        self.vocab_size = config.get_text_config().vocab_size
        self.takes_adapters = base is not None
        self.dtype: torch.dtype = getattr(torch, self.options.dtype or dtype)
        self.quantized = self.options.quantization is not None
        self.limit: Limit | None = None
        self._held = Held()
        self._base: dict[str, str] | None = None
        self.version: int | None = None
        self._asleep = False
        self._staged = StagedWeights()
        self._adapters = AdapterFolders()
        self._adapter: Any = None
        self._adapter_version = 0
        self._count = 0
        self._closed: str | None = None
        self._stopped = False
        self._thread = LoopThread("vllm engine")
        try:
            with save_base(base) if base else tempfile.TemporaryDirectory(prefix="llmrl-") as folder:
                save_config(config, folder)
                arguments = engine_arguments(
                    self.options,
                    path if path and not base else folder,
                    dtype=dtype,
                    device=self.device.type,
                    max_num_seqs=max_num_seqs,
                    lora_rank=lora_rank if base else None,
                )
                arguments["trust_remote_code"] = trust_remote_code
                if arguments["max_model_len"] is None:
                    arguments["max_model_len"] = longest_exact(config)
                self._llm = self._thread.run(start(arguments, config, self.device), self.options.start_timeout_s)
        except FutureTimeout:
            self._thread.stop()
            raise RunFailed(f"vLLM did not start within {self.options.start_timeout_s:g} s") from None
        except BaseException:
            self._thread.stop()
            raise
        self.max_model_len: int = self._llm.model_config.max_model_len

    async def generate(self, prompt_ids: list[int], sampling: Sampling, *, session: str) -> Completion:
        """Draw one completion; see `Engine.generate`. Cancelling the call frees its slot.

        Raises:
            UserError: an empty prompt, a token outside the vocabulary, an impossible setting, or prompt + max_tokens
                beyond the engine's length.
            RunFailed: log-probabilities that are not finite, or an engine that is closed or has died.
        """
        self._check_open()
        if self.version is None or self._asleep:
            raise RunFailed("the vllm engine has no weights yet, or is asleep: push weights first")
        self._check_request(prompt_ids, sampling)
        return await self._thread.call(self._generate(prompt_ids, sampling, session))

    async def logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        """Return log-probabilities (temperature 1) of each token after the first; see `Engine.logprobs`."""
        self._check_open()
        for sequence in sequences:
            check_tokens(sequence, self.vocab_size)
        return await self._thread.call(self._logprobs(sequences))

    async def load_weights(self, source: WeightSource, *, version: int) -> None:
        """Serve the weights of `source` from now on, as policy `version`.

        `source` is iterated once. Names and shapes are checked in vLLM's process before any weight changes.

        Raises:
            RunFailed: names are missing, unexpected or wrongly shaped (the old weights are still served), or vLLM
                failed.
        """
        self._check_open()
        if self.takes_adapters:
            raise RunFailed("this vllm engine keeps its base weights and takes adapters: call load_adapter")
        await self._wake("weights")
        if self.options.weight_transfer == "ipc":
            await asyncio.to_thread(self._load_by_ipc, source, version)
        else:
            await self._thread.call(self._load(self._staged.stage(source), version))
        await self._wake("kv_cache")
        self.version = version

    async def load_adapter(self, adapter: Adapter, *, version: int) -> None:
        """Serve the base weights with `adapter` from now on, as policy `version`.

        Running requests continue under the adapter they began with, unless `on_update` is wait or abort.

        Raises:
            RunFailed: vLLM did not take the adapter; the old one is still served.
        """
        self._check_open()
        await self._wake("weights", "kv_cache")
        folder, old = self._adapters.save(adapter)
        await self._thread.call(self._load_adapter(str(folder), version, old))
        self.version = version

    async def differing(self, sent: WeightSource | Adapter) -> list[str]:
        """Compare digests of `sent` with those of what vLLM's workers received and hold; see `Engine.differing`."""
        self._check_open()
        answers = await self._thread.call(self._llm.collective_rpc("llmrl_held"))
        if not isinstance(sent, Adapter) and self.takes_adapters:
            if self._base is None:
                self._base = sent_base(sent(), self.dtype)
            return self._held.base(self._base, answers)
        if not isinstance(sent, Adapter):
            return self._held.weights(sent_weights(sent(), self.dtype, quantized=self.quantized), answers)
        if self._adapter is None or self._adapter.lora_int_id != self._adapters.count:
            return ["the adapter itself, which no request asks for"]
        wanted = sent_adapter(sent, self.dtype)
        return differences(self._adapters.saved, wanted.parts) or self._held.adapter(wanted, answers)

    async def sleep(self) -> None:
        """Lend the GPU's memory to the learner until the next push, if `enable_sleep_mode` is set."""
        if self.options.enable_sleep_mode and not self._asleep:
            await self._thread.call(self._llm.sleep(level=1, mode="keep"))
            self._asleep = True

    async def _wake(self, *tags: str) -> None:
        """Wake parts of vLLM by their tags: `weights` before a push and `kv_cache` after it.

        So old and new weights are never in memory together with a full cache.
        """
        if self._asleep:
            awake = await self._thread.call(self._llm.wake_up(list(tags)))
            self._asleep = not awake

    async def close(self) -> None:
        """End vLLM's processes. Requests that still wait fail with RunFailed. Safe to call twice."""
        if self._stopped:
            return
        self._stopped, self._closed = True, "it is closed"
        await asyncio.to_thread(self._shutdown)

    def _shutdown(self) -> None:
        with contextlib.suppress(FutureTimeout):
            self._thread.run(stop(self._llm), 60)
        self._thread.stop()
        self._staged.close()
        self._adapters.close()

    # --- requests -------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed is not None:
            raise RunFailed(f"the vllm engine serves no requests: {self._closed}")

    def _check_request(self, prompt_ids: list[int], sampling: Sampling) -> None:
        check_sampling(sampling)
        if 0 < sampling.temperature < SMALLEST_TEMPERATURE:
            raise UserError(f"temperature {sampling.temperature}: vLLM takes 0 or at least {SMALLEST_TEMPERATURE}")
        check_tokens(prompt_ids, self.vocab_size)
        total = len(prompt_ids) + sampling.max_tokens
        if total > self.max_model_len:
            raise UserError(
                f"a prompt of {len(prompt_ids)} tokens and max_tokens {sampling.max_tokens} make {total}, but vLLM "
                f"was started for {self.max_model_len}: raise rollout.vllm.max_model_len or shorten either"
            )

    async def _generate(self, prompt_ids: list[int], sampling: Sampling, session: str) -> Completion:
        version = self._adapter_version if self.takes_adapters else self.version or 0
        output = (await self._final(prompt_ids, sampling_params(sampling))).outputs[0]
        token_ids, logprobs = list(output.token_ids), sampled_logprobs(output.logprobs)
        if not all(map(math.isfinite, logprobs)):
            raise RunFailed(
                f"vLLM gave log-probabilities that are not finite for session {session!r} (prompt of "
                f"{len(prompt_ids)} tokens, weights of version {self.version}): the weights are broken, usually by a "
                "diverged update; lower the learning rate or train in float32"
            )
        spans = [(version, len(token_ids))] if self.takes_adapters else version_spans(output.weight_versions)
        versions = [version for version, _ in spans] or [version]
        return Completion(
            token_ids=token_ids,
            logprobs=logprobs,
            finish=finish_reason(output.finish_reason),
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
        """Return the finished output of one request."""
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        self._count += 1
        last = None
        try:
            async for output in self._llm.generate(
                {"prompt_token_ids": prompt_ids}, params, str(self._count), lora_request=self._adapter
            ):
                last = output
        except (EngineDeadError, EngineGenerateError) as error:
            raise RunFailed(f"vLLM's process has died or failed; its log is above ({error!r})") from error
        return last

    # --- weights --------------------------------------------------------------------------------------------------

    async def _load(self, staged: dict[str, Any], version: int) -> None:
        """Load staged weights between a pause and a resume, so that no step sees half of them."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest

        await self._llm.pause_generation(mode=self.options.on_update, clear_cache=True)
        try:
            if self.version is None:
                await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info={}))
            await self._llm.start_weight_update()
            await self._llm.update_weights(WeightTransferUpdateRequest(update_info=staged))
            await self._llm.finish_weight_update(str(version))
        except Exception as error:
            if REFUSED not in str(error):  # vLLM may hold half of the weights, and the next step would kill it
                self._closed = f"loading the weights of version {version} failed halfway"
            raise RunFailed(f"vLLM did not take the weights of version {version}: {_cause(error)}") from error
        finally:
            if self._closed is None:
                await self._llm.resume_generation()

    def _load_by_ipc(self, source: WeightSource, version: int) -> None:
        from llmrl.engines.vllm.ipc import send_by_ipc

        def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
            return self._thread.run(coroutine, self.options.start_timeout_s)

        run(self._llm.pause_generation(mode=self.options.on_update, clear_cache=True))
        try:
            send_by_ipc(self._llm, run, source)
            run(self._llm.update_weight_version(str(version)))
            run(self._llm.resume_generation())
        except Exception as error:
            self._closed = f"loading the weights of version {version} failed halfway"
            raise RunFailed(f"vLLM did not take the weights of version {version}: {error}") from error

    async def _load_adapter(self, folder: str, version: int, old: list[int]) -> None:
        """Load an adapter under a new name and id, because vLLM would serve the old adapter for a name it knows."""
        from vllm.lora.request import LoRARequest

        number = self._adapters.count
        request = LoRARequest(lora_name=f"policy-{version}-{number}", lora_int_id=number, lora_path=folder)
        pause = self.options.on_update != "keep" and self._adapter is not None
        if pause:
            await self._llm.pause_generation(mode=self.options.on_update, clear_cache=False)
        try:
            if not await self._llm.add_lora(request):
                raise RunFailed(f"vLLM did not take the adapter of version {version}")
            for gone in old:
                await self._llm.remove_lora(gone)
        except Exception as error:
            raise RunFailed(f"vLLM did not take the adapter of version {version}: {error}") from error
        finally:
            if pause:
                await self._llm.resume_generation()
        self._adapter, self._adapter_version = request, version


def sampling_params(sampling: Sampling) -> Any:
    """Return vLLM's form of a request: ids only, one log-probability per token, the stop token kept, no text."""
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
    """Return one number per sampled token, from vLLM's flat list, in which each token has a row of one entry."""
    return [logprobs.logprobs[start] for start in logprobs.start_indices]


def version_spans(spans: Any) -> list[tuple[int, int]]:
    """Return (version, number of tokens) in order, from vLLM's spans; their labels are the versions we pushed."""
    return [(int(span.version), span.end - span.start) for span in spans or [] if span.end > span.start]


def finish_reason(reason: str | None) -> Any:
    """Map vLLM's finish reason to ours. Anything but stop and length means that the request was aborted."""
    return reason if reason in ("stop", "length") else "abort"


def _cause(error: BaseException) -> str:
    """Return vLLM's message without the prefix that its remote call added."""
    text = str(error)
    return text[text.index(REFUSED) :] if REFUSED in text else text
