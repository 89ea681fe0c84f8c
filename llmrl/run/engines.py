"""The engine that a configuration names, and what it is told about the policy it serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmrl.config import Config
from llmrl.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from llmrl.engines.base import Engine
    from llmrl.model.policy import Policy


def make_engine(
    config: Config, model: PreTrainedModel, policy: Policy, accelerator: Accelerator, say: Callable[[str], None] = print
) -> Engine:
    """The engine that `rollout.engine` names, serving the policy's weights."""
    device = accelerator.device
    if config.rollout.engine == "vllm_server":
        from llmrl.engines.vllm.servers import VllmServerEngine

        apart = serves_adapters_apart(config, policy, device)
        return VllmServerEngine.from_config(config, accelerator, takes_adapters=apart, say=say)
    if config.rollout.engine == "vllm":
        return _vllm_engine(config, model, policy, device)
    import torch

    from llmrl.engines.hf.engine import HFEngine

    return HFEngine(
        model.config,
        weights=policy.weights,
        max_num_seqs=config.rollout.max_num_seqs,
        dtype=getattr(torch, config.model.dtype),
        device=device,
        attn_implementation=config.model.attn_implementation,
    )


def _vllm_engine(config: Config, model: PreTrainedModel, policy: Policy, device: Any) -> Engine:
    from llmrl.config import VllmConfig
    from llmrl.engines.vllm.engine import VllmEngine

    options = config.rollout.vllm or VllmConfig()
    own_code = config.model.trust_remote_code
    apart = serves_adapters_apart(config, policy, device)
    return VllmEngine(
        model.config,
        options=options,
        dtype=config.model.dtype,
        max_num_seqs=config.rollout.max_num_seqs,
        device=device,
        trust_remote_code=own_code,
        path=config.model.path if own_code else None,
        base=policy.base_weights if apart else None,
        lora_rank=policy.adapter_rank if apart else 0,
    )


def serves_adapters_apart(config: Config, policy: Policy, device: Any) -> bool:
    """Whether vLLM gets the adapter alone at each push, or the weights it was merged into.

    Raises:
        UserError: `rollout.vllm.lora_sync adapter` for a policy without one, or one that vLLM cannot serve.
    """
    wanted = config.rollout.vllm.lora_sync if config.rollout.vllm else "auto"
    if not policy.has_adapters:
        if wanted != "auto":
            raise UserError(f"rollout.vllm.lora_sync {wanted}, but no adapter is trained: set model.lora")
        return False
    reason = policy.adapter_obstacle()
    if reason is None and config.model.trust_remote_code:
        reason = "it would have to load the base from a copy, without the code that comes with the model"
    if wanted == "adapter" and reason:
        raise UserError(f"rollout.vllm.lora_sync adapter: vLLM cannot, because {reason}; use merged")
    # On a CPU vLLM decodes 3.3 times slower with an adapter, and merged weights travel in milliseconds.
    return wanted == "adapter" or (wanted == "auto" and reason is None and str(device) != "cpu")


def engine_precision(config: Config) -> dict[str, Any]:
    """How exactly the engine computes: what `WeightSync` expects of it."""
    options = config.rollout.vllm
    if options is None:
        return {"dtype": config.model.dtype}
    return {"dtype": options.dtype or config.model.dtype, "quantized": options.quantization is not None}
