"""Runs that sample: how rollouts are drawn, by which engine, and the loss of GRPO, by TRL's names."""

from __future__ import annotations

from llmrl.run.from_trl.fields import Fields, Translation, copy
from llmrl.run.from_trl.tables import POLICY_GRADIENT, SAMPLED


def sampling(found: Translation, fields: Fields, refused: list[str], *, evaluates: bool) -> None:
    """Set how rollouts are drawn, by which engine, and how held-out tasks are sampled."""
    copy(found, fields, SAMPLED)
    if "max_prompt_length" in fields and fields.get("max_prompt_length") is not None:
        found.notes.append(f"{found.source}: tasks whose prompts exceed max_prompt_length are left out, not cut")
    held_out = fields.get("num_generations_eval")
    if held_out is not None or ("num_generations_eval" in fields and evaluates):
        found.options["eval.num_generations"] = held_out or fields.get("num_generations")
        found.options["eval.temperature"] = fields.get("temperature")
    if fields.get("use_vllm"):
        _vllm(found, fields)
    else:
        fields.read |= {name for name in fields.values if name.startswith("vllm_")}
    weights = fields.get("reward_weights")
    found.reward_weights = None if weights is None else [float(weight) for weight in weights]


def _vllm(found: Translation, fields: Fields) -> None:
    colocated = fields.get("vllm_mode") == "colocate"
    found.options["rollout.engine"] = "vllm" if colocated else "vllm_server"
    if colocated:
        table = {
            "vllm_gpu_memory_utilization": "gpu_memory_utilization",
            "vllm_tensor_parallel_size": "tensor_parallel_size",
            "vllm_max_model_length": "max_model_len",
            "vllm_enable_sleep_mode": "enable_sleep_mode",
        }
        copy(found, fields, {name: f"rollout.vllm.{option}" for name, option in table.items()})
        fields.read |= {name for name in fields.values if name.startswith("vllm_server_")}
        return
    host, port = fields.get("vllm_server_host"), fields.get("vllm_server_port")
    address = fields.get("vllm_server_base_url") or f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    found.options["rollout.server.urls"] = [address.rstrip("/")]
    if "vllm_server_timeout" in fields:
        found.options["rollout.server.return_timeout_s"] = fields.get("vllm_server_timeout")
    served = (
        "vllm_gpu_memory_utilization",
        "vllm_tensor_parallel_size",
        "vllm_max_model_length",
        "vllm_enable_sleep_mode",
    )
    for name in served:
        if name in fields.unread():
            found.notes.append(f"{found.source}: {name} is not needed: the server was started with its own")
        fields.read.add(name)


# --- GRPO -------------------------------------------------------------------------------------------------------------


def policy_gradient(found: Translation, fields: Fields, refused: list[str]) -> None:
    """Set advantages, loss, penalty and correction."""
    copy(found, fields, POLICY_GRADIENT)
    if "scale_rewards" in fields:
        scale = fields.get("scale_rewards")
        scale = {True: "group", False: "none"}.get(scale, scale) if isinstance(scale, bool) else scale
        found.options["algo.baseline.scale"] = scale
    each = fields.get("multi_objective_aggregation") or "sum_then_normalize"
    if each == "normalize_then_sum":
        found.options.pop("algo.baseline.scale", None)
        found.options["algo.baseline"] = "each_reward"
    elif each != "sum_then_normalize":
        refused.append(f"multi_objective_aggregation {each}: use sum_then_normalize or normalize_then_sum")
    if beta := fields.get("beta"):
        found.options["algo.kl.beta"] = beta
        found.options["algo.kl.bias_correction"] = bool(fields.get("use_bias_correction_kl"))
    fields.read.add("use_bias_correction_kl")
    _loss(found, fields, refused)
    if fields.get("use_vllm"):
        _correction(found, fields, refused)
    if not fields.get("use_adaptive_entropy"):
        fields.read |= {"entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"}
    else:
        fields.read.discard("use_adaptive_entropy")
    if not fields.get("sync_ref_model"):
        fields.read |= {"ref_model_mixup_alpha", "ref_model_sync_steps"}
    else:
        fields.read.discard("sync_ref_model")


LOSSES = {
    "grpo": ("clip", "grpo"),
    "dapo": ("clip", "dapo"),
    "dr_grpo": ("clip", "dr_grpo"),
    "luspo": ("clip", "sequence_sum"),
    "cispo": ("cispo", "dapo"),
    "sapo": ("sapo", "grpo"),
    "vespo": ("vespo", "dapo"),
}
"""TRL's loss_type -> (algo.loss.kind, algo.aggregation)."""


def _loss(found: Translation, fields: Fields, refused: list[str]) -> None:
    """Set the loss of a token, what it reads, and how tokens are averaged."""
    name = fields.get("loss_type")
    if name is not None and str(name) not in LOSSES:
        refused.append(
            f"loss_type {name}: use dapo, which is the mean over all tokens whatever the micro-batches"
            if name == "bnpo"
            else f"loss_type {name}: there are {', '.join(LOSSES)}"
        )
        fields.read |= {other for other in fields.values if other.startswith(("epsilon", "delta", "sapo_", "vespo_"))}
        return
    kind = "clip"
    if name is not None:
        kind, found.options["algo.aggregation"] = LOSSES[name]
        if kind != "clip":
            found.options["algo.loss.kind"] = kind
    reads = {
        "clip": {"epsilon": "epsilon", "epsilon_high": "epsilon_high", "delta": "delta"},
        "cispo": {},
        "sapo": {f"sapo_{key}": key for key in ("temperature_pos", "temperature_neg")},
        "vespo": {f"vespo_{key}": key for key in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")},
    }
    copy(found, fields, {given: f"algo.loss.{option}" for given, option in reads[kind].items()})
    if kind == "cispo" and fields.any("epsilon", "epsilon_high"):
        high = fields.get("epsilon_high")
        found.options["algo.loss.max_ratio"] = fields.get("epsilon") if high is None else high
    level = fields.get("importance_sampling_level")
    if level is not None and kind != "vespo":
        found.options["algo.loss.ratio"] = level
    elif level not in (None, "token"):
        refused.append(f"importance_sampling_level {level}: loss_type {name} has a ratio of its own")
    for other, names in reads.items():
        for given in names if other != kind else ():
            if given in fields.unread():
                refused.append(f"{given} {fields.values[given]}: loss_type {name} does not read it; leave it out")
                fields.read.add(given)


def _correction(found: Translation, fields: Fields, refused: list[str]) -> None:
    """Set the correction for a sampler that is not quite the policy."""
    wanted, mode = fields.get("vllm_importance_sampling_correction"), fields.get("vllm_importance_sampling_mode")
    low, high = fields.get("vllm_importance_sampling_clip_min"), fields.get("vllm_importance_sampling_clip_max")
    cap = fields.get("vllm_importance_sampling_cap")
    if wanted is False or not (fields.complete or wanted):
        return
    of, _, outside = str(mode).partition("_")
    if of not in ("token", "sequence") or outside not in ("mask", "truncate"):
        refused.append(f"vllm_importance_sampling_mode {mode}: token or sequence, then _mask or _truncate")
        return
    bounds = {"low": low or 0.0, "high": 1e9 if (cap or high) is None else cap or high}
    for option, value in {"kind": "weights", "of": of, "outside": outside, **bounds}.items():
        found.options[f"algo.sampler.{option}"] = value
