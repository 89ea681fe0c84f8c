"""Starts commands inside a box, one at a time, and kills everything that they leave behind. Standard library only.

Commands come in on a packet socket, with the descriptors of their standard streams attached; a report on how each ended
goes out. Every command restricts itself before it starts, so this process keeps only what it needs to end them.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import socket
import struct
import time
from typing import Any

from llmrl.sandbox import calls, landlock, seccomp
from llmrl.sandbox.zygote import NOBODY, _set_capabilities

_PDEATHSIG, _DUMPABLE, _KEEPCAPS, _SUBREAPER, _AMBIENT = 1, 4, 8, 36, 47
_CAP_DAC_READ_SEARCH = 2
_KILL_SECONDS = 20.0


def main(control: socket.socket, config: dict[str, Any]) -> None:
    """Give up all rights, report "ready" or the failure, then run commands until the other end closes.

    Args:
        control: packet socket to the owner.
        config: read_paths, write_paths, device_paths, namespaces (whether the box has its own).
    """
    try:
        launcher = Launcher(control, config)
    except BaseException as error:
        control.send(json.dumps({"failed": f"{type(error).__name__}: {error}"}).encode())
        return
    control.send(json.dumps({"ready": {"uid": os.getuid(), "landlock": landlock.abi_version()}}).encode())
    launcher.loop()


class Launcher:
    """Starts, watches and ends commands."""

    def __init__(self, control: socket.socket, config: dict[str, Any]) -> None:
        self.control, self.config = control, config
        self.namespaces: bool = config["namespaces"]
        self.installer = seccomp.Installer()
        self.root = os.getuid() == 0
        with open("/proc/self/oom_score_adj", "w") as score:
            score.write("1000")
        if self.root:
            self.drop_root()
        self.installer.call(_PDEATHSIG, signal.SIGKILL)
        self.installer.call(_DUMPABLE, 0)
        self.installer.call(_SUBREAPER, 1)
        self.installer.no_new_privileges()
        version = landlock.abi_version()
        if not self.namespaces and not version:
            raise OSError("this kernel has no Landlock (Linux 5.13 or newer with it switched on)")
        self.signals = self.namespaces or version >= 6
        self.pid = os.getpid()
        self.children = f"/proc/self/task/{self.pid}/children"
        with contextlib.suppress(PermissionError):  # it leads its session already
            os.setpgid(0, 0)

    def drop_root(self) -> None:
        """Become nobody. Where paths to read lie in a folder that only root may enter, keep the capability to read."""
        closed = not self.namespaces and not _all_reachable(self.config["read_paths"])
        self.installer.call(_KEEPCAPS, 1)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        if not (closed and self.keep_reading()):
            _set_capabilities(0)

    def keep_reading(self) -> bool:
        header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))
        mask = 1 << _CAP_DAC_READ_SEARCH
        sets = ctypes.create_string_buffer(struct.pack("=6I", mask, mask, mask, 0, 0, 0))
        if ctypes.CDLL(None).capset(header, sets) != 0:
            return False
        return bool(self.installer.prctl(_AMBIENT, 2, _CAP_DAC_READ_SEARCH, 0, 0) == 0)

    def loop(self) -> None:
        while True:
            data, descriptors, _, _ = socket.recv_fds(self.control, 1 << 20, 8)
            if not data:
                self.end_all()
                os._exit(0)
            command = json.loads(data)
            if command["do"] == "run":
                self.run(command, descriptors)

    def run(self, command: dict[str, Any], descriptors: list[int]) -> None:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        pid = os.fork()
        if pid == 0:
            try:
                self.become(command, descriptors)
            except BaseException as error:
                os.write(2, f"{command['argv'][0]}: {type(error).__name__}: {error}\n".encode())
            finally:
                os._exit(127)
        for descriptor in descriptors:
            os.close(descriptor)
        closed = self.wait_or_kill(pid)
        _, status, usage = os.wait4(pid, 0)
        clean = self.end_all()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        report = {
            "status": os.waitstatus_to_exitcode(status),
            "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            "memory_mb": usage.ru_maxrss / 1024,
            "clean": clean,
        }
        if closed:
            os._exit(0)
        self.control.send(json.dumps(report).encode())

    def wait_or_kill(self, pid: int) -> bool:
        """Wait for the end of a command, or for the order to kill it. Return whether the owner is gone."""
        child = os.pidfd_open(pid)
        poll = select.poll()
        poll.register(child, select.POLLIN)
        poll.register(self.control, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll()}
        os.close(child)
        if child in ready:
            return False
        order = self.control.recv(1 << 16)
        os.kill(pid, signal.SIGKILL)
        return not order

    def end_all(self) -> bool:
        """Kill and reap what a command started. This process is the parent of everything whose parent has ended."""
        deadline = time.monotonic() + _KILL_SECONDS
        while time.monotonic() < deadline:
            if self.namespaces:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(-1, signal.SIGKILL)  # everything in the process namespace but its first process and this
            else:
                for child in self.own_children():
                    os.kill(child, signal.SIGKILL)
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                return True
        return False

    def own_children(self) -> list[int]:
        with open(self.children) as file:
            return [int(pid) for pid in file.read().split()]

    def become(self, command: dict[str, Any], descriptors: list[int]) -> None:
        """Take the descriptors, restrict this process and execute the command. Returns only by an exception."""
        self.installer.call(_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        for target, descriptor in enumerate(descriptors):
            os.dup2(descriptor, target)
        os.closerange(len(descriptors), 1 << 12)
        os.chdir(command["cwd"])
        if not self.namespaces:
            devices = self.config["device_paths"]
            read = [*self.config["read_paths"], "/proc/self", "/proc/cpuinfo", "/proc/meminfo"]
            landlock.restrict(read, self.config["write_paths"], devices, commands=True)
        _set_limits(command["limits"])
        program = calls.command_filter(
            launcher=self.pid,
            namespaces=self.namespaces,
            network=self.namespaces and command["processes"],
            processes=command["processes"],
            signals=self.signals,
            own_files=self.namespaces or self.root,
        )
        self.installer.install(program)
        os.execve(command["argv"][0], command["argv"], command["env"])


def _all_reachable(paths: list[str]) -> bool:
    """Return whether every user may enter the folders above these paths."""
    for path in paths:
        parent = os.path.dirname(os.path.realpath(path))
        while parent != "/":
            if os.path.exists(parent) and not os.stat(parent).st_mode & 0o001:
                return False
            parent = os.path.dirname(parent)
    return True


def _set_limits(limits: dict[str, int]) -> None:
    cpu = limits["cpu_seconds"]
    for kind, soft, hard in (
        (resource.RLIMIT_CPU, cpu, cpu + 1),
        (resource.RLIMIT_DATA, limits["memory_bytes"], limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"], limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, 1024, 4096),
        (resource.RLIMIT_NPROC, limits["max_user_processes"], limits["max_user_processes"]),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
        (resource.RLIMIT_STACK, limits["stack_bytes"], limits["stack_bytes"]),
    ):
        inherited = resource.getrlimit(kind)[1]  # which cannot be raised
        most = hard if inherited == resource.RLIM_INFINITY else min(hard, inherited)
        resource.setrlimit(kind, (min(soft, most), most))
