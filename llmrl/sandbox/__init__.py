"""Running programs written by the policy: never in this process, never with its files, network or environment.

A program goes in, as a script with standard input or as functions to call; its output or plain values come out.
`open_sandbox` chooses the back end; see docs/sandbox.md.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import Protocol

from llmrl.errors import UserError
from llmrl.sandbox.limits import BoxDied, Conventions, Limits, RunResult, SandboxUnavailable
from llmrl.sandbox.packages import check_installed
from llmrl.sandbox.session import CannotTravel, Handle, ProgramEnded, Raised, Session

__all__ = [
    "DEFAULT_PACKAGES",
    "BoxDied",
    "CannotTravel",
    "Conventions",
    "Handle",
    "Limits",
    "ProgramEnded",
    "Raised",
    "RunResult",
    "Sandbox",
    "SandboxUnavailable",
    "Session",
    "default_sandbox",
    "open_sandbox",
]

_logger = logging.getLogger(__name__)


DEFAULT_PACKAGES = ("numpy", "sortedcontainers")
"""Packages that programs may import if they are installed."""


class Sandbox(Protocol):
    """Runs untrusted programs. Thread-safe."""

    def describe(self) -> str:
        """Return one line that names the box in use and what it consists of."""
        ...

    def run(self, source: str, stdin: str, limits: Limits, conventions: Conventions = "python") -> RunResult:
        """Run a program from standard input to standard output.

        Raises:
            SandboxUnavailable: no box can be started or reached.
            BoxDied: the box died with the program.
        """
        ...

    def open(self, source: str, limits: Limits) -> Session:
        """Return a session in which functions of the program can be called, once it is loaded.

        Raises:
            SandboxUnavailable: no box can be started or reached.
        """
        ...

    def close(self) -> None:
        """Kill all boxes. Safe to call twice."""
        ...


def open_sandbox(kind: str | None = None, *, packages: tuple[str, ...] = DEFAULT_PACKAGES) -> Sandbox:
    """Start a sandbox and check with a first program that it confines what runs in it.

    Args:
        kind: `bwrap`, `lite`, the http(s) address of a run-code server, or `auto`: the first of bwrap and lite that
            works. None means the environment variable LLMRL_SANDBOX, or `auto` if that is not set.
        packages: installed packages that programs may import besides the standard library.

    Raises:
        UserError: `kind` is not one of these, or a package is not installed.
        SandboxUnavailable: the sandbox does not work here. Programs are never run without a box.
    """
    from llmrl.sandbox.http import HttpSandbox
    from llmrl.sandbox.local import LocalSandbox

    if packages != DEFAULT_PACKAGES:  # programs may do without those, but what was asked for must be there
        check_installed(packages)
    kind = kind or os.environ.get("LLMRL_SANDBOX") or "auto"
    if kind.startswith(("http://", "https://")):
        return HttpSandbox(kind)
    if kind in ("bwrap", "lite"):
        return LocalSandbox(kind, packages=packages)
    if kind != "auto":
        raise UserError(
            f"sandbox {kind!r} is unknown: use auto, bwrap, lite or the http:// address of a run-code server"
        )
    reasons = []
    for candidate in ("bwrap", "lite"):
        try:
            return LocalSandbox(candidate, packages=packages)
        except SandboxUnavailable as error:
            reasons.append(f"{candidate}: {error}")
    raise SandboxUnavailable(
        "no sandbox works on this machine, and programs of the policy are not run without one.\n  "
        + "\n  ".join(reasons)
        + "\nInstall bubblewrap (apt-get install bubblewrap) where user namespaces are allowed, or use a kernel with"
        " Landlock (5.13+), or set LLMRL_SANDBOX to the address of a run-code server (scripts/serve_sandbox)."
    )


_default: dict[tuple[str, tuple[str, ...]], Sandbox] = {}
_default_lock = threading.Lock()


def default_sandbox(packages: tuple[str, ...] = DEFAULT_PACKAGES) -> Sandbox:
    """Return this process's sandbox, chosen by LLMRL_SANDBOX. The first call starts it and logs its description.

    Args:
        packages: installed packages that programs may import. There is one sandbox for each choice of them.

    Raises:
        UserError: a package is not installed.
        SandboxUnavailable: no sandbox works here.
    """
    key = os.environ.get("LLMRL_SANDBOX") or "auto", packages
    with _default_lock:
        if key not in _default:
            _default[key] = open_sandbox(key[0], packages=packages)
            _logger.info("%s", _default[key].describe())
        return _default[key]
