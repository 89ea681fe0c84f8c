"""Health warnings: each symptom is reported once, and again only after it has gone away."""

from __future__ import annotations

import json

import pytest

from llmrl.track.health import PATIENCE, Health
from llmrl.types import Rollout, RolloutGroup, Score, Task

FINE = {
    "advantage/zero_variance_frac": 0.3,
    "reward/mean": 0.4,
    "rollout/truncated_frac": 0.1,
    "reward/unscored_frac": 0.0,
    "policy/entropy": 2.0,
    "kl/mismatch/max": 0.001,
}
ILL = {
    "no_signal": ({"advantage/zero_variance_frac": 1.0, "reward/mean": 0.0}, "rewards within every group are equal"),
    "truncated": ({"rollout/truncated_frac": 0.96}, "cut off"),
    "unscored": ({"reward/unscored_frac": 0.031}, "could not be scored"),
    "abstained": ({"reward/abstained_frac": 0.01}, "abstained"),
    "entropy": ({"policy/entropy": 0.039}, "entropy has fallen"),
    "off_policy": ({"kl/mismatch/ess": 0.49}, "far from the one that sampled"),
    "lambda": ({"value/lambda": 0.49}, "length-adaptive lambda"),
}
NEARLY = {
    "advantage/zero_variance_frac": 0.999,
    "rollout/truncated_frac": 0.95,
    "reward/unscored_frac": 0.02,
    "policy/entropy": 0.041,
    "kl/mismatch/max": 0.05,
    "kl/mismatch/ess": 0.5,
    "value/lambda": 0.5,
}


def test_healthy_and_nearly_ill_runs_get_no_warning() -> None:
    health = Health(on_policy=True)
    for metrics in [FINE] * 20 + [FINE | NEARLY] * 20:
        assert health.observe(metrics) == []


@pytest.mark.parametrize("name", ILL)
def test_once_after_some_patience_and_again_only_after_recovery(name: str) -> None:
    symptom, words = ILL[name]
    health = Health(on_policy=True)
    course = [False] + [True] * (PATIENCE - 1) + [False] + [True] * (PATIENCE + 10) + [False] + [True] * PATIENCE
    given = [health.observe(FINE | symptom if ill else FINE) for ill in course]
    counts = [len(warnings) for warnings in given]
    first = 1 + PATIENCE + PATIENCE - 1
    assert [step for step, count in enumerate(counts) if count] == [first, len(course) - 1]
    assert set(counts) == {0, 1}
    assert words in given[first][0]
    assert words in given[-1][0]


def test_several_at_once() -> None:
    health = Health(on_policy=True)
    health.observe(FINE)
    everything = FINE | {key: value for symptom, _ in ILL.values() for key, value in symptom.items()}
    for _ in range(PATIENCE - 1):
        assert health.observe(everything) == []
    warnings = health.observe(everything)
    assert len(warnings) == len(ILL)


def test_sampler_and_trainer_apart_is_reported_at_once_and_on_policy_only() -> None:
    fine, apart = FINE | {"sync/limit": 0.1, "kl/mismatch/gap": 0.1}, FINE | {"sync/limit": 0.1, "kl/mismatch/gap": 0.3}
    health = Health(on_policy=True)
    assert health.observe(apart) == [], "before the first push of the run nothing is known about rounding"
    (warning,) = health.observe(apart)
    assert "0.3 nats on average" in warning and "rounding explains 0.1" in warning
    assert health.observe(apart) == []
    assert health.observe(fine) == []
    assert len(health.observe(apart)) == 1
    for on_policy, metrics in ((False, apart), (True, apart | {"rollout/staleness/max": 1.0})):
        health = Health(on_policy=on_policy)
        assert [health.observe(metrics) for _ in range(3)] == [[], [], []]


def abstention(task: str, index: int, info: dict) -> Rollout:
    score = Score(reward=None, parts={"judge": None}, info={"abstained": ["judge"], **info})
    return Rollout(task=Task(id=task, messages=[]), index=index, score=score)


def test_abstentions_name_their_tasks_and_reasons() -> None:
    groups = []
    for name in ("a-1", "b-2", "c-3", "d-4"):
        scored = Rollout(task=Task(id=name, messages=[]), index=1, score=Score(reward=0.0))
        info = {"judge": {"reason": f"no grade for {name}"}} if name != "b-2" else {}
        groups.append(RolloutGroup(task=scored.task, rollouts=[abstention(name, 0, info), scored]))
    failed = Score(reward=None, error="Traceback ...")
    groups[0].rollouts.append(Rollout(task=groups[0].task, index=2, score=failed))
    metrics = FINE | {"reward/abstained_frac": 4 / 9, "reward/unscored_frac": 4 / 9}
    health = Health(on_policy=True)
    for _ in range(PATIENCE - 1):
        assert health.observe(metrics, groups) == []
    (warning,) = health.observe(metrics, groups)
    assert "4 of 9 rollouts" in warning and "not counted as wrong" in warning
    assert "verify.max_abstained_frac" in warning
    _, *shown = warning.splitlines()
    assert shown == ["  a-1: judge (no grade for a-1)", "  b-2: judge", "  c-3: judge (no grade for c-3)"]


def test_abstentions_without_groups_give_their_share() -> None:
    health = Health(on_policy=True)
    warnings = [text for _ in range(PATIENCE) for text in health.observe(FINE | {"reward/abstained_frac": 0.25})]
    assert len(warnings) == 1 and "a share of 0.25 of the rollouts" in warnings[0]


EVALUATOR = "reward/ircoco/evaluator"
AGREE = {f"{EVALUATOR}/correlation": 0.6, f"{EVALUATOR}/mean": 0.5, "reward/ircoco/mean": 0.5}


def test_an_evaluator_that_no_longer_agrees_with_its_metric() -> None:
    health = Health(on_policy=True)
    apart = AGREE | {f"{EVALUATOR}/correlation": 0.09}
    for metrics in [AGREE] * 9 + [apart] * (PATIENCE - 1) + [AGREE] + [apart] * (PATIENCE - 1):
        assert health.observe(FINE | metrics) == []
    (warning,) = health.observe(FINE | apart)
    assert "correlation 0.09" in warning and "algo.use_token_rewards false" in warning
    assert health.observe(FINE | apart) == []


def test_an_evaluator_that_rises_while_its_metric_falls() -> None:
    def means(evaluator: float, metric: float) -> dict[str, float]:
        return FINE | AGREE | {f"{EVALUATOR}/mean": evaluator, "reward/ircoco/mean": metric}

    harmless = [(0.9, 0.9), (0.1, 0.1), (0.1, 0.9), (0.9, 0.481), (0.499, 0.1)]
    health = Health(on_policy=True)
    for evaluator, metric in [(0.5, 0.5)] + [pair for pair in harmless for _ in range(3 * PATIENCE)]:
        assert health.observe(means(evaluator, metric)) == []
    resumed = Health(on_policy=True)
    resumed.load_state_dict(json.loads(json.dumps(health.state_dict())))
    for _ in range(PATIENCE - 1):
        assert resumed.observe(means(0.6, 0.4)) == []
    (warning,) = resumed.observe(means(0.6, 0.4))
    assert "has risen by 0.100" in warning and "reward/ircoco has fallen by 0.100" in warning


def test_metrics_that_are_absent_or_nan_are_not_symptoms() -> None:
    nan = dict.fromkeys(FINE, float("nan"))
    for metrics in ({}, nan):
        health = Health(on_policy=True)
        quiet = metrics | {"advantage/zero_variance_frac": 0.0}
        assert all(health.observe(quiet) == [] for _ in range(3 * PATIENCE))


def test_a_resumed_run_keeps_counting() -> None:
    symptom, _ = ILL["entropy"]
    health = Health(on_policy=True)
    health.observe(FINE)
    for _ in range(PATIENCE - 1):
        health.observe(FINE | symptom)
    resumed = Health(on_policy=True)
    resumed.load_state_dict(json.loads(json.dumps(health.state_dict())))
    assert len(resumed.observe(FINE | symptom)) == 1
    assert len(Health(on_policy=True).observe(FINE | symptom)) == 0
