"""A small pool of warm boxes in this process. Safe to use from several threads and after a fork; closed at exit."""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import threading
import weakref
from dataclasses import replace
from typing import Any

from llmrl.sandbox import bwrap, lite, wire
from llmrl.sandbox.limits import BoxDied, Conventions, Limits, RunResult, SandboxUnavailable, Status
from llmrl.sandbox.server import BoxPlan, Server
from llmrl.sandbox.session import ProgramEnded, Raised, Session, SocketExchange, exception_text
from llmrl.sandbox.watch import Stopwatch

_BACK_ENDS = {"bwrap": bwrap, "lite": lite}
_SIGXCPU, _SIGKILL, _SIGXFSZ = -24, -9, -25
_STDERR_BYTES = 4000
_PROBE = """
import colorsys, os, socket
def attempts():
    reached = []
    for name, attempt in {
        "read /etc/passwd": lambda: open("/etc/passwd").read(),
        "make a socket": lambda: socket.socket(),
        "start a process": lambda: os._exit(0) if os.fork() == 0 else None,
        "read another process": lambda: open("/proc/1/environ", "rb").read(),
        "write beside itself": lambda: open("/var/tmp/probe", "w"),
    }.items():
        try:
            attempt()
            reached.append(name)
        except OSError:
            pass
    return reached
"""


class LocalSandbox:
    """Runs programs in bubblewrap or lite boxes on this machine.

    Args:
        kind: `bwrap` or `lite`.
        packages: installed packages that programs may import. A program whose source names one gets a server that has
            it loaded.
        max_servers: most boxes of this process at the same time.

    Raises:
        SandboxUnavailable: the box does not start here, or does not confine a program.
    """

    def __init__(self, kind: str, *, packages: tuple[str, ...] = ("numpy",), max_servers: int | None = None) -> None:
        self.kind = kind
        self.packages = packages
        self.max_servers = max_servers or min(8, os.cpu_count() or 1)
        self._plans: dict[tuple[str, ...], BoxPlan] = {}
        self._reset()
        self._probe()
        _living.add(self)

    def describe(self) -> str:
        """Return one line that names the box in use and what it consists of."""
        return f"sandbox {self.kind}: {_BACK_ENDS[self.kind].REASON}; up to {self.max_servers} warm servers"

    def _reset(self) -> None:
        self._idle: dict[tuple[str, ...], list[Server]] = {}
        self._in_use = 0
        self._slots = threading.BoundedSemaphore(self.max_servers)
        self._lock = threading.Lock()
        self.closed = False
        self._twin: LocalSandbox | None = None

    def twin(self) -> LocalSandbox:
        """Return a second pool of the same boxes, for the other one of two programs that run at the same time.

        Who holds a box of this pool may wait for one of the twin's. Two boxes of one pool could wait for each other.
        """
        with self._lock:
            if self._twin is None or self._twin.closed:
                self._twin = LocalSandbox(self.kind, packages=self.packages, max_servers=self.max_servers)
            return self._twin

    def _probe(self) -> None:
        try:
            with self.open(_PROBE, Limits(cpu_seconds=5, wall_seconds=20)) as session:
                session.load(_PROBE)
                reached = session.name("attempts")()
        except (BoxDied, ProgramEnded, Raised) as error:
            self.close()
            raise SandboxUnavailable(f"the {self.kind} box does not run a first program: {error}") from error
        if reached != []:
            self.close()
            raise SandboxUnavailable(f"the {self.kind} box does not confine programs here: one could {reached}")

    # --- servers ------------------------------------------------------------------------------------------------------

    def _take(self, source: str) -> tuple[tuple[str, ...], Server]:
        wanted = tuple(package for package in self.packages if package in source)
        self._slots.acquire()
        surplus = None
        with self._lock:
            self._in_use += 1
            servers = self._idle.get(wanted)
            if servers:
                return wanted, servers.pop()
            idle = [group for group in self._idle.values() if group]
            if self._in_use + sum(map(len, idle)) > self.max_servers:
                surplus = idle[0].pop()
        try:
            if surplus is not None:
                surplus.close()
            if self.closed:
                raise SandboxUnavailable("the sandbox is closed")
            if wanted not in self._plans:
                self._plans[wanted] = _BACK_ENDS[self.kind].plan(wanted)
            return wanted, Server(self._plans[wanted])
        except BaseException:
            self._release()
            raise

    def _release(self) -> None:
        with self._lock:
            self._in_use -= 1
        self._slots.release()

    def _give_back(self, wanted: tuple[str, ...], server: Server, *, reusable: bool) -> None:
        try:
            with self._lock:
                keep = reusable and server.idle and not self.closed
                if keep:
                    self._idle.setdefault(wanted, []).append(server)
            if not keep:
                server.close()
        finally:
            self._release()

    def _start(self, source: str, mode: str, limits: Limits, stdio: tuple[int, ...] = ()) -> _Running:
        """Start a program on a free server, replacing servers that died while idle."""
        while True:
            wanted, server = self._take(source)
            fresh = server.fresh
            try:
                return _Running(self, wanted, server, server.start(mode, limits, stdio), limits)
            except BoxDied as error:
                self._give_back(wanted, server, reusable=False)
                if fresh:
                    raise SandboxUnavailable(f"the box dies at once: {error}") from error
            except BaseException:
                self._give_back(wanted, server, reusable=False)
                raise

    def close(self) -> None:
        """Kill all boxes. Safe to call twice."""
        with self._lock:
            self.closed = True
            twin = self._twin
            servers = [server for group in self._idle.values() for server in group]
            self._idle.clear()
        for server in servers:
            server.close()
        if twin is not None:
            twin.close()

    def _forget(self) -> None:
        for group in self._idle.values():
            for server in group:
                server.forget()
        self._reset()

    # --- programs -----------------------------------------------------------------------------------------------------

    def open(self, source: str, limits: Limits) -> Session:
        """Return a session with a fresh process for a program; `load` the program first.

        Args:
            source: the program, of which only the package names are read here.
            limits: limits of each test in the session; `total_seconds` of all of them.

        Raises:
            SandboxUnavailable: no box can be started.
        """
        running = self._start(source, "serve", limits)
        exchange = SocketExchange(running.channel, limits, running.stopwatch, running.how_it_ended)
        return Session(exchange, running.close)

    def run(self, source: str, stdin: str, limits: Limits, conventions: Conventions = "python") -> RunResult:
        """Run a program from standard input to standard output.

        Raises:
            SandboxUnavailable: no box can be started.
            BoxDied: the server died with the program.
        """
        stdio = tuple(os.memfd_create(name) for name in ("stdin", "stdout", "stderr"))
        try:
            _fill(stdio[0], stdin)
            running = self._start(source, "script", limits, stdio)
            try:
                report, timed_out, message = running.finish(source, conventions)
            finally:
                running.close()
            seconds = max(running.stopwatch.seconds, float(report["cpu_seconds"]))
            return replace(_result(report, timed_out, message, stdio, limits), seconds=seconds)
        finally:
            for descriptor in stdio:
                os.close(descriptor)


class _Running:
    """A program on a server reserved for it; closing kills the program and returns the server to the pool."""

    def __init__(
        self, box: LocalSandbox, wanted: tuple[str, ...], server: Server, channel: socket.socket, limits: Limits
    ) -> None:
        self.box, self.wanted, self.server, self.channel, self.limits = box, wanted, server, channel, limits
        self.stopwatch = Stopwatch(limits, server.watch)
        self.report: dict[str, Any] | None = None
        self.closed = False

    def finish(self, source: str, conventions: Conventions) -> tuple[dict[str, Any], bool, dict[str, Any]]:
        """Send the source and wait for the end.

        Returns:
            The server's report, whether the program was killed at its time limit, and the driver's message.
        """
        self.channel.settimeout(self.limits.wall_seconds)
        with contextlib.suppress(OSError):  # if it ended before reading, the report tells how
            self.channel.sendall(wire.dump({"source": source, "conventions": conventions}))
        self.stopwatch.resume()
        while self.report is None and (wait := self.stopwatch.next_wait()) > 0:
            self.report = self.server.wait(wait)
        timed_out = self.report is None
        if self.report is None:
            self.report = self.server.kill_program()
        return self.report, timed_out, self._message()

    def _message(self) -> dict[str, Any]:
        """Return the driver's message about an exception; it comes from inside the box and cannot be trusted."""
        self.channel.setblocking(False)
        try:
            return wire.load(self.channel.recv(1 << 16)[wire.HEADER.size :])
        except (OSError, wire.BadValue):
            return {}

    def how_it_ended(self, timed_out: bool) -> tuple[str, str]:
        """Return (kind, detail) for a program that stopped answering.

        Raises:
            BoxDied: the server died with it.
        """
        if self.report is None and not timed_out:
            self.report = self.server.wait(1.0)
        if self.report is None:
            self.report = self.server.kill_program()
            return "timeout", "time limit"
        if _used_up_its_time(self.report, self.limits):
            return "timeout", "processor time limit"
        return "error", f"the program ended by itself ({_exit_text(self.report['status'])})"

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self.stopwatch.close()
        self.channel.close()
        reusable = True
        try:
            if self.report is None:
                self.report = self.server.kill_program()
            reusable = not self.report["dirty"]
        except BoxDied:
            reusable = False
        self.box._give_back(self.wanted, self.server, reusable=reusable)


def _fill(descriptor: int, text: str) -> None:
    data = memoryview(text.encode("utf-8", "surrogatepass"))
    while data:
        data = data[os.write(descriptor, data) :]
    os.lseek(descriptor, 0, os.SEEK_SET)


def _result(
    report: dict[str, Any], timed_out: bool, message: dict[str, Any], stdio: tuple[int, ...], limits: Limits
) -> RunResult:
    limit = limits.output_mb << 20
    size = os.fstat(stdio[1]).st_size
    code = int(report["status"])
    status: Status = "ok" if code == 0 else "error"
    if timed_out or _used_up_its_time(report, limits):
        status = "timeout"
    elif code == _SIGXFSZ or size >= limit:
        status = "output_limit"
    elif "compile_error" in message:
        status = "compile_error"
    detail = message.get("compile_error") or message.get("error")
    return RunResult(
        status=status,
        exit_code=code,
        stdout=os.pread(stdio[1], limit, 0).decode("utf-8", "replace"),
        stderr=os.pread(stdio[2], _STDERR_BYTES, 0).decode("utf-8", "replace"),
        detail=exception_text(detail) if detail else "" if status == "ok" else _exit_text(code),
        cpu_seconds=float(report["cpu_seconds"]),
        memory_mb=float(report["memory_mb"]),
    )


def _used_up_its_time(report: dict[str, Any], limits: Limits) -> bool:
    code, allowed = report["status"], limits.total_seconds or limits.cpu_seconds
    return code == _SIGXCPU or (code == _SIGKILL and report["cpu_seconds"] >= allowed)


def _exit_text(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


_living: weakref.WeakSet[LocalSandbox] = weakref.WeakSet()


def _close_all() -> None:
    for box in list(_living):
        box.close()


def _forget_all() -> None:
    for box in list(_living):
        box._forget()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_forget_all)
