"""No hostile program passes or does harm outside its box, in any box, as root and as an ordinary user."""

from __future__ import annotations

import functools
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmrl.sandbox import SandboxUnavailable, open_sandbox

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
NOBODY = 65534
SECRET = "s3cr3t-of-the-trainer"


@functools.cache
def box_problem(kind: str) -> str | None:
    try:
        open_sandbox(kind, packages=()).close()
    except SandboxUnavailable as error:
        return str(error)
    return None


@functools.cache
def python_of_nobody() -> str | None:
    """Return an interpreter that an ordinary user can run with this repository, or None."""
    for candidate in (os.path.realpath(sys.executable), shutil.which("python3", path="/usr/local/bin:/usr/bin")):
        if candidate is None:
            continue
        try:
            tried = subprocess.run(
                [candidate, "-c", "import sys, llmrl.sandbox; sys.exit(sys.version_info < (3, 11))"],
                user=NOBODY, group=NOBODY, extra_groups=[], cwd="/", env={"PYTHONPATH": str(ROOT)}, capture_output=True,
            )  # fmt: skip
        except OSError:
            continue
        if tried.returncode == 0:
            return candidate
    return None


@pytest.fixture
def canary() -> Iterator[Path]:
    """Make a folder and a file that everyone may change, so that only the box protects them."""
    folder = Path(tempfile.mkdtemp(prefix="canary-"))
    folder.chmod(0o777)
    (folder / "keep.txt").write_text("KEEP")
    (folder / "keep.txt").chmod(0o666)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def state_of(folder: Path) -> dict[str, tuple[int, int, int, int, bytes]]:
    entries = [folder, *sorted(folder.rglob("*"))]
    return {
        str(path): (
            s.st_mode,
            s.st_uid,
            s.st_mtime_ns,
            s.st_nlink,
            b"" if stat.S_ISDIR(s.st_mode) else path.read_bytes(),
        )
        for path in entries
        for s in [path.lstat()]
    }


def run_all(python: str, kind: str, canary: Path, port: int, abstract: str, **user: Any) -> dict[str, Any]:
    done = subprocess.run(
        [python, str(HERE / "run_all.py"), kind, str(canary), str(port), abstract],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "TEST_SECRET": SECRET, "PYTHONDONTWRITEBYTECODE": "1"},
        cwd="/", capture_output=True, text=True, **user,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert SECRET not in done.stdout
    return dict(json.loads(done.stdout))


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("who", ["myself", "ordinary user"])
@pytest.mark.parametrize("kind", ["bwrap", "lite"])
def test_hostile_programs_get_nothing_and_harm_nothing(kind: str, who: str, canary: Path) -> None:
    problem = box_problem(kind)
    if problem:
        pytest.skip(problem)
    python, user = sys.executable, {}
    if who == "ordinary user":
        if os.getuid() != 0:
            pytest.skip("the tests run as an ordinary user already")
        python = python_of_nobody() or ""
        if not python:
            pytest.skip("uid 65534 can read neither this interpreter nor /usr/bin/python3 >= 3.11 with this repository")
        user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams,
    ):
        abstract = f"llmrl-{os.getpid()}-{kind}"
        datagrams.bind(f"\0{abstract}")
        before = state_of(canary)
        report = run_all(python, kind, canary, server.getsockname()[1], abstract, **user)
        for waiting in (server.accept, lambda: datagrams.recv(100)):
            server.setblocking(False)
            datagrams.setblocking(False)
            with pytest.raises(BlockingIOError):
                waiting()
    assert report["uid"] == (NOBODY if user else os.getuid())
    assert state_of(canary) == before
    assert report["left"] == []
    assert len(report["reports"]) >= 60
    for program in report["reports"]:
        for mode in ("functions", "stdin", "suite"):
            assert set(program[mode]) != {"passed"}, program
        assert program["honest"] == ["passed"] * 10, program
