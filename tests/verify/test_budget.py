"""Budgets of rollouts without a score: errors and abstentions each count against their own."""

from __future__ import annotations

import pytest

from llmrl.errors import RunFailed
from llmrl.types import Rollout, Score, Status, Task
from llmrl.verify.budget import check_scores
from llmrl.verify.options import VerifyConfig


def scored(index: int) -> Rollout:
    return Rollout(task=Task(id=f"task-{index}", messages=[]), index=0, score=Score(reward=0.0))


def abstained(index: int) -> Rollout:
    return Rollout(task=Task(id=f"task-{index}", messages=[]), index=0, score=Score(reward=None))


def failed(index: int) -> Rollout:
    score = Score(reward=None, error=f"Traceback: reward {index}")
    return Rollout(task=Task(id=f"task-{index}", messages=[]), index=0, score=score)


def unplayed(index: int) -> Rollout:
    task = Task(id=f"task-{index}", messages=[])
    return Rollout(task=task, index=0, status=Status.ERROR_ENV, error=f"Traceback: environment {index}")


def step(*kinds: tuple[int, object]) -> list[Rollout]:
    made = [kind for number, kind in kinds for _ in range(number)]
    return [kind(index) for index, kind in enumerate(made)]  # type: ignore[operator]


def check(rollouts: list[Rollout], unscored: float, abstained: float | None) -> None:
    check_scores(rollouts, VerifyConfig(max_unscored_frac=unscored, max_abstained_frac=abstained), what="rollouts")


@pytest.mark.parametrize("kind", [failed, unplayed])
def test_errors_count_against_their_budget(kind: object) -> None:
    check(step((2, kind), (18, scored)), 0.1, None)
    with pytest.raises(RunFailed, match="3 of 20 rollouts have no score.*max_unscored_frac 0.1") as caught:
        check(step((3, kind), (17, scored)), 0.1, None)
    lines = str(caught.value).splitlines()
    assert [line[:6] for line in lines[1:4]] == ["once: "] * 3
    assert all(lines[number + 1].endswith(f" {number}") for number in range(3))


def test_errors_of_rewards_and_environments_add_up_and_equal_ones_are_shown_once() -> None:
    rollouts = step((1, failed), (1, unplayed), (1, failed), (7, scored))
    rollouts[2].score = rollouts[0].score
    with pytest.raises(RunFailed, match="3 of 10") as caught:
        check(rollouts, 0.2, 1.0)
    assert str(caught.value).splitlines()[1:] == [
        "2 times: Traceback: reward 0",
        "once: Traceback: environment 1",
    ]


def test_workers_that_died_after_different_times_are_one_kind() -> None:
    def died(seconds: float) -> Rollout:
        error = f"worker died {seconds} s into mine.py:f (signal SIGKILL)"
        return Rollout(task=Task(id="t", messages=[]), index=0, score=Score(reward=None, error=error))

    with pytest.raises(RunFailed) as caught:
        check([died(0.1), died(3.25), died(20)], 0.0, None)
    assert str(caught.value).splitlines()[1:] == ["3 times: worker died 0.1 s into mine.py:f (signal SIGKILL)"]


def test_errors_of_one_kind_at_one_place_are_counted_together() -> None:
    def failing(text: str, line: int) -> Rollout:
        error = f"ValueError: bad {text} (mine.py, line {line}, in f)\nTraceback\n  {text}"
        return Rollout(task=Task(id="t", messages=[]), index=0, score=Score(reward=None, error=error))

    rollouts = [failing("d", 7), *(failing(text, 3) for text in "abc"), *(failing("x", line) for line in range(8, 11))]
    with pytest.raises(RunFailed) as caught:
        check(rollouts, 0.0, None)
    assert str(caught.value).splitlines()[1:] == [
        "3 times: ValueError: bad a (mine.py, line 3, in f)",
        "once: ValueError: bad d (mine.py, line 7, in f)",
        "once: ValueError: bad x (mine.py, line 8, in f)",
        "2 times: other errors",
        "--- ValueError: bad a (mine.py, line 3, in f)",
        "Traceback",
        "  a",
        "--- ValueError: bad d (mine.py, line 7, in f)",
        "Traceback",
        "  d",
        "--- ValueError: bad x (mine.py, line 8, in f)",
        "Traceback",
        "  x",
    ]


def test_abstentions_count_against_theirs_and_their_tasks_are_named() -> None:
    check(step((20, abstained)), 0.0, None)
    check(step((5, abstained), (15, scored)), 0.0, 0.25)
    with pytest.raises(RunFailed, match="6 of 20 rollouts were not judged.*max_abstained_frac 0.25") as caught:
        check(step((6, abstained), (14, scored)), 0.0, 0.25)
    assert "task-0, task-1, task-2, task-3, task-4." in str(caught.value), "the first five"


def test_neither_kind_counts_as_the_other() -> None:
    check(step((10, abstained), (1, failed)), 0.0, 1.0)
    check(step((10, failed), (1, abstained)), 1.0, 0.0)


def test_one_of_either_kind_is_always_allowed() -> None:
    check(step((1, failed), (1, abstained), (18, scored)), 0.0, 0.0)
    check(step((1, failed)), 0.0, 0.0)
    with pytest.raises(RunFailed, match="2 of 4 rollouts have no score"):
        check(step((2, failed), (2, scored)), 0.0, 0.0)
    with pytest.raises(RunFailed, match="2 of 4 rollouts were not judged"):
        check(step((2, abstained), (2, scored)), 0.0, 0.0)


def test_nothing_is_within_every_budget() -> None:
    check([], 0.0, 0.0)
