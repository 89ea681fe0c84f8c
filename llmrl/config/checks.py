"""What types cannot say about a configuration: required fields, ranges, and settings that contradict each other."""

from __future__ import annotations

from typing import Any

from llmrl.config.fields import MISSING, Config
from llmrl.errors import UserError


def validate(config: Config) -> None:
    """Check what types cannot say: required fields, ranges, and settings that contradict each other.

    Raises:
        UserError: with the field, its value, and the fix. All findings are listed, not only the first.
    """
    from llmrl.algo import preference_presets
    from llmrl.algo.bcoder_options import bcoder_contradictions
    from llmrl.algo.presets import contradictions

    c, found = config, contradictions(config) + preference_presets.contradictions(config)
    found += bcoder_contradictions(config)
    offline = preference_presets.is_offline(config)

    def check(ok: bool, message: str) -> None:
        if not ok:
            found.append(message)

    check(c.model.path != MISSING, "model.path is not set: give a hub id or a local folder")
    check(c.data.path != MISSING, "data.path is not set: give a hub id or a local file")
    check(
        bool(c.rewards) or offline,
        "rewards is empty: name at least one, such as `fn: rewards/math_answer.py:math_answer`",
    )
    for i, reward in enumerate(c.rewards):
        check(reward.fn != MISSING, f"rewards[{i}].fn is not set")
        check(reward.time_limit_s > 0, f"rewards[{i}].time_limit_s is {reward.time_limit_s}: must be above 0")
    positive = {
        "rollout.num_prompts": c.rollout.num_prompts,
        "rollout.max_completion_length": c.rollout.max_completion_length,
        "rollout.max_num_seqs": c.rollout.max_num_seqs,
        "train.max_steps": c.train.max_steps,
        "train.max_tokens_per_micro_batch": _given(c.train.max_tokens_per_micro_batch, 1),
        "eval.num_generations": c.eval.num_generations,
    }
    for name, value in positive.items():
        check(value >= 1, f"{name} is {value}: must be at least 1")
    at_least_zero = {
        "rollout.max_staleness": c.rollout.max_staleness,
        "train.learning_rate": c.train.learning_rate,
        "train.warmup_steps": c.train.warmup_steps,
        "train.max_grad_norm": c.train.max_grad_norm,
        "train.save_steps": c.train.save_steps,
        "train.save_total_limit": c.train.save_total_limit,
        "eval.steps": c.eval.steps,
        "eval.temperature": c.eval.temperature,
    }
    for name, value in at_least_zero.items():
        check(value >= 0, f"{name} is {value}: must not be negative")
    check(
        c.rollout.temperature > 0,
        f"rollout.temperature is {c.rollout.temperature}: greedy rollouts are all alike and carry no signal; use 1.0",
    )
    check(
        c.rollout.top_p == 1.0 and c.rollout.top_k == 0,
        f"rollout.top_p {c.rollout.top_p} / top_k {c.rollout.top_k} cut the support that rollouts are drawn from, "
        "which biases every probability ratio by the mass cut off; train with top_p 1 and top_k 0",
    )
    found += vllm_findings(c) + server_findings(c)
    check(
        0 <= c.verify.max_unscored_frac <= 1,
        f"verify.max_unscored_frac is {c.verify.max_unscored_frac}: must lie between 0 and 1",
    )
    check(
        c.eval.steps == 0 or c.eval.data is not None,
        "eval.steps is set but eval.data is not: say where the held-out tasks come from (eval.data.path)",
    )
    if c.eval.data is not None:
        check(c.eval.data.path != MISSING, "eval.data.path is not set")
        check(c.eval.steps > 0, "eval.data is set but eval.steps is 0, so it would never be used: set eval.steps")
    if found:
        raise UserError("configuration:\n" + "\n".join(f"  - {line}" for line in found))


def vllm_findings(config: Any) -> list[str]:
    options = config.rollout.vllm
    if options is None:
        return []
    if not config.rollout.engine.startswith("vllm"):
        return [f"rollout.vllm is set but rollout.engine is {config.rollout.engine}, which does not read it"]
    sizes = {
        "tensor_parallel_size": options.tensor_parallel_size,
        "data_parallel_size": options.data_parallel_size,
        "max_model_len": _given(options.max_model_len, 1),
        "kv_cache_memory_bytes": _given(options.kv_cache_memory_bytes, 1),
    }
    found = [f"rollout.vllm.{name} is {value}: must be at least 1" for name, value in sizes.items() if value < 1]
    if options.enable_sleep_mode and config.rollout.max_staleness > 0:
        found.append(
            "rollout.vllm.enable_sleep_mode lends the GPU to the learner while it updates, which is when "
            "rollout.max_staleness above 0 generates: choose one"
        )
    if options.on_update == "abort" and config.rollout.max_staleness > 0:
        found.append(
            "rollout.vllm.on_update abort throws away what rollout.max_staleness has generated ahead, whenever new "
            "weights come: use keep or wait"
        )
    if not 0 < _given(options.gpu_memory_utilization, 1) <= 1:
        found.append(
            f"rollout.vllm.gpu_memory_utilization is {options.gpu_memory_utilization}: a share above 0, up to 1"
        )
    return found


def server_findings(config: Any) -> list[str]:
    options, vllm = config.rollout.server, config.rollout.vllm
    found = []
    if options is not None and config.rollout.engine != "vllm_server":
        found.append(f"rollout.server is set but rollout.engine is {config.rollout.engine}, which does not read it")
    if config.rollout.engine == "vllm_server" and vllm is not None:
        if vllm.weight_transfer != "auto":
            found.append("rollout.vllm.weight_transfer is for engine vllm: servers read rollout.server.weight_transfer")
        if vllm.enable_sleep_mode:
            found.append("rollout.vllm.enable_sleep_mode is for engine vllm: servers have their GPUs to themselves")
    if options is None:
        return found
    found += [
        f"rollout.server.urls: {url!r} is no address such as http://node5:8000"
        for url in options.urls
        if not url.startswith(("http://", "https://"))
    ]
    if len(set(options.urls)) < len(options.urls):
        found.append("rollout.server.urls names a server twice")
    limits = {
        "num_replicas": options.num_replicas,
        "request_timeout_s": options.request_timeout_s,
        "health_timeout_s": options.health_timeout_s,
        "return_timeout_s": options.return_timeout_s,
    }
    return found + [
        f"rollout.server.{name} is {value}: must be above 0" for name, value in limits.items() if value <= 0
    ]


def _given(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value
