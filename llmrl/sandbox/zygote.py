"""The warm fork server inside the box: confines itself once, then forks one child per program.

Commands come in on a packet socket, with the program's descriptors attached; a report on how each child ended goes out.
The server holds no tests, no secrets and nothing of the trainer's environment, because every program sees a copy of its
memory. Standard library only.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import random
import resource
import select
import signal
import socket
import struct
import sys
from typing import Any

from llmrl.sandbox import conventions, driver, landlock, seccomp, wire

NOBODY = 65534
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_KEEPCAPS = 1, 4, 8
_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 1, 2


def main(control: socket.socket, config: dict[str, Any]) -> None:
    """Confine this process, report "ready" or the failure, then serve until the other end closes.

    Args:
        control: packet socket to the owner.
        config: preload, package_paths, read_paths, write_paths, device_paths, landlock ("required" or "optional").
    """
    try:
        server = _Server(control, config)
        facts = _lock_in(config)
    except BaseException as error:
        control.send(json.dumps({"failed": f"{type(error).__name__}: {error}"}).encode())
        return
    control.send(json.dumps({"ready": facts}).encode())
    server.loop()


def _lock_in(config: dict[str, Any]) -> dict[str, Any]:
    installer = seccomp.Installer()
    sys.path += config["package_paths"]
    for name in config["preload"]:
        _preload(name)
    conventions.complete_python()
    conventions.judge_names()  # so that the children find them ready
    with open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")
    if os.getuid() == 0:
        _drop_root(installer)
    installer.call(_PR_SET_PDEATHSIG, signal.SIGKILL)
    installer.call(_PR_SET_DUMPABLE, 0)
    installer.no_new_privileges()
    version = landlock.abi_version()
    if version:
        landlock.restrict(config["read_paths"], config["write_paths"], config["device_paths"])
    elif config["landlock"] == "required":
        raise OSError("this kernel has no Landlock (Linux 5.13 or newer with it switched on)")
    installer.install(seccomp.server_filter())
    return {"landlock": version, "uid": os.getuid()}


def _preload(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ImportError:
        return
    if name == "numpy":
        module.random.seed(0)


def _drop_root(installer: seccomp.Installer) -> None:
    """Become nobody. If the interpreter lies in a directory that only root may enter, keep the one capability that
    ignores file permissions for reading; Landlock still limits the paths that can be reached.
    """
    installer.call(_PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    if _can_read_library():
        _set_capabilities(0)
        return
    for capability in (_CAP_DAC_READ_SEARCH, _CAP_DAC_OVERRIDE):
        if _set_capabilities(1 << capability):
            return
    _set_capabilities(0)


def _can_read_library() -> bool:
    try:
        os.listdir(os.path.dirname(os.__file__))
    except OSError:
        return False
    return True


def _set_capabilities(mask: int) -> bool:
    """Set the effective and permitted capabilities to `mask`; return False if this process lacks one of them."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))
    sets = ctypes.create_string_buffer(struct.pack("=6I", mask, mask, 0, 0, 0, 0))
    return bool(ctypes.CDLL(None).capset(header, sets) == 0)


class _Server:
    """Forks, watches and reaps one program at a time."""

    def __init__(self, control: socket.socket, config: dict[str, Any]) -> None:
        self.control = control
        self.scratch: str | None = (config["write_paths"] or [None])[0]
        # Where the interpreter lies below the scratch folder, that is where it is mounted.
        self.mounted = set(os.listdir(self.scratch)) if self.scratch else set()
        self.installer = seccomp.Installer()
        self.null = os.open("/dev/null", os.O_RDWR)
        self.statm = os.open("/proc/self/statm", os.O_RDONLY)

    def loop(self) -> None:
        self.own_memory = int(os.read(self.statm, 100).split()[0]) * resource.getpagesize()
        os.close(self.statm)
        gc.collect()
        gc.freeze()
        while True:
            data, descriptors, _, _ = socket.recv_fds(self.control, 1 << 16, 8)
            if not data:
                os._exit(0)
            command = json.loads(data)
            if command["do"] == "run":
                self.run(command, descriptors)
            # Otherwise it is a "kill" that arrived after its program had ended: there is nothing to do.

    def run(self, command: dict[str, Any], descriptors: list[int]) -> None:
        pid = os.fork()
        if pid == 0:
            try:
                self.become_program(command, descriptors)
            finally:
                os._exit(111)
        for descriptor in descriptors:
            os.close(descriptor)
        self.wait_or_kill(pid)
        _, status, usage = os.wait4(pid, 0)
        report = {
            "status": os.waitstatus_to_exitcode(status),
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "memory_mb": usage.ru_maxrss / 1024,
            "dirty": bool(self.scratch and set(os.listdir(self.scratch)) != self.mounted),
        }
        self.control.send(json.dumps(report).encode())

    def wait_or_kill(self, pid: int) -> None:
        child = os.pidfd_open(pid)
        poll = select.poll()
        poll.register(child, select.POLLIN)
        poll.register(self.control, select.POLLIN)
        command = b""
        while child not in {descriptor for descriptor, _ in poll.poll()}:
            command = self.control.recv(1 << 16)
            if b"watch" not in command:
                os.kill(pid, signal.SIGKILL)
                break
            socket.send_fds(self.control, [b'{"watch":true}'], [child])
        else:
            command = b"ended by itself"
        os.close(child)
        if not command:
            os._exit(0)

    def become_program(self, command: dict[str, Any], descriptors: list[int]) -> None:
        """Take the descriptors, give up everything else and run the program, in the child. Never returns."""
        channel = descriptors[0]
        self.control.close()
        for target, descriptor in enumerate(descriptors[1:] or [self.null] * 3):
            os.dup2(descriptor, target)
        self.installer.call(_PR_SET_PDEATHSIG, signal.SIGKILL)
        self.set_limits(command["limits"])
        random.seed(0)
        sys.argv = ["program.py"]
        self.installer.install_program_filter()
        if command["mode"] == "serve":
            driver.serve(channel)
        request = _receive_request(channel)

        def report(message: dict[str, Any]) -> None:
            os.write(channel, wire.dump(message))

        os._exit(driver.run_script(request, report))

    def set_limits(self, limits: dict[str, int]) -> None:
        cpu = limits["cpu_seconds"]
        for kind, soft, hard in (
            (resource.RLIMIT_CPU, cpu, cpu + 1),
            (resource.RLIMIT_AS, *[self.own_memory + limits["memory_bytes"]] * 2),
            (resource.RLIMIT_FSIZE, *[limits["file_bytes"]] * 2),
            (resource.RLIMIT_NOFILE, 64, 64),
            (resource.RLIMIT_NPROC, *[limits["max_user_processes"]] * 2),
            (resource.RLIMIT_CORE, 0, 0),
            (resource.RLIMIT_MEMLOCK, 0, 0),
            (resource.RLIMIT_STACK, 120 << 20, resource.RLIM_INFINITY),
        ):
            inherited = resource.getrlimit(kind)[1]  # which cannot be raised
            most = min((limit for limit in (hard, inherited) if limit != resource.RLIM_INFINITY), default=-1)
            resource.setrlimit(kind, (soft if most == resource.RLIM_INFINITY else min(soft, most), most))


def _receive_request(channel: int) -> dict[str, Any]:
    def read(count: int) -> bytes:
        data = b""
        while len(data) < count:
            chunk = os.read(channel, count - len(data))
            if not chunk:
                os._exit(0)
            data += chunk
        return data

    return wire.load(read(wire.HEADER.unpack(read(wire.HEADER.size))[0]))
