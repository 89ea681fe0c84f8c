"""A small repository with two commits, made in a folder: the state with a bug, and the fix with its tests."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

BUGGY = '''
def roman(number):
    """Return a number in Roman numerals."""
    if number <= 0:
        raise ValueError("positive numbers only")
    return "I" * number


def words(text):
    return text.split(" ")
'''
FIXED = '''
SIGNS = [(100, "C"), (90, "XC"), (50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")]


def roman(number):
    """Return a number in Roman numerals."""
    if number <= 0:
        raise ValueError("positive numbers only")
    text = ""
    for value, sign in SIGNS:
        while number >= value:
            text, number = text + sign, number - value
    return text


def words(text):
    return text.split(" ")
'''
OLD_TESTS = """
import pytest
from numerals import roman, words


def test_small():
    assert roman(3) == "III"


def test_negative():
    with pytest.raises(ValueError):
        roman(-1)


def test_words():
    assert words("a b") == ["a", "b"]
"""
NEW_TESTS = (
    OLD_TESTS
    + """

@pytest.mark.parametrize("number, expected", [(4, "IV"), (9, "IX"), (88, "LXXXVIII")])
def test_many(number, expected):
    assert roman(number) == expected


class TestLarge:
    def test_hundreds(self):
        result = "CCCXCIV"
        assert roman(394) == result
        assert [roman(n) for n in (6, 7)] == ["VI", "VII"]
"""
)
NAMES = [
    *("tests/test_numerals.py::test_many[4-IV]", "tests/test_numerals.py::test_many[9-IX]"),
    *("tests/test_numerals.py::test_many[88-LXXXVIII]", "tests/test_numerals.py::TestLarge::test_hundreds"),
]
OLD_NAMES = [f"tests/test_numerals.py::{name}" for name in ("test_small", "test_negative", "test_words")]


def git(folder: Path, *arguments: str) -> str:
    settings = [
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@b",
        "-c",
        "commit.gpgsign=false",
        "-c",
        "init.defaultBranch=main",
    ]
    done = subprocess.run(["git", *settings, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


def make(folder: Path) -> dict[str, Any]:
    """Make the repository and return a row of it in the columns of SWE-bench."""
    (folder / "src" / "numerals").mkdir(parents=True)
    (folder / "tests").mkdir()
    (folder / "src" / "numerals" / "__init__.py").write_text(BUGGY)
    (folder / "tests" / "test_numerals.py").write_text(OLD_TESTS)
    (folder / "tests" / "conftest.py").write_text("")
    (folder / "pyproject.toml").write_text("[tool.pytest.ini_options]\naddopts = '--no-such-option'\n")
    (folder / ".gitattributes").write_text("tests export-ignore\n")
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "a first version")
    base = git(folder, "rev-parse", "HEAD").strip()
    (folder / "src" / "numerals" / "__init__.py").write_text(FIXED)
    git(folder, "commit", "-qam", "all numerals")
    patch = git(folder, "diff", base, "HEAD")
    (folder / "tests" / "test_numerals.py").write_text(NEW_TESTS)
    git(folder, "commit", "-qam", "tests of all numerals")
    test_patch = git(folder, "diff", "HEAD^", "HEAD")
    return {
        "repository": str(folder),
        "base_commit": base,
        "patch": patch,
        "test_patch": test_patch,
        "FAIL_TO_PASS": NAMES,
        "PASS_TO_PASS": OLD_NAMES,
    }


def diff(path: str, before: str, after: str) -> str:
    """Return a unified diff of one file, as git writes it."""
    import difflib

    lines = difflib.unified_diff(before.splitlines(True), after.splitlines(True), f"a/{path}", f"b/{path}")
    return f"diff --git a/{path} b/{path}\n" + "".join(lines)
