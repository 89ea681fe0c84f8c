"""A run's files: what is written per step, and what a resumed run keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest

from llmrl.track.files import read_jsonl
from llmrl.track.flat import flatten
from llmrl.track.options import TrackConfig
from llmrl.track.record import Record, environment
from llmrl.types import Rollout, RolloutGroup, Score, Task

CONFIG = {"model": {"path": "m", "lora": None}, "rewards": [{"fn": "f"}], "seed": 1, "name": "caf\u00e9"}


def groups() -> list[RolloutGroup]:
    found = []
    for name in ("a", "b"):
        task = Task(id=name, messages=[{"role": "user", "content": "?"}])
        found.append(
            RolloutGroup(task=task, rollouts=[Rollout(task=task, index=i, score=Score(reward=1.0)) for i in (0, 1)])
        )
    return found


def record(folder: Path, logged: list[Any], **options: Any) -> Record:
    class Listener:
        def log(self, step: int, metrics: dict[str, float]) -> None:
            logged.append((step, metrics))

        def table(self, step: int, groups: list[RolloutGroup]) -> None:
            pass

        def close(self, *, failed: bool) -> None:
            pass

    return Record(TrackConfig(**options), folder, trackers=Listener())  # type: ignore[arg-type]


@pytest.mark.parametrize(("saved", "num_rows"), [("all", 4), ("sample", 2), ("none", 0)])
def test_a_step_goes_to_files_and_trackers(
    saved: Literal["all", "sample", "none"], num_rows: int, tmp_path: Path
) -> None:
    logged: list[Any] = []
    run = record(tmp_path, logged, save_rollouts=saved)
    run.step(1, {"reward/mean": 0.5}, groups())
    run.close()
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "reward/mean": 0.5}]
    assert len(read_jsonl(tmp_path / "rollouts.jsonl")) == num_rows
    assert logged == [(1, {"reward/mean": 0.5})]


@pytest.mark.parametrize(("saved", "kept"), [("all", 3), ("sample", 2)])
def test_rollouts_of_a_step_can_be_bounded(saved: Literal["all", "sample"], kept: int, tmp_path: Path) -> None:
    run = record(tmp_path, [], save_rollouts=saved, num_saved_rollouts=3)
    run.step(1, {}, groups())
    run.step(2, {}, groups())
    run.close()
    rows = read_jsonl(tmp_path / "rollouts.jsonl")
    everyone = [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert [(row["step"], row["task"], row["index"]) for row in rows] == [
        (step, *place) for step in (1, 2) for place in everyone[:kept]
    ]


def test_a_resumed_run_drops_later_rows(tmp_path: Path) -> None:
    run = record(tmp_path, [])
    run.step(1, {"a": 1.0}, groups())
    lengths = run.lengths()
    run.step(2, {"a": 2.0}, groups())
    run.close()
    resumed = record(tmp_path, [])
    resumed.truncate(lengths)
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1]
    assert len(read_jsonl(tmp_path / "rollouts.jsonl")) == 4


def test_trackers_get_plain_values_with_dotted_keys() -> None:
    assert flatten(CONFIG) == {
        "model.path": "m", "model.lora": "None", "rewards": "[{'fn': 'f'}]", "seed": 1, "name": "caf\u00e9",
    }  # fmt: skip


def test_the_environment_is_json() -> None:
    found = environment(device="cpu", num_processes=2, distributed_type="MULTI_CPU")
    assert json.loads(json.dumps(found)) == found
    assert found["num_processes"] == 2 and "torch" in found["versions"]
