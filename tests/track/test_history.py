"""The parts of a run: what each used, and what changed from one to the next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmrl.errors import RunFailed, UserError
from llmrl.track.files import read_jsonl
from llmrl.track.history import begin, part_of

ENVIRONMENT = {"versions": {"torch": "2"}}


def config(rate: float, **train: Any) -> dict[str, Any]:
    return {"model": {"path": "m"}, "train": {"learning_rate": rate, **train}}


def start(folder: Path, rate: float, step: int, resumed_from: Path | None = None, **train: Any) -> list[str]:
    folder.mkdir(exist_ok=True)
    return begin(folder, config(rate, **train), step=step, environment=ENVIRONMENT, resumed_from=resumed_from)


def own_checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}"


def rates(folder: Path) -> list[tuple[int, float]]:
    return [(p["from_step"], p["config"]["train"]["learning_rate"]) for p in read_jsonl(folder / "history.jsonl")]


def test_the_first_part(tmp_path: Path) -> None:
    assert start(tmp_path, 0.1, 0, resume_from_checkpoint=None) == []
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == config(0.1)
    assert json.loads((tmp_path / "env.json").read_text()) == ENVIRONMENT


def test_a_resumed_part_says_what_changed_and_its_file_is_no_resume(tmp_path: Path) -> None:
    start(tmp_path, 0.1, 0)
    changes = start(tmp_path, 0.2, 5, own_checkpoint(tmp_path, 5), resume_from_checkpoint="last", weight_decay=0.3)
    assert changes == ["train.learning_rate 0.1 -> 0.2", "train.weight_decay default -> 0.3"]
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == config(0.2, weight_decay=0.3)
    assert rates(tmp_path) == [(0, 0.1), (5, 0.2)]


def test_a_part_that_was_given_up_is_forgotten(tmp_path: Path) -> None:
    """Killed at step 7 with its last checkpoint at 5, twice."""
    start(tmp_path, 0.1, 0)
    start(tmp_path, 0.2, 5, own_checkpoint(tmp_path, 5))
    assert start(tmp_path, 0.3, 5, own_checkpoint(tmp_path, 5)) == ["train.learning_rate 0.1 -> 0.3"]
    assert rates(tmp_path) == [(0, 0.1), (5, 0.3)]
    assert part_of(tmp_path, 5)["config"]["train"]["learning_rate"] == 0.1, "step 5 was trained by the first part"
    assert part_of(tmp_path, 6)["config"]["train"]["learning_rate"] == 0.3


def test_a_branch_begins_with_the_parts_of_the_other_run(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    start(old, 0.1, 0)
    start(old, 0.2, 4, own_checkpoint(old, 4))
    changes = start(new, 0.5, 2, own_checkpoint(old, 2), output_dir="elsewhere")
    assert changes == ["train.learning_rate 0.1 -> 0.5"]
    assert rates(new) == [(0, 0.1), (2, 0.5)]
    assert rates(old) == [(0, 0.1), (4, 0.2)]


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no run.*output_dir"):
        part_of(tmp_path, 1)


def test_a_full_disk_keeps_the_parts_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(tmp_path, 0.1, 0)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(RunFailed, match=r"history.jsonl cannot be written.*No space left"):
        start(tmp_path, 0.2, 5, own_checkpoint(tmp_path, 5))
    assert rates(tmp_path) == [(0, 0.1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "env.json", "history.jsonl"]
