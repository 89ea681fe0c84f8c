"""Shared by the tests of citations and rubrics: a scripted judge and a small history."""

from __future__ import annotations

import json
from typing import Any

from llmrl.verify.judge.verdict import Question, Verdict, check_values


def call(identifier: str, name: str) -> dict[str, Any]:
    function = {"name": name, "arguments": "{}"}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": identifier, "type": "function", "function": function}],
    }


def tool(identifier: str, content: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": identifier, "content": content}


class ScriptedJudge:
    """Answer each question with its scripted values (None: abstain); the entries of a list are used in order."""

    def __init__(self, **verdicts: Any) -> None:
        self.verdicts = verdicts
        self.asked: list[str] = []
        self.cases: list[dict[str, str]] = []

    async def ask(self, question: Question, case: dict[str, str]) -> Verdict:
        self.asked.append(question.name)
        self.cases.append(case)
        values = self.verdicts[question.name]
        if isinstance(values, list):
            values = values.pop(0)
        if isinstance(values, Exception):
            raise values
        if values is None:
            return Verdict(values=None, problem="scripted")
        assert set(values) == set(question.fields), (values, question.fields)
        return Verdict(values=check_values(values, question.fields))


RIGHT = {"final_answer": "x", "reason": "r", "correct": True}


PAGE = [
    tool(
        "1",
        json.dumps(
            [
                {"url": "https://a", "title": "Old Rivers", "text": "The town lies on the left bank of the Rhine."},
                {"url": "https://b", "text": "-"},
            ]
        ),
    )
]
