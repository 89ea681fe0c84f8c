"""System-call filters of the box: an allow list for the fork server, and a second, short filter for each program.

Calls that are not on the list fail with EPERM: sockets, ptrace, mounts, namespaces, keys, BPF, io_uring, perf,
userfaultfd, clocks, chmod and chown, execve, memfd_create, shared memory. A program can start threads but no processes.
For x86-64 and 64-bit ARM; installed with prctl. Standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_ABSENT = -1

# fmt: off
_ALLOWED: dict[str, tuple[int, int]] = {
    # descriptors and files; the mounts and Landlock decide which files they reach
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "pwrite64": (18, 68),
    "lseek": (8, 62), "open": (2, _ABSENT), "openat": (257, 56), "close": (3, 57), "stat": (4, _ABSENT),
    "fstat": (5, 80), "lstat": (6, _ABSENT), "newfstatat": (262, 79), "statx": (332, 291), "access": (21, _ABSENT),
    "faccessat": (269, 48), "readlink": (89, _ABSENT), "readlinkat": (267, 78), "getdents64": (217, 61),
    "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50), "dup": (32, 23), "dup2": (33, _ABSENT),
    "dup3": (292, 24), "pipe": (22, _ABSENT), "pipe2": (293, 59), "poll": (7, _ABSENT), "ppoll": (271, 73),
    "select": (23, _ABSENT),
    "pselect6": (270, 72), "epoll_create": (213, _ABSENT), "epoll_create1": (291, 20), "epoll_ctl": (233, 21),
    "epoll_wait": (232, _ABSENT), "epoll_pwait": (281, 22), "eventfd2": (290, 19), "mkdir": (83, _ABSENT),
    "mkdirat": (258, 34), "rmdir": (84, _ABSENT), "unlink": (87, _ABSENT), "unlinkat": (263, 35),
    "rename": (82, _ABSENT), "renameat": (264, 38), "renameat2": (316, 276), "link": (86, _ABSENT), "linkat": (265, 37),
    "symlink": (88, _ABSENT), "symlinkat": (266, 36), "ftruncate": (77, 46), "fsync": (74, 82),
    "fdatasync": (75, 83),
    "statfs": (137, 43), "fstatfs": (138, 44), "fadvise64": (221, 223), "umask": (95, 166),
    # a pair of connected sockets, which event loops need; no call here creates or reaches another socket
    "socketpair": (53, 199), "recvfrom": (45, 207), "shutdown": (48, 210), "getsockopt": (55, 209),
    "setsockopt": (54, 208), "getsockname": (51, 204), "getpeername": (52, 205),
    # memory
    "mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216), "madvise": (28, 233),
    "brk": (12, 214), "msync": (26, 227), "mincore": (27, 232),
    # threads, time, the process's own signals and limits
    "futex": (202, 98), "set_robust_list": (273, 99), "get_robust_list": (274, 100), "set_tid_address": (218, 96),
    "rseq": (334, 293), "arch_prctl": (158, _ABSENT), "restart_syscall": (219, 128), "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123), "getcpu": (309, 168), "getpriority": (140, 141), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigsuspend": (130, 133), "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137), "sigaltstack": (131, 132), "pause": (34, _ABSENT), "alarm": (37, _ABSENT),
    "getitimer": (36, 102), "setitimer": (38, 103), "nanosleep": (35, 101), "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "gettimeofday": (96, 169), "time": (201, _ABSENT),
    "times": (100, 153), "getrusage": (98, 165), "getrlimit": (97, 163), "setrlimit": (160, 164), "exit": (60, 93),
    "exit_group": (231, 94),
    # the process's own ids and the system's description
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "getgroups": (115, 158), "getresuid": (118, 148),
    "getresgid": (120, 150), "getpgrp": (111, _ABSENT), "getpgid": (121, 155), "getsid": (124, 156), "uname": (63, 160),
    "sysinfo": (99, 179), "getrandom": (318, 278),
}
_SERVER_ONLY: dict[str, tuple[int, int]] = {
    "wait4": (61, 260), "kill": (62, 129), "prctl": (157, 167), "sendmsg": (46, 211), "recvmsg": (47, 212),
    "pidfd_open": (434, 434), "fork": (57, _ABSENT),
}
# fmt: on
_CLONE, _FCNTL, _IOCTL, _SENDTO, _PRLIMIT, _TGKILL = (56, 220), (72, 25), (16, 29), (44, 206), (302, 261), (234, 131)
_CLONE_THREAD = 0x10000
_FIRST_NEW_CALL = 435
"""Calls from this number on (clone3, openat2 ...) fail with ENOSYS; the C library then uses an older call."""
_FCNTL_DENIED = (8, 10, 15, 1024, 1026)
"""F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE, F_NOTIFY: ways to make the kernel send signals."""
_IOCTL_ALLOWED = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX."""

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_DENY = _ERRNO | errno.EPERM

Instruction = tuple[int, int, int, int]


def _return(action: int) -> Instruction:
    return (_RETURN, 0, 0, action)


def _argument(index: int, *, high: bool = False) -> Instruction:
    return (_LOAD, 0, 0, _FIRST_ARGUMENT + 8 * index + (4 if high else 0))


def _one_of(values: tuple[int, ...], then: int, otherwise: int) -> list[Instruction]:
    rules: list[Instruction] = []
    for value in values:
        rules += [(_EQUAL, 0, 1, value), _return(then)]
    return [*rules, _return(otherwise)]


def _null_argument(index: int) -> list[Instruction]:
    return [
        _argument(index),
        (_EQUAL, 0, 3, 0),
        _argument(index, high=True),
        (_EQUAL, 0, 1, 0),
        _return(_ALLOW),
        _return(_DENY),
    ]


def _call(number: int, block: list[Instruction]) -> list[Instruction]:
    """Return the block, guarded by a test that the call is `number`. A block always returns."""
    return [] if number == _ABSENT else [(_EQUAL, 0, len(block), number), *block]


def _architecture() -> tuple[int, int]:
    machine = os.uname().machine
    if machine not in _ARCHITECTURES:
        raise OSError(f"no system-call table for {machine}")
    return _ARCHITECTURES[machine]


def _head(audit: int) -> list[Instruction]:
    head = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, audit), _return(_KILL), (_LOAD, 0, 0, _NUMBER)]
    return [*head, (_AT_LEAST, 0, 1, 0x40000000), _return(_DENY)]


def server_filter() -> bytes:
    """Return the allow list, for the fork server and everything that it forks."""
    column, audit = _architecture()
    rules = _head(audit)
    for numbers in (*_ALLOWED.values(), *_SERVER_ONLY.values(), _CLONE, _PRLIMIT, _TGKILL, _SENDTO):
        rules += _call(numbers[column], [_return(_ALLOW)])
    rules += _call(_FCNTL[column], [_argument(1), *_one_of(_FCNTL_DENIED, _DENY, _ALLOW)])
    rules += _call(_IOCTL[column], [_argument(1), *_one_of(_IOCTL_ALLOWED, _ALLOW, _ERRNO | errno.ENOTTY)])
    rules += [(_AT_LEAST, 0, 1, _FIRST_NEW_CALL), _return(_ERRNO | errno.ENOSYS), _return(_DENY)]
    return _pack(rules)


def program_filter(pid: int) -> bytes:
    """Return the second filter: it denies new processes, signals to others, and messages with descriptors or addresses.

    Args:
        pid: the program's own process, the only one whose threads it may signal.
    """
    column, audit = _architecture()
    rules = _head(audit)
    for numbers in _SERVER_ONLY.values():
        rules += _call(numbers[column], [_return(_DENY)])
    threads_only = [_argument(0), (_ANY_BIT, 0, 1, _CLONE_THREAD), _return(_ALLOW), _return(_DENY)]
    rules += _call(_CLONE[column], threads_only)
    rules += _call(_SENDTO[column], _null_argument(4))
    rules += _call(_PRLIMIT[column], _null_argument(0))
    rules += _call(_TGKILL[column], [_argument(0), *_one_of((pid,), _ALLOW, _DENY)])
    return _pack([*rules, _return(_ALLOW)])


def _pack(rules: list[Instruction]) -> bytes:
    return b"".join(struct.pack("=HBBI", *rule) for rule in rules)


_OWN_PID = 0x7FFFFFF0
"""Placeholder for the process's own id in a filter that is built before the process exists."""


class Installer:
    """Prepares everything for installing filters, so that a forked child only makes the system call."""

    def __init__(self) -> None:
        self.program_filter = program_filter(_OWN_PID)
        self.prctl = ctypes.CDLL(None, use_errno=True).prctl
        self.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]

    def no_new_privileges(self) -> None:
        """Prevent this process from ever gaining rights, which the kernel requires for filters without privilege."""
        self.call(38, 1)

    def call(self, option: int, value: int, pointer: int = 0) -> None:
        """Call prctl(option, value, pointer).

        Raises:
            OSError: the kernel refused.
        """
        if self.prctl(option, value, pointer, 0, 0) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"prctl({option}): {os.strerror(code)}")

    def install_program_filter(self) -> None:
        """Apply `program_filter` to this process."""
        self.install(self.program_filter.replace(struct.pack("=I", _OWN_PID), struct.pack("=I", os.getpid())))

    def install(self, program: bytes) -> None:
        """Apply a filter to this process and all that it forks, irrevocably."""
        code = ctypes.create_string_buffer(program, len(program))
        header = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(code)))
        self.call(22, 2, ctypes.addressof(header))
