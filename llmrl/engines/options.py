"""Options of what samples from the policy."""

from __future__ import annotations

from typing import Literal

from llmrl.engines.vllm.options import VllmConfig, VllmServerConfig
from llmrl.option import Count, option


@option
class EngineConfig:
    """Which engine samples, and how it is run."""

    engine: Literal["hf", "vllm", "vllm_server"] = "hf"
    """`hf`: the sampler of this project, in the trainer's process. `vllm`: vLLM beside the trainer, on its devices.
    `vllm_server`: vLLM servers, on this machine or on others."""
    vllm: VllmConfig | None = None
    """Options of the vLLM engines."""
    server: VllmServerConfig | None = None
    """Which servers, with `vllm_server`."""
    max_num_seqs: Count = 128
    """Rows an engine decodes together; a finished row's place goes to the next waiting one."""
