"""The output of a long command: what is finished stays when it is stopped, and the next start goes on from there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from llmrl.errors import RunFailed, UserError


class PartialFile:
    """A JSON-lines file that is called `OUTPUT.partial` until it is complete.

    Its first line says what is written, so that nobody goes on with the output of another command.

    Args:
        output: the file that it becomes. A device is written to directly, and nothing of it can be kept.
        what: all that decides the rows, as JSON.

    Raises:
        UserError: there is a part of another command's output, or the file cannot be written.
    """

    def __init__(self, output: Path, what: Any) -> None:
        self.output = output
        self.is_device = output.exists() and not output.is_file()
        self.file = output if self.is_device else output.with_name(f"{output.name}.partial")
        digest = hashlib.sha256(json.dumps(what, sort_keys=True, default=repr).encode()).hexdigest()
        self._head = json.dumps({"partial": digest}) + "\n"
        try:
            found = b"" if self.is_device or not self.file.is_file() else self.file.read_bytes()
            self.rows = self._finished(found)
            self._out: IO[bytes] = self.file.open("wb" if self.is_device or not found else "r+b")
            if not self.is_device and not found:
                self._out.write(self._head.encode())
                self._out.flush()
        except OSError as error:
            raise UserError(f"--output {output}: cannot be written: {error.strerror}") from None
        self._kept = 0

    def _finished(self, found: bytes) -> list[bytes]:
        lines = found.splitlines(keepends=True)
        if found and lines[0] != self._head.encode():
            raise UserError(
                f"{self.file} is the unfinished output of another command (other rewards, arguments or input): delete "
                "it, or choose another --output"
            )
        return [line for line in lines[1:] if line.endswith(b"\n")]

    def keep(self, count: int) -> Iterator[dict[str, Any]]:
        """Take over the next `count` rows of the part that is there. Call `go_on` before the first `write`."""
        taken = self.rows[self._kept : self._kept + count]
        self._kept += count
        return map(json.loads, taken)

    @property
    def left(self) -> int:
        """Rows of the part that is there and not taken over yet."""
        return max(0, len(self.rows) - self._kept)

    def go_on(self) -> None:
        """Cut off what was not taken over."""
        if not self.is_device:
            end = len(self._head) + sum(map(len, self.rows[: self._kept]))
            self._out.truncate(end)
            self._out.seek(end)
        self.rows = []

    def write(self, lines: str) -> None:
        """Write finished rows; they reach the operating system at once.

        Raises:
            RunFailed: they cannot be written, for example because the disk is full.
        """
        try:
            self._out.write(lines.encode("utf-8", errors="backslashreplace"))
            self._out.flush()
        except OSError as error:
            raise RunFailed(f"--output {self.output}: writing failed: {error.strerror}; free some space") from None

    def drop(self) -> None:
        """Remove it: nothing in it is of use."""
        if not self.is_device:
            self.file.unlink(missing_ok=True)

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Rename the file if all went well; drop it if it holds no row."""
        with contextlib.suppress(OSError):
            self._out.close()
        if self.is_device:
            return
        size = self.file.stat().st_size - len(self._head)
        if kind is None:
            self._complete()
        if kind is None or size <= 0:
            self.file.unlink()

    def _complete(self) -> None:
        beside = self.output.with_name(f".{self.output.name}.{os.getpid()}.tmp")
        try:
            with self.file.open("rb") as source, beside.open("wb") as target:
                source.seek(len(self._head))
                while block := source.read(1 << 20):
                    target.write(block)
                target.flush()
                os.fsync(target.fileno())  # before the rename, or a crash could leave an empty file
            beside.replace(self.output)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise RunFailed(
                f"--output {self.output}: writing failed: {error.strerror}. All rows are in {self.file}; free some "
                "space and run the same command again"
            ) from None
