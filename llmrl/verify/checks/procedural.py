"""Procedural tasks of reasoning-gym: rows from its generators, and its own scorers.

The package is an extra (`llmrl[tasks]`) and is imported on first use.
"""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

from llmrl.errors import UserError


def make_rows(tasks: Mapping[str, Mapping[str, Any]], *, size: int, seed: int) -> list[dict[str, Any]]:
    """Generate rows with `question`, `answer`, `metadata` and `source_dataset`, the same for the same arguments.

    Args:
        tasks: name of a generator -> its options.
        size: rows per generator.
        seed: two seeds give different rows; one that a generator makes twice is left out.

    Raises:
        UserError: the package is missing, a generator is unknown, or its options are wrong.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for name, options in tasks.items():
        dataset = _dataset(name, {**options, "size": size, "seed": seed})
        for index in range(size):
            entry = dataset[index]
            rows.setdefault(
                (name, entry["question"]),
                {
                    "question": entry["question"],
                    "answer": "" if entry["answer"] is None else str(entry["answer"]),
                    "metadata": metadata_text(entry["metadata"]),
                    "source_dataset": name,
                },
            )
    return list(rows.values())


def scorer_of(name: str) -> Callable[[str, dict[str, Any]], float]:
    """Return the scorer of a generator: (answer, entry) -> a number from 0 to 1.

    Raises:
        UserError: the package is missing, or the generator is unknown.
    """
    return _dataset_for_scoring(name).score_answer


@functools.lru_cache(maxsize=256)
def _dataset_for_scoring(name: str) -> Any:
    return _dataset(name, {"size": 1, "seed": 0})


def _dataset(name: str, options: Mapping[str, Any]) -> Any:
    try:
        import reasoning_gym  # pyright: ignore[reportMissingImports]  # an extra
        from reasoning_gym.factory import DATASETS  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"reasoning_gym: {error}; pip install 'llmrl[tasks]'") from error
    if name not in DATASETS:
        raise UserError(f"reasoning_gym: there is no generator {name!r}; there are {', '.join(sorted(DATASETS))}")
    try:
        return reasoning_gym.create_dataset(name, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"reasoning_gym: the options of {name!r} are wrong: {error}") from error


def metadata_text(metadata: Mapping[str, Any]) -> str:
    """Write metadata for `read_metadata`: as a Python literal, because JSON has no tuples and integer keys."""
    literal = repr(metadata)
    try:
        if ast.literal_eval(literal) == metadata:
            return literal
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pass
    return json.dumps(metadata, default=_plain)


def read_metadata(metadata: Any) -> dict[str, Any]:
    """Read metadata: an object, its JSON text, or a Python literal.

    Raises:
        UserError: it is none of these.
    """
    if isinstance(metadata, str):
        try:
            metadata = ast.literal_eval(metadata)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            try:
                metadata = json.loads(metadata)
            except ValueError as error:
                raise UserError(
                    f"reasoning_gym: the column `metadata` is neither JSON nor a literal: {error}"
                ) from None
    return dict(metadata or {})


def _plain(value: Any) -> Any:
    """Return what JSON can hold for a value of a task's metadata."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)
