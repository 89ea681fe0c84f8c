"""Names -> choices. An `AlgoConfig` with gaps goes in, one without comes out; contradictions are findings.

Every option has a reader: a condition on the other choices under which it is read. Elsewhere it stays None, and giving
it is an error. Nothing here needs torch, so that a wrong combination is told before anything loads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmrl.algo import bcoder_options
from llmrl.algo.bcoder_options import BCODER_PRESETS
from llmrl.algo.preference_presets import PREFERENCE_PRESETS, READ_OF_ALGO
from llmrl.errors import UserError

if TYPE_CHECKING:
    from llmrl.config import AlgoConfig, Config

GRPO: dict[str, Any] = {
    "baseline": "group",
    "scale_rewards": "group",
    "batch_std_of": "raw",
    "whiten_advantages": False,
    "multi_objective_aggregation": "sum_then_normalize",
    "passk_k": 4,
    "passk_mix": 1.0,
    "rubric_alpha": 0.0,
    "rubric_norm": "group_max",
    "overlong_buffer": 0.0,
    "mask_truncated_completions": False,
    "dynamic_sampling": False,
    "dynamic_sampling_max_batches": 10,
    "policy_loss": "clip",
    "importance_sampling_level": "token",
    "loss_type": "grpo",
    "epsilon": 0.2,
    "max_ratio": 5.0,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
    "cov_fraction": 2e-4,
    "kl_cov_coef": 1.0,
    "vllm_importance_sampling_mode": "none",
    "beta": 0.0,
    "kl_in": "loss",
    "kl_estimator": "k3",
    "use_bias_correction_kl": False,
    "kl_horizon": 10_000,
    "entropy_coef": 0.0,
    "top_entropy_quantile": 1.0,
    "token_weighting": "none",
    "thr_p": 0.0,
    "thr_p_steps": 100,
    "thr_threshold": "nthr_min",
    "thr_threshold_value": 1.0,
    "use_token_rewards": False,
    "gamma": 1.0,
    "positive_lm_coef": 0.0,
    "num_iterations": 1,
    "num_mini_batches": 1,
}
"""The row the others are told by their difference from. Options that are off when unset have no entry."""

DAPO = {"epsilon_high": 0.28, "loss_type": "dapo"}
PPO = {
    "baseline": "critic", "whiten_advantages": True, "loss_type": "dapo", "num_mini_batches": 4,
    "use_token_rewards": True,
}  # fmt: skip
SEQUENCE = {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4, "num_mini_batches": 4}
PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"scale_rewards": "none", "loss_type": "dr_grpo"},
    "dapo": DAPO | {"dual_clip": 10.0, "dynamic_sampling": True, "overlong_buffer": 0.2},
    "lite_ppo": {"scale_rewards": "batch", "loss_type": "dapo"},
    "gspo": SEQUENCE,
    "gspo_token": SEQUENCE | {"importance_sampling_level": "sequence_token"},
    "luspo": SEQUENCE | {"epsilon": 2e-3, "epsilon_high": 2.5e-3, "loss_type": "sequence_sum"},
    "gmpo": {"policy_loss": "gmpo", "epsilon": 0.4, "num_mini_batches": 4},
    "cispo": {"policy_loss": "cispo", "loss_type": "dapo", "dynamic_sampling": True},
    "sapo": {"policy_loss": "sapo", "num_mini_batches": 4},
    "vespo": {"policy_loss": "vespo", "loss_type": "dapo", "num_mini_batches": 4},
    "clip_cov": {"policy_loss": "clip_cov", "loss_type": "dapo", "num_mini_batches": 4},
    "kl_cov": {"policy_loss": "kl_cov", "loss_type": "dapo", "num_mini_batches": 4},
    "rloo": {
        "baseline": "leave_one_out", "loss_type": "sequence_sum", "beta": 0.05, "kl_in": "reward", "kl_estimator": "k1",
    },
    "opo": {"baseline": "length_weighted", "loss_type": "dapo"},
    "remax": {"baseline": "greedy", "loss_type": "dapo"},
    "optimal_token": {"baseline": "optimal_token", "loss_type": "dapo"},
    "reinforce_pp": {
        "baseline": "none", "scale_rewards": "none", "whiten_advantages": True, "loss_type": "dapo",
        "beta": 0.01, "kl_in": "reward", "kl_estimator": "k1",
    },
    "reinforce_pp_baseline": {
        "scale_rewards": "none", "whiten_advantages": True, "loss_type": "dapo", "beta": 0.01, "kl_estimator": "k2",
    },
    "gdpo": {"multi_objective_aggregation": "normalize_then_sum"},
    "passk": DAPO | {"baseline": "passk"},
    "thr": {"token_weighting": "thr", "thr_p": 0.1},
    "nthr": {"token_weighting": "nthr"},
    "c_grpo": {"rubric_alpha": 0.3},
    "ircoco": {"baseline": "none", "scale_rewards": "none", "use_token_rewards": True, "gamma": 0.0},
    "ppo": PPO,
    "vapo": PPO | {"epsilon_high": 0.28, "positive_lm_coef": 0.1},
}  # fmt: skip

CLIP_MIN, CLIP_MAX = "vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max"
SAMPLER_BOUNDS: dict[str, dict[str, float]] = {
    "token_truncate": {CLIP_MIN: 0.0, CLIP_MAX: 2.0},
    "token_mask": {CLIP_MIN: 0.5, CLIP_MAX: 5.0},
    "sequence_truncate": {CLIP_MIN: 0.0, CLIP_MAX: 3.0},
    "sequence_mask": {CLIP_MIN: 0.0, CLIP_MAX: 3.0},
}
"""Of the sampler's correction: TIS as its authors use it, IcePop, and TRL's default for sequences."""

FAMILIES = {"ppo": "ppo", "vapo": "ppo", **dict.fromkeys(PREFERENCE_PRESETS, "dpo"), "bcoder": "bcoder"}
"""The presets that are not of the GRPO family, and whose they are: `make_algorithm` picks the class by it."""

TOKEN_RATIO_LOSSES = ("gmpo", "vespo", "clip_cov", "kl_cov")
"""Policy losses with a ratio of their own: `importance_sampling_level` is not theirs to choose."""


def _loss_is(*names: str) -> tuple[str, Callable[[Any], bool]]:
    return f"policy_loss {' or '.join(names)}", lambda c: c.policy_loss in names


CRITIC = ("baseline critic", lambda c: c.baseline == "critic")
PENALTY = ("beta above 0", lambda c: c.beta > 0)
ESTIMATED_IN_LOSS = (
    "beta above 0, kl_in loss and a kl_estimator that looks at the drawn token alone",
    lambda c: c.beta > 0 and c.kl_in == "loss" and c.kl_estimator != "full",
)
TOKEN_WEIGHTING = ("token_weighting thr or nthr", lambda c: c.token_weighting != "none")
THR = ("token_weighting thr", lambda c: c.token_weighting == "thr")
PASSK = ("baseline passk", lambda c: c.baseline == "passk")
WEIGHTED = ("a vllm_importance_sampling_mode of weights", lambda c: c.vllm_importance_sampling_mode in SAMPLER_BOUNDS)
SUM_FIRST = ("multi_objective_aggregation sum_then_normalize", lambda c: c.multi_objective_aggregation[0] == "s")
READ_WITH: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "baseline": SUM_FIRST,
    "scale_rewards": (
        "baseline group, batch or none (and rewards summed before they are normalised)",
        lambda c: c.baseline in ("group", "batch", "none"),
    ),
    "batch_std_of": ("scale_rewards batch", lambda c: c.scale_rewards == "batch"),
    "passk_k": PASSK,
    "passk_mix": PASSK,
    "rubric_norm": ("rubric_alpha above 0", lambda c: c.rubric_alpha > 0),
    "dynamic_sampling_max_batches": ("dynamic_sampling", lambda c: c.dynamic_sampling),
    "importance_sampling_level": (
        "policy_loss clip, cispo or sapo",
        lambda c: c.policy_loss not in TOKEN_RATIO_LOSSES,
    ),
    "epsilon": _loss_is("clip", "clip_cov", "gmpo"),
    "epsilon_high": _loss_is("clip", "clip_cov"),
    "delta": _loss_is("clip"),
    "dual_clip": _loss_is("clip"),
    "max_ratio": _loss_is("cispo"),
    "sapo_temperature_pos": _loss_is("sapo"),
    "sapo_temperature_neg": _loss_is("sapo"),
    "vespo_k_pos": _loss_is("vespo"),
    "vespo_lambda_pos": _loss_is("vespo"),
    "vespo_k_neg": _loss_is("vespo"),
    "vespo_lambda_neg": _loss_is("vespo"),
    "cov_fraction": _loss_is("clip_cov", "kl_cov"),
    "kl_cov_coef": _loss_is("kl_cov"),
    CLIP_MIN: WEIGHTED,
    CLIP_MAX: WEIGHTED,
    "kl_in": PENALTY,
    "kl_estimator": PENALTY,
    "use_bias_correction_kl": ESTIMATED_IN_LOSS,
    "kl_target": PENALTY,
    "kl_horizon": ("kl_target", lambda c: c.beta > 0 and c.kl_target is not None),
    "thr_p": THR,
    "thr_p_end": THR,
    "thr_p_steps": ("thr_p_end", lambda c: c.thr_p_end is not None),
    "thr_threshold": TOKEN_WEIGHTING,
    "thr_threshold_value": (
        "a threshold",
        lambda c: c.token_weighting != "none" and c.thr_threshold != "none",
    ),
    "use_token_rewards": ("baseline critic or none", lambda c: c.baseline in ("critic", "none")),
    "gamma": ("baseline none and use_token_rewards true", lambda c: c.baseline == "none" and c.use_token_rewards),
    "positive_lm_coef": CRITIC,
    "nthr_eta": ("token_weighting nthr", lambda c: c.token_weighting == "nthr"),
}
"""For options that not every choice reads: what they are read with, in words and as a condition. The order matters: an
option's condition looks at options before it, or at those that are always read."""


def resolve(config: AlgoConfig) -> AlgoConfig:
    """Fill every option that has a reader from the preset; what is given wins. Resolving twice changes nothing.

    Raises:
        UserError: an option is given that the other choices do not read.
    """
    resolved, findings = _resolve(config)
    if findings:
        raise UserError("configuration:\n" + "\n".join(f"  - {line}" for line in findings))
    return resolved


def _resolve(config: AlgoConfig) -> tuple[AlgoConfig, list[str]]:
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if config.name in BCODER_PRESETS:
        return _resolve_few(config, bcoder_options.READ_OF_ALGO)
    if config.name in PREFERENCE_PRESETS:
        return _resolve_few(config, READ_OF_ALGO)
    row = GRPO | PRESETS[config.name]
    if given["epsilon"] is not None and "epsilon_high" not in PRESETS[config.name]:
        row["epsilon_high"] = given["epsilon"]
    row.setdefault("epsilon_high", row["epsilon"])
    row |= SAMPLER_BOUNDS.get(given["vllm_importance_sampling_mode"] or row["vllm_importance_sampling_mode"], {})
    filled = dataclasses.replace(config, **{k: row.get(k) if v is None else v for k, v in given.items()})
    findings = []
    for name, (words, condition) in READ_WITH.items():
        if not _holds(condition, filled):
            setattr(filled, name, None)
            if given[name] is not None:
                findings.append(f"algo.{name} {given[name]!r} is given, but only read with {words}: leave it out")
    return filled, findings


def _resolve_few(config: AlgoConfig, row: dict[str, Any]) -> tuple[AlgoConfig, list[str]]:
    """For a family with options of its own: of these it reads only those in `row`."""
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "name"}
    filled = {name: row.get(name) if value is None else value for name, value in given.items()}
    unread = [name for name, value in given.items() if value is not None and name not in row]
    findings = [
        f"algo.{name} {given[name]!r} is given, but algo.name {config.name} does not read it" for name in unread
    ]
    resolved = dataclasses.replace(config, **filled | dict.fromkeys(unread))
    for name in row:
        words, condition = READ_WITH.get(name, ("", lambda _: True))
        if not _holds(condition, resolved):
            setattr(resolved, name, None)
            if given[name] is not None:
                findings.append(f"algo.{name} {given[name]!r} is given, but only read with {words}: leave it out")
    return resolved, findings


def _holds(condition: Callable[[Any], bool], config: AlgoConfig) -> bool:
    """A condition on an option that itself has no reader does not hold."""
    try:
        return bool(condition(config))
    except TypeError:
        return False


def contradictions(config: Config) -> list[str]:
    """What is wrong with `config.algo`, alone and together with the rest; one line each, with the fix."""
    from llmrl.algo.critic_presets import critic_contradictions

    c, findings = _resolve(with_staleness(config))
    findings += _ranges(c)
    if c.name not in PREFERENCE_PRESETS and c.name not in BCODER_PRESETS:
        findings += _clashes(c) + _clashes_outside(c, config)
    return findings + critic_contradictions(config)


def with_staleness(config: Config) -> AlgoConfig:
    """`config.algo`, and where nothing is said about stale rollouts, truncated weights (only of what is sampled)."""
    if config.algo.name in (*PREFERENCE_PRESETS, *BCODER_PRESETS):
        return config.algo
    if config.rollout.max_staleness > 0 and config.algo.vllm_importance_sampling_mode is None:
        return dataclasses.replace(config.algo, vllm_importance_sampling_mode="token_truncate")
    return config.algo


def _ranges(c: AlgoConfig) -> list[str]:
    def wrong(names: tuple[str, ...], what: str, ok: Callable[[Any], bool]) -> list[str]:
        values = {name: getattr(c, name) for name in names}
        return [f"algo.{name} is {v}: must {what}" for name, v in values.items() if v is not None and not ok(v)]

    counts = (
        "num_iterations",
        "num_mini_batches",
        "passk_k",
        "dynamic_sampling_max_batches",
        "kl_horizon",
        "thr_p_steps",
    )
    not_negative = ("epsilon", "epsilon_high", "beta", "kl_cov_coef", "nthr_eta", "entropy_coef", CLIP_MIN)
    not_negative += ("positive_lm_coef",)
    positive = ("max_ratio", "sapo_temperature_pos", "sapo_temperature_neg", "kl_target", "off_policy_mask_threshold")
    findings = wrong(counts, "be at least 1", lambda v: v >= 1)
    findings += wrong(not_negative, "not be negative", lambda v: v >= 0)
    findings += wrong(positive, "be above 0", lambda v: v > 0)
    shares = ("passk_mix", "rubric_alpha", "overlong_buffer", "gamma")
    findings += wrong(shares, "lie between 0 and 1", lambda v: 0 <= v <= 1)
    findings += wrong(("top_entropy_quantile", "cov_fraction"), "lie above 0 and at most at 1", lambda v: 0 < v <= 1)
    findings += wrong(("thr_p", "thr_p_end"), "lie between -1 and 1", lambda v: -1 <= v <= 1)
    findings += wrong(("dual_clip",), "be above 1", lambda v: v > 1)
    if c.delta is not None and c.delta <= 1 + (c.epsilon_high or 0):
        findings.append(f"algo.delta is {c.delta}: must be above 1 + epsilon_high, or it clips before that does")
    if c.vllm_importance_sampling_mode in SAMPLER_BOUNDS and not (getattr(c, CLIP_MIN) < 1 < getattr(c, CLIP_MAX)):
        findings.append(
            f"algo.{CLIP_MIN} {getattr(c, CLIP_MIN)} and algo.{CLIP_MAX} {getattr(c, CLIP_MAX)}: 1, where sampler and "
            "policy agree, must lie between them"
        )
    if c.thr_threshold == "quantile" and not 0 <= (c.thr_threshold_value or 0) < 1:
        findings.append(
            f"algo.thr_threshold_value is {c.thr_threshold_value}: a quantile must be at least 0 and below 1"
        )
    return findings


def _clashes(c: AlgoConfig) -> list[str]:
    per_token = [
        (c.token_weighting != "none", f"token_weighting {c.token_weighting}"),
        (c.baseline == "optimal_token", "baseline optimal_token"),
        (c.baseline == "critic", "baseline critic"),
        (c.baseline == "none" and c.kl_in == "reward", "a KL penalty in the reward with baseline none"),
        (c.baseline == "none" and bool(c.use_token_rewards), "use_token_rewards with baseline none"),
    ]
    findings = []
    for _, what in (pair for pair in per_token if pair[0]):
        if c.importance_sampling_level == "sequence":
            findings.append(
                f"algo: {what} gives every token its own advantage, which a ratio per sequence cannot tell apart: set "
                "algo.importance_sampling_level sequence_token"
            )
        if c.policy_loss in ("gmpo", "vespo"):
            findings.append(
                f"algo: {what} gives every token its own advantage; policy_loss {c.policy_loss} takes one per sequence"
            )
    pairs = [
        (
            c.policy_loss == "gmpo" and (c.top_entropy_quantile or 1) < 1,
            "algo.top_entropy_quantile leaves tokens out, but policy_loss gmpo takes the mean over a whole sequence",
        ),
        (
            c.policy_loss == "vespo" and (c.vllm_importance_sampling_mode or "").startswith("sequence"),
            "algo.policy_loss vespo multiplies the weights of a sequence's tokens into its own ratio: use "
            "algo.vllm_importance_sampling_mode token_truncate or token_mask",
        ),
        (
            c.kl_in == "loss" and c.kl_estimator == "k1",
            "algo.kl_estimator k1 in the loss has a gradient of zero on average: use k2 or k3, or algo.kl_in reward",
        ),
        (
            c.kl_in == "reward" and c.kl_estimator == "full",
            "algo.kl_estimator full in the reward says nothing about the token drawn, so the divergence itself gets "
            "no gradient, only what led to it: use k1 there, or set algo.kl_in loss",
        ),
        (
            c.kl_in == "reward" and c.kl_estimator not in ("k1", "full"),
            f"algo.kl_estimator {c.kl_estimator} in the reward hardly penalises near the reference (its gradient "
            "cancels to first order): only k1 is sound there, or set algo.kl_in loss",
        ),
        (
            c.dynamic_sampling and (c.baseline in ("none", "batch", "greedy", "critic") or c.whiten_advantages),
            "algo.dynamic_sampling drops groups whose accuracies are all equal, but with this baseline those do carry "
            "a gradient: use baseline group, or leave it off",
        ),
        (
            (c.rubric_alpha or 0) > 0 and c.multi_objective_aggregation == "normalize_then_sum",
            "algo.rubric_alpha mixes outcome and rubric into one reward, multi_objective_aggregation normalize_then_sum"
            " keeps rewards apart: choose one",
        ),
        (
            c.baseline == "passk" and c.passk_mix == 1.0 and bool(c.overlong_buffer),
            "algo.overlong_buffer shapes the reward, but the pass@k advantage looks at right and wrong only: set "
            "algo.passk_mix below 1 or algo.overlong_buffer 0",
        ),
        (
            c.baseline == "optimal_token" and c.kl_in == "reward",
            "algo.baseline optimal_token is for an outcome reward; a KL penalty goes into the loss: algo.kl_in loss",
        ),
        (
            (FAMILIES.get(c.name) == "ppo") != (c.baseline == "critic"),
            f"algo.name {c.name} with baseline {c.baseline}: ppo and vapo take the critic's values for their baseline, "
            "and no other preset has a critic (nor rewards kept apart by multi_objective_aggregation)",
        ),
        (
            c.baseline == "none" and bool(c.use_token_rewards) and c.scale_rewards != "none",
            f"algo.scale_rewards {c.scale_rewards} divides the rewards of whole rollouts, but algo.use_token_rewards "
            "pays single tokens: set algo.scale_rewards none",
        ),
        (
            c.baseline == "critic" and c.token_weighting != "none",
            f"algo.token_weighting {c.token_weighting} weighs advantages by which rollouts of a group are right, not "
            "a critic's: use preset thr or nthr, or leave it out",
        ),
        (
            c.baseline == "critic" and (c.rubric_alpha or 0) > 0,
            "algo.rubric_alpha makes a rollout's reward depend on the others of its group, which a critic cannot know: "
            "use c_grpo, or set algo.rubric_alpha 0",
        ),
    ]
    return findings + [text for wrong, text in pairs if wrong]


def _clashes_outside(c: AlgoConfig, config: Config) -> list[str]:
    size, prompts = config.rollout.num_generations, config.rollout.num_prompts
    weighted = [reward for reward in config.rewards if reward.weight > 0]
    several = c.multi_objective_aggregation == "normalize_then_sum"
    pairs = [
        (size < 1, f"rollout.num_generations is {size}: must be at least 1"),
        (
            1 <= size < 2 and (several or c.baseline not in ("none", "batch", "greedy", "critic")),
            f"rollout.num_generations is {size}: a group-relative advantage needs at least 2 rollouts",
        ),
        (
            c.baseline == "passk" and (c.passk_k or 1) > size,
            f"algo.passk_k {c.passk_k} exceeds rollout.num_generations {size}",
        ),
        (
            (c.num_mini_batches or 1) > prompts,
            f"algo.num_mini_batches {c.num_mini_batches} exceeds rollout.num_prompts {prompts}: mini-batches are made "
            "of whole groups",
        ),
        (
            several and bool(config.rewards) and len(weighted) < 2,
            "algo.multi_objective_aggregation normalize_then_sum needs at least two rewards with weight above 0",
        ),
        (
            (c.rubric_alpha or 0) > 0 and any(reward.fn.endswith(":score_group") for reward in config.rewards),
            "algo.rubric_alpha mixes outcome and rubric, and so does the reward `score_group`: name "
            "`rewards/citation_rubric.py:citation_rubric`, or set algo.rubric_alpha 0",
        ),
    ]
    return [text for wrong, text in pairs if wrong]


def cautions(c: AlgoConfig) -> list[str]:
    """What a resolved configuration may well mean, but rarely does."""
    one_step = c.num_iterations == 1 and c.num_mini_batches == 1
    pairs = [
        (
            (c.importance_sampling_level == "sequence" or c.policy_loss == "gmpo")
            and c.loss_type in ("dapo", "dr_grpo"),
            f"loss_type {c.loss_type} weighs a per-sequence loss by length; grpo gives every sequence the same weight",
        ),
        (
            c.mask_truncated_completions and bool(c.overlong_buffer),
            "mask_truncated_completions leaves out the very rollouts that overlong_buffer punishes most",
        ),
        (
            c.dynamic_sampling and c.scale_rewards == "batch",
            "dynamic_sampling leaves mixed groups only: the batch's deviation is larger, the learning rate acts less",
        ),
        (
            c.kl_in == "loss" and c.kl_estimator == "k3" and not c.use_bias_correction_kl and not one_step,
            "the k3 penalty is biased once the batch is off-policy; use_bias_correction_kl true corrects it",
        ),
        (
            c.policy_loss == "kl_cov" and one_step,
            "kl_cov has no effect with one optimizer step per batch: set num_mini_batches or num_iterations above 1",
        ),
    ]
    return [text for caution, text in pairs if caution]


def describe(config: AlgoConfig) -> list[str]:
    """Lines for the user: what the preset (and what overrides it) sets, and what to be careful about."""
    c = resolve(config)
    if c.name in BCODER_PRESETS:
        return [f"algorithm {c.name}: on stored programs, nothing is sampled"]
    preset = {k: v for k, v in PRESETS[c.name].items() if getattr(c, k) == v}
    own = {
        f.name: getattr(c, f.name)
        for f in dataclasses.fields(c)
        if f.name != "name" and getattr(c, f.name) not in (None, (GRPO | PRESETS[c.name]).get(f.name))
    }
    if c.epsilon_high == c.epsilon:
        own.pop("epsilon_high", None)

    def told(options: dict[str, Any]) -> str:
        return ", ".join(f"{k} {v}" for k, v in options.items())

    core = {k: getattr(c, k) for k in ("baseline", "scale_rewards", "policy_loss", "loss_type", "beta")}
    shown = {k: v for k, v in core.items() if v is not None and k not in own} | preset
    line = f"algorithm {c.name}: {told(shown)}" + (f"; changed: {told(own)}" if own else "")
    return [line, *(f"caution: {text}" for text in cautions(c))]
