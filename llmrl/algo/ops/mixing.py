"""C-GRPO: outcome and rubric rewards of each group -> one reward per rollout, normalised within the group."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from llmrl.errors import RunFailed

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from llmrl.types import Rollout, RolloutGroup

OUTCOME, RUBRIC = "outcome", "rubric"
"""Score parts that are mixed, under these names or as `REWARD/outcome`, `REWARD/rubric`."""


def mixed_rewards(groups: list[RolloutGroup], alpha: float, rubric_norm: Any) -> Float[Tensor, "P G"]:
    """R_i = (1 - alpha) Ro_i + alpha Ro_i Rr_i / max_j Rr_j over each group; NaN where a value it needs is missing.

    Raises:
        RunFailed: no rollout has both parts.

    References:
        Zhang et al. 2026, arXiv:2601.06021 (CaRR, C-GRPO).
    """
    from llmrl.verify.citations.rubrics import mix_rewards

    rows = []
    for group in groups:
        outcomes, rubrics = ([_part(rollout, name) for rollout in group.rollouts] for name in (OUTCOME, RUBRIC))
        rows.append(
            [math.nan if r is None else r for r in mix_rewards(outcomes, rubrics, alpha=alpha, rubric_norm=rubric_norm)]
        )
    if all(math.isnan(value) for row in rows for value in row):
        raise RunFailed(
            f"algo.rubric_alpha mixes the score parts {OUTCOME!r} and {RUBRIC!r}, and no rollout has both: use a "
            "reward that gives them, such as rewards/citation_rubric.py:citation_rubric, or set algo.rubric_alpha 0"
        )
    return torch.tensor(rows, dtype=torch.float32)


def _part(rollout: Rollout, name: str) -> float | None:
    parts = rollout.score.parts if rollout.score is not None else {}
    return next((value for key, value in parts.items() if key == name or key.endswith(f"/{name}")), None)
