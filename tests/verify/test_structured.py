"""JSON against a schema, and multiple choice: rows that cannot be scored, and what a policy might try."""

from __future__ import annotations

from typing import Any

import pytest

from llmrl.errors import UserError
from llmrl.types import Score
from llmrl.verify.spec import resolve


def score(name: str, completion: str, **row: Any) -> Score:
    found = resolve(name)(completion, **row)
    assert isinstance(found, Score)
    return found


# --- json_schema ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("", "not JSON"),
        ("{'a': 1}", "not JSON"),
        ('{"a": 1,}', "not JSON"),
        ('{"a": 1} // done', "not JSON"),
        ('{"a": Infinity}', "Infinity is not JSON"),
        ('{"a": 1, "a": 2}', "a key is given twice"),
        ('{"a": true}', "$.a: True is not of type 'integer'"),
        ('{"b": 1}', "$: 'a' is a required property"),
        ("```json\n{}\n```\n```\n{}\n```", "2 fenced blocks"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("\ufeff{}", "not JSON"),
    ],
)
def test_the_reason_says_what_is_wrong(completion: str, reason: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    found = score("json_schema", completion, schema=schema)
    assert found.reward == 0.0
    assert reason in found.info["reason"]


def test_the_expected_value_is_compared_as_json() -> None:
    for text, reward in (("[1, true]", 1.0), ("[1.0, true]", 1.0), ("[1, 1]", 0.0), ("[true, 1]", 0.0), ("[1]", 0.0)):
        assert score("json_schema", text, schema=True, answer="[1, true]").reward == reward


def test_a_bad_schema_is_named_and_a_remote_one_is_not_fetched() -> None:
    for schema, text in (({"type": "objekt"}, "not valid at"), ("{", "not JSON"), (3, "must be an object")):
        with pytest.raises(UserError, match=text):
            score("json_schema", "1", schema=schema)
    with pytest.raises(Exception, match="Unresolvable"):
        score("json_schema", "1", schema={"$ref": "http://127.0.0.1:9/schema.json"})


# --- multiple_choice --------------------------------------------------------------------------------------------------

OPTIONS = ["12", "15", "18", "none of these"]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (r"\boxed{15}", 1.0),
        (r"\boxed{B}", 1.0),
        (r"\boxed{\text{(B)}}", 1.0),
        ("**Answer: B**", 1.0),
        ("The answer is B: 15.", 1.0),
        ("B", 1.0),
        ("(b)", 1.0),
        ("<answer>B</answer>", 1.0),
        ("I choose A. No, wait. The answer is B.", 1.0),
        ("None of these", 0.0),
        ("A or B", 0.0),
        ("Answer: A, B", 0.0),
        ("The answer is A or B.", 0.0),
        ("Answer: B) 12", 0.0),
        (r"\boxed{12, 15, 18}", 0.0),
        (r"\boxed{A, B, C, D}", 0.0),
        (r"\boxed{\mathcal{B}}", 0.0),
        ("The answer is \uff22.", 1.0),  # a full-width B is a B
        ("The answer is \u0392.", 0.0),  # a Greek one is not
        ("The answer is not B.", 0.0),
        ("Which of A, B, C, D?", 0.0),
        ("Between", 0.0),
    ],
)
def test_choices(completion: str, reward: float) -> None:
    assert score("multiple_choice", completion, answer="B", options=OPTIONS).reward == reward


@pytest.mark.parametrize(
    ("answer", "options", "gold"),
    [("B", OPTIONS, "B"), (1, OPTIONS, "B"), ("1", OPTIONS, "B"), ("15", OPTIONS, "B"), ("C", None, "C")],
)
def test_forms_of_the_right_answer(answer: Any, options: Any, gold: str) -> None:
    assert score("multiple_choice", "A", answer=answer, options=options).info["gold"] == gold


def test_an_answer_that_is_no_option_is_named() -> None:
    for answer in ("E", "16", 4, "", None, True):
        with pytest.raises(UserError, match="none of the options"):
            score("multiple_choice", "A", answer=answer, options=OPTIONS)
