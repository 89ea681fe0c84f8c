"""SQL by execution: run a query on an SQLite database that it cannot change, within limits, and compare results.

Every query runs on a copy in memory, and an authorizer allows nothing but reading. Work is limited in instructions of
SQLite's machine, so the verdict does not depend on how busy the computer is.
"""

from __future__ import annotations

import functools
import math
import re
import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

MAX_INSTRUCTIONS = 50_000_000
"""Of SQLite's virtual machine, for one query: about 5 seconds."""
MAX_ROWS = 100_000
MAX_RESULT_BYTES = 50_000_000
MAX_HEAP_BYTES = 2_000_000_000
"""Of all databases of one process."""
MAX_VALUE_BYTES = 1_000_000
"""Longest text or blob that a query may build."""
_STEP = 10_000
_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_FORBIDDEN_FUNCTIONS = {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer", "random", "randomblob"}
Row = tuple[Any, ...]


class QueryFailed(Exception):
    """A query is not valid, is refused, or exceeds a limit; the message says which."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a query returned."""

    rows: list[Row]
    tables: frozenset[str]
    """Tables that it read."""


def open_database(setup: str | None, file: str | None, *, thinned: bool = False) -> sqlite3.Connection:
    """Open a database in memory: a copy of a file, or what a script of CREATE and INSERT makes, or both.

    The last few are kept open, because the completions of a group share one, and queries cannot change it.

    Args:
        setup: the script; it runs after the file is copied.
        file: an SQLite file.
        thinned: delete every third row of each table: a second state, in which a constant result is wrong.

    Raises:
        ValueError: the script fails, or the file is missing or not a database.
    """
    path = None if file is None else Path(file).expanduser().resolve()
    if path is not None and not path.is_file():
        raise ValueError(f"the database file {file} does not exist")
    return _opened(setup, path, None if path is None else path.stat().st_mtime_ns, thinned)


@functools.lru_cache(maxsize=8)
def _opened(setup: str | None, path: Path | None, changed: int | None, thinned: bool) -> sqlite3.Connection:
    memory = sqlite3.connect(":memory:", check_same_thread=False)
    try:
        memory.execute(f"PRAGMA hard_heap_limit = {MAX_HEAP_BYTES}")
        memory.execute("PRAGMA temp_store = MEMORY")
        if path is not None:
            with closing(sqlite3.connect(f"file:{quote(path.as_posix())}?mode=ro", uri=True)) as source:
                source.backup(memory)
        if setup is not None:
            memory.set_authorizer(_guard_setup)
            memory.executescript(setup)
            memory.set_authorizer(None)
        if thinned:
            _thin_out(memory)
    except (sqlite3.Error, MemoryError) as error:
        memory.close()
        raise ValueError(f"the database cannot be made: {error or 'out of memory'}") from None
    memory.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
    return memory


def _guard_setup(action: int, first: str | None, *_: str | None) -> int:
    denied = action in (sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH) or (
        action == sqlite3.SQLITE_FUNCTION and str(_[0]).lower() in _FORBIDDEN_FUNCTIONS - {"random"}
    )
    return sqlite3.SQLITE_DENY if denied else sqlite3.SQLITE_OK


def run_query(connection: sqlite3.Connection, query: str) -> Result:
    """Run one SELECT and return its rows.

    Raises:
        QueryFailed: the query is not a single SELECT, fails, or exceeds a limit.
    """
    tables: set[str] = set()
    steps = 0

    def authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
        if action not in _ALLOWED or (
            action == sqlite3.SQLITE_FUNCTION and str(second).lower() in _FORBIDDEN_FUNCTIONS
        ):
            return sqlite3.SQLITE_DENY
        if action == sqlite3.SQLITE_READ and first and not first.startswith("sqlite_"):
            tables.add(first.lower())
        return sqlite3.SQLITE_OK

    def progress() -> int:
        nonlocal steps
        steps += 1
        return int(steps * _STEP > MAX_INSTRUCTIONS)

    connection.set_authorizer(authorize)
    connection.set_progress_handler(progress, _STEP)
    try:
        with closing(connection.cursor()) as cursor:
            rows = _fetched(cursor.execute(query))
    except MemoryError:
        raise QueryFailed("the query needs too much memory") from None
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, UnicodeError) as error:
        if steps * _STEP > MAX_INSTRUCTIONS:
            raise QueryFailed("the query took too long") from None
        raise QueryFailed(str(error)[:200]) from None
    finally:
        connection.set_progress_handler(None, 0)
        connection.set_authorizer(None)
    return Result(rows, frozenset(tables))


def _fetched(cursor: sqlite3.Cursor) -> list[Row]:
    rows: list[Row] = []
    size = 0
    for row in cursor:
        size += sum(len(value) if isinstance(value, str | bytes) else 8 for value in row)
        if len(rows) >= MAX_ROWS or size > MAX_RESULT_BYTES:
            raise QueryFailed(f"more than {MAX_ROWS} rows or {MAX_RESULT_BYTES} bytes")
        rows.append(tuple(row))
    return rows


def _thin_out(connection: sqlite3.Connection) -> None:
    names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    connection.execute("PRAGMA foreign_keys = OFF")
    for name in names:
        quoted = '"' + name.replace('"', '""') + '"'
        try:
            connection.execute(f"DELETE FROM {quoted} WHERE rowid IN (SELECT rowid FROM {quoted} WHERE rowid % 3 = 1)")
        except sqlite3.Error:
            continue  # no rowid, or a virtual table
    connection.commit()


def is_ordered(query: str) -> bool:
    """Return whether the outermost SELECT has an ORDER BY."""
    text = re.sub(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|--[^\n]*|/\*.*?\*/", " ", query, flags=re.DOTALL)
    while (shorter := re.sub(r"\([^()]*\)", " ", text)) != text:
        text = shorter
    return re.search(r"\border\s+by\b", text, re.IGNORECASE) is not None


def same_rows(ours: Sequence[Row], theirs: Sequence[Row], *, ordered: bool) -> bool:
    """Compare two results, as sequences or as multisets of rows. Columns count by position; 1 is 1.0."""
    if len(ours) != len(theirs):
        return False
    a, b = ([tuple(map(_key, row)) for row in rows] for rows in (ours, theirs))
    return a == b if ordered else Counter(a) == Counter(b)


def _key(value: Any) -> Any:
    """Return what a value is compared by: numbers to 9 digits, texts and blobs as they are."""
    if isinstance(value, float) and not math.isfinite(value):
        return ("number", str(value))
    if isinstance(value, int | float):
        return ("number", float(f"{value:.9g}"))
    return (type(value).__name__, value)
