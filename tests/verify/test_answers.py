"""Short-answer scoring: hand-computed values per normalizer, two papers' rewards, row formats, hostile text."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmrl.errors import UserError
from llmrl.types import Rollout, Task, Turn
from llmrl.verify.checks import answers as qa
from rewards.qa_match import EXAMPLES, qa_match
from tests.verify.texts import HUGE, assert_linear, repeated, texts

FRAGMENTS = ["<answer>", "</answer>", "<think>", "</think>", "<search>", "</search>", "<information>", "</information>"]


# --- normalisers and measures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "squad", "deepresearcher", "multilingual"),
    [
        ("The  Cat's-Paw, a tale!", "catspaw tale", "the cat s paw a tale", "catspaw tale"),
        ("U.S.A.", "usa", "u s a", "usa"),
        ("another an", "another", "another an", "another"),
        ("\u2018Caf\u00e9\u2019", "\u2018caf\u00e9\u2019", "\u2018caf\u00e9\u2019", "caf\u00e9"),
        ("\u5317\u4eac\u3002", "\u5317\u4eac\u3002", "\u5317\u4eac\u3002", "\u5317 \u4eac"),
        ("\uff21\uff22 \uff11", "\uff41\uff42 \uff11", "\uff41\uff42 \uff11", "ab 1"),
        ("STRASSE Stra\u00dfe", "strasse stra\u00dfe", "strasse stra\u00dfe", "strasse strasse"),
        ("\u0642\u0627\u0644\u061f", "\u0642\u0627\u0644\u061f", "\u0642\u0627\u0644\u061f", "\u0642\u0627\u0644"),
    ],
)
def test_normalizers(text: str, squad: str, deepresearcher: str, multilingual: str) -> None:
    assert qa.squad_em(text) == squad
    assert qa.deepresearcher_f1(text) == deepresearcher
    assert qa.multilingual(text) == multilingual


def test_exact_match_takes_the_best_of_several_golds() -> None:
    assert qa.exact_match("the beatles", ["Rolling Stones", "Beatles"]) == 1.0
    assert qa.exact_match("the beatles band", ["Rolling Stones", "Beatles"]) == 0.0
    assert qa.exact_match("the beatles", ["Beatles"], "deepresearcher_f1") == 0.0


@pytest.mark.parametrize(
    ("prediction", "gold", "normalizer", "expected"),
    [
        # Shared: {x}; 2 * 1 / (2 + 1).
        ("x y", "x", "squad_em", 2 / 3),
        # Multisets: min(2, 1) = 1 shared of 2 and 1; as sets the two are equal.
        ("x x", "x", "squad_em", 2 / 3),
        ("x x", "x", "deepresearcher_f1", 1.0),
        # The article is dropped by one and kept by the other: P = 1/2, R = 1.
        ("the x", "x", "squad_em", 1.0),
        ("the x", "x", "deepresearcher_f1", 2 / 3),
        ("p q", "r", "squad_em", 0.0),
        ("\u5317\u4eac\u5e02", "\u5317\u4eac", "squad_em", 0.0),
        ("\u5317\u4eac\u5e02", "\u5317\u4eac", "multilingual", 0.8),
    ],
)
def test_f1_by_hand(prediction: str, gold: str, normalizer: str, expected: float) -> None:
    assert qa.f1(prediction, [gold, "nothing like it"], normalizer) == pytest.approx(expected)


def test_golds_that_normalize_to_nothing_match_only_themselves() -> None:
    for measure in (qa.exact_match, qa.f1, qa.substring_match):
        assert measure("The", ["the"]) == 1.0
        assert measure("", ["the"]) == 0.0
        assert measure("something", ["a", "?"]) == 0.0
    assert qa.exact_match("", [""]) == qa.substring_match("x", [""]) == qa.f1("", [""]) == 0.0


def test_no_golds_score_nothing() -> None:
    assert qa.exact_match("x", []) == qa.f1("x", []) == qa.substring_match("x", []) == 0.0


def test_an_unknown_normalizer_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="squad_em, deepresearcher_f1, multilingual"):
        qa.f1("x", ["x"], "squad")


# --- extraction and rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer> a </answer>", "a"),
        ("<answer>a</answer> then <answer>b</answer>", "b"),
        ("<answer>a</answer> then <answer>b", "a"),
        ("<answer>a<answer>b</answer>", "b"),
        ("<answer>a</answer></answer>", "a"),
        ("</answer><answer>", None),
        ("<answer></answer>", ""),
        ("answer: a", None),
    ],
)
def test_extract_tag(text: str, expected: str | None) -> None:
    assert qa.extract_tag(text) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("x", ["x"]),
        ("x<|answer_split|> y <|answer_split|>x", ["x", "y"]),
        (["x", "y", "x", " "], ["x", "y"]),
        (np.array(["x", "y"], dtype=object), ["x", "y"]),
        (1912, ["1912"]),
        ({"text": ["x", "y"], "answer_start": [3, 9]}, ["x", "y"]),
        ({"value": "x", "aliases": ["y"], "type": "WikipediaEntity"}, ["x", "y"]),
        ({"style": "rule", "ground_truth": {"target": np.array(["x"], dtype=object)}}, ["x"]),
        ({"style": "rule", "ground_truth": "x<|answer_split|>y"}, ["x", "y"]),
        (None, []),
    ],
)
def test_gold_answers_of_every_row_format(value: Any, expected: list[str]) -> None:
    assert qa.gold_answers(value) == expected


# --- DeepResearcher ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>t</think><answer>The Nile</answer>", 2 * 0.5 * 1 / 1.5),
        ("<think>t</think><tool_call>{}</tool_call><think>u</think><answer>nile</answer>", 1.0),
        ("<answer>nile</answer><answer>x</answer>", 1.0),
        ("<THINK>t</THINK><ANSWER>NILE</ANSWER>", 1.0),
        ("<think>t</think><answer>amazon</answer>", 0.0),
        ("<think>t<answer>nile</answer>", -1.0),
        ("<tool_call><answer>nile</answer>", -1.0),
        ("</think><think><answer>nile</answer>", -1.0),
        ("<think>t</think>nile", -1.0),
        ("", -1.0),
    ],
)
def test_deepresearcher_reward(text: str, expected: float) -> None:
    assert qa.deepresearcher_reward(text, ["Nile"]) == pytest.approx(expected)


# --- Search-R1 --------------------------------------------------------------------------------------------------------

ROUND = "<think>t</think>\n<search>q</search>\n<information>the Nile flows</information>\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>t</think><answer>x</answer>", True),
        ("\n" + ROUND + ROUND + "<think>t</think> <answer>x</answer>\n", True),
        ("<answer>x</answer>", False),
        ("<think>t</think>", False),
        ("<think>t</think><search>q</search><answer>x</answer>", False),
        ("<think>t</think><search>q</search><information>i</information><answer>x</answer>", False),
        ("<think>t</think> so <answer>x</answer>", False),
        ("<think>t</think><answer>x</answer> Done.", False),
        ("<think>t</think><answer>x</answer><think>t</think>", False),
        ("<think><think>t</think></think><answer>x</answer>", False),
        ("<think>t</think><answer>x", False),
        ("<think>t</search><answer>x</answer>", False),
        ("", False),
    ],
)
def test_search_r1_format(text: str, expected: bool) -> None:
    assert qa.search_r1_format(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>t</think><answer>the Nile.</answer>", 1.0),
        ("well, <answer>Nile</answer>", 0.8),
        ("<think>t</think><answer>Po</answer>", 0.2),
        (ROUND + "<think>t</think><answer>Po</answer>", 0.25),
        ("well, <answer>Po</answer>", 0.1),
        ("well, Nile", 0.0),
    ],
)
def test_search_r1_reward(text: str, expected: float) -> None:
    assert qa.search_r1_reward(text, ["Nile"], retrieval_score=0.05) == pytest.approx(expected)


def rollout(*turns: tuple[str, str]) -> Rollout:
    """Make a rollout of pairs (text of the policy, reply of the environment)."""
    return Rollout(
        task=Task(id="t", messages=[{"role": "user", "content": "Which river?"}], answer="Nile"),
        index=0,
        turns=[
            Turn(
                prompt_ids=[1],
                completion_ids=[2],
                rollout_logprobs=[0.0],
                finish="stop",
                policy_version=(0, 0),
                message={"role": "assistant", "content": written},
                replies=[{"role": "user", "content": replied}] if replied else [],
            )
            for written, replied in turns
        ],
    )


def test_search_r1_reads_the_whole_rollout() -> None:
    asked = "<think>t</think><search>q</search>"
    found = "<information>The Nile is long.</information>"
    honest = rollout((asked, found), ("<think>t</think><answer>Po</answer>", ""))
    score = qa_match(honest.completion, "Nile", rollout=honest, measure="search_r1", retrieval_score=0.3)
    assert score.reward == pytest.approx(0.5)
    forged = rollout((asked + found + "<think>t</think><answer>Po</answer>", ""))
    score = qa_match(forged.completion, "Nile", rollout=forged, measure="search_r1", retrieval_score=0.3)
    assert score.reward == pytest.approx(0.1)


def test_deepresearcher_ignores_tags_in_observations() -> None:
    searched = rollout(
        ("<think>t</think><tool_call>{}</tool_call>", "<think> <answer>x"), ("<think></think><answer>Nile</answer>", "")
    )
    assert qa_match(searched.completion, "Nile", rollout=searched, measure="deepresearcher").reward == 1.0


# --- the reward -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", EXAMPLES, ids=lambda e: repr(e["completion"])[:40])
def test_examples(case: dict[str, Any]) -> None:
    columns = {k: v for k, v in case.items() if k != "reward"}
    assert qa_match(**columns).reward == pytest.approx(case["reward"])


def test_a_row_without_gold_answer_is_an_error() -> None:
    with pytest.raises(UserError, match="no gold answer"):
        qa_match("<answer>x</answer>", answer=[], golden_answers=None)
    with pytest.raises(UserError, match="measure 'exact'"):
        qa_match("<answer>x</answer>", "x", measure="exact")  # type: ignore[arg-type]


def test_messages_are_read_like_text() -> None:
    completion = [
        {"role": "assistant", "content": "<answer>Rome</answer>"},
        {"role": "tool", "content": "<answer>Nile</answer>"},
        {"role": "assistant", "content": "<answer>Nile</answer>"},
        {"role": "tool", "content": "<answer>Po</answer>"},
    ]
    assert qa_match(completion, "Nile").reward == 1.0
    assert qa_match([], "Nile").reward == 0.0


def test_natural_questions_rows(shared_data: Path) -> None:
    lines = (shared_data / "qa" / "nq_open_1500.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 1500
    for row, other in itertools.pairwise(rows):
        golds = row["golden_answers"]
        for gold in golds:
            score = qa_match(f"<think>t</think><answer>{gold}</answer>", golden_answers=golds)
            assert score.reward == score.parts["f1"] == score.parts["substring"] == 1.0
        wrong = qa_match("<answer>I do not know</answer>", golden_answers=golds, measure="substring")
        assert wrong.reward == 0.0
        swapped = qa_match(f"<answer>{other['golden_answers'][0]}</answer>", golden_answers=golds)
        assert swapped.reward == float(qa.squad_em(other["golden_answers"][0]) in map(qa.squad_em, golds))


# --- any text ---------------------------------------------------------------------------------------------------------


@given(texts(FRAGMENTS), texts(FRAGMENTS))
def test_any_text_scores_within_range(text: str, gold: str) -> None:
    for name in qa.NORMALIZERS:
        measures = [measure(text, [gold], name) for measure in (qa.exact_match, qa.f1, qa.substring_match)]
        assert all(0.0 <= value <= 1.0 for value in measures)
        if measures[0] == 1.0:
            assert measures[1] == pytest.approx(1.0) and measures[2] == 1.0
        compared = qa.NORMALIZERS[name].normalize(text)
        assert compared == " ".join(compared.split())
    assert qa.deepresearcher_reward(text, [gold]) == -1.0 or 0 <= qa.deepresearcher_reward(text, [gold]) <= 1
    assert 0.0 <= qa.search_r1_reward(text, [gold], retrieval_score=0.1) <= 1.0
    extracted = qa.extract_tag(text)
    assert extracted is None or (extracted in text and "</answer>" not in extracted)


@given(st.text(st.characters(exclude_categories=()), min_size=1, max_size=30))
def test_a_text_matches_itself(text: str) -> None:
    for name in qa.NORMALIZERS:
        expected = float(bool(text.split()))
        assert qa.exact_match(text, [text], name) == qa.f1(text, [text], name) == expected


BLOCKS = ["<think>t</think>", "<search>q</search>", "<information>i</information>", "<answer>a</answer>"]


@given(st.lists(st.sampled_from([*BLOCKS, *BLOCKS, " ", "\n", "x", "<think>", "</answer>"]), max_size=8).map("".join))
@example(ROUND + "<think>t</think><answer>x</answer>")
def test_format_follows_the_grammar(text: str) -> None:
    """Compare with a regular expression of the same language, on texts made of its parts."""
    inner = r"(?:(?!</?(?:think|search|information|answer)>).)*"
    block = {name: f"<{name}>{inner}</{name}>" for name in ("think", "search", "information", "answer")}
    one_round = rf"\s*{block['search']}\s*{block['information']}\s*{block['think']}"
    grammar = rf"\s*{block['think']}(?:{one_round})*\s*{block['answer']}\s*"
    assert qa.search_r1_format(text) == bool(re.fullmatch(grammar, text, re.DOTALL))


@pytest.mark.parametrize(
    "pattern", ["<answer>", "</answer>", "<answer>x</answer>", "<think>", "\ud800", "a the ", "\u4e2d", "\0"]
)
def test_long_texts_take_linear_time(pattern: str) -> None:
    assert_linear(qa.extract_tag, pattern)
    assert_linear(qa.search_r1_format, pattern)
    assert_linear(lambda text: qa.deepresearcher_reward(text, ["x"]), pattern)
    assert_linear(lambda text: qa.f1(text, ["x"], "multilingual"), pattern)
    assert_linear(lambda text: qa.exact_match(text, ["x"]), pattern)


@pytest.mark.slow
def test_ten_megabytes_are_scored() -> None:
    answer = repeated("a \ud800 \0 the \u4e2d " + "long" * 20 + " ", HUGE) + " x"
    text = f"<answer>{answer}</answer>"
    assert qa.extract_tag(text) == answer and not qa.search_r1_format(text)
    assert 0 < qa.f1(answer, ["x"], "multilingual") < 1e-5 and qa.exact_match(answer, ["x"]) == 0
    assert 0 < qa.deepresearcher_reward(text, ["x"]) < 1
