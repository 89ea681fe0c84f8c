"""Whole runs of a tiny model: dynamic sampling draws, drops and accounts for groups; token scores reach the record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmrl import Trainer
from llmrl.config import Config, RewardConfig, RolloutConfig, TrackConfig, TrainConfig, load_config, preset
from llmrl.run.ledger import audit
from llmrl.track.files import read_jsonl

pytestmark = pytest.mark.slow

NUM_PROMPTS, SIZE = 4, 4


def half_of_the_tasks_say_nothing(completion: str, answer: str) -> float:
    if answer == "always":
        return 1.0
    return float(sum(map(ord, completion)) % 2)


def run(folder: Path, name: str, **algo: Any) -> tuple[list[dict], list[dict], dict[str, Any]]:
    config = Config(
        rollout=RolloutConfig(num_prompts=NUM_PROMPTS, num_generations=SIZE, max_completion_length=8),
        rewards=[RewardConfig(fn="given")],
        algo=preset(name, **algo),
        train=TrainConfig(output_dir=str(folder), max_steps=2, learning_rate=1e-3),
        track=TrackConfig(console="quiet"),
    )
    rows = [{"prompt": f"q{i}", "answer": "always" if i % 2 else "varies"} for i in range(40)]
    Trainer(config, model="tiny:qwen2", reward=half_of_the_tasks_say_nothing, train_dataset=rows).train()
    return read_jsonl(folder / "metrics.jsonl"), read_jsonl(folder / "rollouts.jsonl"), audit(folder / "ledger.jsonl")


def test_dynamic_sampling_replaces_groups_without_signal(tmp_path: Path) -> None:
    metrics, rollouts, accounts = run(tmp_path / "run", "dapo", overlong_buffer=0.0)
    assert accounts["exact"], accounts
    drawn = [row["rollout/drawn_groups"] for row in metrics]
    assert sum(drawn) > 2 * NUM_PROMPTS, "half the tasks carry no signal"
    assert accounts["issued"] == accounts["trained"] == sum(drawn) == len(rollouts) / SIZE
    for row in metrics:
        assert row["train/computed_frac"] == 1.0, "only groups with signal are left to compute"
        assert row["advantage/zero_variance_frac"] == 0.0
        assert row["reward/mean"] > 0.5, "measured over all that was drawn, not over what was kept"
    recorded = load_config(["--config", str(tmp_path / "run" / "config.yaml"), "--data.path=d", "--model.path=m"]).algo
    assert (recorded.dynamic_sampling.max_batches, recorded.loss.epsilon_high, recorded.loss.kind) == (10, 0.28, "clip")


def test_without_it_those_groups_stay_in_the_batch_and_are_not_computed(tmp_path: Path) -> None:
    metrics, _, accounts = run(tmp_path / "run", "grpo")
    assert accounts["issued"] == 2 * NUM_PROMPTS
    for row in metrics:
        assert row["rollout/drawn_groups"] == NUM_PROMPTS
        assert row["train/computed_frac"] == pytest.approx(1 - row["advantage/zero_variance_frac"])


def test_remax_compares_with_the_greedy_completion_of_the_task(tmp_path: Path) -> None:
    _, rollouts, accounts = run(tmp_path / "run", "remax")
    assert accounts["exact"]
    groups: dict[tuple[int, str], set[float]] = {}
    for row in rollouts:
        groups.setdefault((row["step"], row["task"]), set()).add(row["reward"] - row["advantage"])
    baselines = [values for values in groups.values()]
    assert all(len(values) == 1 and values <= {0.0, 1.0} for values in baselines), (
        "one baseline a group, a reward itself"
    )
    assert all(row["advantage"] == 0 for row in rollouts if row["answer"] == "always")


def test_token_scores_are_recorded(tmp_path: Path) -> None:
    metrics, rollouts, _ = run(tmp_path / "run", "thr", token_weighting={"p": 0.1})
    assert all(0 <= row["thr/kept_frac"] <= 1 for row in metrics)
    scored = [row for row in rollouts if "token_scores" in row]
    assert scored
    for row in scored:
        assert row["answer"] == "varies"
        assert len(row["token_scores"]["thr"]) == sum(len(turn["completion_ids"]) for turn in row["turns"])
