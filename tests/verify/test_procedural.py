"""reasoning-gym: rows of its generators are scored by its scorers, with the cheats that these allow closed."""

from __future__ import annotations

from typing import Any

import pytest

from llmrl.errors import UserError
from llmrl.types import Score
from llmrl.verify.checks.procedural import make_rows, metadata_text, read_metadata
from llmrl.verify.spec import resolve


def score(answer: str, row: dict[str, Any], **options: Any) -> Score:
    names = ("answer", "metadata", "source_dataset", "question")
    found = resolve("reasoning_gym")(f"<answer>{answer}</answer>", **{name: row[name] for name in names}, **options)
    assert isinstance(found, Score)
    return found


@pytest.mark.parametrize("metadata", [{"a": (1, 2), 3: {4}}, {"a": [1.5, None, True]}, {}])
def test_metadata_keeps_what_json_would_lose(metadata: dict[Any, Any]) -> None:
    assert read_metadata(metadata_text(metadata)) == metadata


def test_metadata_may_be_json_too() -> None:
    assert read_metadata('{"a": true}') == {"a": True}
    assert read_metadata(None) == {}
    with pytest.raises(UserError, match="neither JSON nor a literal"):
        read_metadata("{a}")


def test_a_row_without_a_generator_is_named() -> None:
    import rewards.reasoning_gym as module

    assert "names no generator" in (module.check({"answer": "7", "metadata": {}}) or "")
    assert module.check({"answer": "7", "source_dataset": "chain_sum"}) is None


def test_generators_and_scorers() -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: pip install 'llmrl[tasks]'")
    rows = make_rows({"chain_sum": {"max_terms": 3}, "countdown": {}}, size=4, seed=1)
    assert rows == make_rows({"chain_sum": {"max_terms": 3}, "countdown": {}}, size=4, seed=1)
    assert {row["source_dataset"] for row in rows} == {"chain_sum", "countdown"}
    for row in rows:
        assert score(row["answer"], row).reward == 1.0
        assert score("nothing", row).reward == 0.0
    first = rows[0]
    listed = score(f"{first['answer']} or 5", first)
    assert listed.reward == 0.0 and listed.info["score"] > 0  # the scorer pays for a list that has the answer
    assert score(f"{first['answer']} or 5", first, partial=True).reward == listed.info["score"]


def test_a_scorer_that_pays_for_nonsense_pays_only_for_the_rows_answer() -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: pip install 'llmrl[tasks]'")
    rows = make_rows({"game_of_life_halting": {}}, size=8, seed=0)
    row = next(row for row in rows if row["answer"] == "False")
    assert score("False", row).reward == 1.0
    assert score("perhaps", row).reward == 0.0


def test_wrong_generators_and_options_are_named() -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: pip install 'llmrl[tasks]'")
    with pytest.raises(UserError, match="no generator 'chain'"):
        make_rows({"chain": {}}, size=1, seed=0)
    with pytest.raises(UserError, match="options of 'chain_sum'"):
        make_rows({"chain_sum": {"terms": 2}}, size=1, seed=0)
