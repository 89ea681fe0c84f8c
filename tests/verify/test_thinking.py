"""One rule for thinking: what it removes, and that every verifier reads what it leaves."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given

from llmrl.verify.checks.answers import deepresearcher_reward, search_r1_reward
from llmrl.verify.checks.math import extract_answer
from llmrl.verify.citations.pages import final_response, judged_text
from llmrl.verify.code.extract import extract_program
from llmrl.verify.code.rows import read_row
from llmrl.verify.judge.judge import OfflineJudge
from llmrl.verify.thinking import without_thinking
from llmrl.verify.translation.compare import parse_output
from rewards.box_iou import box_iou
from rewards.format_tags import format_tags
from rewards.judge import judge
from rewards.qa_match import qa_match
from tests.verify.texts import assert_linear, texts

# Capital letters stand for a piece of text each: T and U are thought, A and B are answered.
SHAPES = [
    ("A", "A"),
    ("<think>T</think>A", "A"),
    ("T</think>A", "A"),
    ("A<think>T</think>B", "A\nB"),
    ("<think>T</think>A<think>U</think>B", "A\nB"),
    ("T</think>A<think>U</think>B", "A\nB"),
    ("<think>T</think>A<think>U", "A"),
    ("T</think>A<think>U", "A"),
    ("A<think>T", "A"),
    ("<think>T", ""),
    ("<think>T</think>", ""),
    ("T</think>", ""),
    ("<think>T</think><think>U</think>A", "A"),
    ("<think>T<think>U</think>A", "A"),
    ("<think>T</think>A</think>B", "A\nB"),
    ("T</think>A</think>B", "A\nB"),
    ("</think>A<think>T", "A"),
    ("<think></think>A", "A"),
    ("", ""),
]
PIECES = {"A": 1, "B": 2, "T": 3, "U": 4}


def filled(text: str, form: str) -> str:
    """The text with each piece in a form such as `<answer>{}</answer>`, filled with the piece's number."""
    return "".join(form.replace("{}", str(PIECES[c])) if c in PIECES else c for c in text)


def shown_to_the_judge(completion: str) -> str:
    seen: list[str] = []

    def answer(question: str, case: dict[str, str]) -> dict[str, Any]:
        seen.append(case["response"])
        return {"final_answer": "x", "reason": "", "correct": True}

    asyncio.run(judge(completion, "x", question="q", judge=OfflineJudge(answer)))
    return seen[0] if seen else ""


@pytest.mark.parametrize(("completion", "text"), SHAPES)
def test_every_verifier_reads_the_same_text(completion: str, text: str) -> None:
    translation = parse_output(completion, require_thought=False)
    read = {
        "rule": without_thinking(completion),
        "code": extract_program(completion, read_row({"test_list": ["assert f(1)"]})),
        "citations": judged_text(completion),
        "conversation": final_response([{"role": "assistant", "content": completion}]) or "",
        "short answers": qa_match(completion, "x", answer_tag=None).info["extracted"],
        "translation": translation.translation if translation else "",
        "judge": shown_to_the_judge(completion),
    }
    assert read == dict.fromkeys(read, text)


@pytest.mark.parametrize(("completion", "text"), SHAPES)
def test_every_verifier_finds_its_answer_in_the_same_text(completion: str, text: str) -> None:
    pieces = [str(PIECES[c]) for c in text if c in PIECES]
    last = pieces[-1] if pieces else None
    found = extract_answer(filled(completion, r"\boxed{{}}"))
    assert (found.answer, found.num_boxes) == (last, len(pieces))
    tagged = filled(completion, "<answer>{}</answer>")
    assert qa_match(tagged, "x").info["extracted"] == last
    boxed = filled(completion, "<answer>[0, 0, {}, 1]</answer>")
    assert box_iou(boxed, [0, 0, 1, 1]).info.get("box") == (last and (0, 0, float(last), 1))
    # Both papers' rewards grade the form of the whole transcript, but the answer only outside the thinking.
    assert (search_r1_reward(tagged, [last or "x"]) >= 0.8) == (last is not None)
    if (first := deepresearcher_reward(tagged, [pieces[0] if pieces else "x"])) != -1:
        assert first == 1.0


@pytest.mark.parametrize("thought", ["", "T", "<answer>1</answer>", "\n"])
def test_what_is_in_the_demanded_form_is_read_as_its_answer(thought: str) -> None:
    completion = f"<think>{thought}</think><answer>2</answer>"
    assert without_thinking(completion) == "<answer>2</answer>"
    assert format_tags(completion) == float("answer" not in thought)
    output = parse_output(completion)
    assert (output is not None) == bool(thought.strip())
    assert output is None or output.translation == "<answer>2</answer>"


@given(texts(["<think>", "</think>", "<thi", "nk>", "</th", "ink>"]))
def test_no_tag_is_left_and_twice_is_once(text: str) -> None:
    once = without_thinking(text)
    assert "<think>" not in once and "</think>" not in once
    assert without_thinking(once) == once
    if "think>" not in text:
        assert once == text


@pytest.mark.parametrize("pattern", ["<think>", "</think>", "<think>a</think>", "a</think>b<think>", "<thin", "\ud800"])
def test_it_takes_linear_time(pattern: str) -> None:
    assert_linear(without_thinking, pattern)
