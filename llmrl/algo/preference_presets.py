"""Names of the DPO family -> choices, and which option is read with which: `presets.py` for `config.preference`.

Nothing here needs torch, so that a wrong combination is told before anything loads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmrl.config import Config, PreferenceConfig

DPO: dict[str, Any] = {
    "source": "dataset",
    "loss_type": ["sigmoid"],
    "beta": 0.1,
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "discopop_tau": 0.05,
    "simpo_gamma": 0.5,
    "use_weighting": False,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.0,
    "pairs": "best_worst",
    "min_margin": 0.0,
    "desirable_above": 0.5,
    "max_length": 1024,
    "precompute_ref_log_probs": False,
    "ref_model_sync_steps": 0,
    "ref_model_mixup_alpha": 0.6,
}
"""The row the others are told by their difference from. Options that are off when unset have no entry."""
PREFERENCE_PRESETS: dict[str, dict[str, Any]] = {
    "dpo": {},
    "online_dpo": {"source": "rollouts"},
    "cdpo": {"label_smoothing": 0.1},
    "ipo": {"loss_type": ["ipo"]},
    "simpo": {"loss_type": ["simpo"], "beta": 2.0, "simpo_gamma": 1.0},
    "orpo": {"loss_type": ["sft", "orpo"], "loss_weights": [1.0, 0.1]},
    "kto": {"loss_type": ["kto"]},
}
READ_OF_ALGO: dict[str, Any] = {
    "num_iterations": 1,
    "num_mini_batches": 1,
    "dynamic_sampling": False,
    "dynamic_sampling_max_batches": 10,
}
"""The options of `config.algo` that this family reads, and their defaults."""

SINGLE = ("kto", "apo_zero_unpaired")
"""Losses of completions with a label; all others are of pairs."""
NO_REFERENCE = ("sft", "simpo", "orpo")
OF_DIFFERENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
"""Losses of f(x_chosen) - f(x_rejected), where another divergence than the reverse KL makes sense."""
SMOOTHED = ("sigmoid", "exo_pair", "robust", "aot", "aot_unpaired", "simpo")
WHOLE_BATCH = ("aot", "aot_unpaired")
"""Losses whose terms depend on all pairs of the optimizer step."""

Reader = tuple[str, Callable[[Any], bool]]


def _some(*names: str) -> Reader:
    return f"loss_type {' or '.join(names)}", lambda c: any(loss in names for loss in c.loss_type)


def is_single(c: PreferenceConfig) -> bool:
    """Whether the losses are of single completions."""
    return any(loss in SINGLE for loss in c.loss_type or ())


def needs_reference(c: PreferenceConfig) -> bool:
    """Whether any loss looks at the reference model."""
    return any(loss not in NO_REFERENCE for loss in c.loss_type or ())


IN_PAIRS: Reader = ("losses of pairs", lambda c: not is_single(c))
WITH_REFERENCE: Reader = ("a loss that looks at the reference", needs_reference)
FROM_DATASET: Reader = ("source dataset", lambda c: c.source == "dataset")
PAIRS_OF_ROLLOUTS: Reader = (
    "source rollouts and losses of pairs",
    lambda c: c.source == "rollouts" and not is_single(c),
)
READ_WITH: dict[str, Reader] = {
    "beta": (
        "a loss other than sft and orpo",
        lambda c: any(loss not in ("sft", "orpo") for loss in c.loss_type),
    ),
    "label_smoothing": _some(*SMOOTHED),
    "f_divergence_type": _some(*OF_DIFFERENCE),
    "f_alpha_divergence_coef": (
        "f_divergence_type alpha_divergence",
        lambda c: c.f_divergence_type == "alpha_divergence",
    ),
    "discopop_tau": _some("discopop"),
    "simpo_gamma": _some("simpo"),
    "ld_alpha": IN_PAIRS,
    "use_weighting": IN_PAIRS,
    "desirable_weight": _some(*SINGLE),
    "undesirable_weight": _some(*SINGLE),
    "pairs": PAIRS_OF_ROLLOUTS,
    "min_margin": (
        "source rollouts, losses of pairs and no hierarchy",
        lambda c: PAIRS_OF_ROLLOUTS[1](c) and not c.hierarchy,
    ),
    "hierarchy": PAIRS_OF_ROLLOUTS,
    "desirable_above": (
        "source rollouts and a loss of single completions",
        lambda c: c.source == "rollouts" and is_single(c),
    ),
    "max_length": FROM_DATASET,
    "precompute_ref_log_probs": (
        "source dataset and a loss that looks at the reference",
        lambda c: c.source == "dataset" and needs_reference(c),
    ),
    "ref_cache_dir": ("precompute_ref_log_probs true", lambda c: bool(c.precompute_ref_log_probs)),
    "ref_model_sync_steps": WITH_REFERENCE,
    "ref_model_mixup_alpha": ("ref_model_sync_steps above 0", lambda c: bool(c.ref_model_sync_steps)),
}  # fmt: skip
"""For options that not every choice reads: what they are read with, in words and as a condition."""


def is_preference(config: Config) -> bool:
    """Whether `algo.name` is of this family."""
    return config.algo.name in PREFERENCE_PRESETS


def is_offline(config: Config) -> bool:
    """Whether the run is fed from a dataset of preferences: no engine, no rewards."""
    return is_preference(config) and resolve_preference(config)[0].source == "dataset"


def resolve_preference(config: Config) -> tuple[PreferenceConfig, list[str]]:
    """`config.preference` with every option that has a reader filled from the preset, and what is wrong with it.

    What is given wins over the preset. Resolving twice changes nothing.
    """
    from llmrl.config import PreferenceConfig

    given = vars(config.preference or PreferenceConfig())
    row = DPO | PREFERENCE_PRESETS[config.algo.name]
    if given["loss_type"] is not None and given["loss_type"] != row["loss_type"]:
        row.pop("loss_weights", None)  # the preset's belong to its own losses
    filled = PreferenceConfig(**{k: row.get(k) if v is None else v for k, v in given.items()})
    findings = []
    for name, (words, condition) in READ_WITH.items():
        if not condition(filled):
            setattr(filled, name, None)
            if given[name] is not None:
                findings.append(f"preference.{name} {given[name]!r} is given, but only read with {words}: leave it out")
    if filled.loss_weights is None:
        filled.loss_weights = [1.0] * len(filled.loss_type or ())
    return filled, findings


def contradictions(config: Config) -> list[str]:
    """What is wrong with `config.preference`, alone and together with the rest; one line each, with the fix."""
    if not is_preference(config):
        if config.preference is None:
            return []
        names = ", ".join(PREFERENCE_PRESETS)
        return [f"preference is given, but algo.name {config.algo.name} reads none of it; those that do: {names}"]
    c, findings = resolve_preference(config)
    findings += _ranges(c) + _clashes(c, config)
    return findings + (_unread_offline(config) if c.source == "dataset" else _unread_online(c, config))


def _ranges(c: PreferenceConfig) -> list[str]:
    bounds: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "loss_type": ("name at least one loss, each once", lambda v: v and len(set(v)) == len(v)),
        "loss_weights": (f"have one weight for each of {c.loss_type}", lambda v: len(v) == len(c.loss_type or ())),
        "beta": ("be above 0", lambda v: v > 0),
        "label_smoothing": ("be at least 0 and below 0.5", lambda v: 0 <= v < 0.5),
        "discopop_tau": ("be above 0", lambda v: v > 0),
        "ld_alpha": ("lie between 0 and 1", lambda v: 0 <= v <= 1),
        "desirable_weight": ("not be negative", lambda v: v >= 0),
        "undesirable_weight": ("not be negative", lambda v: v >= 0),
        "min_margin": ("not be negative", lambda v: v >= 0),
        "hierarchy": ("name at least one level", bool),
        "max_length": ("be at least 2", lambda v: v >= 2),
        "ref_model_sync_steps": ("not be negative", lambda v: v >= 0),
        "ref_model_mixup_alpha": ("lie above 0 and at most at 1", lambda v: 0 < v <= 1),
    }
    values = {name: getattr(c, name) for name in bounds}
    return [
        f"preference.{name} is {value}: must {bounds[name][0]}"
        for name, value in values.items()
        if value is not None and not bounds[name][1](value)
    ]


def _clashes(c: PreferenceConfig, config: Config) -> list[str]:
    losses = c.loss_type or []
    other_scores = [loss for loss in losses if loss not in (*OF_DIFFERENCE, "sft")]
    several_steps = (config.algo.num_iterations or 1) * (config.algo.num_mini_batches or 1) > 1
    pairs = [
        (
            is_single(c) and (len(losses) > 1),
            f"preference.loss_type {losses} mixes single completions and pairs, or two losses of single completions",
        ),
        (
            "exo_pair" in losses and not c.label_smoothing,
            "preference.loss_type exo_pair is infinite without smoothing: set preference.label_smoothing (paper: 1e-3)",
        ),
        (
            c.f_divergence_type not in (None, "reverse_kl") and bool(other_scores),
            f"preference.f_divergence_type {c.f_divergence_type} is not defined for {', '.join(other_scores)}",
        ),
        (
            several_steps and any(loss in WHOLE_BATCH for loss in losses),
            "preference.loss_type aot compares all pairs of an optimizer step with each other: set algo.num_iterations "
            "and algo.num_mini_batches to 1",
        ),
        (
            c.ld_alpha is not None and any(loss in WHOLE_BATCH for loss in losses),
            "preference.ld_alpha shortens each pair by its own lengths, aot compares pairs with each other: choose one",
        ),
        (
            bool(c.use_weighting) and any(loss in WHOLE_BATCH for loss in losses),
            "preference.use_weighting weighs pairs, but aot's terms belong to ranks, not to pairs: choose one",
        ),
        (
            several_steps and bool(c.use_weighting),
            "preference.use_weighting is measured on the policy that takes the step: set algo.num_iterations and "
            "algo.num_mini_batches to 1",
        ),
        (
            bool(c.ref_model_sync_steps) and bool(c.precompute_ref_log_probs),
            "preference.ref_model_sync_steps moves the reference, precompute_ref_log_probs fixes it: choose one",
        ),
        (
            bool(c.ref_model_sync_steps) and config.model.lora is not None,
            "preference.ref_model_sync_steps cannot move a reference that is the model without its adapters: remove "
            "model.lora, or preference.ref_model_sync_steps",
        ),
        (
            "kto" in losses and config.rollout.num_prompts < 2,
            "preference.loss_type kto estimates the KL with completions of other prompts: set rollout.num_prompts to 2 "
            "or more",
        ),
        (
            any(level.part == "???" for level in c.hierarchy or ()),
            "preference.hierarchy: every level needs `part`, the name of a reward",
        ),
        (
            (config.algo.num_mini_batches or 1) > config.rollout.num_prompts,
            f"algo.num_mini_batches {config.algo.num_mini_batches} exceeds rollout.num_prompts "
            f"{config.rollout.num_prompts}: mini-batches are made of whole groups",
        ),
    ]
    return [text for wrong, text in pairs if wrong]


def _unread_offline(config: Config) -> list[str]:
    """Options that nobody reads when completions come from a dataset."""
    from llmrl.config import DataConfig, RolloutConfig, VerifyConfig

    reads_data = ("path", "split", "limit", "shuffle", "chat_template")
    parts: list[tuple[str, Any, Any, tuple[str, ...]]] = [
        ("rollout", config.rollout, RolloutConfig(), ("num_prompts",)),
        ("verify", config.verify, VerifyConfig(), ()),
        ("data", config.data, DataConfig(), reads_data),
    ]
    if config.eval.data is not None:
        parts.append(("eval.data", config.eval.data, DataConfig(), reads_data))
    given = [
        f"{part}.{field.name}"
        for part, values, defaults, read in parts
        for field in dataclasses.fields(values)
        if field.name not in read and getattr(values, field.name) != getattr(defaults, field.name)
    ]
    given += ["rewards"] * bool(config.rewards)
    given += [f"eval.{name}" for name, default in (("num_generations", 1), ("temperature", 0.0))
              if getattr(config.eval, name) != default]  # fmt: skip
    given += ["algo.dynamic_sampling"] * bool(config.algo.dynamic_sampling)
    return [
        f"{name} is given, but nothing is sampled or scored with preference.source dataset: leave it out"
        for name in given
    ]


def _unread_online(c: PreferenceConfig, config: Config) -> list[str]:
    pairs = [
        (
            config.rollout.num_generations < 2 and not is_single(c),
            f"rollout.num_generations is {config.rollout.num_generations}: a pair needs at least 2 rollouts",
        ),
    ]
    return [text for wrong, text in pairs if wrong]


def describe(config: Config) -> list[str]:
    """Lines for the user: what is compared, where it comes from, and by which loss."""
    c, _ = resolve_preference(config)
    told = {k: v for k, v in vars(c).items() if v not in (None, False, 0, 0.0, [1.0], "reverse_kl") and k != "source"}
    if told.get("hierarchy"):
        told["hierarchy"] = " > ".join(level.part for level in c.hierarchy or ())
    where = "the dataset's preferences" if c.source == "dataset" else "preferences among the policy's own rollouts"
    return [f"algorithm {config.algo.name} on {where}: " + ", ".join(f"{k} {v}" for k, v in told.items())]
