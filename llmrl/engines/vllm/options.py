"""Options of the vLLM engines. A name that vLLM also has means what it means there."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

from llmrl.option import Count, Natural, Positive, PositiveShare, option


@option
class VllmConfig:
    """How vLLM serves the policy. None leaves the choice to vLLM, unless the field names another default."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type that vLLM computes in. Default: `model.dtype`."""
    gpu_memory_utilization: PositiveShare | None = None
    """Share of each GPU for weights and cache. Default: 0.4 for engine `vllm`, which shares the GPU with the trainer;
    vLLM's own default for servers."""
    kv_cache_memory_bytes: Count | None = None
    """Size of the key-value cache. Default on a CPU: 512 MiB; on a GPU `gpu_memory_utilization` decides."""
    tensor_parallel_size: Count = 1
    """GPUs that hold one copy of the model together."""
    data_parallel_size: Count = 1
    """Copies of the model inside one engine. With engine `vllm` each training process has its own copy anyway."""
    max_model_len: Count | None = None
    """Longest prompt + completion, in tokens. Default: what the run's rows need, 2,048 at least; the model's limit if
    that is less, and for `llmrl serve`, which knows no rows."""
    enable_prefix_caching: bool = True
    """Compute a prompt that several requests share only once."""
    enforce_eager: bool | None = None
    """Run without compiling the model. Default on a CPU: true; there compiling takes 20 to 35 s for at most 10%."""
    quantization: str | None = None
    """Such as `fp8`. Its rounding shows up in the mismatch between sampler and trainer."""
    speculative_config: dict[str, Any] | None = None
    """Speculative decoding, as vLLM configures it."""
    enable_sleep_mode: bool = False
    """Release the GPU memory of weights and cache while the learner updates. Not available on a CPU."""
    on_update: Literal["wait", "keep", "abort"] = "keep"
    """What happens to running requests when new weights arrive. `wait`: they finish first. `keep`: they continue under
    the new weights (their cache is recomputed; the version of every token is recorded). `abort`: they end, which counts
    as an engine error."""
    lora_sync: Literal["auto", "adapter", "merged"] = "auto"
    """What a push sends of a policy with adapters: only the adapter (a hundredth of the bytes), or all weights with the
    adapter merged in. `auto`: the adapter on a GPU; merged on a CPU, where vLLM decodes 3.3 times slower with one."""
    weight_transfer: Literal["auto", "shared_memory", "ipc"] = "auto"
    """How all weights travel: through a file in shared memory (any device, `auto`), or by vLLM's CUDA IPC (on one
    GPU)."""
    start_timeout_s: Positive = 600.0
    """Seconds the engine may take to start."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's `EngineArgs`, passed on unchanged."""


@option
class VllmServerConfig:
    """Which vLLM servers sample: servers that run already, or servers that this run (or `llmrl serve`) starts."""

    urls: list[str] = field(default_factory=list)
    """Servers that run already, such as http://node5:8000. Empty: the training run starts its own and stops them."""
    num_replicas: Count = 1
    """Servers to start if `urls` is empty."""
    host: str = "127.0.0.1"
    """Address the started servers listen on; 0.0.0.0 makes them reachable from other machines, and needs a key."""
    port: Natural = 8000
    """Port of the first started server; the others take the following ports. 0: any free ports."""
    gpus: list[int] = field(default_factory=list)
    """GPUs for the started servers, in order, `tensor_parallel_size * data_parallel_size` for each. If none are named,
    `llmrl serve` takes all; a training run has to name GPUs that it does not train on."""
    api_key_env: str = "VLLM_API_KEY"
    """Environment variable that holds the servers' API key, if they require one."""
    weight_transfer: Literal["auto", "shared_memory", "nccl"] = "auto"
    """How all weights travel: through a file in shared memory, for servers on this machine or if LLMRL_SHARED_MEMORY
    names a folder that all machines share; or by NCCL between GPUs. `auto`: nccl if the policy is on a GPU. Adapters
    always travel as files."""
    nccl_host: str | None = None
    """Address of the trainer to which servers on other machines connect for NCCL. Default: this machine's name."""
    request_timeout_s: Positive = 1800.0
    """A server counts as hanging if it has completed nothing for this many seconds."""
    health_timeout_s: Positive = 30.0
    """A server counts as hanging if it has not answered a health check after this many seconds."""
    return_timeout_s: Positive = 600.0
    """Seconds that requests wait for a server to return when none is left."""
    max_restarts: Natural = 3
    """How often a server that this run started is restarted after it died."""
