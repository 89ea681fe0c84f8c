"""Metrics of hand-made groups, and pass@k against counting every draw."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from llmrl.track.metrics import pass_at_k, pass_rates, rollout_metrics, rollout_rows
from llmrl.types import Rollout, RolloutGroup, Score, Status, Task, Turn


def rollout(task: Task, index: int, length: int, score: Score | None, status: Status = Status.COMPLETED) -> Rollout:
    turn = Turn(
        prompt_ids=[1, 2],
        completion_ids=[3] * length,
        rollout_logprobs=[-0.5] * length,
        finish="stop",
        policy_version=(4, 4),
        message={"role": "assistant", "content": "c" * length},
    )
    return Rollout(task=task, index=index, turns=[turn], score=score, status=status, advantage=0.5)


def hand_made() -> list[RolloutGroup]:
    first, second = (Task(id=name, messages=[{"role": "user", "content": name}], answer="4") for name in ("a", "b"))
    return [
        RolloutGroup(
            task=first,
            rollouts=[
                rollout(first, 0, 4, Score(reward=1.5, parts={"math": 1.0, "format": 0.5})),
                rollout(first, 1, 8, Score(reward=0.5, parts={"math": 0.0, "format": 0.5}), Status.TRUNCATED_LENGTH),
            ],
        ),
        RolloutGroup(
            task=second,
            rollouts=[
                rollout(second, 0, 2, Score(reward=1.0, parts={"math": 1.0, "format": None})),
                rollout(second, 1, 6, Score(reward=None, parts={"math": None, "format": 1.0})),
                rollout(second, 2, 6, Score(reward=None, parts={"math": None}, error="Traceback ...")),
                rollout(second, 3, 0, None, Status.ERROR_ENV),
            ],
        ),
    ]


def test_every_key_and_value() -> None:
    metrics = rollout_metrics(hand_made(), accuracy="math")
    assert metrics == pytest.approx(
        {
            "reward/mean": 1.0,
            "reward/std": math.sqrt(1 / 6),
            "reward/unscored_frac": 3 / 6,
            "reward/abstained_frac": 1 / 6,
            "reward/error_frac": 1 / 6,
            "rollout/error_frac": 1 / 6,
            "rollout/truncated_frac": 1 / 6,
            "rollout/length/mean": 26 / 6,
            "rollout/length/max": 8.0,
            "rollout/num_tokens": 26.0,
            "reward/format/mean": 2 / 3,
            "reward/math/mean": 2 / 3,
            "reward/pass@1": (0.5 + 1.0) / 2,  # the second group has one judged rollout
        }
    )


def test_how_well_an_evaluator_goes_with_its_metric() -> None:
    task = Task(id="a", messages=[])

    def metrics(*pairs: tuple[float | None, float | None]) -> dict[str, float]:
        scores = [Score(reward=true, parts={"r": true, "r/evaluator": value, "x": 1.0}) for true, value in pairs]
        group = RolloutGroup(task=task, rollouts=[rollout(task, i, 2, score) for i, score in enumerate(scores)])
        return rollout_metrics([group], accuracy="r")

    key = "reward/r/evaluator/correlation"
    pairs = [(0.1, 3.0), (0.4, 2.0), (0.9, 7.0), (0.3, 3.5)]
    found = metrics(*pairs, (None, 9.0), (0.5, None))
    assert found[key] == pytest.approx(np.corrcoef(np.array(pairs).T)[0, 1])
    assert found["reward/r/evaluator/mean"] == pytest.approx(24.5 / 5)
    assert [k for k in found if k.endswith("correlation")] == [key]
    for flat in ([(0.5, 1.0), (0.5, 2.0)], [(0.5, 1.0), (0.7, 1.0)], [(0.5, 1.0)], [(None, 1.0)]):
        assert math.isnan(metrics(*flat)[key])


def test_nothing_was_scored() -> None:
    task = Task(id="a", messages=[])
    metrics = rollout_metrics([RolloutGroup(task=task, rollouts=[rollout(task, 0, 3, None)])], accuracy="math")
    assert math.isnan(metrics["reward/mean"])
    assert math.isnan(metrics["reward/std"])
    assert metrics["reward/unscored_frac"] == 1.0
    assert not any("pass@" in key for key in metrics)
    assert rollout_metrics([], accuracy="math")["rollout/num_tokens"] == 0.0


def test_pass_rates() -> None:
    task = Task(id="a", messages=[])

    def group(*values: float | None) -> RolloutGroup:
        scores = [Score(reward=v, parts={"math": v}) for v in values]
        return RolloutGroup(task=task, rollouts=[rollout(task, i, 1, score) for i, score in enumerate(scores)])

    groups = [group(1.0, 0.0, 0.0, 0.0), group(1.0, 1.0, 0.99, 0.0), group(None, None, None, None)]
    assert pass_rates(groups, accuracy="math") == pytest.approx({"reward/pass@1": 0.375, "reward/pass@4": 1.0})
    expected = {"reward/pass@1": 0.375, "reward/pass@2": (0.5 + 5 / 6) / 2}
    assert pass_rates(groups, accuracy="math", ks=[2, 8]) == pytest.approx(expected)
    assert pass_rates(groups, accuracy="other") == {}


def test_pass_at_k_is_the_share_of_draws_with_a_right_one() -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12), (n, c, k)


def test_rows_hold_what_recomputing_needs_and_are_json() -> None:
    groups = hand_made()
    groups[1].rollouts[3].error = "env broke"
    rows = json.loads(json.dumps(rollout_rows(7, groups)))
    assert [(row["step"], row["task"], row["index"]) for row in rows] == [
        (7, "a", 0), (7, "a", 1), (7, "b", 0), (7, "b", 1), (7, "b", 2), (7, "b", 3),
    ]  # fmt: skip
    assert [row["reward"] for row in rows] == [1.5, 0.5, 1.0, None, None, None]
    assert [row["error"] for row in rows] == [None, None, None, None, "Traceback ...", "env broke"]
    assert rows[1]["status"] == "truncated_length"
    assert rows[0] == {
        "step": 7,
        "task": "a",
        "index": 0,
        "status": "completed",
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "cccc"}],
        "answer": "4",
        "reward": 1.5,
        "parts": {"math": 1.0, "format": 0.5},
        "info": {},
        "error": None,
        "advantage": 0.5,
        "turns": [
            {
                "prompt_ids": [1, 2],
                "completion_ids": [3, 3, 3, 3],
                "rollout_logprobs": [-0.5] * 4,
                "finish": "stop",
                "policy_version": [4, 4],
            }
        ],
    }
