"""Rows that cannot be used: found one by one in every check, reported together before a model loads.

Each check adds what it finds; `settle` then raises one error that lists all of it, or leaves the rows out and writes
them down (`data.on_bad_row`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmrl.errors import UserError

OnBadRow = Literal["error", "drop"]
NUM_EXAMPLES = 3
"""Places shown of each kind of finding."""
DROPPED = "dropped_rows.jsonl"
"""File in the run's folder with the rows that were left out."""


class BadRow(UserError):
    """One row cannot be used.

    Args:
        place: where it comes from ("train.jsonl, line 3").
        reason: what is wrong and how to fix it; it may begin with the column.
    """

    def __init__(self, place: str, reason: str) -> None:
        self.place, self.reason = place, reason
        separator = ", " if reason.startswith(("column ", "message ")) else ": "
        super().__init__(f"{place}{separator}{reason}")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A row that cannot be used, and why."""

    place: str
    reason: str
    row: Any = None

    def __str__(self) -> str:
        return str(BadRow(self.place, self.reason))


@dataclass(kw_only=True)
class RowReport:
    """What is known about the rows of one dataset, and what the checks have found.

    Args:
        on_bad_row: raise an error, or leave such rows out.
        what: what the rows are called in messages.
    """

    on_bad_row: OnBadRow = "error"
    what: str = "rows"
    num_rows: int = 0
    """Rows looked at, good or bad."""
    streams: bool = False
    """They were read no further than a run needs, so that a longer run has more of them."""
    places: dict[str, str] = field(default_factory=dict)
    """Where the row of each task comes from, by task id."""
    found: list[Finding] = field(default_factory=list)

    def add(self, place: str, reason: str, row: Any = None) -> None:
        """Note that a row cannot be used."""
        self.found.append(Finding(place=place, reason=reason, row=row))

    def refuse(self, place: str, error: BadRow, row: Any) -> None:
        """Note the row that could not be read, or that is wrong; `row` may itself say that it could not be read."""
        reason = str(error).removeprefix(place).lstrip(":, ")
        self.add(place, reason, None if isinstance(row, BadRow) else row)

    def place_of(self, task_id: str) -> str:
        """Return where the row of a task comes from; of a task made in Python, its id."""
        return self.places.get(task_id, f"task {task_id}")

    def settle(self, num_left: int) -> list[str]:
        """Raise if rows must not be left out, or if none are left. Returns lines to show.

        Raises:
            UserError: with all findings, grouped, with counts and examples.
        """
        if not self.found:
            return []
        if self.on_bad_row == "error":
            raise UserError(self.text())
        if not num_left:
            raise UserError(f"data.on_bad_row drop leaves out every row. {self.text()}")
        kinds = by_reason(self.found)
        reasons = "; ".join(f"{len(group)} x {group[0].reason}" for group in kinds[:NUM_EXAMPLES])
        more = f"; and {len(kinds) - NUM_EXAMPLES} more reasons" if len(kinds) > NUM_EXAMPLES else ""
        return [f"{len(self.found)} of {self.num_rows} {self.what} left out: {reasons}{more}"]

    def text(self) -> str:
        """Return all findings as text: one line for a single one, else one per kind, with counts and examples."""
        kinds = by_reason(self.found)
        if len(kinds) == 1 and len(self.found) == self.num_rows > 1:
            # Not the rows are wrong, but what is asked of them.
            return f"{self.found[0]} (so it is with all {self.num_rows} {self.what})"
        rest = "" if len(self.found) == self.num_rows else "; or leave such rows out with data.on_bad_row drop"
        if len(self.found) == 1:
            return f"{self.found[0]}{rest}"
        lines = [f"{len(self.found)} of {self.num_rows} {self.what} cannot be used{rest}:"]
        for group in kinds:
            examples = _together([finding.place for finding in group[:NUM_EXAMPLES]])
            more = f" and {len(group) - NUM_EXAMPLES} more" if len(group) > NUM_EXAMPLES else ""
            count = f"{len(group)} rows: " if len(group) > 1 else ""
            lines.append(f"  - {count}{group[0].reason}\n    ({examples}{more})")
        return "\n".join(lines)


def by_reason(found: Iterable[Finding]) -> list[list[Finding]]:
    """Group findings whose reasons differ in quoted values and numbers only; the largest group comes first."""
    groups: dict[str, list[Finding]] = {}
    for finding in found:
        groups.setdefault(_kind(finding.reason), []).append(finding)
    return sorted(groups.values(), key=len, reverse=True)


def _together(places: list[str]) -> str:
    """Return places as text, with the name of a file once: `train.jsonl, line 3, line 7`."""
    file = places[0].partition(", ")[0]
    return ", ".join([places[0], *(place.removeprefix(f"{file}, ") for place in places[1:])])


def _kind(reason: str) -> str:
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "*", reason)


def write_dropped(folder: Path, found: Iterable[Finding]) -> None:
    """Write the rows that were left out, with the reasons, as JSON lines in the run's folder."""
    from llmrl.track.files import replacing

    with replacing(folder / DROPPED) as file:
        for finding in found:
            line = {"where": finding.place, "reason": finding.reason, "row": finding.row}
            file.write(json.dumps(line, default=str) + "\n")
