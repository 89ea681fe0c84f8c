"""Rewards on the length of a completion in tokens: DAPO's soft overlong punishment, and the cosine length reward.

For a rollout without token ids (a stored completion that is only text) both abstain.
"""

from __future__ import annotations

import math

from llmrl.errors import UserError
from llmrl.types import Rollout
from llmrl.verify.reward import group_reward

_LIMITS = {"max_length": 100, "cache": 20}
_COSINE = {"max_length": 100, "accuracy": "correct"}

EXAMPLES = {
    "soft_overlong": [
        {"completion": "x", "completion_ids": [1] * 80, **_LIMITS, "reward": 0.0},
        {"completion": "x", "completion_ids": [1] * 90, **_LIMITS, "reward": -0.5},
        {"completion": "x", "completion_ids": [1] * 100, **_LIMITS, "reward": -1.0},
        {"completion": "x", "completion_ids": [1] * 5000, **_LIMITS, "reward": -1.0},
        {"completion": "x" * 5000, **_LIMITS, "reward": None},
    ],
    "cosine_length": [
        {"completion": "x", "correct": 1, **_COSINE, "reward": None},
        {"completion": "x", "completion_ids": [1] * 50, "correct": None, **_COSINE, "reward": None},
        {"completion": "x", "completion_ids": [1] * 50, "correct": 1, **_COSINE, "reward": 0.75},
        {"completion": "x", "completion_ids": [1] * 100, "correct": 1, **_COSINE, "reward": 0.5},
        {"completion": "x", "completion_ids": [1] * 900, "correct": 1, **_COSINE, "reward": 0.5},
        {"completion": "x", "completion_ids": [1] * 50, "correct": 0, **_COSINE, "reward": -0.75},
        {"completion": "x", "completion_ids": [1] * 900, "correct": 0, **_COSINE, "reward": -0.5},
    ],
}


def soft_overlong(rollout: Rollout, max_length: int, cache: int) -> float | None:
    """Return 0 up to max_length - cache tokens, a linear fall to -1 at max_length, and -1 beyond.

    Source: DAPO (arXiv 2503.14476), equation 13, with L_max = max_length and L_cache = cache.
    """
    length = rollout.num_completion_tokens
    if length == 0:
        return None
    excess = length - (max_length - cache)
    if excess <= 0:
        return 0.0
    return -min(excess / cache, 1.0) if cache else -1.0


@group_reward
def cosine_length(
    rollouts: list[Rollout],
    max_length: int,
    accuracy: str = "math_answer",
    correct_bounds: tuple[float, float] = (0.5, 1.0),
    wrong_bounds: tuple[float, float] = (-1.0, -0.5),
) -> list[float | None]:
    """Reward a short correct answer most and a short wrong one least, along a cosine of the length:

        r = far + (near - far) / 2 * (1 + cos(pi * length / max_length)), constant beyond max_length

    `near` is the bound at length 0, `far` the one at max_length.
    Source: Demystifying Long Chain-of-Thought Reasoning (arXiv 2502.03373), cosine reward; default bounds as in TRL.

    Args:
        rollouts: the group.
        max_length: tokens at which the far bound is reached.
        accuracy: reward of the same rubric, or column, that is above 0 for a correct rollout.
        correct_bounds: (far, near) for a correct answer.
        wrong_bounds: (near, far) for a wrong answer.

    Raises:
        UserError: `accuracy` names neither a reward nor a column.
    """
    rewards: list[float | None] = []
    for rollout in rollouts:
        known = rollout.task.meta | (rollout.score.parts if rollout.score is not None else {})
        if accuracy not in known:
            raise UserError(
                f"cosine_length: accuracy {accuracy!r} is neither another reward of this run nor a column; there are "
                f"{', '.join(known) or 'none'}"
            )
        correct, length = known[accuracy], rollout.num_completion_tokens
        if correct is None or length == 0:
            rewards.append(None)
            continue
        near, far = correct_bounds[::-1] if correct > 0 else wrong_bounds
        rewards.append(far + 0.5 * (near - far) * (1.0 + math.cos(math.pi * min(length / max_length, 1.0))))
    return rewards
