"""Boxes in which commands run: what they see, what they leave behind, and their limits."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmrl.sandbox import BoxDied, Limits, SandboxUnavailable
from llmrl.sandbox.commands import CommandBox, command_box_kind, give_to_box

pytestmark = pytest.mark.slow

LIMITS = Limits(cpu_seconds=60, wall_seconds=300.0, memory_mb=512, output_mb=2)


@pytest.fixture(params=["bwrap", "lite"])
def box(request: pytest.FixtureRequest, work: Path) -> Iterator[CommandBox]:
    try:
        made = CommandBox(command_box_kind(request.param), write=[str(work)])
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    yield made
    made.close()


@pytest.fixture
def work(tmp_path: Path) -> Path:
    for folder in (tmp_path, *tmp_path.parents[:3]):
        if folder != Path("/tmp"):
            folder.chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    give_to_box(work)
    return work


def shell(box: CommandBox, text: str, *, cwd: str = "/", limits: Limits = LIMITS, processes: bool = True) -> str:
    end = box.run(["/bin/bash", "-c", text], cwd=cwd, limits=limits, processes=processes)
    return end.stdout


def test_a_command_gets_its_input_and_arguments_and_gives_output_and_code(box: CommandBox) -> None:
    end = box.run(["/bin/bash", "-c", 'cat; echo "$1" >&2; exit 3', "x", "two"], stdin="one", limits=LIMITS)
    assert (end.status, end.exit_code, end.stdout, end.stderr) == ("error", 3, "one", "two\n")
    assert box.run(["/bin/true"], limits=LIMITS).status == "ok"
    assert box.run(["/no/such"], limits=LIMITS).exit_code == 127


def test_files_are_shared_by_the_commands_of_a_box_and_stay(box: CommandBox, work: Path) -> None:
    assert shell(box, f"cd {work} && mkdir a && echo x > a/f && mv a b && chmod 700 b/f && cat b/f") == "x\n"
    assert shell(box, f"cat {work}/b/f") == "x\n" and (work / "b" / "f").read_text() == "x\n"


def test_it_sees_the_system_and_its_folders_only(box: CommandBox, work: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("SECRET")
    told = shell(box, f"cat {tmp_path}/secret /etc/passwd /etc/shadow /proc/1/environ; ls {Path.home()}; env")
    names = {line.partition("=")[0] for line in told.splitlines()}
    assert "SECRET" not in told and names <= {"PATH", "LANG", "HOME", "TMPDIR", "PWD", "SHLVL", "_"}
    python = "import socket\ntry: socket.create_connection(('127.0.0.1', 22), 2)\nexcept OSError as e: print('no')"
    assert shell(box, f'python3 -c "{python}"') == "no\n"
    assert shell(box, "echo x > /usr/x || echo x > /var/tmp/x || echo x > /etc/x; echo done") == "done\n"


def test_nothing_outlives_a_command(box: CommandBox, work: Path) -> None:
    shell(box, f"cd {work}; (setsid bash -c 'while true; do date +%N > alive; sleep 0.01; done' &) ; echo started")
    before = (work / "alive").read_text() if (work / "alive").exists() else ""
    time.sleep(0.2)
    assert ((work / "alive").read_text() if (work / "alive").exists() else "") == before


def test_no_command_can_end_its_box(box: CommandBox) -> None:
    shell(box, "kill -9 -1; for i in $(seq 2 60); do kill -9 $i; kill -9 -$i; done; kill -9 $PPID", limits=LIMITS)
    assert shell(box, "echo still here") == "still here\n"


def test_limits_hold(box: CommandBox) -> None:
    end = box.run(["/bin/bash", "-c", "while true; do :; done"], limits=Limits(cpu_seconds=1, wall_seconds=60.0))
    assert end.status == "timeout"
    end = box.run(["/bin/sleep", "100"], limits=Limits(wall_seconds=0.3))
    assert end.status == "timeout"
    assert box.run(["/bin/bash", "-c", "yes"], limits=LIMITS).status in ("output_limit", "error")
    assert (
        "MemoryError"
        in box.run(["/bin/bash", "-c", "python3 -c 'bytearray(10**9)' || (echo no; exit 1)"], limits=LIMITS).stderr
    )
    assert shell(box, "(echo a) || echo no", processes=False) == ""
    end = box.run(["/bin/bash", "-c", ":(){ :|:& };: ; sleep 100"], limits=Limits(cpu_seconds=2, wall_seconds=1.0))
    assert end.status in ("timeout", "error")
    assert shell(box, "echo still here") == "still here\n"


def test_a_closed_box_is_gone(work: Path) -> None:
    try:
        box = CommandBox(command_box_kind(), write=[str(work)])
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    pid = box._process.pid
    box.close()
    box.close()
    assert not os.path.exists(f"/proc/{pid}/task")
    with pytest.raises((BoxDied, OSError)):
        shell(box, "true")
