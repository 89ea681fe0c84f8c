"""The bubblewrap box: everything the lite box has, inside its own mount, process, network, IPC and user namespaces."""

from __future__ import annotations

import os
import shutil
from pathlib import PurePosixPath

from llmrl.sandbox.limits import SandboxUnavailable
from llmrl.sandbox.server import BoxPlan

REASON = "bubblewrap namespaces + rlimits + Landlock + seccomp"
_SCRATCH_BYTES = 64 << 20
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


def plan(packages: tuple[str, ...]) -> BoxPlan:
    """Return how to start a bubblewrap box. Its programs can write to a private /tmp of limited size.

    Raises:
        SandboxUnavailable: bubblewrap is not installed.
    """
    if shutil.which("bwrap") is None:
        raise SandboxUnavailable("bubblewrap is not installed (apt-get install bubblewrap)")
    return BoxPlan(wrap=_wrap, landlock="optional", scratch="/tmp", packages=packages)


def _wrap(command: list[str], plan: BoxPlan) -> list[str]:
    # Before all other mounts, because an interpreter or packages below /tmp must be mounted into it.
    scratch = ["--size", str(_SCRATCH_BYTES), "--perms", "1777", "--tmpfs", "/tmp"]
    paths = outermost(["/usr", *plan.read_paths])
    mounts = [*scratch, *_folders([*paths, *_DEVICES]), *_read_only(paths)]
    for device in _DEVICES:
        mounts += ["--dev-bind", device, device]
    return [*_isolated(), *mounts, "--proc", "/proc", "--remount-ro", "/", "--chdir", "/tmp", "--", *command]


def wrap_commands(command: list[str], read: list[str], write: list[str], scratch_mb: int) -> list[str]:
    """Return the command line of a box for commands: it sees `read`, may change `write`, and has /dev and /proc.

    Raises:
        SandboxUnavailable: bubblewrap is not installed.
    """
    if shutil.which("bwrap") is None:
        raise SandboxUnavailable("bubblewrap is not installed (apt-get install bubblewrap)")
    paths = outermost(read)
    mounts = ["--size", str(max(1, scratch_mb) << 20), "--perms", "1777", "--tmpfs", "/tmp"]
    mounts += ["--dev", "/dev", "--size", str(max(1, scratch_mb) << 20), "--perms", "1777", "--tmpfs", "/dev/shm"]
    mounts += [*_folders([*paths, *write])]
    for path in sorted([*paths, *write], key=len):  # what lies inside another mount comes after it
        mounts += ["--bind", path, path] if path in write else _read_only([path])
    closed = ["/"] if scratch_mb else ["/", "/tmp", "/dev/shm"]
    mounts += ["--proc", "/proc", *(part for path in closed for part in ("--remount-ro", path))]
    return [*_isolated(), *mounts, "--chdir", "/", "--", *command]


def _isolated() -> list[str]:
    """Return how bubblewrap is started, up to the mounts."""
    program = shutil.which("bwrap") or "bwrap"
    unshare = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if os.getuid() == 0:
        # In a user namespace made by root, every user maps to root outside. So the box starts without one and the
        # server inside really changes its user.
        rights = ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_SETPCAP"]
    else:
        rights = ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    return [program, *unshare, *rights, "--hostname", "box", "--die-with-parent"]


def _read_only(paths: list[str]) -> list[str]:
    mounts: list[str] = []
    for path in paths:
        mounts += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind-try", path, path]
    return mounts


def _folders(paths: list[str]) -> list[str]:
    """Return how the folders above the paths are made. Made by bubblewrap itself, they would be closed to others."""
    made: list[str] = []
    for folder in _parents(paths):
        made += ["--perms", "0755", "--dir", folder] if folder not in ("/tmp", "/dev") else []
    return made


def outermost(paths: list[str]) -> list[str]:
    """Return the existing paths that do not lie below another one, shortest first."""
    kept: list[str] = []
    for path in sorted(set(paths), key=len):
        if os.path.lexists(path) and not any(path.startswith(f"{other}/") for other in kept):
            kept.append(path)
    return kept


def _parents(paths: list[str]) -> list[str]:
    """Return every folder above the paths, outer folders first."""
    return sorted({str(folder) for path in paths for folder in PurePosixPath(path).parents} - {"/"})
