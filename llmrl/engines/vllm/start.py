"""Starting vLLM: its arguments, the environment of its processes, and restoring the state of this process.

vLLM changes the process that imports it: it seeds torch's random numbers, sets environment variables, and replaces
`torch.set_num_threads`. This module undoes all of that.
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
from llmrl.engines.vllm.lifetime import TRAINER
from llmrl.engines.vllm.transfer import NOTED_LOADING, RECEIVER_ARGS
from llmrl.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.v1.engine.async_llm import AsyncLLM

    from llmrl.engines.vllm.options import VllmConfig

IPC_ARGS = RECEIVER_ARGS | {"weight_transfer_config": {"backend": "ipc"}}
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""A launcher sets these for the trainer's processes. vLLM's processes must not take them for their own."""
SHARE_BESIDE_TRAINER = 0.4
"""Share of a GPU's memory that vLLM takes if the trainer uses the same GPU."""
CPU_CACHE_BYTES = 512 << 20
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Adapter ranks that vLLM can reserve room for."""
CPU_BLOCK_SIZE = 32
"""vLLM's CPU kernels need a multiple of this; the smallest lets requests share most of a prompt."""


def engine_arguments(
    options: VllmConfig, model: str, *, dtype: str, device: str, max_num_seqs: int, lora_rank: int | None = None
) -> dict[str, Any]:
    """Return arguments of vLLM's `EngineArgs` for an engine that serves `model` to a trainer.

    Without `lora_rank`, vLLM takes only the architecture from `model`, and weights are pushed later. With it, vLLM also
    loads the weights, and accepts adapters of that rank.
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
        # A prompt computed in parts yields no token before the last part, and vLLM then steps the request's generator
        # back. Torch's CPU generators cannot do that, so vLLM's core would die ("CPU Generator does not use offset").
        arguments["enable_chunked_prefill"] = False
    else:
        share = options.gpu_memory_utilization
        arguments["gpu_memory_utilization"] = SHARE_BESIDE_TRAINER if share is None else share
        arguments["enable_sleep_mode"] = options.enable_sleep_mode
    if lora_rank is not None:
        rank = next((known for known in LORA_RANKS if known >= lora_rank), lora_rank)
        # Two adapters in a batch: requests that began under the previous version continue beside those of the new one.
        arguments |= {"load_format": NOTED_LOADING, "enable_lora": True, "max_lora_rank": rank}
        arguments |= {"max_loras": 2, "max_cpu_loras": ADAPTERS_KEPT}
    return arguments | options.extra


def save_config(config: PretrainedConfig, folder: str) -> None:
    """Write config.json and name the causal language model's class in it, which a model built from a config lacks."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    written = copy.deepcopy(config)
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if not written.architectures and known:
        written.architectures = [known]
    written.save_pretrained(folder)


async def start(arguments: dict[str, Any], config: PretrainedConfig, device: torch.device) -> AsyncLLM:
    """Start vLLM's process, and leave environment and random numbers of this process as they were.

    Raises:
        UserError: vLLM is not installed, or refuses the model or the arguments.
    """
    num_workers = arguments["tensor_parallel_size"] * arguments["data_parallel_size"]
    with process_state_kept(trainer_environment(device, single_worker=num_workers == 1)):
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise not_installed(error) from error
        check_head_dim(config, on_cpu=device.type == "cpu")
        try:
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"vLLM did not start: {error}{_hint(error)}") from error


def _hint(error: Exception) -> str:
    """Return what to do about an error whose message does not say so."""
    if "Chunked prefill is required for mamba" in str(error):  # which the CPU's engine goes without, see above
        return "\nFor a model with layers that remember, on a CPU: rollout.vllm.enable_prefix_caching false"
    return ""


def not_installed(error: ImportError) -> UserError:
    """Return the error that says how to install vLLM."""
    return UserError(
        f"vLLM cannot be imported ({error}). On a GPU: pip install 'llmrl[vllm]'; without one see the README, section "
        "vLLM on a CPU"
    )


def check_head_dim(config: PretrainedConfig, *, on_cpu: bool) -> None:
    """Refuse heads of a width that vLLM computes wrongly, or has no attention for on a CPU.

    Raises:
        UserError: vLLM cannot serve the width; or answering this takes vLLM, and it is not installed.
    """
    text = config.get_text_config()
    derived = text.hidden_size // text.num_attention_heads
    width = getattr(text, "head_dim", None) or derived
    if text.model_type == "qwen2" and width != derived:
        raise UserError(
            f"vLLM assumes that heads of a qwen2 model have width hidden_size / num_attention_heads = {derived}, but "
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
    """End vLLM's processes; a coroutine, because it must run on the engine's own event loop."""
    llm.shutdown()


def vllm_environment(device: str, *, single_worker: bool = True) -> dict[str, str]:
    """Return the environment variables for vLLM's processes. A value that the user has set takes precedence.

    Args:
        device: type of the device vLLM runs on.
        single_worker: whether the engine has only one worker.
    """
    wanted = {"VLLM_NO_USAGE_STATS": "1"}
    if device == "cpu":
        # vLLM's warnings here are about libraries it wants preloaded. With dynamo on, the first request for
        # log-probabilities compiles a kernel. Threads bound to cores would all compete for the same ones.
        # "Multiprocessing" would put the model into one more process below the core's, which is a separate one anyway.
        wanted |= {
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if single_worker else "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "TORCHDYNAMO_DISABLE": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }
    else:
        wanted["VLLM_LOGGING_LEVEL"] = "WARNING"
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def trainer_environment(device: torch.device, *, single_worker: bool) -> dict[str, str | None]:
    """Return the same for a trainer's child processes; None removes a variable. One worker gets the trainer's GPU."""
    environment: dict[str, str | None] = dict(vllm_environment(device.type, single_worker=single_worker))
    environment |= dict.fromkeys(LAUNCHER_VARIABLES) | {TRAINER: str(os.getpid())}
    if device.type == "cuda" and single_worker:
        visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        index = device.index or 0
        environment["CUDA_VISIBLE_DEVICES"] = visible[index] if visible else str(index)
    return environment


@contextlib.contextmanager
def process_state_kept(environment: dict[str, str | None]) -> Iterator[None]:
    """Set variables inside the block; afterwards restore environment, random numbers and thread settings."""
    before, numbers = dict(os.environ), (random.getstate(), np.random.get_state(), torch.get_rng_state())
    set_num_threads = torch.set_num_threads
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # importing vLLM raises several about its own code
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
    """An event loop that runs in its own thread."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    async def call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine on that loop and await it here. Cancelling one cancels the other."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self.loop))

    def run(self, coroutine: Coroutine[Any, Any, Any], timeout: float) -> Any:
        """Run a coroutine on that loop and block until it is done, at most `timeout` seconds."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout)

    def stop(self) -> None:
        """Cancel what runs on that loop and end the thread."""
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
