"""Options of the vLLM engines. Names that vLLM has mean what they mean there."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

from llmrl.option import Count, Natural, Positive, PositiveShare, option


@option
class VllmConfig:
    """How vLLM serves the policy. None leaves the choice to vLLM, unless a field says otherwise."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type vLLM computes in. Default: `model.dtype`."""
    gpu_memory_utilization: PositiveShare | None = None
    """Share of each GPU for weights and cache. Default: 0.4 for engine `vllm`, which shares it with the trainer; vLLM's
    own for servers."""
    kv_cache_memory_bytes: Count | None = None
    """Size of the key-value cache. Default on a CPU: 512 MiB; on a GPU `gpu_memory_utilization` decides."""
    tensor_parallel_size: Count = 1
    data_parallel_size: Count = 1
    """Replicas inside one engine. Training processes that each have an engine are replicas without it."""
    max_model_len: Count | None = None
    """Longest prompt + completion. Default: the model's limit."""
    enable_prefix_caching: bool = True
    enforce_eager: bool | None = None
    """Default on a CPU: true, where compiling takes 20 to 35 s for at most a tenth."""
    quantization: str | None = None
    """Such as `fp8`. What it changes shows in the mismatch between sampler and trainer."""
    speculative_config: dict[str, Any] | None = None
    enable_sleep_mode: bool = False
    """Give the GPU memory of weights and cache back while the learner updates. Not on a CPU."""
    on_update: Literal["wait", "keep", "abort"] = "keep"
    """What becomes of requests that run when new weights arrive: finish first, go on under the new weights (their cache
    is computed anew; the version of every token is recorded), or end, which counts as an error of the engine."""
    lora_sync: Literal["auto", "adapter", "merged"] = "auto"
    """What a push brings of a policy with adapters: the adapter alone (a hundredth of the bytes), or weights it is
    merged into. `auto`: the adapter on a GPU; merged on a CPU, where vLLM decodes 3.3 times slower with one."""
    weight_transfer: Literal["auto", "shared_memory", "ipc"] = "auto"
    """How whole weights travel: through a file in shared memory (any device, `auto`), or vLLM's CUDA IPC (on one
    GPU)."""
    start_timeout_s: Positive = 600.0
    """How long the engine may take to start."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's `EngineArgs`, passed on as they are."""


@option
class VllmServerConfig:
    """Which vLLM servers sample: some that run already, or some that this run (or `llmrl serve`) starts."""

    urls: list[str] = field(default_factory=list)
    """Servers that run already, such as http://node5:8000. Empty: the training run starts its own and ends them."""
    num_replicas: Count = 1
    """Servers to start, where `urls` is empty."""
    host: str = "127.0.0.1"
    """Address the started servers listen on; 0.0.0.0 makes them reachable from other machines."""
    port: Natural = 8000
    """Of the first server started; the others take the following ones. 0: any free ports."""
    gpus: list[int] = field(default_factory=list)
    """GPUs of the servers started, dealt out in order, `tensor_parallel_size * data_parallel_size` to each. `llmrl
    serve` takes all where none are named; a training run has to name those it does not train on."""
    api_key_env: str = "VLLM_API_KEY"
    """Environment variable with the servers' key, if they want one."""
    weight_transfer: Literal["auto", "shared_memory", "nccl"] = "auto"
    """How full weights travel: a file in shared memory, for servers on this machine or where LLMRL_SHARED_MEMORY names
    a folder that all machines share; or NCCL between GPUs. `auto`: nccl where the policy is on a GPU. Adapters always
    travel as files."""
    nccl_host: str | None = None
    """Address of the trainer that servers on other machines connect to for NCCL. Default: this machine's name."""
    request_timeout_s: Positive = 1800.0
    """A server that has not answered a request after so long counts as hanging."""
    health_timeout_s: Positive = 30.0
    """... and so does one that has not answered a health check."""
    return_timeout_s: Positive = 600.0
    """How long requests wait when no server is left, until one returns."""
    max_restarts: Natural = 3
    """How often a server that this run started is started again after it died."""
