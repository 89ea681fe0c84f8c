"""Columns by name, nested ones by a path with dots: a row and `reward_model.ground_truth` in, the value out."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Any

from llmrl.data.rows import Row
from llmrl.errors import UserError

ABSENT = object()
"""What `pick` returns where there is no such column."""


def pick(row: Row, path: str) -> Any:
    """Return the value of a column; a dot leads into a mapping, a list (by number) or JSON text, unless a column has
    the whole name.

    Returns `ABSENT` where there is none.
    """
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if isinstance(value, str):
            value = _parsed(value)
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return ABSENT
    return value


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def names(row: Row) -> str:
    """Return the columns of a row for messages, with what is nested in them."""
    found = [f"{column}.{inner}" if inner else str(column) for column, value in row.items() for inner in _inner(value)]
    return ", ".join(found) or "(none)"


def _inner(value: Any) -> list[str]:
    return [str(key) for key in value] if isinstance(value, dict) and 0 < len(value) <= 8 else [""]


def choose(option: str, chosen: str | None, defaults: Sequence[str], place: str, row: Row, hint: str = "") -> str:
    """Return the configured column, or the first of the defaults that the first row has.

    Args:
        option: full name of the option, for messages.
        chosen: its value.
        defaults: what it can be if it is not set.
        place: where the first row comes from.
        row: the first row.
        hint: what else could be done, for messages.

    Raises:
        UserError: there is no such column.
    """
    if chosen is not None:
        check_column(option, chosen, place, row)
        return chosen
    found = next((column for column in defaults if pick(row, column) is not ABSENT), None)
    if found is None:
        raise UserError(
            f"{place}: no column named {' / '.join(defaults)}; set {option}{hint} (the columns are {names(row)})"
        )
    return found


def check_column(option: str, chosen: str, place: str, row: Row) -> None:
    """Raise UserError unless the row has the column that an option names."""
    if pick(row, chosen) is not ABSENT:
        return
    close = difflib.get_close_matches(chosen, names(row).split(", "), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UserError(
        f"{place}: {option} names {chosen!r}, but there is no such column{hint} (the columns are {names(row)})"
    )
