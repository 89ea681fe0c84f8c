"""The table of metrics: every metric that a run logs is described once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmrl import Score, Trainer
from llmrl.track.files import read_jsonl
from llmrl.track.names import METRICS, find

TASKS = [{"prompt": f"Count to {i}", "answer": str(i)} for i in range(16)]
PAIRS = [{"prompt": f"Name number {i}.", "chosen": f" It is {i}", "rejected": f" no {i}"} for i in range(16)]
LABELED = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0} for i, row in enumerate(PAIRS)]


def predicted(completion: str) -> Score:
    """A reward with a part, and an evaluator that predicts it."""
    value = sum(character.isalpha() for character in completion) / 16
    return Score(reward=value, parts={"evaluator": value / 2}, info={"extracted": completion[:1]})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "rows"),
    [("grpo", TASKS), ("ppo", TASKS), ("dpo", PAIRS), ("kto", LABELED)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_metric_of_a_run_is_in_the_table(algorithm: str, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    options = {
        "train.output_dir": str(tmp_path / "run"),
        "train.max_steps": 2,
        "train.save_steps": 0,
        "rollout.num_prompts": 4,
        "track.console": "quiet",
        "eval.steps": 1,
    }
    more = {"train_dataset": rows, "eval_dataset": rows[:4], "algorithm": algorithm}
    if rows is TASKS:
        options |= {"rollout.num_generations": 4, "rollout.max_completion_length": 8}
        more |= {"reward": predicted}
    Trainer(options, model="tiny:qwen2", **more).train()
    logged = {key for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") for key in row} - {"step"}
    assert len(logged) > 20
    assert not {key for key in logged if find(key) is None}, "describe these in llmrl/track/names.py"


def test_patterns_and_exact_keys() -> None:
    assert find("reward/mean") is METRICS["reward/mean"]
    assert find("reward/pass@1") is METRICS["reward/pass@1"]
    assert find("reward/pass@64") is METRICS["reward/pass@{k}"]
    assert find("reward/a/b/mean") is METRICS["reward/{part}/mean"]
    assert find("reward/a/evaluator/correlation") is METRICS["reward/{part}/evaluator/correlation"]
    assert find("advantage/p50") is METRICS["advantage/p{q}"]
    assert find("reward//mean") is None and find("reward/mean/x") is None and find("my own") is None


def test_rows_are_sentences() -> None:
    for key, metric in METRICS.items():
        assert key == metric.key and metric.unit
        assert metric.meaning[0].isupper() or metric.meaning.startswith("preference/"), key
        assert metric.meaning.endswith(".") and metric.better in ("up", "down", "none"), key
