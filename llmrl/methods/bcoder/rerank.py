"""Rank the samples of a task: programs of any model in, scores out.

Example:
    >>> ranker = Ranker.load("runs/bcoder/policy/model")
    >>> best = ranker.rank([{"role": "user", "content": "Write a function f ..."}], programs)[0]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmrl.track.ranking import order
from llmrl.types import Message, RolloutGroup, Status

if TYPE_CHECKING:
    from llmrl.data.chat import Chat
    from llmrl.methods.bcoder.policy import QPolicy
    from llmrl.types import Sample

RANK_TOKENS = 16_384
"""Tokens in one forward pass of a ranker."""


class Ranker:
    """Rank programs by the reward that a trained Q function implies for them, summed over their tokens.

    Args:
        q: a B-Coder policy.
        chat: renders prompts for it.
        gamma: discount per token that it was trained with.
        alpha: temperature that it was trained with.
        exact: bootstrap from the anchor token, as in training, instead of from V.
    """

    def __init__(self, q: QPolicy, chat: Chat, *, gamma: float, alpha: float, exact: bool = False) -> None:
        self.q, self.chat, self.gamma, self.alpha, self.exact = q, chat, gamma, alpha, exact

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "cpu", exact: bool = False) -> Ranker:
        """Load the model/ folder of a run with `algo.name bcoder`.

        Raises:
            UserError: it has no value heads, or the model that they were trained from is gone.
        """
        from llmrl.methods.bcoder.policy import load_q

        q, chat = load_q(Path(folder), device=device)
        return cls(q, chat, gamma=q.options.gamma, alpha=q.options.alpha, exact=exact)

    @staticmethod
    def check(folder: str | Path) -> None:
        """Raise a UserError unless `folder` holds what `load` needs."""
        from llmrl.methods.bcoder.policy import read_description

        read_description(folder)

    def rank(
        self, messages: list[Message], programs: Sequence[str], *, finished: Sequence[bool] | None = None
    ) -> list[int]:
        """Return the indices of `programs`, the best first; the arguments are those of `scores`."""
        return order(self.scores(messages, programs, finished=finished))

    def scores(
        self, messages: list[Message], programs: Sequence[str], *, finished: Sequence[bool] | None = None
    ) -> list[float]:
        """Return the recovered reward of each program: higher is better. Compare them within one task only.

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
        """Return the scores of all rollouts, by the text of their last message."""
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
        from llmrl.model.modes import evaluating
        from llmrl.train.packing import build_micro_batch
        from llmrl.train.planning import plan_micro_batches

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
