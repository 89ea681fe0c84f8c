"""Options of the vLLM engines, under `rollout.vllm`. Names that vLLM has mean what they mean there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class VllmConfig:
    """How vLLM serves the policy. None leaves the choice to vLLM, unless a field says otherwise."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type vLLM computes in. Default: `model.dtype`."""
    gpu_memory_utilization: float | None = None
    """Share of each GPU for weights and cache. Default: 0.4 for engine `vllm`, which shares it with the trainer; vLLM's
    own for servers."""
    kv_cache_memory_bytes: int | None = None
    """Size of the key-value cache. Default on a CPU: 512 MiB; on a GPU `gpu_memory_utilization` decides."""
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    """Replicas inside one engine. Training processes that each have an engine are replicas without it."""
    max_model_len: int | None = None
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
    start_timeout_s: float = 600.0
    """How long the engine may take to start."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's `EngineArgs`, passed on as they are."""
