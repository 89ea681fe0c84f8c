"""Two processes never train in one folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmrl import Trainer
from llmrl.errors import UserError
from llmrl.run import lock as locks
from tests.run.test_interruption import odd

HOLD = """
import sys
from pathlib import Path
from llmrl.run.lock import lock
lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    """Start a process that holds the lock until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def trainer(folder: Path) -> Trainer:
    options = {"train.output_dir": str(folder), "train.max_steps": 1, "rollout.num_prompts": 2,
               "rollout.num_generations": 2, "rollout.max_completion_length": 4, "track.console": "quiet"}  # fmt: skip
    rows = [{"question": "1+1?", "answer": "2"}] * 4
    return Trainer(options, model="tiny:qwen2", reward=odd, train_dataset=rows)


def test_a_folder_in_use_is_refused_until_its_process_is_gone(tmp_path: Path) -> None:
    process = hold(tmp_path)
    with pytest.raises(UserError, match=rf"is in use: process {process.pid} on .* trains in it\. Wait for its end or"):
        trainer(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    trainer(tmp_path).train()


def test_a_run_gives_its_folder_back_at_its_end(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    process = hold(tmp_path)
    process.kill()
    process.wait()


def test_a_lock_that_was_removed_under_us_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, removed = locks.fcntl.flock, []

    def flock(file: Any, how: int) -> None:
        real(file, how)
        if not removed:
            removed.append((tmp_path / locks.FILE).unlink())

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    locks.lock(tmp_path)
    assert (tmp_path / locks.FILE).is_file()
    with pytest.raises(AssertionError):  # "held" never comes
        hold(tmp_path)
    locks.unlock(tmp_path)
    assert not (tmp_path / locks.FILE).exists()


def test_a_second_trainer_in_one_process_takes_the_place_of_the_first(tmp_path: Path) -> None:
    trainer(tmp_path)
    trainer(tmp_path).train()
    assert tmp_path.resolve() not in locks._held
