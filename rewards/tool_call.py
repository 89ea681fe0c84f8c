"""Tool calls: 1.0 if the response calls exactly the expected tools with right arguments, in any order.

Rows have `answer`, `ground_truth` or `answers`: BFCL's `[{name: {argument: [possible values]}}]`, where "" among the
values says that the argument may be left out, or xLAM's `[{"name": ..., "arguments": {...}}]`. The response holds
`<tool_call>` blocks, or is JSON or `[f(a=1)]` alone. Calls that a template parsed (`tool_calls`) count too.
"""

from __future__ import annotations

from typing import Any

from llmrl.errors import UserError
from llmrl.types import Message, Score
from llmrl.verify.checks.tool_calls import Call, as_call, expected_calls, mismatch, read_calls
from llmrl.verify.thinking import without_thinking

_BFCL = {"answer": [{"weather": {"city": ["Paris", "Paris, France"], "days": [3], "unit": ["C", ""]}}]}
_XLAM = {
    "answers": '[{"name": "add", "arguments": {"a": 1, "b": 2.5}}, {"name": "add", "arguments": {"a": 3, "b": 4}}]'
}
EXAMPLES = [
    # good
    {
        **_BFCL,
        "completion": '<tool_call>\n{"name": "weather", "arguments": {"city": "paris", "days": 3}}\n</tool_call>',
        "reward": 1.0,
    },
    {**_BFCL, "completion": '[weather(city="Paris, France", days=3, unit="C")]', "reward": 1.0},
    {
        **_XLAM,
        "completion": '[{"name": "add", "arguments": {"a": 3, "b": 4}},'
        ' {"name": "add", "arguments": {"b": 2.5, "a": 1}}]',
        "reward": 1.0,
    },
    {"answer": [], "completion": "I need no tool for that.", "reward": 1.0},
    # bad
    {**_BFCL, "completion": '[weather(city="Paris")]', "reward": 0.0},
    {**_BFCL, "completion": '[weather(city="Paris", days="3")]', "reward": 0.0},
    {**_BFCL, "completion": '[weather(city="Paris", days=3, unit="F")]', "reward": 0.0},
    {**_BFCL, "completion": '[weather(city="Paris", days=3, hours=1)]', "reward": 0.0},
    {**_BFCL, "completion": '[forecast(city="Paris", days=3)]', "reward": 0.0},
    {**_BFCL, "completion": "It will rain in Paris for 3 days.", "reward": 0.0},
    # hostile
    {**_BFCL, "completion": "", "reward": 0.0},
    {**_BFCL, "completion": '[weather(city="Paris", days=3), weather(city="Rome", days=3)]', "reward": 0.0},
    {**_XLAM, "completion": "[add(a=1, b=2.5), add(a=1, b=2.5)]", "reward": 0.0},
    {**_BFCL, "completion": '<think>[weather(city="Paris", days=3)]</think>', "reward": 0.0},
    {**_BFCL, "completion": '[weather(city="\u0420aris", days=3)]', "reward": 0.0},
    {
        **_BFCL,
        "completion": '{"name": "weather", "arguments": {"city": "Rome", "city": "Paris", "days": 3}}',
        "reward": 0.0,
    },
    {"answer": [], "completion": "<tool_call>{}</tool_call>", "reward": 0.0},
]


def tool_call(
    completion: str,
    answer: Any = None,
    ground_truth: Any = None,
    answers: Any = None,
    messages: list[Message] | None = None,
    prefilled: str = "",
) -> Score:
    """Compare the response's calls with the expected ones.

    Args:
        completion: the policy's response; its thinking is not read.
        answer: the expected calls, or their JSON text. The first of these three columns that is given is used.
        ground_truth: the same (BFCL).
        answers: the same (xLAM).
        messages: the conversation; calls in `tool_calls` of its last message are used if the text has none.
        prefilled: how the prompt already begins the response, such as `<think>`.

    Raises:
        UserError: the row's expected calls cannot be read.
    """
    try:
        expected = expected_calls(_given(answer, ground_truth, answers))
    except ValueError as error:
        raise UserError(f"tool_call: {error}") from None
    text = without_thinking(prefilled + completion).strip()
    try:
        calls = _parsed(messages) or _calls(text, bool(expected))
    except ValueError as error:
        return Score(reward=0.0, info={"reason": str(error)})
    problem = mismatch(calls, expected) if text or calls else "empty response"
    return Score(reward=float(problem is None), info={"reason": problem} if problem else {})


def check(row: dict[str, Any]) -> str | None:
    """Say that a row's expected calls cannot be read."""
    try:
        expected_calls(_given(row.get("answer"), row.get("ground_truth"), row.get("answers")))
    except ValueError as error:
        return str(error)
    return None


def _given(*columns: Any) -> Any:
    found = next((column for column in columns if column is not None), None)
    if found is None:
        raise ValueError("the row has no expected calls; it needs `answer`, `ground_truth` or `answers`")
    return found


def _calls(text: str, some_expected: bool) -> list[Call]:
    """Read the calls; where none is expected, a text that is no call is a plain answer."""
    try:
        return read_calls(text)
    except ValueError:
        if some_expected or "<tool_call" in text:
            raise
        return []


def _parsed(messages: list[Message] | None) -> list[Call]:
    last = messages[-1] if messages else {}
    return [as_call(call) for call in last.get("tool_calls") or []] if last.get("role") == "assistant" else []
