"""Starting vLLM: its arguments, the environment its processes get, and leaving ours as it was.

vLLM changes the process it is imported into: it seeds torch's random numbers, sets environment variables, replaces
`torch.set_num_threads`. All of that is dealt with here.
"""

# pyright: reportMissingImports=false
# (vLLM is an extra)
from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import random
import threading
import warnings
from collections.abc import Coroutine, Iterator
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmrl.engines.vllm.adapters import ADAPTERS_KEPT
from llmrl.engines.vllm.transfer import RECEIVER_ARGS
from llmrl.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.v1.engine.async_llm import AsyncLLM

    from llmrl.engines.vllm.options import VllmConfig

IPC_ARGS = {"weight_transfer_config": {"backend": "ipc"}}
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What accelerate tells the trainer's processes about each other is not meant for vLLM's."""
SHARE_BESIDE_TRAINER = 0.4
"""Of a GPU's memory, where the trainer uses the same GPU."""
CPU_CACHE_BYTES = 512 << 20
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM can make room for."""
CPU_BLOCK_SIZE = 32
"""A multiple of it is what vLLM's kernels for CPUs want; the smallest shares most of a prompt."""


def engine_arguments(
    options: VllmConfig, model: str, *, dtype: str, device: str, max_num_seqs: int, lora_rank: int | None = None
) -> dict[str, Any]:
    """Arguments of vLLM's `EngineArgs` for an engine that serves `model` to a trainer.

    Without `lora_rank` only its architecture is taken and weights are pushed later; with it the weights are loaded too,
    and adapters of that rank are.
    """
    on_cpu = device == "cpu"
    arguments: dict[str, Any] = {
        "model": model,
        "runner": "generate",
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
        **(RECEIVER_ARGS if options.weight_transfer != "ipc" else IPC_ARGS),
    }
    if on_cpu:
        arguments["kv_cache_memory_bytes"] = options.kv_cache_memory_bytes or CPU_CACHE_BYTES
        arguments["block_size"] = CPU_BLOCK_SIZE
        # A prompt computed in parts gives no token before the last one, and vLLM then steps the request's generator
        # back. Torch's generators for CPUs cannot: its core would die ("CPU Generator does not use offset").
        arguments["enable_chunked_prefill"] = False
    else:
        share = options.gpu_memory_utilization
        arguments["gpu_memory_utilization"] = SHARE_BESIDE_TRAINER if share is None else share
        arguments["enable_sleep_mode"] = options.enable_sleep_mode
    if lora_rank is not None:
        rank = next((known for known in LORA_RANKS if known >= lora_rank), lora_rank)
        # Two in a batch: requests that began under the last version go on beside those of the new one.
        arguments |= {"load_format": "auto", "enable_lora": True, "max_lora_rank": rank}
        arguments |= {"max_loras": 2, "max_cpu_loras": ADAPTERS_KEPT}
    return arguments | options.extra


def save_config(config: PretrainedConfig, folder: str) -> None:
    """Write config.json with the causal language model's class in it, which a model made from a configuration lacks."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    written = copy.deepcopy(config)
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if not written.architectures and known:
        written.architectures = [known]
    written.save_pretrained(folder)


async def start(arguments: dict[str, Any], config: PretrainedConfig, device: torch.device) -> AsyncLLM:
    """Start vLLM's process; this one's environment and random numbers are as before afterwards.

    Raises:
        UserError: vLLM is not installed, or refuses the model or the arguments.
    """
    replicas = arguments["tensor_parallel_size"] * arguments["data_parallel_size"]
    with undisturbed(beside_trainer(device, alone=replicas == 1)):
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise not_installed(error) from error
        check_head_dim(config, on_cpu=device.type == "cpu")
        try:
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"vLLM did not start: {error}") from error


def not_installed(error: ImportError) -> UserError:
    return UserError(
        f"vLLM cannot be imported ({error}). On a GPU: pip install 'llmrl[vllm]'; without one see the README, section "
        "vLLM on a CPU"
    )


def check_head_dim(config: PretrainedConfig, *, on_cpu: bool) -> None:
    """Refuse heads of a width that vLLM would get wrong, or has no attention for on a CPU.

    Raises:
        UserError: with the width and what to do; or vLLM is needed to tell, and is not installed.
    """
    text = config.get_text_config()
    derived = text.hidden_size // text.num_attention_heads
    width = getattr(text, "head_dim", None) or derived
    if text.model_type == "qwen2" and width != derived:
        raise UserError(
            f"vLLM takes the width of a qwen2 model's heads to be hidden_size / num_attention_heads = {derived}, but "
            f"its head_dim is {width}: use rollout.engine hf for this model"
        )
    if not on_cpu:
        return
    try:
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    except ImportError as error:
        raise not_installed(error) from error
    if width not in (known := CPUAttentionBackend.get_supported_head_sizes()):
        raise UserError(
            f"vLLM on a CPU has no attention for heads of width {width}, only {known}: use rollout.engine hf for this "
            "model"
        )


async def stop(llm: AsyncLLM) -> None:
    llm.shutdown()


def vllm_environment(device: str, *, alone: bool = True) -> dict[str, str]:
    """Environment variables vLLM's processes want; what the user has set stays.

    Args:
        device: type of the one vLLM runs on.
        alone: with one worker.
    """
    wanted = {"VLLM_NO_USAGE_STATS": "1"}
    if device == "cpu":
        # Its warnings are about libraries it wants preloaded. Asking for log-probabilities compiles a kernel at the
        # first request unless dynamo is off; threads bound to cores would fight over the same ones. "Multiprocessing"
        # would put the model into a second process below that of the core, which is apart from ours in any case.
        wanted |= {
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if alone else "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "TORCHDYNAMO_DISABLE": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }
    else:
        wanted["VLLM_LOGGING_LEVEL"] = "WARNING"
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def beside_trainer(device: torch.device, *, alone: bool) -> dict[str, str | None]:
    """The same for vLLM's processes below a trainer's (None: without that variable): one worker belongs on its GPU."""
    environment: dict[str, str | None] = dict(vllm_environment(device.type, alone=alone))
    environment |= dict.fromkeys(LAUNCHER_VARIABLES)
    if device.type == "cuda" and alone:
        visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        index = device.index or 0
        environment["CUDA_VISIBLE_DEVICES"] = visible[index] if visible else str(index)
    return environment


@contextlib.contextmanager
def undisturbed(environment: dict[str, str | None]) -> Iterator[None]:
    """Set variables for what is inside; put environment, random numbers and thread settings back afterwards."""
    before, numbers = dict(os.environ), (random.getstate(), np.random.get_state(), torch.get_rng_state())
    set_num_threads = torch.set_num_threads
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
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


async def _cancel_all() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
