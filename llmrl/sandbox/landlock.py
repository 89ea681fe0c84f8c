"""Landlock (Linux 5.13+): restricts this process and its children to the listed paths, without any privilege.

It does not cover chmod, chown, utime and setxattr; the system-call filter denies those. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct

_CREATE, _ADD, _RESTRICT = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
_MAKE_AND_REMOVE = sum(1 << bit for bit in (4, 5, 7, 8, 12))
"""remove_dir, remove_file, make_dir, make_reg, make_sym."""
_MOVE_AND_PIPE = 1 << 13 | 1 << 10
"""refer, make_fifo."""
_HANDLED = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
_ALL_HANDLED = (1 << 16) - 1


def abi_version() -> int:
    """Return the version of Landlock in the running kernel, or 0 if it has none."""
    version = ctypes.CDLL(None, use_errno=True).syscall(_CREATE, None, 0, 1)
    return max(0, int(version))


def restrict(read: list[str], write: list[str], devices: list[str], *, commands: bool = False) -> None:
    """Apply the restriction, irrevocably. Paths that do not exist are skipped.

    Args:
        read: files or directories (with all below) that may be read.
        write: directories in which files may be read, created, written and removed.
        devices: files that may be read and written but not replaced.
        commands: files below `read` and `write` may also be executed, and those below `write` moved between folders.

    Raises:
        OSError: the kernel refused.
    """
    version = abi_version()
    handled = _HANDLED.get(version, _ALL_HANDLED)
    attributes = struct.pack("=QQQ", handled, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _syscall(_CREATE, ctypes.create_string_buffer(attributes), size, 0)
    readable = _READ_FILE | _READ_DIR | (_EXECUTE if commands else 0)
    changeable = _MAKE_AND_REMOVE | (_MOVE_AND_PIPE if commands else 0)
    for paths, access in (
        (read, readable),
        (write, readable | _WRITE_FILE | _TRUNCATE | changeable),
        (devices, _READ_FILE | _WRITE_FILE),
    ):
        for path in paths:
            _allow(ruleset, path, access & handled)
    _syscall(_RESTRICT, ruleset, 0)
    os.close(ruleset)


def _allow(ruleset: int, path: str, access: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):
        return
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            access &= _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
        rule = struct.pack("=Qi", access, descriptor)
        _syscall(_ADD, ruleset, 1, ctypes.create_string_buffer(rule), 0)
    finally:
        os.close(descriptor)


def _syscall(number: int, *arguments: object) -> int:
    result = int(ctypes.CDLL(None, use_errno=True).syscall(number, *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"Landlock call {number}: {os.strerror(code)}")
    return result
