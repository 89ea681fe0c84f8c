"""Ids of tasks: the same on every machine and in every version, because ledgers and checkpoints hold them."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from llmrl.data.report import BadRow


def new_id(name: str, prompt: Any, answer: Any, taken: dict[str, int], place: str) -> str:
    """Return `name`-`hash` of (prompt, answer), or of (prompt, answer, k) for the k-th repetition of a row.

    Ids never change: the ledgers and checkpoints of earlier runs hold them.

    Args:
        name: short name of the dataset.
        prompt: the row's, text or messages.
        answer: the row's, any plain value.
        taken: ids so far, and how often each was repeated; updated.
        place: where the row comes from, for errors.
    """
    first = task_id = f"{name}-{_digest([prompt, answer], place)}"
    while task_id in taken:
        taken[first] += 1
        task_id = f"{name}-{_digest([prompt, answer, taken[first]], place)}"
    taken[task_id] = 0
    return task_id


def _digest(content: Any, place: str) -> str:
    """Return the first 12 hex digits of SHA-256 over canonical JSON, the same on every machine and Python version."""
    try:
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), default=_plain)
    except TypeError as error:
        raise BadRow(place, f"prompt and answer must be plain values such as text, numbers, lists ({error})") from None
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def _plain(value: Any) -> Any:
    """Convert values of tables that JSON does not know: numpy numbers and arrays, dates, bytes."""
    for method in ("tolist", "isoformat", "hex"):
        if hasattr(value, method):
            return getattr(value, method)()
    raise TypeError(f"found {type(value).__name__}")
