"""What is taken out of a test file, and what the test runner tells about values."""

from __future__ import annotations

import math
from typing import Any

import pytest

from llmrl.sandbox import wire
from llmrl.verify.repository.harness import Tree
from llmrl.verify.repository.withhold import is_telling, withhold

SOURCE = """
import pytest

def test_direct():
    assert f(2) == 14
    assert [1, 2, 3] == g()
    assert f(1) == True

def test_leaked():
    assert f("echo") == "echo"

def test_variable():
    expected = {"a": 71}
    assert f() == expected

def test_used_variable():
    expected = [7, 8, 9]
    assert f(expected) == expected

class TestX:
    def test_method(self):
        self.assertEqual(f(1), "text")
        for n in range(3):
            self.assertEqual(f(n), 55)
        with pytest.raises(ValueError):
            assert f(3) == 66

@pytest.mark.parametrize("a, expected", [(5, "five"), (6, "six"), (7, [7, 7])])
def test_rows(a, expected):
    assert f(a) == expected

@pytest.mark.parametrize("a, expected", [(5, "five"), (6, "")])
def test_guessed_row(a, expected):
    assert f(a) == expected

def helper():
    assert f(2) == 99
"""


def test_expected_values_are_taken_out() -> None:
    found = withhold(SOURCE, "0")
    for gone in ("14", "[1, 2, 3]", "71", "'text'", "55", "66", "'six'", "[7, 7]"):
        assert gone not in found.source
    for kept in ("== True", "f('echo')", "f(expected)", "99", "(6, '')"):
        assert kept in found.source
    assert {name: (len(function.sites), function.tokens) for name, function in found.functions.items()} == {
        "test_direct": (2, False),
        "test_variable": (1, False),
        "TestX::test_method": (1, False),
        "test_rows": (1, True),
    }
    values = list(found.answers.values())
    for value in (14, [1, 2, 3], {"a": 71}, "text", 55, 66, "five", "six", [7, 7], "echo"):
        assert value in values
    assert sorted(found.shown.values()) == ["expected2", "five", "six"]
    compile(found.source, "x", "exec")


def test_what_is_left_in_place_renames_nothing_else() -> None:
    all_out = withhold(SOURCE, "0")
    first = all_out.functions["test_direct"].sites[0]
    fewer = withhold(SOURCE, "0", frozenset({first}))
    assert "f(2) == 14" in fewer.source
    assert fewer.answers == {name: value for name, value in all_out.answers.items() if name != first}


def test_a_file_that_does_not_parse_stays() -> None:
    assert withhold("def test(:", "0").source == "def test(:"


@pytest.mark.parametrize("value", [True, None, 0, -1, 2, 1.0, "", "x", b"", [], {}, (), [1], math.nan])
def test_guessable_values(value: Any) -> None:
    assert not is_telling(value)


@pytest.mark.parametrize(
    "value",
    [
        3,
        2.5,
        "ab",
        [1, (2, {3}), {"a": None}],
        -(2**70),
        math.inf,
        1 + 2j,
        b"\xff",
        frozenset({1}),
        True,
        {1: "\ud800"},
    ],
)
def test_values_arrive_as_they_were(value: Any) -> None:
    arrived = wire.decode(Tree().of(value), lambda *_: "handle")
    assert arrived == value and type(arrived) is type(value)


def test_other_objects_arrive_as_handles() -> None:
    assert wire.decode(Tree().of([object(), 1]), lambda *_: "handle") == ["handle", 1]
