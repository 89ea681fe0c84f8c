"""SQL by execution: 1.0 if the response's query returns what the reference query returns, on SQLite.

Rows have the reference query in `answer`, `query` or `sql`, and the database: `setup` or `sql_context` (a script of
CREATE and INSERT), or `db_path` (a file). Order counts where the reference has an ORDER BY. Both queries also run on a
second state of the database, from which every third row was deleted: a result written into the query is wrong there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llmrl.errors import UserError
from llmrl.types import Score
from llmrl.verify.checks.sql import QueryFailed, is_ordered, open_database, run_query, same_rows
from llmrl.verify.thinking import without_thinking

POOL = True
_FENCE = re.compile(r"```[ \t]*(\w*)[ \t]*\r?\n(.*?)```", re.DOTALL)

_ROW = {
    "setup": "CREATE TABLE town (name TEXT, land TEXT, size INT);"
    "INSERT INTO town VALUES ('Rome', 'IT', 28), ('Pisa', 'IT', 1), ('Bonn', 'DE', 3), "
    "('Kiel', 'DE', 2), ('Ulm', 'DE', 1);",
    "answer": "SELECT land, COUNT(*) FROM town GROUP BY land",
}
_ORDERED = {**_ROW, "answer": "SELECT name FROM town ORDER BY size DESC, name"}
EXAMPLES = [
    # good
    {**_ROW, "completion": "SELECT land, SUM(1) AS n FROM town GROUP BY land ORDER BY n DESC", "reward": 1.0},
    {**_ROW, "completion": "Count:\n```sql\nSELECT land, COUNT(name) FROM town GROUP BY 1;\n```", "reward": 1.0},
    {**_ORDERED, "completion": "SELECT name FROM town ORDER BY -size, name", "reward": 1.0},
    {
        **_ROW,
        "completion": "WITH t AS (SELECT land FROM town) SELECT land, COUNT(*) FROM t GROUP BY land",
        "reward": 1.0,
    },
    # bad
    {**_ROW, "completion": "SELECT COUNT(*), land FROM town GROUP BY land", "reward": 0.0},
    {**_ORDERED, "completion": "SELECT name FROM town ORDER BY name", "reward": 0.0},
    {**_ROW, "completion": "SELECT land FROM", "reward": 0.0},
    {**_ROW, "completion": "I would group by land.", "reward": 0.0},
    # hostile
    {**_ROW, "completion": "", "reward": 0.0},
    {**_ROW, "completion": "SELECT 'IT', 2 UNION ALL SELECT 'DE', 3", "reward": 0.0},
    {**_ROW, "completion": "SELECT 'IT', 2 FROM town UNION SELECT 'DE', 3 FROM town", "reward": 0.0},
    {**_ROW, "completion": "DROP TABLE town", "reward": 0.0},
    {**_ROW, "completion": "SELECT 1; SELECT land, COUNT(*) FROM town GROUP BY land", "reward": 0.0},
    {**_ROW, "completion": "ATTACH '/tmp/other.db' AS other", "reward": 0.0},
    {
        **_ROW,
        "completion": "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT x FROM c",
        "reward": 0.0,
    },
    {
        **_ROW,
        "completion": "```sql\nSELECT 1\n```\n```sql\nSELECT land, COUNT(*) FROM town GROUP BY 1\n```",
        "reward": 0.0,
    },
    # nothing to tell right from wrong
    {**_ROW, "answer": "SELECT name FROM town WHERE size > 99", "completion": "SELECT 1 WHERE 0", "reward": None},
]


def sql_result(
    completion: str,
    answer: str | None = None,
    query: str | None = None,
    sql: str | None = None,
    setup: str | None = None,
    sql_context: str | None = None,
    db_path: str | None = None,
    prefilled: str = "",
) -> Score:
    """Run the response's query and the reference query, and compare what they return.

    Args:
        completion: the policy's response: a query, alone or in its only fenced block. Its thinking is not read.
        answer: the reference query. The first of these three columns that is given is used.
        query: the same (Spider).
        sql: the same.
        setup: a script that makes the database.
        sql_context: the same (sql-create-context).
        db_path: an SQLite file; it is copied into memory and not changed.
        prefilled: how the prompt already begins the response, such as `<think>`.

    Raises:
        UserError: the row has no query or no database, or the reference query fails.
    """
    gold, script = _reference(answer, query, sql), setup if setup is not None else sql_context
    text = without_thinking(prefilled + completion).strip()
    blocks = [block for label, block in _FENCE.findall(text) if label.lower() in ("", "sql", "sqlite")]
    if len(blocks) > 1:
        return Score(reward=0.0, info={"reason": f"{len(blocks)} fenced blocks, expected one"})
    ours = (blocks[0] if blocks else text).strip()
    if not ours:
        return Score(reward=0.0, info={"reason": "no query"})
    some_rows = False
    for thinned in (False, True):
        wanted = _gold_rows(gold, script, db_path, thinned)
        some_rows = some_rows or bool(wanted)
        try:
            found = run_query(open_database(script, db_path, thinned=thinned), ours).rows
        except QueryFailed as error:
            return Score(reward=0.0, info={"reason": str(error)})
        if not same_rows(found, wanted, ordered=is_ordered(gold)):
            where = "in the second state of the database" if thinned else ""
            reason = f"{len(found)} rows that differ from the {len(wanted)} expected {where}".strip()
            return Score(reward=0.0, info={"reason": reason, "rows": [str(row)[:80] for row in found[:3]]})
    if not some_rows:
        return Score(reward=None, info={"reason": "the reference query returns no rows, so any empty result equals it"})
    return Score(reward=1.0, info={"num_rows": len(wanted)})


def check(row: dict[str, Any]) -> str | None:
    """Say that a row's database or reference query fails, or that the query returns no rows."""
    script = row.get("setup") if row.get("setup") is not None else row.get("sql_context")
    try:
        gold = _reference(row.get("answer"), row.get("query"), row.get("sql"))
        if row.get("db_path") is not None:  # copying a large file for each row would take too long
            return None if Path(row["db_path"]).expanduser().is_file() else f"no database file {row['db_path']}"
        rows = _gold_rows(gold, script, row.get("db_path"), False)
    except UserError as error:
        return str(error)
    return None if rows else "the reference query returns no rows, so any empty result equals it"


def _reference(*columns: str | None) -> str:
    found = next((column for column in columns if column is not None), None)
    if not isinstance(found, str) or not found.strip():
        raise UserError("sql_result: the row has no reference query; it needs `answer`, `query` or `sql`")
    return found


def _gold_rows(gold: str, script: str | None, file: str | None, thinned: bool) -> list[tuple[Any, ...]]:
    if script is None and file is None:
        raise UserError("sql_result: the row has no database; it needs `setup`, `sql_context` or `db_path`")
    try:
        return run_query(open_database(script, file, thinned=thinned), gold).rows
    except ValueError as error:
        raise UserError(f"sql_result: {error}") from None
    except QueryFailed as error:
        raise UserError(f"sql_result: the reference query fails: {error}") from None
