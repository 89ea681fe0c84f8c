"""SQL by execution and regular expressions: what counts as equal, and what a hostile query or pattern costs."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from llmrl.errors import UserError
from llmrl.types import Score
from llmrl.verify.checks.sql import QueryFailed, is_ordered, open_database, run_query, same_rows
from llmrl.verify.spec import resolve

SETUP = "CREATE TABLE t (a INT, b TEXT); INSERT INTO t VALUES (1, 'x'), (2, 'y'), (3, 'y'), (4, NULL), (5, 'x');"


def score(name: str, completion: str, **row: Any) -> Score:
    found = resolve(name)(completion, **row)
    assert isinstance(found, Score)
    return found


@pytest.mark.parametrize(
    ("gold", "ours", "reward"),
    [
        ("SELECT a FROM t", "select a from t order by a desc", 1.0),
        ("SELECT a FROM t ORDER BY a", "SELECT a FROM t ORDER BY a DESC", 0.0),
        ("SELECT a FROM t ORDER BY a", "SELECT a * 1.0 FROM t ORDER BY a", 1.0),
        ("SELECT b FROM t", "SELECT DISTINCT b FROM t", 0.0),
        ("SELECT COUNT(*) FROM t", "SELECT 5", 0.0),
        ("SELECT COUNT(*) FROM t", "SELECT 5 FROM t LIMIT 1", 0.0),
        ("SELECT COUNT(*) FROM t", "SELECT COUNT(a) FROM t", 1.0),
        ("SELECT COUNT(*) FROM t", "SELECT COUNT(b) FROM t", 0.0),
        ("SELECT a FROM t WHERE b IS NULL", "SELECT 4", 0.0),
        ("SELECT a, b FROM t", "SELECT b, a FROM t", 0.0),
        ("SELECT a FROM t", "EXPLAIN SELECT a FROM t", 0.0),
        ("SELECT a FROM t", "PRAGMA table_info(t)", 0.0),
        ("SELECT a FROM t", "DELETE FROM t RETURNING a", 0.0),
        ("SELECT a FROM t", "SELECT load_extension('x')", 0.0),
        ("SELECT a FROM t", "SELECT a FROM t; DROP TABLE t", 0.0),
        ("SELECT a FROM t", "SELECT a FROM t;", 1.0),
        ("SELECT a FROM t", "SELECT a FROM t -- all", 1.0),
        ("SELECT a FROM t", "SELECT \x00", 0.0),
        ("SELECT a FROM t", "SELECT * FROM t, t, t, t, t, t, t, t, t, t, t, t", 0.0),
        ("SELECT a FROM t", "SELECT zeroblob(900000) FROM t x, t y, t z, t w", 0.0),
        ("SELECT a FROM t", "SELECT printf('%.*c', 999999999, 'x')", 0.0),
    ],
)
def test_queries(gold: str, ours: str, reward: float) -> None:
    assert score("sql_result", ours, answer=gold, setup=SETUP).reward == reward
    # Whatever it was, the next query finds the database unchanged.
    assert run_query(open_database(SETUP, None), "SELECT COUNT(*) FROM t").rows == [(5,)]


@pytest.mark.parametrize(
    ("query", "ordered"),
    [
        ("SELECT a FROM t ORDER  BY a", True),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a)", False),
        ("SELECT row_number() OVER (ORDER BY a) FROM t", False),
        ("SELECT 'order by' FROM t -- order by", False),
        ("SELECT a FROM t UNION SELECT 1 ORDER BY 1", True),
    ],
)
def test_only_an_outer_order_by_orders(query: str, ordered: bool) -> None:
    assert is_ordered(query) == ordered


def test_rows_are_compared_by_value() -> None:
    assert same_rows([(1, "a")], [(1.0, "a")], ordered=True)
    assert same_rows([(0.1 + 0.2,)], [(0.3,)], ordered=False)
    assert not same_rows([(1,)], [("1",)], ordered=False)
    assert not same_rows([(1,), (1,), (2,)], [(1,), (2,), (2,)], ordered=False)
    assert not same_rows([(b"a",)], [("a",)], ordered=False)


def test_a_file_is_copied_and_never_changed(tmp_path: Path) -> None:
    file = tmp_path / "my towns.db"
    with sqlite3.connect(file) as connection:
        connection.executescript(SETUP)
    before = file.read_bytes()
    row = {"query": "SELECT a FROM t", "db_path": str(file)}
    assert score("sql_result", "SELECT a FROM t ORDER BY 1", **row).reward == 1.0
    assert score("sql_result", "UPDATE t SET a = 1", **row).reward == 0.0
    assert file.read_bytes() == before


def test_a_setup_script_reaches_no_other_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be made"):
        open_database(f"ATTACH '{tmp_path / 'x.db'}' AS x;", None)
    assert list(tmp_path.iterdir()) == []


def test_a_runaway_query_ends() -> None:
    endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT COUNT(*) FROM c"
    with pytest.raises(QueryFailed, match="took too long"):
        run_query(open_database(SETUP, None), endless)


def test_rows_without_a_usable_reference() -> None:
    import rewards.sql_result as module

    for row, text in (
        ({"setup": SETUP}, "no reference query"),
        ({"answer": "SELECT 1"}, "no database"),
        ({"answer": "SELECT c FROM t", "setup": SETUP}, "the reference query fails: no such column: c"),
        ({"answer": "SELECT 1", "setup": "CREATE"}, "cannot be made"),
        ({"answer": "SELECT 1", "db_path": "/nowhere.db"}, "no database file"),
    ):
        assert text in (module.check(row) or "")
        with pytest.raises(UserError):
            score("sql_result", "SELECT 1", **row)
    assert "no rows" in (module.check({"answer": "SELECT 1 WHERE 0", "setup": SETUP}) or "")
    assert score("sql_result", "SELECT 1 WHERE 0", answer="SELECT a FROM t WHERE 0", setup=SETUP).reward is None


# --- regex_match ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [r"(a+)+b", r"(a|aa)+b", r"(.*a){25}b", r"(\w+\s?)+!"])
def test_a_pattern_that_backtracks_without_end_is_no_match(pattern: str) -> None:
    found = score("regex_match", "a" * 400, pattern=pattern)
    assert found.reward == 0.0
    assert "more than" in found.info["reason"] or "no match" in found.info["reason"]


def test_modes_and_flags() -> None:
    assert score("regex_match", "x 12 y", pattern=r"\d+", mode="search").reward == 1.0
    assert score("regex_match", "x 12 y", pattern=r"\d+").reward == 0.0
    assert score("regex_match", r"so \boxed{12}", pattern=r"\d+", mode="answer").reward == 1.0
    assert score("regex_match", "AB", regex="ab", flags="i").reward == 1.0
    assert score("regex_match", "a\nb", pattern="a.b", flags="s").reward == 1.0
    assert score("regex_match", "a" * 100_001, pattern="a+").reward == 0.0


def test_wrong_patterns_are_named() -> None:
    for row, text in (
        ({}, "no pattern"),
        ({"pattern": "("}, "not valid"),
        ({"pattern": "a", "flags": "q"}, "unknown"),
        ({"pattern": "a", "mode": "some"}, "use full"),
    ):
        with pytest.raises(UserError, match=text):
            score("regex_match", "a", **row)
