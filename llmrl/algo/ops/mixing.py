"""C-GRPO: outcome and rubric rewards of a group -> one reward per rollout, the rubric's share normalized in the group.

References:
    Zhang et al. 2026, arXiv:2601.06021 (CaRR, C-GRPO).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch

from llmrl.errors import RunFailed, UserError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from llmrl.types import Rollout, RolloutGroup

OUTCOME, RUBRIC = "outcome", "rubric"
"""Score parts that are mixed, under these names or as `REWARD/outcome`, `REWARD/rubric`."""

RubricNorm = Literal["group_max", "group_max_correct", "none"]
RubricFor = Literal["correct", "wrong", "all"]


def mixed_rewards(groups: list[RolloutGroup], alpha: float, rubric_norm: RubricNorm) -> Float[Tensor, "P G"]:
    """Apply `mix_rewards` to the score parts of each group; NaN where a value it needs is missing.

    Raises:
        RunFailed: no rollout has both parts.
    """
    rows: list[list[float]] = []
    for group in groups:
        outcomes, rubrics = ([_part(rollout, name) for rollout in group.rollouts] for name in (OUTCOME, RUBRIC))
        mixed = mix_rewards(outcomes, rubrics, alpha=alpha, rubric_norm=rubric_norm)
        rows.append([math.nan if reward is None else reward for reward in mixed])
    rewards = torch.tensor(rows, dtype=torch.float32)
    if torch.isnan(rewards).all():
        raise RunFailed(
            f"algo.rubric mixes the score parts {OUTCOME!r} and {RUBRIC!r}, and no rollout has both: use a reward "
            "that gives them, such as rewards/citation_rubric.py:citation_rubric, or set algo.rubric null"
        )
    return rewards


def _part(rollout: Rollout, name: str) -> float | None:
    parts = rollout.score.parts if rollout.score is not None else {}
    return next((value for key, value in parts.items() if key == name or key.endswith(f"/{name}")), None)


def mix_rewards(
    outcomes: Sequence[float | None],
    rubrics: Sequence[float | None],
    *,
    alpha: float = 0.3,
    rubric_norm: RubricNorm = "group_max",
    rubric_for: RubricFor = "correct",
) -> list[float | None]:
    """Mix the outcome and rubric rewards of one group of G rollouts:

        R_i = (1 - alpha) Ro_i + alpha Ro_i Rr_i / max_j Rr_j

    Args:
        outcomes: [G] Ro in [0, 1]; None where it could not be judged. Malformed and unfinished rollouts have
            Ro = Rr = 0.
        rubrics: [G] Rr in [0, 1]; None where it could not be judged.
        alpha: share of the rubric reward (0.3 in the paper); 0 is plain GRPO on the outcome.
        rubric_norm: divide by the largest rubric reward of the group (the paper), of its correct rollouts only, or
            not at all.
        rubric_for: which rollouts get the rubric reward: `correct` ones (the paper), `wrong` ones,
            R = Ro + alpha (1 - Ro) Rr/max (like E-GRPO), or `all`, R = (1 - alpha) Ro + alpha Rr/max.

    Returns:
        [G] R in [0, 1]; None where a value it depends on is None. A None never lowers the maximum.

    Raises:
        UserError: alpha outside [0, 1], an unknown name, or a norm that contradicts `rubric_for`.
    """
    check_mixing(alpha, rubric_norm, rubric_for)
    pairs = list(zip(outcomes, rubrics, strict=True))
    if rubric_norm == "none":
        ceiling = 1.0
    else:
        in_norm = [r for o, r in pairs if r is not None and (rubric_norm == "group_max" or (o or 0) > 0)]
        ceiling = max(in_norm, default=0.0)
    return [_mix_one(o, r, ceiling, alpha, rubric_for) for o, r in pairs]


def _mix_one(
    outcome: float | None, rubric: float | None, ceiling: float, alpha: float, rubric_for: RubricFor
) -> float | None:
    if outcome is None:
        return None
    weight = alpha * {"correct": outcome, "wrong": 1 - outcome, "all": 1.0}[rubric_for]
    base = outcome if rubric_for == "wrong" else (1 - alpha) * outcome
    # A rubric reward without weight need not be known: a wrong rollout's is often not even asked for.
    if weight == 0:
        return base
    if rubric is None:
        return None
    # Capped at 1, because with `group_max_correct` a wrong rollout may lie above the ceiling.
    return base + weight * (min(rubric / ceiling, 1.0) if ceiling > 0 else 0.0)


def check_mixing(alpha: float, rubric_norm: str, rubric_for: str) -> None:
    """Check the options of `mix_rewards`.

    Raises:
        UserError: one is out of range or unknown, or two contradict each other.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha is {alpha}: must lie in [0, 1]")
    if rubric_norm not in ("group_max", "group_max_correct", "none"):
        raise UserError(f"rubric_norm {rubric_norm!r} is unknown: use group_max, group_max_correct or none")
    if rubric_for not in ("correct", "wrong", "all"):
        raise UserError(f"rubric_for {rubric_for!r} is unknown: use correct, wrong or all")
    if rubric_norm == "group_max_correct" and rubric_for != "correct":
        raise UserError(f"rubric_norm=group_max_correct contradicts rubric_for={rubric_for}: use group_max or none")
