"""SHA256SUMS: what each file of a checkpoint held when it was written, in the format of `sha256sum --check`."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

FILE = "SHA256SUMS"


class Damaged(ValueError):
    """A file is not what was written; the message names it."""


def write(folder: Path) -> Path:
    """Write the sums of all files in a folder, and return the file that holds them."""
    names = sorted(path.name for path in folder.iterdir() if path.name != FILE)
    sums = folder / FILE
    sums.write_text("".join(f"{digest(folder / name)}  {name}\n" for name in names))
    return sums


def check(folder: Path, names: Collection[str] | None = None) -> None:
    """Check files of a folder against its sums.

    Args:
        folder: a checkpoint.
        names: which files; all that are there or should be by default.

    Raises:
        Damaged: a file is missing, or is not what was written.
        OSError: the sums cannot be read.
    """
    if not (folder / FILE).is_file():
        raise Damaged(f"{FILE} is missing")
    lines = (folder / FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    wanted = dict(line.split("  ", 1)[::-1] for line in lines if "  " in line)
    there = {path.name for path in folder.iterdir()} - {FILE}
    for name in sorted(there | wanted.keys()) if names is None else names:
        if name not in wanted:
            raise Damaged(f"{FILE} does not list {name}")
        if not (folder / name).is_file():
            raise Damaged(f"{name} is missing")
        if digest(folder / name) != wanted[name]:
            raise Damaged(f"{name} is not what was written, or {FILE} is not")


def digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
