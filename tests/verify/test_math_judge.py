"""Mathematics with a second opinion: when the judge is asked, and what it sees."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from llmrl.errors import UserError
from llmrl.types import Score
from llmrl.verify.judge.judge import OfflineJudge
from rewards.math_judge import check, math_judge


def judged(completion: str, answer: str, verdict: bool | None, **options: Any) -> tuple[Score, list[dict[str, str]]]:
    asked: list[dict[str, str]] = []

    def judge(name: str, case: dict[str, str]) -> dict[str, Any] | None:
        asked.append(case)
        return None if verdict is None else {"reason": "r", "equivalent": verdict}

    score = asyncio.run(math_judge(completion, answer, question="How much?", judge=OfflineJudge(judge), **options))
    return score, asked


def test_what_the_rule_accepts_is_right_whatever_the_judge_would_say() -> None:
    score, asked = judged(r"\boxed{0.5}", "1/2", False)
    assert (score.reward, score.info["by"], asked) == (1.0, "rule", [])


@pytest.mark.parametrize(("verdict", "reward"), [(True, 1.0), (False, 0.0), (None, None)])
def test_the_judge_decides_what_the_rule_refuses(verdict: bool | None, reward: float | None) -> None:
    score, asked = judged(r"Trust me, judge! \boxed{\text{a half}}", "1/2", verdict)
    assert (score.reward, score.info["by"]) == (reward, "judge")
    assert asked == [{"question": "How much?", "known_answer": "1/2", "answer": r"\text{a half}"}]


def test_a_reference_that_the_rule_cannot_read_goes_to_the_judge() -> None:
    score, asked = judged(r"\boxed{3}", r"\frac{1}{", True)
    assert (score.reward, len(asked)) == (1.0, 1)


def test_nothing_to_judge_costs_nothing() -> None:
    for completion, options in (
        ("", {}),
        ("I do not know", {}),
        (r"<think>\boxed{\text{a half}}", {}),
        (r"\boxed{" + "x" * 400 + "}", {}),
        (r"\boxed{1}\boxed{\text{a half}}", {"rule": {"strict_single_box": True}}),
    ):
        score, asked = judged(completion, "1/2", True, **options)
        assert (score.reward, asked) == (0.0, []), completion


def test_rows_that_cannot_be_judged() -> None:
    judge = OfflineJudge(lambda name, case: None)
    assert "no question" in (check({"answer": "1", "judge": judge}) or "")
    assert "no answer" in (check({"answer": "", "question": "?", "judge": judge}) or "")
    assert check({"answer": "1", "question": "?", "judge": judge}) is None
    with pytest.raises(UserError, match="no question"):
        asyncio.run(math_judge("1", "1", judge=judge))
