"""Code completion: edit similarity with the reference text, and IRCoCo's immediate reward for every token.

    rewards:
      - fn: rewards/ircoco.py:ircoco
        args: {evaluator: runs/ircoco/evaluator, boundary: token, options: {device: "cuda:1"}}

recipes/ircoco/train.py trains the evaluator. `algo.name ircoco` and ppo use the token rewards; other algorithms
use only the edit similarity.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from llmrl.errors import UserError
from llmrl.types import Rollout, Score, Turn
from llmrl.verify.checks.text import code_exact_match, edit_similarity
from llmrl.verify.models.prefix_evaluator import (
    Boundary,
    PrefixEvaluator,
    get_prefix_evaluator,
    segment_ends,
    telescoping_rewards,
)
from llmrl.verify.reward import group_reward


@group_reward
async def ircoco(
    rollouts: list[Rollout],
    answer: str,
    evaluator: Any,
    boundary: Boundary = "token",
    pay_stop: bool = False,
    options: dict[str, Any] | None = None,
) -> list[Score]:
    """Return the true metric as the reward, and the evaluator's gain at each token as the token rewards.

    The reward is the edit similarity (0 to 1); the part `exact_match` is 1 for the same words. The part `evaluator` is
    the evaluator's value of the whole completion; the run warns when it drifts from the reward. The evaluator does not
    see the answer. A completion without token ids gets no token rewards.

    Args:
        rollouts: the group.
        answer: the reference completion.
        evaluator: folder or hub id of a causal sequence classifier; or a function from sequences of token ids to one
            value per token of each.
        boundary: `token`; or `line`: evaluate at line ends only, and share the gain among the tokens of the line.
        pay_stop: reward the stop token too; needs an evaluator trained on finished completions (`evaluator.prefixes
            samples` in the recipe). Otherwise the stop token gets 0, as in the paper.
        options: further arguments of `llmrl.verify.models.prefix_evaluator.get_prefix_evaluator` (device, dtype ...).

    Raises:
        UserError: the evaluator cannot be loaded, or does not fit the policy's tokens.
    """
    if boundary not in ("token", "line"):
        raise UserError(f"boundary {boundary!r} is unknown: use token or line")
    ask = evaluator if callable(evaluator) else get_prefix_evaluator(evaluator, **(options or {}))
    turns = [turn for rollout in rollouts for turn in rollout.turns if turn.prompt_ids and turn.completion_ids]
    if turns and isinstance(ask, PrefixEvaluator):
        ask.check_text(_rewarded(turns[0]), str(turns[0].message.get("content") or ""))
    answered: Any = ask([[*turn.prompt_ids, *_rewarded(turn, pay_stop)] for turn in turns])
    found = iter(await answered if inspect.isawaitable(answered) else answered)
    line_ends = ask.line_ends if boundary == "line" else frozenset()
    scores = []
    for rollout in rollouts:
        reward, token_rewards = edit_similarity(rollout.completion, answer), []
        parts: dict[str, float | None] = {"exact_match": code_exact_match(rollout.completion, answer)}
        for turn in rollout.turns:
            if turn.prompt_ids and turn.completion_ids:
                rewarded, values = _rewarded(turn, pay_stop), next(found)[len(turn.prompt_ids) - 1 :]
                ends = segment_ends(rewarded, boundary, line_ends)
                token_rewards += telescoping_rewards(values, ends, len(turn.completion_ids))
                parts["evaluator"] = float(values[-1])
        scores.append(Score(reward=reward, parts=parts, token_rewards=token_rewards))
    return scores


def check(row: dict[str, Any]) -> str | None:
    """Say that the row has no reference text."""
    answer = row["answer"]
    if not isinstance(answer, str) or not answer.strip():
        return f"the answer is {str(answer)[:80]!r}; it must be the text that completions are compared with"
    return None


def _rewarded(turn: Turn, pay_stop: bool = False) -> list[int]:
    """Return the completion's tokens that get a reward: all of them, or all but the stop token."""
    return turn.completion_ids[:-1] if turn.finish == "stop" and not pay_stop else turn.completion_ids


def _example_evaluator(sequences: Sequence[list[int]]) -> list[list[float]]:
    """Value a prefix by its length."""
    return [[float(i) for i in range(len(ids))] for ids in sequences]


_ROW = {"prompt": "x = [1, 2]\n", "answer": "y = sum(x)", "evaluator": _example_evaluator}
EXAMPLES = [
    {**_ROW, "completion": "y = sum(x)", "reward": 1.0},
    {**_ROW, "completion": "  y = sum(x)\n", "reward": 1.0},
    # Two of ten characters are replaced: 16 of 20 are kept.
    {**_ROW, "completion": "z = sum(z)", "reward": 0.8},
    {**_ROW, "completion": "", "reward": 0.0},
    # Extra text lowers the similarity.
    {**_ROW, "completion": "y = sum(x)" * 3, "reward": 0.5},
    {**_ROW, "answer": "f = open(<STR_LIT:a.txt>)", "completion": "f = open(a.txt)", "reward": 1.0},
    {**_ROW, "answer": "n = <NUM_LIT>", "completion": "n = <NUM_LIT>", "reward": 1.0},
]
