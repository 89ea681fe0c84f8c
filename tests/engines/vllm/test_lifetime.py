"""vLLM's processes and files end with their trainer; files of others stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmrl.engines.vllm import transfer
from llmrl.engines.vllm.transfer import check_path, remove_files_of, shared_path

TRAINER = """
import os, subprocess, sys
from llmrl.engines.vllm.transfer import shared_path
file = shared_path("weights")
file.touch()
os.environ["LLMRL_TRAINER_PID"] = str(os.getpid())
engine = subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]], stdout=subprocess.PIPE, text=True)
print(os.getpid(), engine.stdout.readline().strip(), file, flush=True)
sys.stdin.read()
"""
WORKER = """
import os, sys, time
from llmrl.engines.vllm.lifetime import end_with_trainer
from llmrl.engines.vllm.transfer import remove_files_of
end_with_trainer(remove_files_of)
print(os.getpid(), flush=True)
time.sleep(1000)
"""
ENGINE = """
import os, subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
print(os.getpid(), worker.stdout.readline().strip(), flush=True)
time.sleep(1000)
"""


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


def wait_for(condition: object) -> None:
    assert callable(condition)
    while not condition():  # bounded by the test's own limit
        time.sleep(0.05)


@pytest.mark.parametrize("layers", ["one process", "an engine and its worker"])
def test_nothing_outlives_a_killed_trainer(tmp_path: Path, layers: str) -> None:
    arguments = [WORKER] if layers == "one process" else [ENGINE, WORKER]
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"LLMRL_SHARED_MEMORY": str(tmp_path)},
    )
    assert trainer.stdout is not None
    pid, *others, file = trainer.stdout.readline().split()
    assert len(others) == len(arguments) and Path(file).is_file()
    os.kill(int(pid), signal.SIGKILL)
    trainer.wait()
    for other in others:
        wait_for(lambda other=other: gone(int(other)))
    wait_for(lambda: not Path(file).exists())


def names(folder: Path, **changes: str) -> Path:
    parts = dict(zip(["prefix", "host", "boot", "namespace", "pid", "kind", "unique"], NAME.split("_"), strict=True))
    file = folder / "_".join((parts | changes).values())
    file.touch()
    return file


NAME = ""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMRL_SHARED_MEMORY", str(tmp_path))
    monkeypatch.setattr(sys.modules[__name__], "NAME", shared_path("weights").name)
    return tmp_path


def dead_pid() -> str:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return str(process.pid)


def test_only_what_is_known_to_be_left_behind_is_removed(folder: Path) -> None:
    dead = dead_pid()
    left = names(folder, pid=dead)
    kept = [
        names(folder),
        names(folder, pid=dead, boot="00000000"),  # another machine, or this one before it was started again
        names(folder, pid=dead, host="elsewhere"),
        names(folder, pid=dead, namespace="1"),  # a container beside this one
        folder / "llmrl_of_the_user",
    ]
    kept[-1].touch()
    shared_path("weights")
    assert not left.exists()
    assert all(file.exists() for file in kept)


def test_the_files_of_one_process(folder: Path) -> None:
    mine, other = names(folder), names(folder, pid="1")
    remove_files_of(os.getpid())
    assert not mine.exists() and other.exists()


def test_a_host_name_with_odd_characters(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer.socket, "gethostname", lambda: "a_b/c d")
    assert shared_path("weights").parent == folder
    assert len(shared_path("weights").name.split("_")) == 7


def test_a_server_opens_staged_files_only(folder: Path) -> None:
    check_path(names(folder))
    (folder / "secret").write_text("x")
    link = folder / f"{NAME[:-1]}x"
    link.symlink_to(folder / "secret")
    for path in (folder / "secret", Path("/etc/passwd"), link):
        with pytest.raises(PermissionError, match="is not a file of weights that a trainer has staged"):
            check_path(path)
