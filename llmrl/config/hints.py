"""What to say about an option that is not there: near matches, its new or its TRL name, who else reads it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from functools import cache

from llmrl.config.schema import option_fields, walk

MOVED = {
    "algo.baseline": "algo.baseline.kind",
    "algo.scale_rewards": "algo.baseline.scale",
    "algo.batch_std_of": "algo.baseline.batch_std_of",
    "algo.whiten_advantages": "algo.whiten",
    "algo.multi_objective_aggregation": "algo.baseline.kind each_reward",
    "algo.passk_k": "algo.baseline.k",
    "algo.passk_mix": "algo.baseline.mix",
    "algo.rubric_alpha": "algo.rubric.alpha",
    "algo.rubric_norm": "algo.rubric.norm",
    "algo.dynamic_sampling_max_batches": "algo.dynamic_sampling.max_batches",
    "algo.policy_loss": "algo.loss.kind",
    "algo.importance_sampling_level": "algo.loss.ratio",
    "algo.loss_type": "algo.aggregation (policy gradients) or algo.loss.kind (the DPO family)",
    "algo.loss_weights": "algo.loss: {kind: sum, terms: [{kind: ..., weight: ...}, ...]}",
    "algo.epsilon": "algo.loss.epsilon",
    "algo.epsilon_high": "algo.loss.epsilon_high",
    "algo.delta": "algo.loss.delta",
    "algo.dual_clip": "algo.loss.dual_clip",
    "algo.max_ratio": "algo.loss.max_ratio",
    "algo.sapo_temperature_pos": "algo.loss.temperature_pos",
    "algo.sapo_temperature_neg": "algo.loss.temperature_neg",
    "algo.vespo_k_pos": "algo.loss.k_pos",
    "algo.vespo_lambda_pos": "algo.loss.lambda_pos",
    "algo.vespo_k_neg": "algo.loss.k_neg",
    "algo.vespo_lambda_neg": "algo.loss.lambda_neg",
    "algo.cov_fraction": "algo.loss.fraction",
    "algo.kl_cov_coef": "algo.loss.coef",
    "algo.vllm_importance_sampling_mode": "algo.sampler: {kind: weights, of: token, outside: truncate} or algo.sampler "
    "bypass",
    "algo.vllm_importance_sampling_clip_min": "algo.sampler.low",
    "algo.vllm_importance_sampling_clip_max": "algo.sampler.high",
    "algo.beta": "algo.kl.beta (policy gradients) or algo.loss.beta (the DPO family)",
    "algo.kl_in": "algo.kl.kind",
    "algo.kl_estimator": "algo.kl.estimator",
    "algo.use_bias_correction_kl": "algo.kl.bias_correction",
    "algo.kl_target": "algo.kl.target",
    "algo.kl_horizon": "algo.kl.horizon",
    "algo.thr_p": "algo.token_weighting.p",
    "algo.thr_p_end": "algo.token_weighting.p_end",
    "algo.thr_p_steps": "algo.token_weighting.p_steps",
    "algo.thr_threshold": "algo.token_weighting.threshold",
    "algo.thr_threshold_value": "algo.token_weighting.threshold_value",
    "algo.nthr_eta": "algo.token_weighting.eta",
    "algo.gamma": "algo.baseline.gamma (kind token_rewards) or algo.value.gamma (ppo)",
    "algo.use_token_rewards": "algo.baseline token_rewards (ppo reads algo.use_token_rewards)",
    "critic.vf_coef": "algo.value.coef",
    "critic.value_clip": "algo.value.clip",
    "critic.gamma": "algo.value.gamma",
    "critic.lam": "algo.value.lam",
    "critic.length_alpha": "algo.value.length_alpha",
    "critic.lam_critic": "algo.value.lam_critic",
    "critic.warmup_steps": "algo.warmup.steps",
    "critic.warmup_iterations": "algo.warmup.iterations",
    "critic.warmup_explained_variance": "algo.warmup.explained_variance",
    "preference.source": "algo.name online_dpo (or online_kto)",
    "preference.loss_type": "algo.loss.kind; several: algo.loss: {kind: sum, terms: [...]}",
    "preference.loss_weights": "the weight of each term of algo.loss: {kind: sum, terms: [...]}",
    "preference.beta": "algo.loss.beta",
    "preference.label_smoothing": "algo.loss.label_smoothing",
    "preference.f_divergence_type": "algo.divergence.kind",
    "preference.f_alpha_divergence_coef": "algo.divergence.coef",
    "preference.discopop_tau": "algo.loss.tau",
    "preference.simpo_gamma": "algo.loss.gamma",
    "preference.desirable_weight": "algo.loss.desirable_weight",
    "preference.undesirable_weight": "algo.loss.undesirable_weight",
    "preference.ref_model_sync_steps": "algo.reference.steps",
    "preference.ref_model_mixup_alpha": "algo.reference.alpha",
    "bcoder.stage": "algo.stage.kind",
    "bcoder.value_hidden_size": "algo.stage.hidden_size",
    "bcoder.q_coef": "algo.stage.q_coef",
    "bcoder.adv_coef": "algo.stage.adv_coef",
    "bcoder.ce_coef": "algo.stage.ce_coef",
}
"""Where an option of before is now, by its dotted path."""

MOVED_SECTIONS = ("preference", "bcoder")
"""Sections of before, whose options are those of `algo` now."""

TRL = {
    "per_device_train_batch_size": "rollout.num_prompts (tasks per step) and train.max_tokens_per_micro_batch",
    "gradient_accumulation_steps": "train.max_tokens_per_micro_batch (micro-batches never change the result)",
    "generation_batch_size": "rollout.num_prompts",
    "steps_per_generation": "algo.num_mini_batches",
    "num_train_epochs": "train.max_steps",
    "max_prompt_length": "data.max_prompt_length",
    "use_vllm": "rollout.engine vllm",
    "vllm_mode": "rollout.engine vllm (colocated) or vllm_server",
    "vllm_server_base_url": "rollout.server.urls",
    "vllm_server_host": "rollout.server.urls",
    "vllm_gpu_memory_utilization": "rollout.vllm.gpu_memory_utilization",
    "vllm_tensor_parallel_size": "rollout.vllm.tensor_parallel_size",
    "vllm_importance_sampling_correction": "algo.sampler weights",
    "vllm_importance_sampling_cap": "algo.sampler.high",
    "importance_sampling_level": "algo.loss.ratio",
    "scale_rewards": "algo.baseline.scale",
    "loss_type": "algo.aggregation (policy gradients) or algo.loss.kind (the DPO family)",
    "reward_weights": "the weight of each entry of rewards",
    "reward_funcs": "rewards",
    "mask_truncated_completions": "algo.mask_truncated_completions",
    "beta": "algo.kl.beta (policy gradients) or algo.loss.beta (the DPO family)",
    "epsilon": "algo.loss.epsilon",
    "epsilon_high": "algo.loss.epsilon_high",
    "delta": "algo.loss.delta",
    "top_entropy_quantile": "algo.top_entropy_quantile",
    "num_iterations": "algo.num_iterations",
    "num_ppo_epochs": "algo.num_iterations",
    "cliprange": "algo.loss.epsilon",
    "cliprange_value": "algo.value.clip",
    "vf_coef": "algo.value.coef",
    "gamma": "algo.value.gamma",
    "lam": "algo.value.lam",
    "kl_coef": "algo.kl.beta",
    "whiten_rewards": "algo.whiten",
    "bf16": "model.dtype bfloat16, or accelerate's --mixed_precision bf16",
    "fp16": "model.dtype bfloat16 (fp16 is not supported)",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "logging_steps": "nothing: every step is logged",
    "eval_strategy": "eval.steps",
    "eval_steps": "eval.steps",
    "save_strategy": "train.save_steps",
    "warmup_ratio": "train.warmup_steps",
    "lr": "train.learning_rate",
    "optim": "nothing: AdamW is the optimizer",
    "attn_implementation": "model.attn_implementation",
    "model_name_or_path": "model.path",
    "dataset_name": "data.path",
    "dataset_config": "data.path, after a colon (openai/gsm8k:main)",
    "dataset_train_split": "data.split",
    "use_peft": "model.lora '{}'",
    "lora_r": "model.lora.r",
    "lora_target_modules": "model.lora.target_modules",
    "sync_ref_model": "algo.reference.steps",
    "ref_model_sync_steps": "algo.reference.steps",
    "ref_model_mixup_alpha": "algo.reference.alpha",
    "label_smoothing": "algo.loss.label_smoothing",
    "f_divergence_type": "algo.divergence.kind",
    "precompute_ref_log_probs": "algo.precompute_ref_log_probs",
    "max_length": "algo.max_length",
    "log_completions": "track.save_rollouts",
    "wandb_project": "track.project",
}
"""TRL's flat names whose place or name differs here."""


def near(name: str, known: Iterable[str]) -> str:
    """A near match as part of a message, or nothing."""
    close = nearest(name, known)
    return f"; did you mean {close}?" if close else ""


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that is most like `name`, as a whole or in one of its words; swapped letters come first."""

    def likeness(other: str) -> float:
        words = [word for word in re.split(r"[_.]", other) if len(word) > 2]
        whole = difflib.SequenceMatcher(None, name, other).ratio()
        if sorted(name) == sorted(other):
            whole = 1.0
        return max([whole, *(0.9 * difflib.SequenceMatcher(None, name, word).ratio() for word in words)])

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best) >= cutoff else None


@cache
def _everything() -> list[str]:
    """Dotted paths of every option of every kind of run."""
    from llmrl.config.config import PRESETS, Config

    paths = [path for path, _ in walk(Config) if not path.startswith("algo.")]
    for cls in dict.fromkeys(type(options) for options in PRESETS.values()):
        paths += [f"algo.{path}" for path, _ in walk(cls)]
    return list(dict.fromkeys(paths))


def readers(name: str, path: str, root: type) -> list[str]:
    """Kinds and presets that read the option `name` at `path`, other than the one that was chosen.

    Args:
        name: the option.
        path: where it was given, with a dot at its end.
        root: the class of the whole configuration: a recipe's has sections of its own.
    """
    from llmrl.config.config import PRESETS, Config

    found: list[str] = []
    parent = path.removesuffix(".")
    for preset, options in PRESETS.items():
        for place, field in walk(type(options)):
            if f"algo.{place}" == parent and field.tagged:
                found += [f"kind {kind}" for kind, cls in field.members.items() if name in option_fields(cls)]
        if parent == "algo" and name in option_fields(type(options)):
            found.append(f"algo.name {preset}")
    for place, field in (*walk(Config), *walk(root)):
        if place == parent and field.tagged:
            found += [f"kind {kind}" for kind, cls in field.members.items() if name in option_fields(cls)]
    return list(dict.fromkeys(found))


def is_kind(kind: str, path: str, root: type) -> bool:
    """Whether an option at this path, of any algorithm, has such a kind."""
    from llmrl.config.config import PRESETS

    classes = [(root, ""), *((type(options), "algo.") for options in PRESETS.values())]
    return any(
        prefix + place == path and kind in field.members for cls, prefix in classes for place, field in walk(cls)
    )


def moved_section(name: str) -> str | None:
    """`name` where it was a section before."""
    return name if name in MOVED_SECTIONS else None


def moved(path: str, section: str) -> str:
    """Where an option of a section of before is now."""
    return MOVED.get(path, f"algo{path.removeprefix(section)}")


def unknown(cls: type, name: str, path: str, elsewhere: list[str]) -> str:
    """What to say of an option that the class at `path` does not have."""
    full = path + name
    if full in MOVED and not MOVED[full].startswith(f"{full}."):
        return f"now {MOVED[full]}"
    if elsewhere:
        shown = ", ".join(elsewhere[:4]) + (" ..." if len(elsewhere) > 4 else "")
        return f"not read by what was chosen, but by {shown}: leave it out, or choose that"
    if "." in name:
        outer, _, inner = name.partition(".")
        return f"there is no such option: options are nested here, {path}{outer} is a mapping that holds {inner}"
    if not path and name in TRL:
        return f"did you mean {TRL[name]}?"
    same = [other for other in _everything() if other.split(".")[-1] == name]
    if same:
        return f"did you mean {' or '.join(same[:3])}?"
    if name in TRL:
        return f"did you mean {TRL[name]}?"
    own = list(option_fields(cls))
    if close := nearest(name, own):
        return f"there is no such option; did you mean {path}{close}?"
    if close := nearest(name, sorted({other.split(".")[-1] for other in _everything()}), cutoff=0.75):
        places = [other for other in _everything() if other.split(".")[-1] == close]
        return f"there is no such option; did you mean {' or '.join(places[:3])}?"
    return f"there is no such option; there are {', '.join(path + other for other in own) or 'none here'}"
