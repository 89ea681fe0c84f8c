"""What to say about an option that does not exist: its new name, its place, who else reads it, or the nearest name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from functools import cache

from llmrl.config.config import PRESETS, RunConfig
from llmrl.config.schema import OptionField, option_fields, walk

RENAMED_PREFIXES = {
    ("algo.", "algo.loss."): "epsilon epsilon_high delta dual_clip max_ratio",
    ("algo.sapo_", "algo.loss."): "temperature_pos temperature_neg",
    ("algo.vespo_", "algo.loss."): "k_pos lambda_pos k_neg lambda_neg",
    ("algo.cov_", "algo.loss."): "fraction",
    ("algo.kl_cov_", "algo.loss."): "coef",
    ("algo.", "algo.baseline."): "batch_std_of",
    ("algo.passk_", "algo.baseline."): "k mix",
    ("algo.rubric_", "algo.rubric."): "alpha norm",
    ("algo.dynamic_sampling_", "algo.dynamic_sampling."): "max_batches",
    ("algo.kl_", "algo.kl."): "estimator target horizon",
    ("algo.thr_", "algo.token_weighting."): "p p_end p_steps threshold threshold_value",
    ("algo.nthr_", "algo.token_weighting."): "eta",
    ("critic.", "algo.value."): "gamma lam length_alpha lam_critic",
    ("critic.vf_", "algo.value."): "coef",
    ("critic.value_", "algo.value."): "clip",
    ("critic.warmup_", "algo.warmup."): "steps iterations explained_variance",
    ("preference.", "algo.loss."): "beta label_smoothing desirable_weight undesirable_weight",
    ("preference.discopop_", "algo.loss."): "tau",
    ("preference.simpo_", "algo.loss."): "gamma",
    ("preference.f_alpha_divergence_", "algo.divergence."): "coef",
    ("bcoder.", "algo.stage."): "q_coef adv_coef ce_coef",
    ("bcoder.value_", "algo.stage."): "hidden_size",
}
"""(old prefix, new prefix) -> the names that kept the rest."""

MOVED = {
    **{old + name: new + name for (old, new), names in RENAMED_PREFIXES.items() for name in names.split()},
    "algo.baseline": "algo.baseline.kind",
    "algo.scale_rewards": "algo.baseline.scale",
    "algo.whiten_advantages": "algo.whiten",
    "algo.multi_objective_aggregation": "algo.baseline.kind each_reward",
    "algo.policy_loss": "algo.loss.kind",
    "algo.importance_sampling_level": "algo.loss.ratio",
    "algo.loss_type": "algo.aggregation (policy gradients) or algo.loss.kind (the DPO family)",
    "algo.loss_weights": "algo.loss: {kind: sum, terms: [{kind: ..., weight: ...}, ...]}",
    "algo.vllm_importance_sampling_mode": "algo.sampler: {kind: weights, of: token, outside: truncate} or algo.sampler "
    "bypass",
    "algo.vllm_importance_sampling_clip_min": "algo.sampler.low",
    "algo.vllm_importance_sampling_clip_max": "algo.sampler.high",
    "algo.beta": "algo.kl.beta (policy gradients) or algo.loss.beta (the DPO family)",
    "algo.kl_in": "algo.kl.kind",
    "algo.use_bias_correction_kl": "algo.kl.bias_correction",
    "algo.gamma": "algo.baseline.gamma (kind token_rewards) or algo.value.gamma (ppo)",
    "algo.use_token_rewards": "algo.baseline token_rewards (ppo reads algo.use_token_rewards)",
    "preference.source": "algo.name online_dpo (or online_kto)",
    "preference.loss_type": "algo.loss.kind; several: algo.loss: {kind: sum, terms: [...]}",
    "preference.loss_weights": "the weight of each term of algo.loss: {kind: sum, terms: [...]}",
    "preference.f_divergence_type": "algo.divergence.kind",
    "preference.ref_model_sync_steps": "algo.reference.steps",
    "preference.ref_model_mixup_alpha": "algo.reference.alpha",
    "bcoder.stage": "algo.stage.kind",
}
"""Old dotted name -> new name."""

MOVED_SECTIONS = ("preference", "bcoder")
"""Old sections. Their options are options of `algo` now, under the same name where MOVED does not have them."""

_AS_MOVED = (
    "algo.beta algo.importance_sampling_level algo.loss_type algo.scale_rewards critic.vf_coef "
    "preference.f_divergence_type preference.ref_model_sync_steps preference.ref_model_mixup_alpha"
)
TRL = {
    **{old.split(".")[1]: MOVED[old] for old in _AS_MOVED.split()},
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
    "reward_weights": "the weight of each entry of rewards",
    "reward_funcs": "rewards",
    "num_ppo_epochs": "algo.num_iterations",
    "cliprange": "algo.loss.epsilon",
    "cliprange_value": "algo.value.clip",
    "gamma": "algo.value.gamma",
    "kl_coef": "algo.kl.beta",
    "whiten_rewards": "algo.whiten",
    "bf16": "model.dtype bfloat16",
    "fp16": "model.dtype bfloat16 (fp16 is not supported)",
    "logging_steps": "nothing: every step is logged",
    "eval_strategy": "eval.steps",
    "eval_steps": "eval.steps",
    "save_strategy": "train.save_steps",
    "warmup_ratio": "train.warmup_steps",
    "lr": "train.learning_rate",
    "optim": "nothing: AdamW is the optimizer",
    "model_name_or_path": "model.path",
    "dataset_name": "data.path",
    "dataset_config": "data.path, after a colon (openai/gsm8k:main)",
    "dataset_train_split": "data.split",
    "use_peft": "model.lora '{}'",
    "lora_r": "model.lora.r",
    "lora_target_modules": "model.lora.target_modules",
    "sync_ref_model": "algo.reference.steps",
    "log_completions": "track.save_rollouts",
    "wandb_project": "track.project",
}
"""TRL's flat name -> the option here, where place or name differ and no option has the same last part."""


def near(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" for a message, or "" where nothing is similar."""
    close = nearest(name, known)
    return f"; did you mean {close}?" if close else ""


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known name most like `name`, as a whole or in one of its words; swapped letters come first."""

    def likeness(other: str) -> float:
        if sorted(name) == sorted(other):
            return 1.0
        words = [word for word in re.split(r"[_.]", other) if len(word) > 2]
        shares = [difflib.SequenceMatcher(None, name, text).ratio() for text in (other, *words)]
        return max(shares[0], *(0.9 * share for share in shares[1:]), 0.0)

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best) >= cutoff else None


@cache
def catalog(root: type) -> dict[str, list[OptionField]]:
    """Return the options of every kind of run by dotted path; below `algo` a path can mean several."""
    found: dict[str, list[OptionField]] = {}
    runs = issubclass(root, RunConfig)
    fields = [(path, field) for path, field in walk(root) if not (runs and path.startswith("algo."))]
    for cls in dict.fromkeys(map(type, PRESETS.values())) if runs else ():
        fields += [(f"algo.{path}", field) for path, field in walk(cls)]
    for path, field in fields:
        found.setdefault(path, []).append(field)
    return found


def readers(name: str, path: str, root: type) -> list[str]:
    """Return the kinds and presets that read the option `name` at `path` (which ends with a dot)."""
    found = [
        f"kind {kind}"
        for field in catalog(root).get(path.removesuffix("."), ())
        for kind, cls in field.members.items()
        if kind and name in option_fields(cls)
    ]
    if path == "algo.":
        found += [f"algo.name {preset}" for preset, algo in PRESETS.items() if name in option_fields(type(algo))]
    return list(dict.fromkeys(found))


def is_kind(kind: str, path: str, root: type) -> bool:
    """Return whether the option at `path` has this kind in any algorithm."""
    return any(kind in field.members for field in catalog(root).get(path, ()))


def moved(path: str) -> str:
    """Return the new name of an option of a section in MOVED_SECTIONS."""
    return MOVED.get(path, f"algo.{path.partition('.')[2]}".removesuffix("."))


def unknown(cls: type, name: str, path: str, elsewhere: list[str], root: type) -> str:
    """Return what to say about `name`, which the class at `path` does not have; `elsewhere` are its `readers`."""
    full = path + name
    if full in MOVED and not MOVED[full].startswith(f"{full}."):
        return f"now {MOVED[full]}"
    if elsewhere:
        shown = ", ".join(elsewhere[:4]) + (" ..." if len(elsewhere) > 4 else "")
        return f"not read by what was chosen, but by {shown}: leave it out, or choose that"
    if "." in name:
        outer, _, inner = name.partition(".")
        return f"there is no such option: options are nested here, {path}{outer} is a mapping that holds {inner}"
    places: dict[str, list[str]] = {}
    for place in catalog(root):
        places.setdefault(place.split(".")[-1], []).append(place)
    if name in TRL and (not path or name not in places):
        return f"did you mean {TRL[name]}?"
    if name in places:
        return f"did you mean {' or '.join(places[name][:3])}?"
    own = option_fields(cls)
    if close := nearest(name, own):
        return f"there is no such option; did you mean {path}{close}?"
    if close := nearest(name, sorted(places), cutoff=0.75):
        return f"there is no such option; did you mean {' or '.join(places[close][:3])}?"
    return f"there is no such option; there are {', '.join(path + other for other in own) or 'none here'}"
