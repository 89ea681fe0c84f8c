"""One run, one folder: a lock on the run's folder that ends with the process, however that ends."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from llmrl.errors import UserError

FILE = ".lock"

_held: dict[Path, IO[str]] = {}
"""Folders that this process has locked. A second `Trainer` in it, as in a notebook, may take the place of the first."""


def lock(folder: Path) -> None:
    """Keep other processes from training in a folder until `unlock`, or until this process is gone.

    Where the file system knows no locks there is none.

    Raises:
        UserError: another process has locked it.
    """
    if folder.resolve() in _held:
        return
    file = (folder / FILE).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(file, folder / FILE):  # its last holder has removed it meanwhile
            file.close()
            return lock(folder)
    except BlockingIOError:
        file.seek(0)
        holder = _describe(file.read())
        file.close()
        raise UserError(
            f"train.output_dir {folder} is in use: {holder} trains in it. Wait for its end or stop it, or choose "
            "another folder"
        ) from None
    except OSError:
        file.close()
        return
    file.seek(0)
    file.truncate()
    json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": datetime.now(UTC).isoformat()}, file)
    file.flush()
    _held[folder.resolve()] = file


def unlock(folder: Path) -> None:
    """Let other processes train in the folder again."""
    if file := _held.pop(folder.resolve(), None):
        (folder / FILE).unlink(missing_ok=True)
        file.close()


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _describe(text: str) -> str:
    try:
        found = json.loads(text)
        return f"process {found['pid']} on {found['host']} (since {found['since'][:19]} UTC)"
    except (ValueError, KeyError, TypeError):
        return "another process"
