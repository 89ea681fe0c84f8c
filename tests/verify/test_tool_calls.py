"""Tool calls: what is read as a call, which arguments match, and calls in any order."""

from __future__ import annotations

from typing import Any

import pytest

from llmrl.errors import UserError
from llmrl.types import Score
from llmrl.verify.checks.tool_calls import Call, expected_calls, mismatch, read_calls
from llmrl.verify.spec import resolve


def reward(completion: str, answer: Any, **options: Any) -> float | None:
    score = resolve("tool_call")(completion, answer=answer, **options)
    assert isinstance(score, Score)
    return score.reward


ONE = Call("f", {"a": 1})


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', [ONE]),
        ('I look.\n<tool_call>\n{"name": "f", "arguments": "{\\"a\\": 1}"}\n</tool_call>', [ONE]),
        ('<tool_call>[{"name": "f", "arguments": {"a": 1}}]</tool_call><tool_call>f(a=1)</tool_call>', [ONE, ONE]),
        ('{"name": "f", "parameters": {"a": 1}}', [ONE]),
        ('[{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]', [ONE]),
        ('```json\n[{"f": {"a": 1}}]\n```', [ONE]),
        ("[f(a=1)]", [ONE]),
        ("f(a=1), f(a=1)", [ONE, ONE]),
        ("[x.f(a=[1, {'b': None}], c=-2.5)]", [Call("x.f", {"a": [1, {"b": None}], "c": -2.5})]),
        ("[]", []),
        ("", []),
    ],
)
def test_forms_of_calls(text: str, calls: list[Call]) -> None:
    assert read_calls(text) == calls


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("f(1)", "name\\(argument=value\\)"),
        ("f(a=g())", "not a literal"),
        ("f(a=1, a=1)", "given twice"),
        ("f(**{'a': 1})", r"by \*\*"),
        ("(lambda: 0)(a=1)", "not the name of a tool"),
        ("I call f(a=1) now", "no tool call"),
        ('<tool_call>{"name": "f"', "not closed"),
        ('<tool_call>{"name": "f"}</tool_call><tool_call>', "not closed"),
        ('{"name": "f", "name": "g"}', "given twice"),
        ('{"name": "f", "arguments": [1]}', "is not a call"),
        ("[1, 2]", "is not a call"),
        ("{" * 50_000, "not JSON"),
        ("[" * 100_000, "nested too deeply|no call in a text"),
        ("[" + "f(a=1)," * 100 + "]", "100 calls"),
    ],
)
def test_what_is_no_call(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_calls(text)


@pytest.mark.parametrize(
    ("values", "ours", "same"),
    [
        ([1], 1, True),
        ([1], 1.0, True),
        ([1], "1", False),
        ([1], True, False),
        ([True], 1, False),
        ([None], None, True),
        (["New York, NY"], "new york ny", True),
        (["a"], "", False),
        ([""], "", True),
        (["a b"], "\u0430 b", False),
        ([[1, "A"]], [1, "a"], True),
        ([[1, 2]], [2, 1], False),
        ([{"k": ["x", "y"]}], {"k": "y"}, True),
        ([{"k": ["x", ""]}], {}, True),
        ([{"k": ["x"]}], {"k": "z"}, False),
        ([{"k": ["x"]}], {"k": "x", "l": 1}, False),
        ([{"k": 1}], {"k": 1}, True),
        (["--"], "**", False),
    ],
)
def test_values(values: list[Any], ours: Any, same: bool) -> None:
    expected = expected_calls([{"f": {"a": values}}])
    assert (mismatch([Call("f", {"a": ours})], expected) is None) == same


def test_calls_match_in_any_order_each_once() -> None:
    answer = [{"f": {"a": [1, 2]}}, {"f": {"a": [1]}}, {"g": {}}]
    assert reward("[f(a=1), g(), f(a=2)]", answer) == 1.0
    assert reward("[f(a=2), f(a=2), g()]", answer) == 0.0
    assert reward("[f(a=1), f(a=1), g(), g()]", answer) == 0.0
    assert reward("[f(a=1), f(a=2)]", answer) == 0.0


def test_optional_arguments_may_be_left_out_and_others_not() -> None:
    answer = [{"f": {"a": [1], "b": ["x", ""]}}]
    for text, right in (("f(a=1)", 1.0), ("f(a=1, b='x')", 1.0), ("f(b='x')", 0.0), ("f(a=1, c=2)", 0.0)):
        assert reward(text, answer) == right


def test_calls_that_the_template_parsed() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert reward("", [{"f": {"a": [1]}}], messages=messages) == 1.0
    assert reward("", [{"f": {"a": [2]}}], messages=messages) == 0.0
    assert reward("", [{"f": {"a": [1]}}], messages=[messages[1], messages[0]]) == 0.0


def test_where_no_call_is_expected() -> None:
    assert reward("It is four.", []) == 1.0
    assert reward("", []) == 0.0
    assert reward("[f(a=1)]", "[]") == 0.0


def test_rows_that_cannot_be_read_are_named() -> None:
    for answer, text in (
        (None, "no expected calls"),
        ("x", "not JSON"),
        ([1], "is not a call"),
        ([{"f": {"a": 1}}], "must be"),
    ):
        with pytest.raises(UserError, match=text):
            reward("[]", answer)
