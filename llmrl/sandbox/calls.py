"""The system-call filter of boxes that run commands: compilers, compiled programs, test runners, an agent's shell.

It allows what the filter of the fork server allows, the start of other programs and ordinary work on files. Mounts and
Landlock decide which files; a process namespace or Landlock's scopes, which processes. Standard library only.
"""

from __future__ import annotations

import os

from llmrl.sandbox.seccomp import (
    _ALLOW,
    _ALLOWED,
    _ANY_BIT,
    _AT_LEAST,
    _CLONE,
    _CLONE_THREAD,
    _DENY,
    _ERRNO,
    _FCNTL,
    _FCNTL_DENIED,
    _FIRST_NEW_CALL,
    _IOCTL,
    _PRLIMIT,
    _SENDTO,
    _TGKILL,
    Instruction,
    _architecture,
    _argument,
    _call,
    _head,
    _null_argument,
    _one_of,
    _pack,
    _return,
)  # fmt: skip

_ABSENT = -1
# fmt: off
_COMMANDS: dict[str, tuple[int, int]] = {
    "execve": (59, 221), "wait4": (61, 260), "waitid": (247, 95), "setpgid": (109, 154), "setsid": (112, 157),
    "getdents": (78, _ABSENT), "truncate": (76, 45), "flock": (73, 32), "fallocate": (285, 47), "sendfile": (40, 71),
    "copy_file_range": (326, 285), "splice": (275, 76), "tee": (276, 77), "preadv": (295, 69), "pwritev": (296, 70),
    "preadv2": (327, 286), "pwritev2": (328, 287), "creat": (85, _ABSENT), "sync": (162, 81), "syncfs": (306, 267),
    "sync_file_range": (277, 84), "readahead": (187, 213), "memfd_create": (319, 279), "timerfd_create": (283, 85),
    "timerfd_settime": (286, 86), "timerfd_gettime": (287, 87), "signalfd4": (289, 74), "inotify_init1": (294, 26),
    "inotify_add_watch": (254, 27), "inotify_rm_watch": (255, 28), "eventfd": (284, _ABSENT), "getxattr": (191, 8),
    "lgetxattr": (192, 9), "fgetxattr": (193, 10), "listxattr": (194, 11), "llistxattr": (195, 12),
    "flistxattr": (196, 13), "capget": (125, 90), "sched_setaffinity": (203, 122), "sched_getparam": (143, 121),
    "sched_getscheduler": (145, 120), "sched_get_priority_max": (146, 125), "sched_get_priority_min": (147, 126),
    "membarrier": (324, 283), "setpriority": (141, 140), "pidfd_open": (434, 434), "mlock": (149, 228),
    "munlock": (150, 229), "timer_create": (222, 107), "timer_settime": (223, 110), "timer_gettime": (224, 108),
    "timer_getoverrun": (225, 109), "timer_delete": (226, 111), "get_mempolicy": (236, 236),
}
_MODES: dict[str, tuple[int, int]] = {
    "chmod": (90, _ABSENT), "fchmod": (91, 52), "fchmodat": (268, 53), "utime": (132, _ABSENT),
    "utimes": (235, _ABSENT), "utimensat": (280, 88), "futimesat": (261, _ABSENT),
}
"""Landlock does not cover these. Where only Landlock protects files of this user, they do nothing and succeed."""
_PROCESSES: dict[str, tuple[int, int]] = {"fork": (57, _ABSENT), "vfork": (58, _ABSENT)}
_SIGNALS: dict[str, tuple[int, int]] = {
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
}
_NETWORK: dict[str, tuple[int, int]] = {
    "connect": (42, 203), "accept": (43, 202), "accept4": (288, 242), "bind": (49, 200), "listen": (50, 201),
    "sendto": (44, 206), "sendmsg": (46, 211), "recvmsg": (47, 212), "sendmmsg": (307, 269), "recvmmsg": (299, 243),
}
# fmt: on
_SOCKET, _PRCTL = (41, 198), (157, 167)
_FAMILIES = (1, 2, 10)
"""AF_UNIX, AF_INET, AF_INET6. A virtual machine's sockets and others would leave the network namespace."""
_PRCTL_ALLOWED = (1, 3, 4, 15, 16, 23, 27, 36, 38, 39, 0x53564D41)
"""PDEATHSIG, DUMPABLE, NAME, capability tests, SECUREBITS (get), CHILD_SUBREAPER, NO_NEW_PRIVS, names of mappings."""
_PRCTL_SUBREAPER = 36
_IOCTL_ALLOWED = (0x5401, 0x540F, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
_NEW_NAMESPACES = 0x7E020000 | 0x80
_PRETEND = _ERRNO
"""The call does nothing and reports success."""


def command_filter(
    *, launcher: int, namespaces: bool, network: bool, processes: bool, signals: bool, own_files: bool
) -> bytes:
    """Return the filter of one command and all that it starts.

    Args:
        launcher: the process that started it, which no signal may reach.
        namespaces: the box has namespaces of its own.
        network: sockets are allowed, because they reach only the box itself.
        processes: it may start processes, not only threads.
        signals: signals reach only processes of the box, so they are allowed. Otherwise they reach own threads only.
        own_files: file modes and times may be changed, because no file of another owner can be reached.
    """
    column, audit = _architecture()
    rules = _head(audit)
    allowed = [*_ALLOWED.values(), *_COMMANDS.values()]
    allowed += _PROCESSES.values() if processes else []
    allowed += _NETWORK.values() if network else []
    for numbers in allowed:
        rules += _call(numbers[column], [_return(_ALLOW)])
    for numbers in _MODES.values():
        rules += _call(numbers[column], [_return(_ALLOW if own_files else _PRETEND)])
    rules += _call(_CLONE[column], _clone(processes))
    rules += _call(_FCNTL[column], [_argument(1), *_one_of(_FCNTL_DENIED, _DENY, _ALLOW)])
    rules += _call(_IOCTL[column], [_argument(1), *_one_of(_IOCTL_ALLOWED, _ALLOW, _ERRNO | 25)])
    options = _PRCTL_ALLOWED if namespaces else tuple(o for o in _PRCTL_ALLOWED if o != _PRCTL_SUBREAPER)
    rules += _call(_PRCTL[column], [_argument(0), *_one_of(options, _ALLOW, _DENY)])
    rules += _call(_PRLIMIT[column], [_return(_ALLOW)] if namespaces else _null_argument(0))
    if network:
        rules += _call(_SOCKET[column], [_argument(0), *_one_of(_FAMILIES, _ALLOW, _ERRNO | 97)])
    else:
        rules += _call(_SENDTO[column], _null_argument(4))
    for numbers in _SIGNALS.values() if signals else ():
        rules += _call(numbers[column], [_argument(0), *_one_of(_everyone_and(launcher), _DENY, _ALLOW)])
    if not signals:
        rules += _call(_TGKILL[column], [_argument(0), *_one_of((os.getpid(),), _ALLOW, _DENY)])
    rules += [(_AT_LEAST, 0, 1, _FIRST_NEW_CALL), _return(_ERRNO | 38), _return(_DENY)]
    return _pack(rules)


def _clone(processes: bool) -> list[Instruction]:
    """Allow threads, and processes if wanted, in the namespaces of their parent."""
    flags: list[Instruction] = [_argument(0), (_ANY_BIT, 0, 1, _NEW_NAMESPACES), _return(_DENY)]
    if processes:
        return [*flags, _return(_ALLOW)]
    return [*flags, (_ANY_BIT, 0, 1, _CLONE_THREAD), _return(_ALLOW), _return(_DENY)]


def _everyone_and(pid: int) -> tuple[int, ...]:
    """Return the targets of a signal that would reach a process: all, itself, and its group."""
    return (0xFFFFFFFF, pid, (1 << 32) - pid)
