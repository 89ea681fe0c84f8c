"""Describe a run at its start: what the algorithm does, what was changed, and what to be careful about."""

from __future__ import annotations

from typing import Any

from llmrl.algo.policy_gradient.options import PolicyGradient
from llmrl.algo.ppo.options import PPO
from llmrl.config.config import PRESETS, Config, RunConfig
from llmrl.config.schema import plain

SHORT_LAMBDA = 0.5
"""Warn when lambda of the longest answers falls below this."""
HIDDEN = ("name", "weight")


def describe(config: RunConfig) -> list[str]:
    """Return a line for the algorithm, one for its critic, and cautions."""
    algo = config.algo
    preset = _flat(plain(PRESETS[algo.name])) if algo.name in PRESETS else {}
    now, default = _flat(plain(algo)), _flat(plain(type(algo)(name=algo.name)))
    shown = {k: v for k, v in now.items() if k.endswith("kind") or default.get(k) != v}
    changed = {k: v for k, v in now.items() if preset.get(k) != v}
    changed |= {k: None for k in preset if k not in now}
    line = f"algorithm {algo.name}: {_text({k: v for k, v in shown.items() if k not in changed})}"
    lines = [line + (f"; changed: {_text(changed)}" if changed else "")]
    lines += [f"caution: {text}" for text in algo.cautions()]
    if isinstance(algo, PolicyGradient) and isinstance(config, Config):
        lines += _unread_rewards(config, algo)
    if isinstance(algo, PPO) and isinstance(config, Config):
        lines += _critic(config, algo)
    return lines


def _unread_rewards(config: Config, algo: PolicyGradient) -> list[str]:
    weighted = [reward.name for reward in config.rewards if reward.weight > 0]
    if len(weighted) < 2 or not algo.only_right_or_wrong:
        return []
    return [
        f"caution: algo.baseline passk with mix 1 learns from {weighted[0]} alone, which tells right from wrong; the "
        f"other rewards ({', '.join(weighted[1:])}) are only logged"
    ]


def _critic(config: Config, algo: PPO) -> list[str]:
    options = _flat(plain(config.critic))
    lines = [f"critic {options.pop('kind')}: {_text(options)}"]
    alpha, longest = algo.value.length_alpha, config.rollout.max_completion_length
    if alpha is not None and (lam := max(0.0, 1 - 1 / (alpha * longest))) < SHORT_LAMBDA:
        lines.append(
            f"caution: algo.value.length_alpha {alpha:g} is meant for long answers: with at most {longest} tokens "
            f"lambda is at most {lam:.2f}, and advantages depend on the critic alone; raise it, or set it to null "
            "(lambda is then algo.value.lam)"
        )
    return lines


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        elif name not in HIDDEN:
            found[prefix + name] = value
    return found


def _text(options: dict[str, Any]) -> str:
    return ", ".join(f"{name.removesuffix('.kind')} {value}" for name, value in options.items())
