"""Groups of rollouts in, numbers for metrics.jsonl and rows for rollouts.jsonl out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from statistics import correlation, fmean, pstdev
from typing import Any

from llmrl.types import Message, RolloutGroup, Score

MAX_SOURCES = 20
"""A batch with more sources has no metrics of single ones: a column `source` may hold the address of each row."""
EVALUATOR = "/evaluator"
"""Suffix of the name of a part that predicts the reward it belongs to."""


def rollout_metrics(groups: Sequence[RolloutGroup], *, accuracy: str) -> dict[str, float]:
    """Summarize a batch of scored rollouts.

    Args:
        groups: all groups of the step.
        accuracy: name of the reward part that decides correct or wrong, for the pass rates.

    Returns:
        Metrics of the stages rollout and reward (see `llmrl.track.names`), with pass@1 and pass@G.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    scores = [rollout.score for rollout in rollouts if rollout.score is not None]
    rewards = [score.reward for score in scores if score.reward is not None]
    lengths = [rollout.num_completion_tokens for rollout in rollouts]
    total = max(1, len(rollouts))
    metrics = {
        "reward/mean": _mean(rewards),
        "reward/std": pstdev(rewards) if rewards else math.nan,
        "reward/unscored_frac": 1 - len(rewards) / total,
        "reward/abstained_frac": sum(s.reward is None and s.error is None for s in scores) / total,
        "reward/error_frac": sum(s.error is not None for s in scores) / total,
        "rollout/error_frac": sum(r.status.is_error for r in rollouts) / total,
        "rollout/truncated_frac": sum(r.status.is_truncated for r in rollouts) / total,
        "rollout/length/mean": _mean(lengths),
        "rollout/length/max": float(max(lengths, default=0)),
        "rollout/num_tokens": float(sum(lengths)),
    }
    for part in sorted({name for score in scores for name in score.parts}):
        metrics[f"reward/{part}/mean"] = _mean([v for s in scores if (v := s.parts.get(part)) is not None])
        if part.endswith(EVALUATOR):
            metrics[f"reward/{part}/correlation"] = _correlation(scores, part, part.removesuffix(EVALUATOR))
    return metrics | pass_rates(groups, accuracy=accuracy)


def source_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Return the mean reward of each source of a batch that has several; a source without a score is left out."""
    by_source: dict[str, list[float]] = {}
    for group in groups:
        scores = [r.score.reward for r in group.rollouts if r.score is not None and r.score.reward is not None]
        by_source.setdefault(group.task.source, []).extend(scores)
    if len(by_source) < 2 or len(by_source) > MAX_SOURCES:
        return {}
    return {f"source/{name}/reward": fmean(found) for name, found in by_source.items() if found}


def _correlation(scores: Sequence[Score], first: str, second: str) -> float:
    """Return Pearson's correlation of two parts over the scores that have both; NaN where one of them is constant."""
    pairs = [(score.parts.get(first), score.parts.get(second)) for score in scores]
    given = [(a, b) for a, b in pairs if a is not None and b is not None]
    if any(len(set(values)) < 2 for values in zip(*given, strict=True)) or not given:
        return math.nan
    return correlation(*zip(*given, strict=True))


def pass_rates(groups: Sequence[RolloutGroup], *, accuracy: str, ks: Sequence[int] = ()) -> dict[str, float]:
    """Compute mean@G (as pass@1) and unbiased pass@k, averaged over tasks.

    A rollout passes when its accuracy part is >= 1. Rollouts without a score are left out of their group; a group
    without any score is left out of the mean.

    References:
        Chen et al. 2021, arXiv:2107.03374, equation 1.
    """
    outcomes = [[v >= 1 for r in group.rollouts if (v := _part(r.score, accuracy)) is not None] for group in groups]
    outcomes = [group for group in outcomes if group]
    largest = min((len(group) for group in outcomes), default=0)
    rates = {}
    for k in sorted({1, *(ks or (largest,))}):
        if 1 <= k <= largest:
            rates[f"reward/pass@{k}"] = _mean([pass_at_k(len(group), sum(group), k) for group in outcomes])
    return rates


def pass_at_k(n: int, c: int, k: int) -> float:
    """Compute the chance that at least one of k samples is correct, drawn without replacement from n with c correct.

    Example:
        >>> pass_at_k(4, 1, 2)
        0.5
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority_rates(
    groups: Sequence[RolloutGroup], *, accuracy: str, ks: Sequence[int], draws: int = 200
) -> dict[str, float]:
    """Compute maj@k, averaged over tasks: how often the most frequent answer among k samples is correct.

    An answer is what the reward reports as `extracted` in its info; samples without one do not vote. Answers with
    equally many votes share the win. For k below the number of samples it is a mean over `draws` seeded subsets.

    Returns:
        reward/maj@k for every k above 1 that all tasks have enough samples for; empty where no answers are reported.
    """
    votes = [_votes(group, accuracy) for group in groups]
    votes = [vote for vote in votes if vote]
    if not any(answer is not None for vote in votes for answer, _ in vote):
        return {}
    smallest = min(len(vote) for vote in votes)
    random = Random(0)
    rates = {}
    for k in sorted(set(ks)):
        if 2 <= k <= smallest:
            rates[f"reward/maj@{k}"] = fmean(
                majority(vote) if k == len(vote) else fmean(majority(random.sample(vote, k)) for _ in range(draws))
                for vote in votes
            )
    return rates


def majority(votes: Sequence[tuple[str | None, bool]]) -> float:
    """Compute the chance that the most frequent answer is correct, from (answer or None, correct) of each sample.

    Example:
        >>> majority([("4", True), ("5", False), ("4", True), (None, False)])
        1.0
    """
    by_answer: dict[str, list[bool]] = {}
    for answer, correct in votes:
        if answer is not None:
            by_answer.setdefault(answer, []).append(correct)
    most = max((len(v) for v in by_answer.values()), default=0)
    # Equal answers can be judged differently (other formatting), so each winner counts by its share of correct ones.
    winners = [fmean(v) for v in by_answer.values() if len(v) == most]
    return fmean(winners) if winners else 0.0


def _votes(group: RolloutGroup, accuracy: str) -> list[tuple[str | None, bool]]:
    votes = []
    for rollout in group.rollouts:
        value = _part(rollout.score, accuracy)
        if value is not None and rollout.score is not None:
            answer = rollout.score.info.get(accuracy, {}).get("extracted")
            votes.append((None if answer is None else str(answer), value >= 1))
    return votes


def rollout_rows(step: int, groups: Sequence[RolloutGroup]) -> list[dict[str, Any]]:
    """Return one row per rollout for rollouts.jsonl: everything needed to inspect it and to recompute the step."""
    return [
        {
            "step": step,
            "task": group.task.id,
            "index": rollout.index,
            "status": rollout.status.value,
            "messages": rollout.messages,
            "answer": group.task.answer,
            "reward": rollout.score.reward if rollout.score else None,
            "parts": rollout.score.parts if rollout.score else {},
            "info": rollout.score.info if rollout.score else {},
            "error": rollout.error or (rollout.score.error if rollout.score else None),
            "advantage": rollout.advantage,
            **({"token_scores": rollout.token_scores} if rollout.token_scores else {}),
            "turns": [
                {
                    "prompt_ids": turn.prompt_ids,
                    "completion_ids": turn.completion_ids,
                    "rollout_logprobs": turn.rollout_logprobs,
                    "finish": turn.finish,
                    **({"prefilled": turn.prefilled} if turn.prefilled else {}),
                    "policy_version": turn.policy_version,
                    **({"version_spans": turn.version_spans} if len(turn.version_spans) > 1 else {}),
                }
                for turn in rollout.turns
            ],
        }
        for group in groups
        for rollout in group.rollouts
    ]


TABLE_ROWS = 8
"""Completions in the table of one step."""


def completion_table(step: int, groups: Sequence[RolloutGroup]) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and rows of a table for people: the first completions of a step, with their scores."""
    rollouts = [rollout for group in groups for rollout in group.rollouts if rollout.turns][:TABLE_ROWS]
    parts = sorted({name for rollout in rollouts if rollout.score for name in rollout.score.parts})
    columns = ["step", "task", "prompt", "completion", "reward", *(name for name in parts if name not in _TEXTS)]
    rows: list[list[Any]] = []
    for rollout in rollouts:
        start = len(rollout.task.messages)
        said = rollout.messages[start:]
        text = _as_text(said) if len(said) > 1 else rollout.prefilled + rollout.completion
        score = rollout.score
        cells = [step, rollout.task.id, _as_text(rollout.task.messages), text, score.reward if score else None]
        rows.append(cells + [_part(score, name) for name in columns[len(cells) :]])
    return columns, rows


_TEXTS = frozenset({"step", "task", "prompt", "completion", "reward"})


def _as_text(messages: Sequence[Message]) -> str:
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in messages)


def _part(score: Score | None, name: str) -> float | None:
    return None if score is None else score.parts.get(name)


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan
