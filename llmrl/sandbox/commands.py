"""A box in which commands run: compilers, compiled programs, the tests of a repository, an agent's shell.

The commands see the listed paths and nothing else, may change the listed folders, may start processes, and reach no
network. Everything that a command leaves running is killed at its end. See docs/sandbox.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmrl.sandbox import bwrap
from llmrl.sandbox.limits import BoxDied, Limits, RunResult, SandboxUnavailable, Status
from llmrl.sandbox.server import _BOOT, _GUEST, _HERE, _PACKAGE, _spawner, _user_tasks, interpreter, interpreter_paths

SYSTEM_PATHS = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/alternatives", "/etc/ld.so.cache", "/etc/localtime"),
    *("/etc/ssl/openssl.cnf", "/etc/ssl/certs"),
)
"""What every command may read: the system's programs and libraries."""
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/tmp", "TMPDIR": "/tmp"}
_DEVICES = ["/dev/null", "/dev/zero", "/dev/urandom", "/dev/random", "/dev/full"]
_START_SECONDS, _KILL_SECONDS = 30.0, 40.0
_SIGXCPU, _SIGKILL, _SIGXFSZ = -24, -9, -25


class CommandBox:
    """Runs commands one after another on the same files, until it is closed. For one thread at a time.

    Args:
        kind: `bwrap` or `lite`.
        read: files and folders that commands may read and execute, besides the system's.
        write: folders that they may change; with bubblewrap they also have a private /tmp.
        scratch_mb: size of that /tmp; 0 makes it read-only.

    Raises:
        SandboxUnavailable: the box does not start here.
    """

    def __init__(
        self, kind: str, *, read: Sequence[str] = (), write: Sequence[str] = (), scratch_mb: int = 256
    ) -> None:
        self.kind, self.write = kind, [os.path.realpath(path) for path in write]
        self.read = [*SYSTEM_PATHS, *read]
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._errors = os.memfd_create("box-stderr")
        command = [interpreter(), "-s", "-S", "-P", "-B", "-c", _BOOT, str(theirs.fileno())]
        try:
            if kind == "bwrap":
                read_paths = [*self.read, *interpreter_paths()]
                command = bwrap.wrap_commands(command, read_paths, self.write, scratch_mb)
            self._process = _spawner().submit(self._spawn, command, theirs).result()
        except OSError as error:
            raise SandboxUnavailable(f"the box does not start: {error}") from error
        finally:
            theirs.close()
        self._handshake()
        _living.add(self)

    def __enter__(self) -> CommandBox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _spawn(self, command: list[str], theirs: socket.socket) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            pass_fds=(theirs.fileno(),),
            cwd="/",
            start_new_session=True,
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
        )

    def _handshake(self) -> None:
        modules = [(name, "") for name in ("llmrl", _PACKAGE)]
        guests = (*_GUEST, "calls", "launcher")
        modules += [(f"{_PACKAGE}.{name}", (_HERE / f"{name}.py").read_text()) for name in guests]
        config = {"modules": modules, "read_paths": self.read, "write_paths": self.write, "device_paths": _DEVICES}
        answer: dict[str, Any] = {}
        try:
            self._control.settimeout(_START_SECONDS)
            self._control.send(json.dumps({**config, "namespaces": self.kind == "bwrap"}).encode())
            answer = json.loads(self._control.recv(1 << 16) or b"{}")
        except OSError as error:
            answer = {"failed": f"{type(error).__name__}: {error}"}
        if "ready" not in answer:
            reason = f"{answer.get('failed') or ''} {self._last_words()}".strip()
            self.close()
            raise SandboxUnavailable(f"the {self.kind} box for commands does not start: {reason or 'it ended'}")
        self._uid = int(answer["ready"]["uid"])

    def _last_words(self) -> str:
        size = os.fstat(self._errors).st_size
        return os.pread(self._errors, 2000, max(0, size - 2000)).decode(errors="replace").strip()

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: str | bytes = b"",
        cwd: str = "/",
        env: dict[str, str] | None = None,
        limits: Limits | None = None,
        processes: bool = True,
        stack_mb: int = 8,
    ) -> RunResult:
        """Run a command and kill what it leaves behind.

        Args:
            argv: absolute path of a program, and its arguments.
            stdin: what it reads from standard input.
            cwd: folder in which it runs.
            env: its whole environment; default `ENVIRONMENT`.
            limits: `memory_mb` is the data of each process, `output_mb` also the largest file that it may write.
            processes: it may start processes, not only threads.
            stack_mb: stack of its first thread, and of others that do not choose.

        Raises:
            BoxDied: the box is gone, or something in it could not be killed.
        """
        limits = limits or Limits()
        stdio = tuple(os.memfd_create(name) for name in ("stdin", "stdout", "stderr"))
        try:
            _fill(stdio[0], stdin if isinstance(stdin, bytes) else stdin.encode("utf-8", "surrogatepass"))
            order = {"do": "run", "argv": list(argv), "cwd": cwd, "env": ENVIRONMENT if env is None else env}
            with self._lock:
                order |= {"processes": processes, "limits": self._numbers(limits, stack_mb)}
                report, timed_out = self._exchange(order, stdio, limits)
            return _result(report, timed_out, stdio, limits)
        finally:
            for descriptor in stdio:
                os.close(descriptor)

    def _numbers(self, limits: Limits, stack_mb: int) -> dict[str, int]:
        numbers = {"cpu_seconds": limits.cpu_seconds, "memory_bytes": limits.memory_mb << 20}
        numbers |= {"file_bytes": limits.output_mb << 20, "stack_bytes": stack_mb << 20}
        return {**numbers, "max_user_processes": _user_tasks(self._uid) + 256}

    def _exchange(self, order: dict[str, Any], stdio: tuple[int, ...], limits: Limits) -> tuple[dict[str, Any], bool]:
        timed_out = False
        try:
            self._control.settimeout(_KILL_SECONDS)
            socket.send_fds(self._control, [json.dumps(order).encode()], list(stdio))
            self._control.settimeout(max(limits.wall_seconds, 0.001))
            try:
                data = self._control.recv(1 << 16)
            except TimeoutError:
                timed_out = True
                self._control.settimeout(_KILL_SECONDS)
                self._control.send(b'{"do":"kill"}')
                data = self._control.recv(1 << 16)
        except OSError as error:
            self.close()
            raise BoxDied(str(error)) from error
        report = dict(json.loads(data)) if data else {}
        if not report.get("clean"):
            words = self._last_words()
            self.close()
            raise BoxDied(f"the box is gone or not clean {words}")
        return report, timed_out

    def close(self) -> None:
        """Kill the box and everything in it. Safe to call twice."""
        if self._control.fileno() < 0:
            return
        self._control.close()
        os.close(self._errors)
        if self.kind == "lite":  # the launcher kills what runs when its owner is gone
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=_KILL_SECONDS)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=_KILL_SECONDS)

    def forget(self) -> None:
        """Close the descriptors of a forked copy of the owner; the box stays with the owner."""
        if self._control.fileno() >= 0:
            self._control.close()
            os.close(self._errors)
            self._process.returncode = 0


def _fill(descriptor: int, content: bytes) -> None:
    data = memoryview(content)
    while data:
        data = data[os.write(descriptor, data) :]
    os.lseek(descriptor, 0, os.SEEK_SET)


def _result(report: dict[str, Any], timed_out: bool, stdio: tuple[int, ...], limits: Limits) -> RunResult:
    most = limits.output_mb << 20
    sizes = [os.fstat(descriptor).st_size for descriptor in stdio]
    code = int(report["status"])
    used_up = code == _SIGXCPU or (code == _SIGKILL and report["cpu_seconds"] >= limits.cpu_seconds)
    status: Status = "ok" if code == 0 else "error"
    if timed_out or used_up:
        status = "timeout"
    elif code == _SIGXFSZ or sizes[1] >= most:
        status = "output_limit"
    stderr = os.pread(stdio[2], most, 0).decode("utf-8", "replace")
    detail = "" if code == 0 else f"signal {-code}" if code < 0 else f"exit code {code}"
    return RunResult(
        status=status,
        exit_code=code,
        stdout=os.pread(stdio[1], most, 0).decode("utf-8", "replace"),
        stderr=stderr,
        detail=detail,
        cpu_seconds=float(report["cpu_seconds"]),
        memory_mb=float(report["memory_mb"]),
    )


_works: dict[str, str | None] = {}
_works_lock = threading.Lock()
_PROBE = (
    "cat /etc/shadow && echo READ; (exec 3<>/dev/tcp/127.0.0.1/22) 2>/dev/null && echo SOCKET;"
    " echo x 2>/dev/null >/var/tmp/probe && echo WROTE; echo ran"
)


def command_box_kind(kind: str | None = None) -> str:
    """Return the kind of box in which commands can run here: `bwrap`, or else `lite`.

    Args:
        kind: the only one to try; default: the environment variable LLMRL_SANDBOX, or both.

    Raises:
        SandboxUnavailable: none works, or it does not confine a first command.
    """
    kind = kind or os.environ.get("LLMRL_SANDBOX") or "auto"
    candidates = ("bwrap", "lite") if kind == "auto" else (kind,)
    if not set(candidates) <= {"bwrap", "lite"}:
        raise SandboxUnavailable(f"commands run in a bwrap or lite box, not in {kind!r}")
    reasons = []
    for candidate in candidates:
        with _works_lock:
            if candidate not in _works:
                _works[candidate] = _problem(candidate)
        if _works[candidate] is None:
            return candidate
        reasons.append(f"{candidate}: {_works[candidate]}")
    raise SandboxUnavailable("no box for commands works here.\n  " + "\n  ".join(reasons))


def _problem(kind: str) -> str | None:
    try:
        with CommandBox(kind) as box:
            said = box.run(["/bin/bash", "-c", _PROBE], limits=Limits(cpu_seconds=10, wall_seconds=60.0)).stdout
    except (SandboxUnavailable, BoxDied) as error:
        return str(error)
    return None if said == "ran\n" else f"it does not confine a first command ({said.split()})"


def scratch_folder(path: Path) -> Path:
    """Make a folder that the commands of a box can enter, and return it. They may change it if the box says so."""
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o755)
    give_to_box(path)
    return path


def give_to_box(path: Path) -> None:
    """Give a folder and all below it to the user as whom commands run when this process is root."""
    if os.getuid() != 0:
        return
    for folder, folders, files in os.walk(path):
        for name in (".", *folders, *files):
            os.chown(os.path.join(folder, name), 65534, 65534, follow_symlinks=False)


_living: weakref.WeakSet[CommandBox] = weakref.WeakSet()


def _forget_all() -> None:
    for box in list(_living):
        box.forget()


os.register_at_fork(after_in_child=_forget_all)
