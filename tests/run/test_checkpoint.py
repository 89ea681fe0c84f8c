"""Checkpoints: everything comes back, damage is named, a failing disk costs nothing but the step being written."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmrl.algo.base import Algorithm
from llmrl.errors import RunFailed, UserError
from llmrl.model.parallel import Parallel
from llmrl.run import checkpoint, sums
from llmrl.run.checkpoint import branch, find_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from llmrl.train.learner import Learner
from tests.invariance.cases import (
    make_config,
    make_learner,
    make_lora,
    make_samples,
    tiny_model,
    train_batch,
    trained_parameters,
)

FILES = ["SHA256SUMS", "learner.pt", "rng-0.pt", "state.json", "weights.safetensors"]


def build(lora: bool = False, seed: int = 0) -> tuple[Learner, Algorithm]:
    model = tiny_model(seed=seed, hidden_size=16, intermediate_size=16)
    model = make_lora(model, seed=seed) if lora else model
    config = make_config(train={"lr_scheduler_type": "linear", "warmup_steps": 3, "adam_epsilon": 1e-3})
    return make_learner(model, config)


def save(folder: Path, step: int, learner: Learner, *, keep: int = 2, state: dict[str, Any] | None = None) -> Path:
    return save_checkpoint(
        folder,
        step,
        policy=learner.policy,
        learner=learner,
        state=state or {},
        parallel=Parallel.alone(),
        keep=keep,
    )


def load(folder: Path, learner: Learner) -> dict[str, Any]:
    return load_checkpoint(folder, policy=learner.policy, learner=learner, parallel=Parallel.alone())


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_training_goes_on_with_the_same_bits(tmp_path: Path, lora: bool, seed: int) -> None:
    samples = make_samples(seed)
    learner, algorithm = build(lora)
    for _ in range(2):
        learner.update(train_batch(samples), algorithm)
    state = {"policy_version": 3, "sampler": {"position": 12}}
    folder = save(tmp_path, 2, learner, state=state)
    expected_metrics = [learner.update(train_batch(samples), algorithm) for _ in range(2)]

    resumed, _ = build(lora)
    with torch.no_grad():
        for parameter in resumed.parameters:
            parameter.add_(1.0)
    assert load(folder, resumed) == state | {"format": 1, "step": 2, "num_processes": 1}
    assert resumed.num_updates == 2
    metrics = [resumed.update(train_batch(samples), algorithm) for _ in range(2)]
    assert metrics == expected_metrics
    expected = trained_parameters(learner)
    for name, parameter in trained_parameters(resumed).items():
        assert torch.equal(parameter, expected[name]), name


def test_random_states_come_back(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.random(), torch.rand(()).item()

    learner, _ = build()
    folder = save(tmp_path, 1, learner)
    expected = draw()
    draw()
    load(folder, learner)
    assert draw() == expected


def test_only_the_adapters_are_written(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = save(tmp_path, 1, build(lora=True)[0])
    assert sorted(file.name for file in folder.iterdir()) == FILES
    names = load_file(folder / "weights.safetensors").keys()
    assert names
    assert all("lora_" in name for name in names)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "garbage", "one bit"])
def test_a_damaged_file_names_the_folder_and_the_older_ones(tmp_path: Path, file: str, damage: str) -> None:
    learner, _ = build()
    older, newer = save(tmp_path, 1, learner), save(tmp_path, 2, learner)
    path = newer / file
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        damaged = {"empty": b"", "half": content[: len(content) // 2], "garbage": b"\xffgarbage" * 50}
        path.write_bytes((damaged | {"one bit": bytes(flipped)})[damage])
    before = trained_parameters(learner)
    with pytest.raises(UserError) as caught:
        load(newer, learner)
    assert str(newer) in str(caught.value) and "is damaged" in str(caught.value)
    assert file in str(caught.value), "the file is named"
    assert str(older) in str(caught.value).split("resume from")[1]
    for name, parameter in trained_parameters(learner).items():
        assert torch.equal(parameter, before[name]), "nothing may be put back from a damaged checkpoint"
    load(older, learner)


def test_sha256sum_itself_finds_a_checkpoint_right(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, build()[0])
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True, capture_output=True)


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    learner, _ = build()
    folder = save(tmp_path, 1, learner)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"format": 7}))
    sums.write(folder)
    with pytest.raises(UserError, match="has format 7, this version of llmrl reads 1: resume with the version that"):
        load(folder, learner)


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    learner, _ = build()
    for file in ("rng-0.pt", "learner.pt"):
        folder = save(tmp_path, 1, learner)
        torch.save({"torch": Evil()}, folder / file)
        sums.write(folder)
        with pytest.raises(UserError, match="is damaged"):
            load(folder, learner)
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_is_gone_before_its_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, _ = build()
    first = save(tmp_path, 1, learner)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)  # killed before anything is deleted
    second = save(tmp_path, 2, learner, keep=1)
    assert list_checkpoints(tmp_path) == [second]
    monkeypatch.undo()
    save(tmp_path, 3, learner, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    assert not first.exists()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, build()[0])
    with pytest.raises(UserError, match="another model"):
        load(folder, build(lora=True)[0])
    wider, _ = make_learner(tiny_model(hidden_size=32, intermediate_size=16), make_config())
    with pytest.raises(UserError, match="another model"):
        load(folder, wider)


@pytest.mark.parametrize("where", ["weights", "learner", "fsync"])
def test_a_failing_disk_leaves_the_older_checkpoint(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, algorithm = build()
    older = save(tmp_path, 1, learner)
    before = trained_parameters(learner)
    learner.update(train_batch(make_samples(0)), algorithm)

    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    def full_for_the_learner(value: Any, file: Path) -> None:
        file.write_bytes(b"half")
        if file.name == "learner.pt":
            raise RuntimeError("PytorchStreamWriter failed writing file")

    with monkeypatch.context() as patch:
        if where == "weights":
            patch.setattr(checkpoint, "save_file", full)
        elif where == "learner":
            patch.setattr(checkpoint.torch, "save", full_for_the_learner)
        else:
            patch.setattr(checkpoint.os, "fsync", full)
        with pytest.raises(RunFailed, match=r"step-00000002 could not be written"):
            save(tmp_path, 2, learner)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [older.name]
    assert find_checkpoint(tmp_path, "last") == older
    load(older, learner)
    for name, parameter in trained_parameters(learner).items():
        assert torch.equal(parameter, before[name]), name
    assert save(tmp_path, 2, learner).is_dir(), "once there is space again, it goes on"


def test_what_a_kill_left_half_written_is_never_taken_for_a_checkpoint(tmp_path: Path) -> None:
    learner, _ = build()
    first = save(tmp_path, 1, learner)
    unfinished = first.with_name(f"{checkpoint.UNFINISHED}step-00000002")
    shutil.copytree(first, unfinished)
    (unfinished / "weights.safetensors").write_bytes(b"half")
    (unfinished / "of-an-earlier-try").touch()
    assert list_checkpoints(tmp_path) == [first]
    assert find_checkpoint(tmp_path, "last") == first
    second = save(tmp_path, 2, learner)
    assert sorted(file.name for file in second.iterdir()) == FILES
    assert list_checkpoints(tmp_path) == [first, second]


def test_the_newest_ones_are_kept(tmp_path: Path) -> None:
    learner, _ = build()
    for step in (1, 2, 9, 10, 11):
        save(tmp_path, step, learner, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000011"]
    save(tmp_path, 12, learner, keep=0)
    assert len(list_checkpoints(tmp_path)) == 3


def test_finding_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        find_checkpoint(tmp_path, "last")
    with pytest.raises(UserError, match="no checkpoint there"):
        find_checkpoint(tmp_path, str(tmp_path / "nowhere"))
    (tmp_path / "metrics.jsonl").touch()
    assert find_checkpoint(tmp_path, "last") is None, "the run was stopped before its first checkpoint"
    folder = save(tmp_path, 1, build()[0])
    assert find_checkpoint(tmp_path, str(folder)) == folder
    assert find_checkpoint(tmp_path, "last") == folder
    assert find_checkpoint(tmp_path, str(tmp_path)) == folder, "a run stands for its last checkpoint"
    assert find_checkpoint(tmp_path / "new", str(tmp_path)) == folder


def test_going_back_to_an_older_checkpoint_is_refused_in_its_own_folder_only(tmp_path: Path) -> None:
    run, (learner, _) = tmp_path / "run", build()
    for step in (10, 20, 30):
        save(run, step, learner, keep=0)
    older = run / "checkpoints" / "step-00000010"
    message = r"later checkpoints \(step-00000020, step-00000030\).*new train.output_dir.*--step 10"
    with pytest.raises(UserError, match=message):
        find_checkpoint(run, str(older))
    assert len(list_checkpoints(run)) == 3
    assert find_checkpoint(tmp_path / "new", str(older)) == older


def test_a_branch_is_a_run_of_its_own(tmp_path: Path) -> None:
    old, new, (learner, _) = tmp_path / "old", tmp_path / "new", build()
    new.mkdir()
    folder = save(old, 2, learner, state={"files": {"metrics": 5, "rollouts": 7, "ledger": 3}})
    for name, text in (("metrics", "12345678"), ("rollouts", "1234567"), ("ledger", "12")):
        (old / f"{name}.jsonl").write_text(text)
    lengths = branch(folder, new)
    assert lengths == {"metrics": 5, "rollouts": 0, "ledger": 0}, "a file that was cut short is not taken over"
    assert (new / "metrics.jsonl").read_text() == "12345"
    assert not (new / "rollouts.jsonl").exists()
    copy = find_checkpoint(new, "last")
    assert copy is not None and copy.name == folder.name
    shutil.rmtree(old)
    other, _ = build(seed=1)
    assert load(copy, other)["files"] == lengths
    for name, parameter in trained_parameters(other).items():
        assert torch.equal(parameter, trained_parameters(learner)[name]), name


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    learner, algorithm = build()
    save(tmp_path, 1, learner)
    learner.update(train_batch(make_samples(0)), algorithm)
    expected = trained_parameters(learner)
    folder = save(tmp_path, 1, learner)
    other, _ = build()
    load(folder, other)
    for name, parameter in trained_parameters(other).items():
        assert torch.equal(parameter, expected[name]), name


def test_a_branch_that_does_not_fit_on_the_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, (learner, _) = tmp_path / "old", tmp_path / "new", build()
    new.mkdir()
    folder = save(old, 2, learner, state={"files": {"metrics": 5, "rollouts": 7, "ledger": 3}})
    (old / "metrics.jsonl").write_text("12345678")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.Path, "rename", full)
    with pytest.raises(RunFailed, match=r"could not be copied.*No space left.*train.output_dir"):
        branch(folder, new)
    assert list_checkpoints(new) == [] and not list(new.glob("*.jsonl"))
