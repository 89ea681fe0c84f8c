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
    """How to start a bubblewrap box; its programs can write to a private, size-capped /tmp.

    Raises:
        SandboxUnavailable: bubblewrap is not installed.
    """
    if shutil.which("bwrap") is None:
        raise SandboxUnavailable("bubblewrap is not installed (apt-get install bubblewrap)")
    return BoxPlan(wrap=_wrap, landlock="optional", scratch="/tmp", packages=packages)


def _wrap(command: list[str], plan: BoxPlan) -> list[str]:
    program = shutil.which("bwrap") or "bwrap"
    unshare = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if os.getuid() == 0:
        # A user namespace of root's maps its users to root; a real change of user, made inside, leaves none of root.
        rights = ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_SETPCAP"]
    else:
        rights = ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    paths = _outermost(["/usr", *plan.read_paths])
    # First of all, so that an interpreter or packages that lie below /tmp can be mounted into it.
    mounts = ["--size", str(_SCRATCH_BYTES), "--perms", "1777", "--tmpfs", "/tmp"]
    for folder in _parents([*paths, *_DEVICES]):  # bubblewrap would make them for its own user alone
        mounts += ["--perms", "0755", "--dir", folder] if folder != "/tmp" else []
    for path in paths:
        mounts += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind-try", path, path]
    for device in _DEVICES:
        mounts += ["--dev-bind", device, device]
    mounts += ["--proc", "/proc", "--remount-ro", "/", "--chdir", "/tmp"]
    return [program, *unshare, *rights, "--hostname", "box", "--die-with-parent", *mounts, "--", *command]


def _outermost(paths: list[str]) -> list[str]:
    """The paths that exist and lie below none of the others, directories before what is inside them."""
    kept: list[str] = []
    for path in sorted(set(paths), key=len):
        if os.path.lexists(path) and not any(path.startswith(f"{other}/") for other in kept):
            kept.append(path)
    return kept


def _parents(paths: list[str]) -> list[str]:
    """Every folder above the paths, outer ones first."""
    return sorted({str(folder) for path in paths for folder in PurePosixPath(path).parents} - {"/"})
