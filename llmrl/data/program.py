"""Datasets that a Python file makes: `rows(split)` of the file in, its rows out."""

from __future__ import annotations

import inspect
import runpy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llmrl.errors import LlmrlError, UserError


def find_program(path: str) -> Path | None:
    """Return the Python file that `path` names, in the working directory or among the shipped recipes, or None."""
    given = Path(path)
    if given.suffix != ".py":
        return None
    package = Path(__file__).resolve().parents[1]
    folders = [package / "shipped" / "recipes", package.parent / "recipes"]  # of the wheel, of a checkout
    shipped = [folder / given.name for folder in folders] if given.parent.name in ("recipes", "") else []
    return next((file for file in (given, *shipped) if file.is_file()), None)


def run_program(file: Path, split: str) -> Iterable[dict[str, Any]]:
    """Run a file and return what its function `rows(split)` returns. It runs as a program that you start: unguarded.

    A generator is returned as one, because it may be endless.

    Raises:
        UserError: the file has no such function, fails, or returns something else than rows.
    """
    try:
        make_rows = runpy.run_path(str(file)).get("rows")
        if not callable(make_rows):
            raise UserError(f"data.path {file}: the file has no function `rows(split)` that returns rows")
        if not inspect.signature(make_rows).parameters:
            raise UserError(f"data.path {file}: `rows` takes no argument; write `def rows(split): ...`")
        found: Any = make_rows(split)
        if isinstance(found, str | Mapping) or not isinstance(found, Iterable):
            raise UserError(f"data.path {file}: rows({split!r}) returned {type(found).__name__}, not a list of rows")
        return list(found) if hasattr(found, "__len__") else _guarded(file, split, found)
    except LlmrlError:
        raise
    except Exception as error:  # it is the user's code
        raise _failed(file, split, error) from error


def _guarded(file: Path, split: str, rows: Iterable[Any]) -> Iterator[Any]:
    try:
        yield from rows
    except LlmrlError:
        raise
    except Exception as error:
        raise _failed(file, split, error) from error


def _failed(file: Path, split: str, error: Exception) -> UserError:
    return UserError(f"data.path {file}: rows({split!r}) failed: {type(error).__name__}: {error}")
