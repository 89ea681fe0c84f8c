"""Regular expressions: 1.0 if the response, or the answer in it, matches the row's pattern.

Rows have `pattern` (or `regex`). The whole response must match, outside its thinking; `mode: search` finds the pattern
anywhere. A match that takes more than 2 s of processor time is none, so a pattern that backtracks without end costs
2 s. Runs in the worker pool.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from llmrl.errors import UserError
from llmrl.types import Score
from llmrl.verify.checks.math_extract import extract_answer
from llmrl.verify.checks.math_symbols import cpu_limit
from llmrl.verify.thinking import without_thinking

POOL = True
MAX_CHARS = 100_000
"""A longer response matches nothing."""
CPU_LIMIT_S = 2.0
_FLAGS = {"i": re.IGNORECASE, "m": re.MULTILINE, "s": re.DOTALL, "x": re.VERBOSE, "a": re.ASCII}

_DATE = {"pattern": r"\d{4}-\d{2}-\d{2}"}
EXAMPLES = [
    # good
    {**_DATE, "completion": "2024-02-29", "reward": 1.0},
    {**_DATE, "completion": "<think>which day?</think>\n2024-02-29\n", "reward": 1.0},
    {**_DATE, "completion": "It was 2024-02-29, a Thursday.", "mode": "search", "reward": 1.0},
    {**_DATE, "completion": r"So \boxed{2024-02-29}", "mode": "answer", "reward": 1.0},
    {"pattern": "yes|no", "flags": "i", "completion": "YES", "reward": 1.0},
    # bad
    {**_DATE, "completion": "29 February 2024", "reward": 0.0},
    {**_DATE, "completion": "It was 2024-02-29.", "reward": 0.0},
    {"pattern": "yes|no", "completion": "YES", "reward": 0.0},
    # hostile
    {**_DATE, "completion": "", "reward": 0.0},
    {"pattern": ".*", "completion": "", "reward": 0.0},
    {**_DATE, "completion": "2024-02-29\n2024-02-30", "reward": 0.0},
    {**_DATE, "completion": "<think>2024-02-29</think>", "mode": "search", "reward": 0.0},
    {**_DATE, "completion": "\u0662\u0660\u0662\u0664-02-29", "reward": 0.0},
    {**_DATE, "completion": r"\d{4}-\d{2}-\d{2}", "reward": 0.0},
    {"pattern": r"(a+)+b", "completion": "a" * 5000, "reward": 0.0},
]


def regex_match(
    completion: str,
    pattern: str | None = None,
    regex: str | None = None,
    flags: str = "",
    prefilled: str = "",
    mode: Literal["full", "search", "answer"] = "full",
) -> Score:
    r"""Match the response against the row's pattern.

    Args:
        completion: the policy's response; its thinking is not read.
        pattern: a regular expression of Python's `re`. \d and \w mean ASCII characters.
        regex: the same, where the column is called so.
        flags: letters of `re`: i (case), m (lines), s (dot matches line ends), x (spaces and comments).
        prefilled: how the prompt already begins the response, such as `<think>`.
        mode: `full`: the whole response, without outer spaces; `search`: any part of it; `answer`: the whole of its
            answer (a box, `<answer>`, `answer is x`), found as `math_answer` finds it.

    Raises:
        UserError: the pattern is missing or not valid, or a flag or the mode is unknown.
    """
    if mode not in ("full", "search", "answer"):
        raise UserError(f"regex_match: mode is {mode!r}; use full, search or answer")
    compiled = _compiled(pattern if pattern is not None else regex, flags)
    text = without_thinking(prefilled + completion).strip()
    if mode == "answer":
        text = extract_answer(text).answer or ""
    if not text or len(text) > MAX_CHARS:
        return Score(reward=0.0, info={"reason": f"{len(text)} characters to match, from 1 to {MAX_CHARS} are read"})
    found = None
    with cpu_limit(CPU_LIMIT_S) as ended:
        found = compiled.search(text) if mode == "search" else compiled.fullmatch(text)
    if ended:
        return Score(reward=0.0, info={"reason": f"the match takes more than {CPU_LIMIT_S} s"})
    return Score(reward=float(found is not None), info={} if found else {"reason": f"no match: {text[:80]!r}"})


def check(row: dict[str, Any]) -> str | None:
    """Say that a row's pattern is missing or not valid."""
    pattern = row.get("pattern")
    try:
        _compiled(pattern if pattern is not None else row.get("regex"), row.get("flags") or "")
    except UserError as error:
        return str(error)
    return None


def _compiled(pattern: Any, flags: str) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise UserError("regex_match: the row has no pattern; it needs `pattern` or `regex`")
    if unknown := set(flags) - set(_FLAGS):
        raise UserError(f"regex_match: the flags {''.join(sorted(unknown))!r} are unknown; use {', '.join(_FLAGS)}")
    chosen = re.RegexFlag(0)
    for flag in flags + "a":
        chosen |= _FLAGS[flag]
    try:
        return re.compile(pattern, chosen)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"regex_match: the pattern {pattern[:60]!r} is not valid: {error}") from None
