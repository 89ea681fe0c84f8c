"""Options of the `vllm_server` engine, under `rollout.server`. How each server works is `rollout.vllm`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class VllmServerConfig:
    """Which vLLM servers sample: some that run already, or some that this run (or `llmrl serve`) starts."""

    urls: list[str] = field(default_factory=list)
    """Servers that run already, such as http://node5:8000. Empty: the training run starts its own and ends them."""
    num_replicas: int = 1
    """Servers to start, where `urls` is empty."""
    host: str = "127.0.0.1"
    """Address the started servers listen on; 0.0.0.0 makes them reachable from other machines."""
    port: int = 8000
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
    request_timeout_s: float = 1800.0
    """A server that has not answered a request after so long counts as hanging."""
    health_timeout_s: float = 30.0
    """... and so does one that has not answered a health check."""
    return_timeout_s: float = 600.0
    """How long requests wait when no server is left, until one returns."""
    max_restarts: int = 3
    """How often a server that this run started is started again after it died."""
