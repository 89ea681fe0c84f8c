"""Putting the samples of a task in order: programs of any model in, scores out, and how often the first one is right.

Example:
    >>> ranker = Ranker.load("runs/bcoder/policy/model")
    >>> best = ranker.rank([{"role": "user", "content": "Write a function f ..."}], programs)[0]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from llmrl.types import Message, RolloutGroup, Status

if TYPE_CHECKING:
    from llmrl.data.chat import Chat
    from llmrl.methods.bcoder.policy import QPolicy
    from llmrl.types import Sample

RANK_TOKENS = 16_384
"""Tokens in one forward pass of a ranker."""


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


class Ranker:
    """Ranks programs by the reward that a trained Q function implies for them, summed over their tokens.

    Args:
        q: a B-Coder policy.
        chat: renders prompts for it.
        gamma: discount per token it was trained with.
        alpha: temperature it was trained with.
        exact: bootstrap from the greedy token of the model before training, as in training, instead of from V.
    """

    def __init__(self, q: QPolicy, chat: Chat, *, gamma: float, alpha: float, exact: bool = False) -> None:
        self.q, self.chat, self.gamma, self.alpha, self.exact = q, chat, gamma, alpha, exact

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "cpu", exact: bool = False) -> Ranker:
        """From the model/ folder of a run with `algo.name bcoder`.

        Raises:
            UserError: there are no value heads in it, or the model it was trained from is gone.
        """
        from llmrl.methods.bcoder.policy import load_q

        q, chat, description = load_q(Path(folder), device=device)
        return cls(q, chat, gamma=description["gamma"], alpha=description["alpha"], exact=exact)

    def rank(
        self, messages: list[Message], programs: Sequence[str], *, finished: Sequence[bool] | None = None
    ) -> list[int]:
        """Indices of `programs`, the best first; arguments as for `scores`."""
        return order(self.scores(messages, programs, finished=finished))

    def scores(
        self, messages: list[Message], programs: Sequence[str], *, finished: Sequence[bool] | None = None
    ) -> list[float]:
        """Recovered reward of each program, the higher the better; comparable within one task only.

        Args:
            messages: the task, as the policy sees it.
            programs: completions as text, of any model.
            finished: False for a program that was cut off, which gets no end token; default: all are finished.
        """
        ends = [True] * len(programs) if finished is None else finished
        prompt_ids, stop = self.chat.render(messages), self.chat.stop_token_ids[0]
        rows = [self.chat.encode(text) + [stop] * end for text, end in zip(programs, ends, strict=True)]
        samples = [_sample(prompt_ids, ids or [stop]) for ids in rows]
        return self._scores(samples)

    def score_groups(self, groups: Sequence[RolloutGroup]) -> list[list[float]]:
        """Scores of all rollouts, by the text of their last message."""
        return [
            self.scores(
                group.task.messages,
                [rollout.completion for rollout in group.rollouts],
                finished=[rollout.status is Status.COMPLETED for rollout in group.rollouts],
            )
            for group in groups
        ]

    def _scores(self, samples: list[Sample]) -> list[float]:
        import torch

        from llmrl.methods.bcoder.bellman import per_sequence, recovered_reward
        from llmrl.model.policy import evaluating
        from llmrl.train.packing import build_micro_batch, plan_micro_batches

        lengths = [len(sample.input_ids) for sample in samples]
        found = [0.0] * len(samples)
        with torch.no_grad(), evaluating(self.q.module):
            for rows in plan_micro_batches(lengths, max_tokens=RANK_TOKENS, packing=False)[0]:
                batch = build_micro_batch(samples, rows, device=self.q.device)
                batch.extras = self.q.streams(batch)
                outputs = self.q.forward(batch)
                assert outputs.values is not None
                anchors = self.alpha * outputs.extras["anchor_advantages"] if self.exact else None
                rewards = recovered_reward(
                    self.alpha * outputs.extras["advantages"],
                    outputs.values,
                    batch.sequence_ids,
                    gamma=self.gamma,
                    anchor_advantages=anchors,
                )
                sums = per_sequence(rewards, batch.sequence_ids, len(batch.sequence_lengths)).tolist()
                for index, value in zip(batch.sample_indices, sums, strict=True):
                    found[index] = value
        return found


def _sample(prompt_ids: list[int], completion_ids: list[int]) -> Sample:
    import numpy as np

    from llmrl.types import Sample

    zeros = np.zeros(len(completion_ids), np.float32)
    return Sample(
        input_ids=np.asarray(prompt_ids + completion_ids, np.int64),
        loss_mask=np.asarray([False] * len(prompt_ids) + [True] * len(completion_ids)),
        advantages=zeros,
        rollout_logprobs=zeros,
        group=0,
        index=0,
    )


def check_folder(folder: str) -> None:
    """Raise UserError unless `folder` holds what `Ranker.load` needs."""
    from llmrl.methods.bcoder.policy import read_description

    read_description(folder)
