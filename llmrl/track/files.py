"""Append-only JSON-lines files of a run directory, cut back on resume so that no line stands twice."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from llmrl.errors import RunFailed


class JsonlFile:
    """One file of one JSON object per line; each `append` reaches the operating system before it returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")

    def append(self, *rows: dict[str, Any]) -> None:
        """Write rows.

        Values that JSON does not know (tensors, exceptions ...) are written as their text, NaN and infinity as null.
        """
        lines = "".join(_to_json(row) + "\n" for row in rows)
        try:
            self._file.write(lines.encode("utf-8", errors="backslashreplace"))
            self._file.flush()
        except OSError as error:
            raise RunFailed(
                f"{self.path} cannot be written ({error}); free space or choose another output_dir"
            ) from error

    def sync(self) -> int:
        """Bring the file to disk and return its length in bytes, to be kept in a checkpoint."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def truncate(self, length: int) -> None:
        """Forget everything after a checkpoint's length."""
        if self.path.stat().st_size < length:
            raise RunFailed(
                f"{self.path} is shorter than when the checkpoint was taken ({length} bytes): it was changed"
            )
        self._file.truncate(length)
        self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        self._file.close()


def _to_json(row: Any) -> str:
    try:
        return json.dumps(row, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:  # what Python writes for NaN is refused by browsers and most other readers
        return json.dumps(_finite(row), ensure_ascii=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a JSON-lines file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]
