"""Scored groups -> matrices of rewards and training samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from llmrl.types import ENVIRONMENT, Sample

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from llmrl.types import Rollout, RolloutGroup


def reward_matrix(groups: list[RolloutGroup], part: str | None = None, *, term: bool = False) -> Float[Tensor, "P G"]:
    """Return the rewards of all rollouts, or one named part of them; NaN without a score.

    Args:
        groups: scored groups.
        part: name of a reward. Default: the whole reward.
        term: take what the part adds to the reward (gated and scaled), where the score tells it.
    """

    def value(rollout: Rollout) -> float:
        score = rollout.score
        if score is None:
            return float("nan")
        parts = score.terms if term and score.terms else score.parts
        found = score.reward if part is None else parts.get(part)
        return float("nan") if found is None else float(found)

    return torch.tensor([[value(rollout) for rollout in group.rollouts] for group in groups], dtype=torch.float32)


def environment_terms(groups: list[RolloutGroup]) -> list[str]:
    """Return the names of the rewards that environments gave, which all have weight 1."""
    scores = [rollout.score for group in groups for rollout in group.rollouts if rollout.score is not None]
    return sorted({name for score in scores for name in score.terms if name.startswith(ENVIRONMENT)})


def token_rewards(rollout: Rollout, reward: float, *, dense: bool) -> np.ndarray:
    """Return the reward of each trained token of a rollout; all zero without a score.

    Args:
        rollout: a rollout, scored or not.
        reward: its shaped reward (a length penalty may have been added).
        dense: pay `Score.token_rewards`, where the verifier gave them, in place of the score's reward at the last
            token; what shaping added stays there.
    """
    paid = np.zeros(rollout.num_completion_tokens, np.float32)
    if rollout.score is None or rollout.score.reward is None or not len(paid):
        return paid
    if dense and rollout.score.token_rewards is not None:
        paid[:] = rollout.score.token_rewards
        reward -= float(np.float32(rollout.score.reward))  # as precise as the reward itself: what is left is shaping
    paid[-1] += reward
    return paid


def samples_of(groups: list[RolloutGroup]) -> list[Sample]:
    """Return the training samples of all scored rollouts, in order; `rollout.advantage` must be set.

    Turns that extend each other (the next prompt begins with the last prompt and completion) become one sample; where a
    prompt was rewritten, a new sample begins, with the same advantage.
    """
    samples: list[Sample] = []
    for number, group in enumerate(groups):
        for rollout in group.rollouts:
            if rollout.score is not None and rollout.score.reward is not None:
                samples += _samples_of_rollout(rollout, number)
    return samples


def mismatched_samples(groups: list[RolloutGroup]) -> list[Sample]:
    """Return samples, which are not trained on, of the mismatched completions that rollouts carry."""
    found: list[Sample] = []
    for number, group in enumerate(groups):
        for rollout in group.rollouts:
            if rollout.mismatched is not None:
                found += _samples_of_rollout(rollout.mismatched, number)
    for sample in found:
        sample.probe = True
    return found


def _samples_of_rollout(rollout: Rollout, group: int) -> list[Sample]:
    total = rollout.num_completion_tokens
    given = rollout.advantage
    advantages = np.full(total, given, np.float32) if np.isscalar(given) else np.asarray(given, np.float32)
    if len(advantages) != total:
        raise ValueError(f"task {rollout.task.id}: {len(advantages)} advantages for {total} completion tokens")
    pieces: list[tuple[list[int], list[bool], list[float]]] = []
    for turn in rollout.turns:
        if not turn.completion_ids:
            continue
        if not pieces or turn.prompt_ids[: len(pieces[-1][0])] != pieces[-1][0]:
            pieces.append(([], [], []))
        ids, mask, logprobs = pieces[-1]
        new = turn.prompt_ids[len(ids) :]
        ids += new + turn.completion_ids
        mask += [False] * len(new) + [True] * len(turn.completion_ids)
        logprobs += turn.rollout_logprobs
    samples: list[Sample] = []
    start, known = 0, rollout.ref_logprobs
    for ids, mask, logprobs in pieces:
        if mask[0] or len(logprobs) != sum(mask):
            raise ValueError(
                f"task {rollout.task.id}: an empty prompt, or {len(logprobs)} rollout_logprobs for {sum(mask)} tokens"
            )
        samples.append(
            Sample(
                input_ids=np.asarray(ids, np.int64),
                loss_mask=np.asarray(mask, bool),
                advantages=advantages[start : start + len(logprobs)],
                rollout_logprobs=np.asarray(logprobs, np.float32),
                group=group,
                index=rollout.index,
                ref_logprobs=None if known is None else known[start : start + len(logprobs)],
            )
        )
        start += len(logprobs)
    return samples


def lengths(groups: list[RolloutGroup]) -> Float[Tensor, "P G"]:
    """Return the number of completion tokens of every rollout."""
    return torch.tensor([[float(r.num_completion_tokens) for r in group.rollouts] for group in groups])
