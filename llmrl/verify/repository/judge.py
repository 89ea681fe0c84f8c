"""Judges an edited repository: its changes go into a fresh copy, with the hidden tests, in a fresh box.

What an agent could have planted for the tests does not come along (`is_protected`). The expected values of the tests
stay outside (`withhold`), so a program that takes over the test runner has to give values that it can only compute.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from llmrl.errors import UserError
from llmrl.sandbox import BoxDied, Limits
from llmrl.sandbox.commands import ENVIRONMENT, CommandBox, give_to_box
from llmrl.sandbox.trees import Changes, apply_patch, changes, export, files_of, write
from llmrl.verify.repository.compare import BrokenTask, Comparison, Guard, Judgement, check_guard
from llmrl.verify.repository.protect import is_protected
from llmrl.verify.repository.task import RepositoryTask
from llmrl.verify.repository.withhold import Withheld, withhold

_KEPT_TASKS = 8
_RESULT_BYTES = 64 << 20


# --- states of a repository -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A task's files: as it begins, and with the hidden tests."""

    before: Path
    tests: Path


_prepared: OrderedDict[str, Prepared] = OrderedDict()
_lock = threading.Lock()


@cache
def _root() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="llmrl-repositories-"))
    folder.chmod(0o711)
    owner = os.getpid()
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)
    return folder


def _reset_after_fork() -> None:
    _root.cache_clear()
    _prepared.clear()
    _references.clear()
    _reference_locks.clear()


os.register_at_fork(after_in_child=_reset_after_fork)


def prepare(task: RepositoryTask) -> Prepared:
    """Return the files of a task. The last few tasks are kept.

    Raises:
        UserError: the source, its commit or a patch of the row is missing or does not fit.
    """
    facts = json.dumps([str(task.source), task.files, task.commit, task.bug, task.test_patch, task.test_files])
    key = hashlib.sha256(facts.encode()).hexdigest()[:32]
    with _lock:
        if key not in _prepared:
            folder = _root() / key
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            before, tests = folder / "before", folder / "tests"
            _export(task, before)
            apply_patch(before, task.bug, "patch: the one that makes the bug")
            shutil.copytree(before, tests, symlinks=True)
            apply_patch(tests, task.test_patch, "test_patch")
            write(tests, {path: text.encode() for path, text in task.test_files.items()})
            _prepared[key] = Prepared(before=before, tests=tests)
        _prepared.move_to_end(key)
        while len(_prepared) > _KEPT_TASKS:
            shutil.rmtree(_prepared.popitem(last=False)[1].before.parent, ignore_errors=True)
        return _prepared[key]


# --- running ----------------------------------------------------------------------------------------------------------


@cache
def python_paths(python: str) -> tuple[str, tuple[str, ...]]:
    """Return the real command of an interpreter or virtual environment, and the folders that it needs.

    Raises:
        UserError: it does not run.
    """
    code = (
        "import pytest,sys,sysconfig,json;print(json.dumps([sys.prefix,sys.base_prefix,sysconfig.get_path('stdlib')]))"
    )
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
        prefix, base, library = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise UserError(f"python {python!r} does not run, or has no pytest: {error}") from error
    folder = os.path.realpath(prefix)
    command = os.path.join(folder, "bin", os.path.basename(python) if prefix != base else "python3")
    folders = [path for path in (folder, os.path.realpath(base), library) if path not in ("/usr", "/usr/local")]
    return command if os.path.exists(command) else os.path.realpath(python), tuple(dict.fromkeys(folders))


def judge(
    task: RepositoryTask,
    edit: str | Changes,
    *,
    kind: str,
    python: str = sys.executable,
    limits: Limits | None = None,
    guard: Guard = "every",
) -> Judgement:
    """Judge an edit of a task's repository.

    Args:
        task: from `read_task`.
        edit: a unified diff, or the changed files (`Workspace.edits`, `trees.changes`).
        kind: the box, `bwrap` or `lite`.
        python: interpreter with the repository's requirements and pytest.
        limits: limits of the whole test run.
        guard: `every` or `some` of the tests that must begin to pass have to hold a withheld value.

    Raises:
        BrokenTask: the tests cannot be judged.
        UserError: the row does not fit its repository.
        SandboxUnavailable: no box can be started.
    """
    limits = limits or Limits(cpu_seconds=600, wall_seconds=900.0, memory_mb=4096, output_mb=64)
    prepared = prepare(task)
    with tempfile.TemporaryDirectory(prefix="run-", dir=_root()) as name:
        folder = Path(name)
        folder.chmod(0o711)
        edits = edit if isinstance(edit, dict) else _patched(prepared, edit, folder, kind)
        if edits is None:
            return Judgement(resolved=False, reason="the patch does not apply", tests={})
        named = {os.path.normpath(path): content for path, content in edits.items()}
        taken = {path: content for path, content in named.items() if not is_protected(path, task, prepared.before)}
        setting = _Setting(task, prepared, kind, python, limits, guard)
        return setting.compare(taken, folder / "judged", setting.left_in_place()).judgement()


@dataclass(frozen=True, slots=True)
class _Setting:
    """Everything about a judgement but the edit."""

    task: RepositoryTask
    prepared: Prepared
    kind: str
    python: str
    limits: Limits
    guard: Guard

    def compare(self, edits: Changes, folder: Path, leave: frozenset[str]) -> Comparison:
        files = _withheld_files(self.task, self.prepared.tests, leave)
        check_guard(self.task, files, self.guard)
        records = _run(self.prepared, edits, files, folder, self.kind, self.python, self.limits)
        return Comparison(self.task, files, records)

    def left_in_place(self) -> frozenset[str]:
        """Return the comparisons whose value is not plain for the known fix, so that it stays in the tests.

        Only the known fix decides that: what an edit under test calls not plain is wrong. It is tried once per task.

        Raises:
            BrokenTask: the known fix does not pass here.
        """
        facts = (self.prepared.before, self.task.reference, self.task.fail_to_pass, self.task.pass_to_pass)
        key = hash((*facts, self.kind, self.python, self.guard))
        with _lock:
            lock = _reference_locks.setdefault(key, threading.Lock())
        with lock:
            known = _references.get(key)
            if known is None:
                known = _references[key] = self.try_reference()
        if isinstance(known, str):
            raise BrokenTask(known)
        return known

    def try_reference(self) -> frozenset[str] | str:
        edits = _reference(self.task, self.prepared)
        if edits is None:
            return frozenset()
        with tempfile.TemporaryDirectory(prefix="reference-", dir=_root()) as name:
            folder = Path(name)
            folder.chmod(0o711)
            try:
                first = self.compare(edits, folder / "0", frozenset())
                leave = frozenset(first.opaque)
                result = (self.compare(edits, folder / "1", leave) if leave else first).judgement()
            except BrokenTask as error:
                return str(error)
        return leave if result.resolved else f"the known fix does not pass the tests here: {result.reason}"


_references: dict[int, frozenset[str] | str] = {}
_reference_locks: dict[int, threading.Lock] = {}


def _reference(task: RepositoryTask, prepared: Prepared) -> Changes | None:
    """Return what the known fix changes, or None if none is known."""
    if not task.bug and not task.reference:
        return None
    with tempfile.TemporaryDirectory(prefix="fixed-", dir=_root()) as name:
        fixed = Path(name) / "files"
        if task.bug:
            _export(task, fixed)
        else:
            shutil.copytree(prepared.before, fixed, symlinks=True)
            apply_patch(fixed, task.reference, "patch: the known fix")
        return changes(prepared.before, fixed)


def _export(task: RepositoryTask, target: Path) -> None:
    if task.source is not None:
        export(task.source, task.commit, target)
    else:
        target.mkdir(parents=True)
        write(target, {path: text.encode() for path, text in task.files.items()})


def _patched(prepared: Prepared, patch: str, folder: Path, kind: str) -> Changes | None:
    """Apply a policy's patch in a box of its own, and return what it changes, or None if it does not apply."""
    if not patch.strip():
        return {}
    work, given = folder / "patched", folder / "edit.diff"
    shutil.copytree(prepared.before, work, symlinks=True)
    given.write_text(patch if patch.endswith("\n") else f"{patch}\n", encoding="utf-8", errors="surrogatepass")
    given.chmod(0o644)
    give_to_box(work)
    env = ENVIRONMENT | {"GIT_CEILING_DIRECTORIES": str(folder), "GIT_CONFIG_NOSYSTEM": "1"}
    try:
        with CommandBox(kind, read=[str(given)], write=[str(work)]) as box:
            argv = ["/usr/bin/git", "apply", "--whitespace=nowarn", "--recount", str(given)]
            end = box.run(argv, cwd=str(work), env=env, limits=Limits(cpu_seconds=60, wall_seconds=300.0, output_mb=64))
    except BoxDied:
        return None
    return changes(prepared.before, work) if end.exit_code == 0 else None


def _withheld_files(task: RepositoryTask, tests: Path, leave: frozenset[str]) -> dict[str, Withheld]:
    contents = files_of(tests)
    paths = sorted(path for path in task.test_paths() if path in contents and path.endswith(".py"))
    return {
        path: withhold(contents[path].decode("utf-8", "surrogateescape"), str(number), leave)
        for number, path in enumerate(paths)
    }


def _run(
    prepared: Prepared,
    edits: Changes,
    files: dict[str, Withheld],
    folder: Path,
    kind: str,
    python: str,
    limits: Limits,
) -> list[dict[str, Any]]:
    """Run the tests in a fresh copy and a fresh box, and return what they wrote."""
    tree, out, harness = folder / "repository", folder / "out", folder / "harness"
    folder.mkdir()
    folder.chmod(0o711)
    for made in (out, out / "tmp", harness):
        made.mkdir()
        made.chmod(0o755)
    shutil.copytree(prepared.tests, tree, symlinks=True)
    write(tree, edits)
    write(tree, {path: file.source.encode("utf-8", "surrogateescape") for path, file in files.items()})
    here = Path(__file__).parent
    shutil.copy(here / "harness.py", harness / "harness.py")
    give_to_box(tree)
    give_to_box(out)
    command, folders = python_paths(python)
    settings = {"root": str(tree), "results": str(out / "results.jsonl"), "files": sorted(files)}
    env = ENVIRONMENT | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONNOUSERSITE": "1", "PYTHONHASHSEED": "0"}
    env |= {"HOME": str(out / "tmp"), "TMPDIR": str(out / "tmp"), "PATH": f"{Path(command).parent}:{env['PATH']}"}
    argv = [command, "-B", "-s", str(harness / "harness.py"), json.dumps(settings)]
    try:
        with CommandBox(kind, read=[*folders, str(harness)], write=[str(tree), str(out)]) as box:
            said = box.run(argv, cwd=str(tree), env=env, limits=limits, stack_mb=64).stderr
    except BoxDied as error:
        said = str(error)  # what was written so far counts
    records = _records(out / "results.jsonl")
    if not any("ready" in record for record in records):  # written before anything of the repository is loaded
        raise BrokenTask(f"pytest does not start with {python}: {said.strip()[-500:]}")
    return records


def _records(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file that the program under test may have written."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return []
    with os.fdopen(descriptor, "rb") as file:
        lines = file.read(_RESULT_BYTES).split(b"\n")
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            found.append(record)
    return found
