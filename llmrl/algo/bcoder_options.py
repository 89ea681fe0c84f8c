"""B-Coder's options: gaps are filled by stage, contradictions are findings. Nothing here needs torch."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from llmrl.config.bcoder import BCoderConfig

if TYPE_CHECKING:
    from llmrl.config import Config

BCODER_PRESETS: dict[str, dict[str, Any]] = {"bcoder": {}}
READ_OF_ALGO: dict[str, Any] = {"num_iterations": 1, "num_mini_batches": 1}
"""The options of `config.algo` that it reads, and their defaults."""
POLICY_STAGE = {"q_coef": 1.0, "adv_coef": 0.1, "ce_coef": 0.5}
"""Options of the second stage and their defaults; the last two are terms of right programs."""
READ_IN_STAGE = {"value_hidden_size": "value", **dict.fromkeys(POLICY_STAGE, "policy")}
"""Options that one stage alone reads."""


def resolve_bcoder(config: Config) -> BCoderConfig | None:
    """What this run's stage reads, with no gap left; None for other algorithms."""
    if config.algo.name not in BCODER_PRESETS:
        return None
    c = config.bcoder or BCoderConfig()
    row = POLICY_STAGE if c.stage == "policy" else {}
    if row and c.real_frac == 0:
        row = row | {"adv_coef": 0.0, "ce_coef": 0.0}
    return dataclasses.replace(c, **{name: value for name, value in row.items() if getattr(c, name) is None})


def bcoder_contradictions(config: Config) -> list[str]:
    """What is wrong with `config.bcoder`, alone and together with the rest; one line each, with the fix."""
    named, c = config.algo.name in BCODER_PRESETS, config.bcoder or BCoderConfig()
    if not named:
        given = config.bcoder is not None
        return [f"bcoder is given, but algo.name {config.algo.name} does not read it: leave it out"] * given
    findings = [
        f"bcoder.{name} {getattr(c, name)!r} is given, but only read with bcoder.stage {stage}: leave it out"
        for name, stage in READ_IN_STAGE.items()
        if stage != c.stage and getattr(c, name) is not None
    ]
    pairs = [
        (c.alpha <= 0, f"bcoder.alpha is {c.alpha}: must be above 0"),
        (not 0 <= c.gamma <= 1, f"bcoder.gamma is {c.gamma}: must lie between 0 and 1"),
        (not 0 <= c.real_frac <= 1, f"bcoder.real_frac is {c.real_frac}: must lie between 0 and 1"),
        (
            0 <= c.real_frac <= 1 and c.real_frac * config.rollout.num_generations % 1 != 0,
            f"bcoder.real_frac {c.real_frac} of rollout.num_generations {config.rollout.num_generations} is no whole "
            "number of programs",
        ),
        (c.value_hidden_size is not None and c.value_hidden_size < 1, "bcoder.value_hidden_size must be at least 1"),
        (config.rollout.max_staleness > 0, "rollout.max_staleness is not read by algo.name bcoder: leave it out"),
        (config.rollout.temperature != 1.0, "rollout.temperature is not read by algo.name bcoder: leave it out"),
        (
            c.stage == "value" and config.model.lora is not None,
            "model.lora is given, but bcoder.stage value trains the value head alone: leave it out",
        ),
        (
            c.stage == "policy" and c.real_frac == 0 and any((c.adv_coef, c.ce_coef)),
            "bcoder.adv_coef and ce_coef are terms of right programs, but bcoder.real_frac is 0: set them to 0 or leave"
            " them out",
        ),
    ]
    for name in POLICY_STAGE:
        value = getattr(c, name)
        pairs.append((value is not None and value < 0, f"bcoder.{name} is {value}: must not be negative"))
    return findings + [text for wrong, text in pairs if wrong]
