"""HERON: a rank instead of a weighted sum. The most important reward decides; the next one breaks its ties.

rewards:
  - {fn: "rewards/unit_tests.py:unit_tests", weight: 0}      # measured, not added up
  - {fn: "rewards/length.py:soft_overlong", weight: 0, args: {max_length: 512, cache: 128}}
  - fn: rewards/heron.py:heron
    args: {levels: [{part: unit_tests}, {part: soft_overlong, margin: 0.1, margin_in: value}]}
"""

from __future__ import annotations

from typing import Any

from llmrl.algo.preference.hierarchy import HierarchicalPreference
from llmrl.errors import UserError
from llmrl.types import Rollout
from llmrl.verify.reward import group_reward

_LEVELS = {"levels": [{"part": "correct"}, {"part": "length", "lower_is_better": True}]}
EXAMPLES = [
    # Each example is a group of one, so nothing is won or lost.
    {"completion": "x", "correct": 1.0, "length": 10.0, **_LEVELS, "reward": 0.0},
    {"completion": "x", "correct": 0.0, "length": 10.0, **_LEVELS, "reward": 0.0},
    # The most important part could not be judged: an abstention.
    {"completion": "x", "correct": None, "length": 10.0, **_LEVELS, "reward": None},
    {"completion": "x", "correct": 1.0, "length": None, **_LEVELS, "reward": 0.0},
]


@group_reward
def heron(rollouts: list[Rollout], levels: list[dict[str, Any]]) -> list[float | None]:
    """Return (wins - losses) / (G - 1) of each rollout against the others of its group, from -1 to 1.

    Source: Bukharin et al. 2023 (arXiv 2309.02632); using the rank directly as a reward, without a
    reward model, is our variant.

    Args:
        rollouts: the group; margins in standard deviations refer to its values.
        levels: criteria, most important first: `part` (a per-rollout reward of the same rubric, or a column), `margin`,
            `margin_in` (`std` or `value`), `lower_is_better`.

    Raises:
        UserError: a level names neither a reward nor a column.
    """
    hierarchy = HierarchicalPreference(levels)
    items: list[dict[str, float | None]] = []
    for rollout in rollouts:
        known = rollout.task.meta | (rollout.score.parts if rollout.score is not None else {})
        if unknown := [level.part for level in hierarchy.levels if level.part not in known]:
            raise UserError(
                f"heron: level {unknown[0]!r} is neither another reward of this run nor a column; there are "
                f"{', '.join(known) or 'none'}"
            )
        items.append({level.part: known[level.part] for level in hierarchy.levels})
    first = hierarchy.levels[0].part
    judged = [i for i, item in enumerate(items) if item[first] is not None]
    ranks = dict(zip(judged, hierarchy.ranks([items[i] for i in judged]), strict=True))
    return [ranks.get(i) for i in range(len(items))]
