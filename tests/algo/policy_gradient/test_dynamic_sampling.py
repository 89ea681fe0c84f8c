"""Dynamic sampling: what is drawn, what is kept, and the cap."""

from __future__ import annotations

import asyncio

import pytest

from llmrl.algo.policy_gradient.dynamic_sampling import collect_informative, is_mixed
from llmrl.types import Rollout, RolloutGroup, Score, Task


def group(name: str, accuracies: list[float | None], rewards: list[float] | None = None) -> RolloutGroup:
    task = Task(id=name, messages=[])
    rollouts = []
    for i, accuracy in enumerate(accuracies):
        reward = accuracy if rewards is None else rewards[i]
        score = Score(reward=None if accuracy is None else reward, parts={"right": accuracy})
        rollouts.append(Rollout(task=task, index=i, score=score))
    return RolloutGroup(task=task, rollouts=rollouts)


class Source:
    """Hands out groups in order, mixed where its pattern says M; repeats the last one."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.asked, self.position = pattern, [], 0

    async def draw(self, count: int) -> list[RolloutGroup]:
        self.asked.append(count)
        groups = []
        for _ in range(count):
            letter = self.pattern[min(self.position, len(self.pattern) - 1)]
            groups.append(group(f"{letter}{self.position}", [1.0, 0.0] if letter == "M" else [1.0, 1.0]))
            self.position += 1
        return groups


@pytest.mark.parametrize(
    ("pattern", "asked", "kept"),
    [
        ("MMM", [3], ["M0", "M1", "M2"]),
        ("MFMFFM", [3, 1, 1, 1], ["M0", "M2", "M5"]),
        ("FFFMMM", [3, 3], ["M3", "M4", "M5"]),
        # the cap of 3 * 3 groups: those without signal that came first fill the batch
        ("FMF", [3, 2, 2, 2], ["F0", "M1", "F2"]),
        ("F", [3, 3, 3], ["F0", "F1", "F2"]),
    ],
)
def test_draws_what_is_missing_until_the_cap(pattern: str, asked: list[int], kept: list[str]) -> None:
    source = Source(pattern)
    chosen, drawn = asyncio.run(collect_informative(source.draw, 3, max_batches=3, accuracy="right"))
    assert source.asked == asked
    assert [g.task.id for g in chosen] == kept
    assert len(drawn) == sum(asked) == source.position <= 9


def test_the_filter_looks_at_accuracy_not_at_the_shaped_reward() -> None:
    shaped = group("t", [1.0, 1.0], [0.9, 0.4])
    assert not is_mixed(shaped, "right")
    assert is_mixed(shaped, "")
    assert not is_mixed(group("t", [1.0, None, None]), "right")
    assert is_mixed(group("t", [1.0, None, 0.0]), "right")
    assert not is_mixed(RolloutGroup(task=shaped.task, rollouts=[Rollout(task=shaped.task, index=0)]), "right")
