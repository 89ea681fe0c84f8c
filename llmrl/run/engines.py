"""Start the engine that a configuration names, with the push that makes it serve the policy's weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llmrl.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from llmrl.engines.base import Engine
    from llmrl.model.options import ModelConfig
    from llmrl.model.parallel import Parallel
    from llmrl.model.policy import Policy
    from llmrl.rollout.options import SamplingConfig
    from llmrl.rollout.source import Push

Say = Callable[[str], None]


USUAL_LENGTH = 2048
"""Tokens that a vLLM engine has room for in one sequence even where the rows of a run need less."""


def start_engine(
    model: ModelConfig,
    rollout: SamplingConfig,
    policy: Policy,
    parallel: Parallel,
    *,
    log_dir: Path,
    longest: int | None = None,
    say: Say = print,
) -> tuple[Engine, Push]:
    """Start the engine that `rollout.engine` names for a policy.

    Args:
        model: options of the policy.
        rollout: which engine, and its options.
        policy: the policy whose weights it serves.
        parallel: the processes of the run.
        log_dir: folder for the logs of servers that are started.
        longest: tokens of the longest sequence of the run, if that is known.
        say: shows a line to the user.

    Returns:
        The engine, and a function that pushes the policy's weights and proves that they are served.

    Raises:
        UserError: the engine cannot serve this model here.
    """
    from llmrl.run.sync import WeightSync

    if reason := policy.merge_obstacle():
        raise UserError(f"no engine can serve this adapter: {reason}")
    rollout = with_length(rollout, policy.model_config, longest)
    engine = ENGINES[rollout.engine](model, rollout, policy, parallel, log_dir=log_dir, say=say)
    return engine, WeightSync(policy, engine).push


def with_length(rollout: SamplingConfig, config: PretrainedConfig, longest: int | None) -> SamplingConfig:
    """Return the options with the length that a vLLM engine has to be started for, where they leave it open.

    vLLM takes the model's limit, and then refuses to start where its cache cannot hold one sequence of that length: the
    usual case for models of 131,072 positions beside a trainer.
    """
    from llmrl.engines.vllm.options import VllmConfig
    from llmrl.model.positions import longest_exact

    vllm = rollout.vllm or VllmConfig()
    text: Any = cast("Any", config).get_text_config()
    limits = [getattr(text, "max_position_embeddings", None), longest_exact(config)]
    limit = min((n for n in limits if n), default=None)
    if longest is None or vllm.max_model_len is not None or (limit is not None and limit <= USUAL_LENGTH):
        return rollout
    length = max(longest, USUAL_LENGTH)
    return replace(rollout, vllm=replace(vllm, max_model_len=length if limit is None else min(length, limit)))


def _hf(model: ModelConfig, rollout: SamplingConfig, policy: Policy, parallel: Parallel, **_: Any) -> Engine:
    import torch

    from llmrl.engines.hf.engine import HFEngine
    from llmrl.model.attention import decoding_attention

    return HFEngine(
        policy.served_config,
        weights=policy.weights,
        max_num_seqs=rollout.max_num_seqs,
        dtype=getattr(torch, model.dtype),
        device=parallel.device,
        attn_implementation=decoding_attention(model.attn_implementation),
    )


def _vllm(model: ModelConfig, rollout: SamplingConfig, policy: Policy, parallel: Parallel, **_: Any) -> Engine:
    from llmrl.engines.vllm.engine import VllmEngine
    from llmrl.engines.vllm.options import VllmConfig

    apart = serves_adapters_apart(model, rollout, policy, parallel.device)
    check_replaceable(policy, apart=apart)
    return VllmEngine(
        policy.served_config,
        options=rollout.vllm or VllmConfig(),
        dtype=model.dtype,
        max_num_seqs=rollout.max_num_seqs,
        device=parallel.device,
        trust_remote_code=model.trust_remote_code,
        path=model.path if model.trust_remote_code else None,
        base=policy.base_weights if apart else None,
        lora_rank=policy.adapter_rank if apart else 0,
    )


def _vllm_server(
    model: ModelConfig, rollout: SamplingConfig, policy: Policy, parallel: Parallel, *, log_dir: Path, say: Say
) -> Engine:
    from llmrl.engines.vllm.servers import VllmServerEngine
    from llmrl.run.pipeline import on_device

    if policy.is_quantized and model.quantization is None:
        raise UserError(
            f"rollout.engine vllm_server: the servers would load {model.path} quantized, and take no other weights: "
            "use rollout.engine vllm or hf, or model.quantization with a model that is not quantized"
        )
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or parallel.world)
    if here < parallel.world and not (rollout.server and rollout.server.urls):
        raise UserError(
            "rollout.engine vllm_server: a run starts servers on its main machine only, where the processes of the "
            "others cannot reach them: start servers with `llmrl serve` and name them in rollout.server.urls"
        )
    served, own = policy.served_config, policy.model_config
    if served.tie_word_embeddings != own.tie_word_embeddings:
        raise UserError(
            "rollout.engine vllm_server cannot serve an adapter on one of two tied weights (input embedding, output "
            "head), because its servers load model.path with both tied: use rollout.engine vllm or hf"
        )
    apart = serves_adapters_apart(model, rollout, policy, parallel.device)
    check_replaceable(policy, apart=apart)
    return VllmServerEngine.from_options(
        model,
        rollout,
        log_dir=log_dir,
        device=parallel.device,
        is_main=parallel.is_main,
        rank=parallel.rank,
        world=parallel.world,
        broadcast=parallel.broadcast,
        barrier=lambda: on_device(parallel.device, parallel.barrier),
        slack=rollout.num_generations,
        takes_adapters=apart,
        say=say,
    )


ENGINES: dict[str, Callable[..., Engine]] = {"hf": _hf, "vllm": _vllm, "vllm_server": _vllm_server}
"""By `rollout.engine`. Each imports what it needs only when it is called."""


def check_replaceable(policy: Policy, *, apart: bool) -> None:
    """Refuse models whose weights vLLM cannot replace while it runs.

    Raises:
        UserError: every push would bring all weights of such a model.
    """
    if not apart and policy.text_config.model_type == "gpt_oss":
        raise UserError(
            "vLLM cannot replace the weights of a gpt_oss model while it runs, because its loader of this model goes "
            "past what vLLM does at a reload: use rollout.engine hf, or train LoRA on linear layers alone "
            "(model.lora.target_modules) with rollout.vllm.lora_sync adapter"
        )


def serves_adapters_apart(model: ModelConfig, rollout: SamplingConfig, policy: Policy, device: Any) -> bool:
    """Return whether a push sends vLLM the adapter alone, rather than the weights with the adapter merged in.

    Raises:
        UserError: `rollout.vllm.lora_sync adapter` for a policy without one, or one that vLLM cannot serve.
    """
    wanted = rollout.vllm.lora_sync if rollout.vllm else "auto"
    if not policy.has_adapters:
        if wanted != "auto":
            raise UserError(f"rollout.vllm.lora_sync {wanted}, but no adapter is trained: set model.lora")
        return False
    reason = policy.adapter_obstacle()
    if reason is None and model.trust_remote_code:
        reason = "it would have to load the base from a copy, without the code that comes with the model"
    if reason is None and rollout.engine == "vllm_server" and (policy.is_quantized or not policy.base_is_saved):
        reason = "the base that the servers would load is not the one that is trained on"
    if wanted == "adapter" and reason:
        raise UserError(f"rollout.vllm.lora_sync adapter: vLLM cannot, because {reason}; use merged")
    # On a CPU vLLM decodes 3.3 times slower with an adapter, and merged weights travel in milliseconds.
    return wanted == "adapter" or (wanted == "auto" and reason is None and str(device) != "cpu")
