"""Files of a run: JSON lines that are appended to and cut back on resume, and files that are replaced whole."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from llmrl.errors import RunFailed, UserError


def cache_folder() -> Path:
    """Return `$LLMRL_CACHE`, or `llmrl` in the user's cache folder."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("LLMRL_CACHE") or user / "llmrl").absolute()


MAX_BEHIND = 2
"""Appends that may wait to be written in the background. The next one waits for the first of them, so that memory does
not grow where a disk is slower than a run."""


class JsonlFile:
    """A file with one JSON object per line; each `append` reaches the operating system before it returns.

    It is made when it is first written to, so that a run that fails before its first step leaves none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _file(self) -> IO[bytes]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.path.open("ab")

    def append(self, *rows: dict[str, Any]) -> None:
        """Write rows.

        Values that JSON cannot hold (tensors, exceptions ...) are written as text, NaN and infinity as null.

        Raises:
            RunFailed: the file cannot be written, for example because the disk is full.
        """
        lines = "".join(_to_json(row) + "\n" for row in rows)
        try:
            # A model can produce lone surrogates, which UTF-8 cannot hold.
            self._file.write(lines.encode("utf-8", errors="backslashreplace"))
            self._file.flush()
        except OSError as error:
            raise self._failed(error) from error

    def length(self) -> int:
        """Return the length in bytes of what was appended."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def sync(self) -> int:
        """Flush the file to disk and return its length in bytes, which a checkpoint keeps.

        Raises:
            RunFailed: the disk turns out to be full, which some file systems report only now.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failed(error) from error
        return self._file.tell()

    def _failed(self, error: OSError) -> RunFailed:
        return RunFailed(f"{self.path} cannot be written ({error}); free space or choose another output_dir")

    def truncate(self, length: int) -> None:
        """Drop everything that was written after a checkpoint, so that no line appears twice after resuming.

        Raises:
            RunFailed: the file is shorter than `length` bytes.
        """
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size < length:
            raise RunFailed(
                f"{self.path} is shorter than when the checkpoint was taken ({length} bytes): it was changed"
            )
        self._file.truncate(length)
        self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Close the file.

        Raises:
            RunFailed: what was still to be written cannot be.
        """
        if "_file" not in self.__dict__:
            return
        try:
            self._file.close()
        except OSError as error:
            raise self._failed(error) from error


class BackgroundJsonlFile(JsonlFile):
    """A `JsonlFile` that turns rows into text and writes them on a thread of its own.

    What goes wrong there is raised by the next `append`, or by `sync`, `truncate` or `close`, which all wait until
    everything is written. Rows may not be changed once they are given to `append`.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._thread = ThreadPoolExecutor(1, f"llmrl {path.name}")
        self._waiting: deque[Future[None]] = deque()

    def append(self, *rows: dict[str, Any]) -> None:
        self._wait(MAX_BEHIND - 1)
        self._waiting.append(self._thread.submit(super().append, *rows))

    def sync(self) -> int:
        self._wait(0)
        return super().sync()

    def truncate(self, length: int) -> None:
        self._wait(0)
        super().truncate(length)

    def close(self) -> None:
        try:
            self._wait(0)
        finally:
            self._thread.shutdown()
            super().close()

    def _wait(self, most: int) -> None:
        """Wait until at most `most` appends are left, and raise the first error among those that are done."""
        while len(self._waiting) > most or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()


def _to_json(row: Any) -> str:
    try:
        return json.dumps(row, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:  # Python would write NaN, which is not JSON: browsers and most other readers refuse it
        return json.dumps(_finite(row), ensure_ascii=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Return all rows of a JSON-lines file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def replace_text(file: Path, text: str) -> None:
    """Replace a file of a run: whole, or not at all.

    Raises:
        RunFailed: it cannot be written, for example because the disk is full.
    """
    beside = file.with_name(f".writing-{file.name}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(file)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise RunFailed(f"{file} cannot be written ({error}); free space or choose another output_dir") from error


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[IO[str]]:
    """Open a text file that replaces a command's `--output` when the block succeeds and vanishes when it fails.

    Raises:
        UserError: the file cannot be opened.
        RunFailed: writing failed.
    """
    is_device = file.exists() and not file.is_file()  # /dev/stdout cannot be renamed over: write to it directly
    beside = file if is_device else file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        output = beside.open("w", encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(f"--output {file}: cannot be written: {error.strerror}") from None
    try:
        with output:
            yield output
            output.flush()
            if not is_device:
                os.fsync(output.fileno())  # before the rename, or a crash could leave an empty file
        if not is_device:
            beside.replace(file)
    except OSError as error:
        hint = "; free some space or choose another disk" if error.errno == errno.ENOSPC else ""
        raise RunFailed(f"--output {file}: writing failed: {error.strerror}{hint}. Nothing was left behind.") from None
    finally:
        if not is_device:
            beside.unlink(missing_ok=True)
