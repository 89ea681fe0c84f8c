"""How good an order of a task's samples is: how often the first one passes."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from llmrl.types import RolloutGroup


def mean_logprob_scores(groups: Sequence[RolloutGroup]) -> list[list[float]]:
    """Mean log-probability (nats per token) that each sample was drawn with: the baseline any ranker has to beat."""
    return [
        [
            fmean(values) if (values := [x for turn in rollout.turns for x in turn.rollout_logprobs]) else -1e9
            for rollout in group.rollouts
        ]
        for group in groups
    ]


def order(scores: Sequence[float], ties: Sequence[float] | None = None) -> list[int]:
    """Indices by falling score; equal scores by falling `ties` (a log-probability), then by index."""
    ties = [0.0] * len(scores) if ties is None else ties
    return sorted(range(len(scores)), key=lambda i: (-scores[i], -ties[i], i))


def ranking_rates(
    groups: Sequence[RolloutGroup], scores: Sequence[Sequence[float]], *, accuracy: str, top_ks: Sequence[int] = (1, 2)
) -> dict[str, float]:
    """How often one of the first k samples of a task is right, averaged over tasks.

    Args:
        groups: scored samples; those without a score are left out.
        scores: what the samples are ranked by, in the shape of the groups.
        accuracy: name of the reward part that is 1 or more where a sample is right.
        top_ks: further k than the first.

    Returns:
        ranked: rate of the first one; ranked@k; random: of a randomly chosen one; oracle: of the best one (pass@N).
    """
    ties = mean_logprob_scores(groups)
    tasks: list[list[bool]] = []
    """Right or wrong, in the order of the ranking."""
    for group, values, likely in zip(groups, scores, ties, strict=True):
        right = [r.score.parts.get(accuracy) if r.score is not None else None for r in group.rollouts]
        ranked = [right[i] for i in order(values, likely)]
        if known := [value >= 1 for value in ranked if value is not None]:
            tasks.append(known)
    rates = {f"ranked@{k}": fmean(any(task[:k]) for task in tasks) for k in top_ks if k > 1}
    return {
        "ranked": fmean(task[0] for task in tasks),
        **rates,
        "random": fmean(fmean(task) for task in tasks),
        "oracle": fmean(any(task) for task in tasks),
    }
