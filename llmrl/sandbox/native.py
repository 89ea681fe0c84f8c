"""Whole programs in compiled languages and JavaScript: compiled once in one box, run once per input in another.

The compiler gets a folder of its own, because a source can make it read any file that it can see and write any file
that it may. The program gets its own files read-only, no folder to write to, threads, and no processes.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import tempfile
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NoReturn

from llmrl.errors import UserError
from llmrl.sandbox.commands import ENVIRONMENT, CommandBox, command_box_kind, scratch_folder
from llmrl.sandbox.languages import Language, language, toolchain
from llmrl.sandbox.limits import Conventions, Limits, RunResult, SandboxUnavailable, Status

_KEPT_PROGRAMS = 32
_KEPT_BOXES = 4
_COMPILE = Limits(cpu_seconds=60, wall_seconds=240.0, memory_mb=4096, output_mb=256)
_COMPILE_STACK_MB = 64


@dataclass(frozen=True)
class _Program:
    folder: Path
    failure: RunResult | None
    """How compiling it failed."""


class NativeSandbox:
    """Runs programs of one language from standard input to standard output. Thread-safe.

    Args:
        name: the language, such as `cpp`.
        kind: `bwrap` or `lite`; default: the first that works.

    Raises:
        UserError: no such language.
        SandboxUnavailable: its toolchain is not installed, or does not work in the box.
    """

    def __init__(self, name: str, kind: str | None = None) -> None:
        self.language: Language = language(name)
        self.kind = command_box_kind(kind)
        tools = toolchain(self.language.labels[0])
        if tools is None:
            raise SandboxUnavailable(f"{self.language.title} is not installed ({self.language.install})")
        self.tools = tools
        self._programs: OrderedDict[str, _Program] = OrderedDict()
        self._idle: list[tuple[Path, CommandBox]] = []
        self._lock, self._compiling = threading.Lock(), threading.Lock()
        self._closed = False
        self._root = Path(tempfile.mkdtemp(prefix="llmrl-native-"))
        self._root.chmod(0o711)
        self._owner = os.getpid()
        atexit.register(self.close)
        first = self.run(self.language.hello, "7\n", Limits(cpu_seconds=20, wall_seconds=120.0))
        if first.stdout != "42\n":
            self.close()
            raise SandboxUnavailable(
                f"{self.language.title} ({tools.program}) does not work in the {self.kind} box: {first.status} "
                f"{first.detail} {first.stderr[-500:]}".rstrip()
            )

    def describe(self) -> str:
        """Return one line that names the language, its toolchain and the box."""
        return f"{self.language.title}: {self.tools.version} in the {self.kind} box"

    def open(self, source: str, limits: Limits) -> NoReturn:
        """Refuse: functions are called in Python programs only.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"a {self.language.title} program is judged by what it prints for an input; the row's tests call functions"
        )

    def run(self, source: str, stdin: str, limits: Limits, conventions: Conventions = "python") -> RunResult:
        """Run a program from standard input to standard output; the first time, compile it.

        Raises:
            SandboxUnavailable: no box can be started.
            BoxDied: the box died with the program.
        """
        program = self.prepare(source)
        if program.failure is not None:
            return program.failure
        memory = limits.memory_mb + self.language.slack_mb
        argv = self.language.start(self.tools.program, source, limits.memory_mb)
        argv[0] = str(program.folder / argv[0]) if argv[0].startswith("./") else argv[0]
        box = self._take(program.folder)
        try:
            end = box.run(
                argv,
                stdin=stdin,
                cwd=str(program.folder),
                env=ENVIRONMENT | {"UV_THREADPOOL_SIZE": "2"},
                limits=replace(limits, memory_mb=memory),
                processes=False,
                stack_mb=self.language.stack_mb,
            )
        except BaseException:
            box.close()
            raise
        self._give_back(program.folder, box)
        return end

    def _take(self, folder: Path) -> CommandBox:
        """Return a warm box that sees a program's folder, or start one."""
        with self._lock:
            for place, (seen, box) in enumerate(self._idle):
                if seen == folder:
                    del self._idle[place]
                    return box
        return CommandBox(self.kind, read=[*self.tools.read, str(folder)], scratch_mb=0)

    def _give_back(self, folder: Path, box: CommandBox) -> None:
        with self._lock:
            self._idle.append((folder, box))
            oldest = self._idle.pop(0)[1] if len(self._idle) > _KEPT_BOXES or self._closed else None
        if oldest is not None:
            oldest.close()

    def prepare(self, source: str) -> _Program:
        """Compile a program, unless this was done; return where it lies or how that failed."""
        key = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        with self._compiling:
            program = self._programs.get(key)
            if program is None:
                program = self._programs[key] = self._compile(source, self._root / key)
            self._programs.move_to_end(key)
            if len(self._programs) > _KEPT_PROGRAMS:
                oldest = self._programs.popitem(last=False)[1]
                shutil.rmtree(oldest.folder, ignore_errors=True)
        return program

    def _compile(self, source: str, folder: Path) -> _Program:
        work = scratch_folder(self._root / "compile")
        scratch_folder(work / ".cache")
        name = self.language.file_name(source)
        (work / name).write_text(source, encoding="utf-8", errors="surrogateescape")
        (work / name).chmod(0o644)
        env = (
            ENVIRONMENT | {"HOME": str(work), "TMPDIR": str(work), "GOCACHE": str(work / ".cache")} | self.language.env
        )
        try:
            with CommandBox(self.kind, read=self.tools.read, write=[str(work)]) as box:
                argv = [self.tools.program, *self.language.compile(name, source)]
                end = box.run(argv, cwd=str(work), env=env, limits=_COMPILE, stack_mb=_COMPILE_STACK_MB)
            folder.mkdir()
            kept = self._keep(work, folder) if end.status == "ok" else 0
        finally:
            shutil.rmtree(work, ignore_errors=True)
        if kept:
            return _Program(folder, None)
        status: Status = "timeout" if end.status == "timeout" else "compile_error"
        said = (end.stderr or end.stdout).strip()
        return _Program(folder, replace(end, status=status, stdout="", detail=said[:500] or end.detail, exit_code=1))

    def _keep(self, work: Path, folder: Path) -> int:
        """Move what the program consists of to a folder that no box may change; return how many files that is."""
        count = 0
        for file in sorted(work.glob(self.language.keep)):
            if file.is_symlink() or not file.is_file():
                continue
            target = folder / file.relative_to(work)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target, follow_symlinks=False)
            target.chmod(0o755)
            count += 1
        for inner, _, _ in os.walk(folder):
            os.chmod(inner, 0o755)
        return count

    def close(self) -> None:
        """Kill all boxes and remove all programs. Safe to call twice."""
        if self._owner != os.getpid():  # a forked copy: the files belong to the owner
            return
        with self._lock:
            self._closed = True
            boxes = [box for _, box in self._idle]
            self._idle.clear()
        for box in boxes:
            box.close()
        shutil.rmtree(self._root, ignore_errors=True)


@cache
def native_sandbox(name: str, kind: str | None = None) -> NativeSandbox:
    """Return this process's sandbox for a language. The first call compiles and runs a first program.

    Raises:
        UserError: no such language.
        SandboxUnavailable: the toolchain is not installed, or does not work in the box.
    """
    return NativeSandbox(name, kind)


os.register_at_fork(after_in_child=native_sandbox.cache_clear)
