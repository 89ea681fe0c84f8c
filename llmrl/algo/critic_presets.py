"""Names -> a critic's choices, as `presets.py` does for `AlgoConfig`: gaps are filled, contradictions are findings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmrl.config.critic import CriticConfig
from llmrl.errors import UserError

if TYPE_CHECKING:
    from llmrl.config import Config

PPO: dict[str, Any] = {
    "train_trunk": True,
    "vf_coef": 0.1,
    "value_clip": 0.2,
    "gamma": 1.0,
    "lam": 0.95,
    "warmup_steps": 0,
    "warmup_iterations": 4,
    "warmup_explained_variance": 0.5,
}
"""The row the others are told by their difference from. `lam_critic` is `lam` when unset."""

CRITIC_PRESETS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "vapo": {"length_alpha": 0.05, "lam_critic": 1.0, "warmup_steps": 50},
}
"""The algorithms that have a critic."""

READ_WITH: dict[str, tuple[str, Callable[[CriticConfig], bool]]] = {
    "path": ("critic.kind separate", lambda c: c.kind == "separate"),
    "lora": ("critic.kind separate or adapter", lambda c: c.kind != "shared"),
    "train_trunk": ("critic.kind shared", lambda c: c.kind == "shared"),
    "vf_coef": ("critic.kind shared and train_trunk", lambda c: c.kind == "shared" and bool(c.train_trunk)),
    "lam": ("critic.length_alpha unset", lambda c: c.length_alpha is None),
    "warmup_iterations": ("critic.warmup_steps above 0", lambda c: bool(c.warmup_steps)),
    "warmup_explained_variance": ("critic.warmup_steps above 0", lambda c: bool(c.warmup_steps)),
}
"""For options that not every choice reads: what they are read with, in words and as a condition."""


SHORT_LAMBDA = 0.5
"""A lambda of the longest answers below this is told."""


def resolve_critic(config: Config) -> CriticConfig | None:
    """The critic of this run with no gap left, or None where the algorithm has none.

    Raises:
        UserError: a critic is given to an algorithm without one, or an option that the other choices do not read.
    """
    resolved, findings = _resolve(config)
    if findings:
        raise UserError("configuration:\n" + "\n".join(f"  - {line}" for line in findings))
    return resolved


def _resolve(config: Config) -> tuple[CriticConfig | None, list[str]]:
    name = config.algo.name
    if name not in CRITIC_PRESETS:
        having = " or ".join(CRITIC_PRESETS)
        given = config.critic is not None
        return None, [f"critic is given, but algo.name {name} has none: leave it out, or use {having}"] * given
    critic = config.critic or CriticConfig()
    row = PPO | CRITIC_PRESETS[name] | {"learning_rate": config.train.learning_rate}
    given = {f.name: getattr(critic, f.name) for f in dataclasses.fields(critic)}
    if given["lam"] is not None and given["length_alpha"] is None:
        row.pop("length_alpha", None)  # what is given wins over the preset's other way to say it
    if critic.kind == "adapter":
        row["lora"] = config.model.lora
    filled = dataclasses.replace(critic, **{k: row.get(k) if v is None else v for k, v in given.items()})
    findings = []
    for option, (words, condition) in READ_WITH.items():
        if not condition(filled):
            setattr(filled, option, None)
            if given[option] is not None:
                findings.append(f"critic.{option} {given[option]!r} is given, but only read with {words}: leave it out")
    return filled, findings


def describe_critic(config: Config) -> list[str]:
    """Lines for the user: what the critic of this run is, if it has one, and a caution about its lambda."""
    c = resolve_critic(config)
    if c is None:
        return []
    options = {k: v for k, v in dataclasses.asdict(c).items() if v is not None and k not in ("kind", "lora")}
    how = " through adapters" if c.lora is not None else ""
    lines = [f"critic {c.kind}{how}: {', '.join(f'{k} {v}' for k, v in options.items())}"]
    longest = config.rollout.max_completion_length
    if c.length_alpha is not None and (lam := max(0.0, 1 - 1 / (c.length_alpha * longest))) < SHORT_LAMBDA:
        lines.append(
            f"caution: critic.length_alpha {c.length_alpha:g} is meant for long answers: with at most {longest} tokens "
            f"lambda is at most {lam:.2f}, and advantages hang on the critic alone; raise it, or give critic.lam"
        )
    return lines


def critic_contradictions(config: Config) -> list[str]:
    """What is wrong with `config.critic`, alone and together with the rest; one line each, with the fix."""
    c, findings = _resolve(config)
    if c is None:
        return findings

    def check(ok: bool, text: str) -> None:
        if not ok:
            findings.append(text)

    for name in ("gamma", "lam", "lam_critic"):
        value = getattr(c, name)
        check(value is None or 0 <= value <= 1, f"critic.{name} is {value}: must lie between 0 and 1")
    for name in ("learning_rate", "value_clip", "vf_coef", "warmup_steps", "warmup_iterations"):
        value = getattr(c, name)
        check(value is None or value >= 0, f"critic.{name} is {value}: must not be negative")
    check(c.warmup_iterations != 0, "critic.warmup_iterations is 0: must be at least 1")
    check(c.length_alpha is None or c.length_alpha > 0, f"critic.length_alpha is {c.length_alpha}: must be above 0")
    target = c.warmup_explained_variance
    check(target is None or target <= 1, f"critic.warmup_explained_variance is {target}: a critic explains 1 at most")
    check(
        c.kind != "adapter" or config.model.lora is not None,
        "critic.kind adapter is a second adapter on a frozen base, but the policy is trained whole: set model.lora, or "
        "use critic.kind separate or shared",
    )
    check(
        (c.warmup_steps or 0) < config.train.max_steps,
        f"critic.warmup_steps {c.warmup_steps} leaves nothing of train.max_steps {config.train.max_steps} to train the "
        "policy: they are steps of it",
    )
    return findings
