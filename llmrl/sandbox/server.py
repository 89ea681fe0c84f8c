"""The trusted end of one warm fork server: starts the process in a box, sends it programs, kills it.

bwrap.py and lite.py decide how to start the box. A program runs behind a private descriptor.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from llmrl.sandbox.limits import BoxDied, Limits, SandboxUnavailable
from llmrl.sandbox.packages import paths_of
from llmrl.sandbox.watch import Watch

_HERE = Path(__file__).parent
_PACKAGE = __name__.rpartition(".")[0]
_GUEST = ("rich", "wire", "conventions", "driver", "seccomp", "landlock", "zygote")
_START_SECONDS = 30.0
_KILL_SECONDS = 10.0
_BOOT = """
import json, socket, sys, types
control = socket.socket(fileno=int(sys.argv[1]))
config = json.loads(control.recv(1 << 20))
for name, source in config.pop("modules"):
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = []
    parent, _, child = name.rpartition(".")
    parent and setattr(sys.modules[parent], child, module)
    exec(compile(source, name, "exec"), module.__dict__)
module.main(control, config)
"""
_COMMON_MODULES = [
    "abc",
    "array",
    "ast",
    "base64",
    "bisect",
    "calendar",
    "cmath",
    "collections.abc",
    "contextlib",
    "copy",
    "csv",
    "dataclasses",
    "datetime",
    "decimal",
    "enum",
    "fractions",
    "functools",
    "hashlib",
    "heapq",
    "io",
    "itertools",
    "json",
    "math",
    "numbers",
    "operator",
    "queue",
    "random",
    "re",
    "statistics",
    "string",
    "struct",
    "textwrap",
    "threading",
    "time",
    "traceback",
    "types",
    "typing",
    "unicodedata",
]


@cache
def _spawner() -> ThreadPoolExecutor:
    """Return the thread that starts all boxes: the kernel kills a box when the THREAD that started it ends."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="sandbox-spawner")


os.register_at_fork(after_in_child=_spawner.cache_clear)


@dataclass(kw_only=True)
class BoxPlan:
    """How to start a box; each back end decides this."""

    wrap: Callable[[list[str], BoxPlan], list[str]]
    """Turns the interpreter's command into the command that runs it in the box."""
    landlock: str
    """`required` or `optional`."""
    scratch: str | None
    """A private directory in which programs may write, or None."""
    packages: tuple[str, ...]
    """Installed packages that programs may import besides the standard library; the server imports them first."""
    read_paths: list[str] = field(default_factory=list)
    package_paths: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.read_paths = interpreter_paths()
        for package in self.packages:
            for path in paths_of(package):
                self.read_paths.append(path)
                if (folder := str(Path(path).parent)) not in self.package_paths:
                    self.package_paths.append(folder)


def interpreter() -> str:
    """Return the real path of the interpreter behind a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def interpreter_paths() -> list[str]:
    """Return the paths that Python must read to run and to import its standard library."""
    library = Path(sysconfig.get_path("stdlib", vars={"base": sys.base_prefix, "installed_base": sys.base_prefix}))
    paths = [str(library), str(library.parent), "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"]
    return [*paths, "/etc/ld.so.cache", "/etc/localtime", interpreter()]


class Server:
    """One fork server. Only one thread may use it at a time; the pool takes care of that."""

    def __init__(self, plan: BoxPlan) -> None:
        self._busy = self._used = False
        self._ended: dict[str, Any] | None = None
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._errors = os.memfd_create("box-stderr")
        command = [interpreter(), "-s", "-S", "-P", "-B", "-c", _BOOT, str(theirs.fileno())]
        try:
            self._process = _spawner().submit(self._spawn, plan.wrap(command, plan), theirs).result()
        except OSError as error:
            raise SandboxUnavailable(f"the box does not start: {error}") from error
        finally:
            theirs.close()
        self.facts = self._handshake(plan)

    def _spawn(self, command: list[str], theirs: socket.socket) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            pass_fds=(theirs.fileno(),),
            cwd="/",
            start_new_session=True,
            env={
                "PATH": "/usr/bin:/bin",
                "HOME": "/nonexistent",
                "LANG": "C.UTF-8",
                "PYTHONHASHSEED": "0",
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
            },
        )

    def _handshake(self, plan: BoxPlan) -> dict[str, Any]:
        modules = [(name, "") for name in ("llmrl", _PACKAGE)]
        modules += [(f"{_PACKAGE}.{name}", (_HERE / f"{name}.py").read_text()) for name in _GUEST]
        config = {
            "modules": modules,
            "preload": [*_COMMON_MODULES, *plan.packages],
            "package_paths": plan.package_paths,
            "read_paths": [*plan.read_paths, "/dev/urandom", "/dev/zero"],
            "write_paths": [plan.scratch] if plan.scratch else [],
            "device_paths": ["/dev/null"],
            "landlock": plan.landlock,
        }
        answer: dict[str, Any] = {}
        try:
            self._control.settimeout(_START_SECONDS)
            self._control.send(json.dumps(config).encode())
            answer = json.loads(self._control.recv(1 << 16) or b"{}")
        except OSError as error:
            answer = {"failed": self._last_words() or f"{type(error).__name__}: {error}"}
        if "ready" not in answer:
            reason = answer.get("failed") or self._last_words()
            self.close()
            raise SandboxUnavailable(f"the box does not start: {reason or 'it ended without a message'}")
        return dict(answer["ready"])

    def _last_words(self) -> str:
        size = os.fstat(self._errors).st_size
        return os.pread(self._errors, 2000, max(0, size - 2000)).decode(errors="replace").strip()

    def start(self, mode: str, limits: Limits, stdio: tuple[int, ...] = ()) -> socket.socket:
        """Fork a program that waits for its source on the returned socket.

        Args:
            mode: `serve` (its functions are called from here) or `script`.
            limits: limits of the program.
            stdio: descriptors of its standard input, output and error. Without them there is no input, and output is
                discarded.

        Raises:
            BoxDied: the server is gone.
        """
        ours, theirs = socket.socketpair()
        command = {
            "do": "run",
            "mode": mode,
            "limits": {
                "cpu_seconds": max(1, math.ceil(limits.total_seconds or limits.cpu_seconds)),
                "memory_bytes": limits.memory_mb << 20,
                "file_bytes": limits.output_mb << 20,
                "max_user_processes": _user_tasks(self.facts["uid"]) + 64,
            },
        }
        try:
            self._control.settimeout(_KILL_SECONDS)
            socket.send_fds(self._control, [json.dumps(command).encode()], [theirs.fileno(), *stdio])
        except OSError as error:
            ours.close()
            raise BoxDied(str(error)) from error
        finally:
            theirs.close()
        self._busy = self._used = True
        self._ended = None
        return ours

    def wait(self, seconds: float) -> dict[str, Any] | None:
        """Return how the program ended, or None if it is still running after this time.

        Raises:
            BoxDied: the server is gone.
        """
        if self._ended is not None:
            report, self._ended = self._ended, None
            return report
        self._control.settimeout(max(seconds, 0.001))
        try:
            return self._receive()[0]
        except TimeoutError:
            return None

    def watch(self) -> Watch | None:
        """Return what measures the running program, or None if it has ended.

        Raises:
            BoxDied: the server is gone.
        """
        try:
            self._control.settimeout(_KILL_SECONDS)
            self._control.send(b'{"do":"watch"}')
            message, descriptors = self._receive()
        except OSError as error:
            raise BoxDied(str(error)) from error
        if "watch" in message:
            return Watch(descriptors[0])
        self._ended = message
        return None

    def _receive(self) -> tuple[dict[str, Any], list[int]]:
        """Return the server's next message and the descriptors that came with it."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._control, 1 << 16, 1)
        except TimeoutError:
            raise
        except OSError as error:
            raise BoxDied(f"{error} {self._last_words()}") from error
        if not data:
            raise BoxDied(f"the fork server is gone {self._last_words()}")
        message = dict(json.loads(data))
        self._busy = "watch" in message
        return message, descriptors

    def kill_program(self) -> dict[str, Any]:
        """Kill the program and return how it ended.

        Raises:
            BoxDied: the server is gone or does not answer.
        """
        try:
            self._control.send(b'{"do":"kill"}')
        except OSError as error:
            raise BoxDied(str(error)) from error
        report = self.wait(_KILL_SECONDS)
        if report is None:
            raise BoxDied("the fork server does not answer")
        return report

    @property
    def fresh(self) -> bool:
        """Whether this server has not run a program yet."""
        return not self._used

    @property
    def idle(self) -> bool:
        """Whether no program is running."""
        return not self._busy

    def close(self) -> None:
        """Kill the server and everything in it. Safe to call twice."""
        if self._control.fileno() < 0:
            return
        self._control.close()
        os.close(self._errors)
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self._process.kill()
        self._process.wait(timeout=_KILL_SECONDS)

    def forget(self) -> None:
        """Close the descriptors of a forked copy of the owner; the server stays with the owner."""
        self._control.close()
        os.close(self._errors)
        self._process.returncode = 0


_tasks_cache: dict[int, tuple[float, int]] = {}
_tasks_lock = threading.Lock()


def _user_tasks(uid: int) -> int:
    """Return the number of a user's processes and threads, because the kernel counts them toward a program's limit."""
    with _tasks_lock:
        measured, count = _tasks_cache.get(uid, (-1e9, 0))
        if time.monotonic() - measured > 5.0:
            count = sum(_threads(entry, uid) for entry in os.scandir("/proc") if entry.name.isdigit())
            _tasks_cache[uid] = (time.monotonic(), count)
        return count


def _threads(entry: os.DirEntry[str], uid: int) -> int:
    try:
        return len(os.listdir(f"{entry.path}/task")) if entry.stat().st_uid == uid else 0
    except OSError:
        return 0
