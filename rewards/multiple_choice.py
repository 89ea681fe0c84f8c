"""Multiple choice: 1.0 if the response chooses the right option, by its letter or by its text, and no other.

Rows have `answer` (a letter, several letters, an index, or the text of the option) and `options` or `choices` (texts,
or letter -> text). The answer is found as `math_answer` finds it: a box, `<answer>`, `the answer is (B)`, a letter.
"""

from __future__ import annotations

import unicodedata
from typing import Any

from llmrl.errors import UserError
from llmrl.types import Score
from llmrl.verify.checks.math_extract import extract_answer
from llmrl.verify.checks.math_letters import chosen_letters, letter_and_text, options_by_letter
from llmrl.verify.checks.math_spelling import normalize

_ROW = {"options": ["Rome", "Paris", "Bonn", "New York"], "answer": "B"}
EXAMPLES = [
    # good
    {**_ROW, "completion": "The answer is (B).", "reward": 1.0},
    {**_ROW, "completion": r"\boxed{B}", "reward": 1.0},
    {**_ROW, "completion": r"\boxed{\text{Paris}}", "reward": 1.0},
    {**_ROW, "completion": "Answer: B) Paris", "reward": 1.0},
    {**_ROW, "completion": "<think>A?</think>B", "reward": 1.0},
    {**_ROW, "completion": "Option B: Paris", "reward": 1.0},
    {**_ROW, "completion": "The answer is: b.", "reward": 1.0},
    {**_ROW, "answer": 1, "completion": "Final answer: B", "reward": 1.0},
    {**_ROW, "answer": "Paris", "completion": "The correct option is B.", "reward": 1.0},
    {"choices": {"label": ["A", "B"], "text": ["dry", "wet"]}, "answer": "B", "completion": "B", "reward": 1.0},
    {**_ROW, "answer": "AC", "completion": "Answer: A, C", "reward": 1.0},
    # bad
    {**_ROW, "completion": "The answer is (C).", "reward": 0.0},
    {**_ROW, "completion": r"\boxed{Rome}", "reward": 0.0},
    {**_ROW, "answer": "AC", "completion": "Answer: A", "reward": 0.0},
    # hostile
    {**_ROW, "completion": "", "reward": 0.0},
    {**_ROW, "completion": "A, B, C, D", "reward": 0.0},
    {**_ROW, "completion": r"\boxed{B or C}", "reward": 0.0},
    {**_ROW, "completion": r"\boxed{A}\boxed{B}\boxed{C}", "reward": 0.0},
    {**_ROW, "completion": "Answer: B) Rome", "reward": 0.0},
    {**_ROW, "completion": "Rome Paris Bonn New York", "reward": 0.0},
    {**_ROW, "completion": "The answer is \u0412.", "reward": 0.0},
    {**_ROW, "completion": "The answer is not B.", "reward": 0.0},
    {**_ROW, "completion": "<think>B", "reward": 0.0},
]


def multiple_choice(
    completion: str,
    answer: Any,
    options: Any = None,
    choices: Any = None,
    prefilled: str = "",
    require_box: bool = False,
) -> Score:
    r"""Compare the chosen option with the right one.

    Args:
        completion: the policy's response; its thinking is not read.
        answer: letter(s), index from 0, or text of the right option.
        options: texts in the order of their letters, or letter -> text, or {"label": [...], "text": [...]}.
        choices: the same, where the column is called so.
        prefilled: how the prompt already begins the response, such as `<think>`.
        require_box: count an answer outside \boxed{} as wrong.

    Raises:
        UserError: the answer is none of the options.
    """
    texts = options_by_letter(options if options is not None else choices)
    gold = _gold(answer, texts)
    # NFKC makes a full-width letter a plain one; letters of other alphabets stay what they are.
    text = unicodedata.normalize("NFKC", prefilled + completion)
    found = extract_answer(text, require_box=require_box).answer
    chosen, reason = _chosen(found, texts)
    info = {"extracted": found, "chosen": "".join(sorted(chosen)), "gold": "".join(sorted(gold))}
    return Score(reward=float(chosen == gold), info=info | ({"reason": reason} if reason else {}))


def check(row: dict[str, Any]) -> str | None:
    """Say that the row's answer is none of its options."""
    try:
        options = row.get("options")
        _gold(row["answer"], options_by_letter(options if options is not None else row.get("choices")))
    except UserError as error:
        return str(error)
    return None


def _gold(answer: Any, texts: dict[str, str]) -> frozenset[str]:
    """Return the letters of the right options. A text comes before a letter, a letter before an index."""
    if hasattr(answer, "item"):
        answer = answer.item()
    if isinstance(answer, str):
        by_text = [letter for letter, text in texts.items() if _same(text, answer)]
        if len(by_text) == 1:
            return frozenset(by_text)
        letters = chosen_letters(normalize(answer))
        if letters and (not texts or letters <= texts.keys()):
            return letters
        answer = int(answer) if answer.strip().isdecimal() else answer
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < max(len(texts), 1) and texts:
        return frozenset(list(texts)[answer])
    raise UserError(
        f"multiple_choice: the answer {str(answer)[:60]!r} is none of the options {', '.join(texts) or '(none)'}; it "
        "must be a letter, an index from 0, or the text of one option"
    )


def _chosen(found: str | None, texts: dict[str, str]) -> tuple[frozenset[str], str]:
    if found is None:
        return frozenset(), "no answer"
    by_text = [letter for letter, text in texts.items() if _same(text, normalize(found)) or _same(text, found)]
    if len(by_text) == 1:
        return frozenset(by_text), ""
    normal = normalize(found).strip("!*_ ")
    if len(normal) == 1 and normal.upper() in texts:
        return frozenset(normal.upper()), ""
    letters = chosen_letters(normal)
    letter, text = letter_and_text(normal)
    if letter and texts and any(_same(text, other) for name, other in texts.items() if name != letter):
        return frozenset(), f"the letter {letter} with the text of another option"
    return letters, "" if letters else "no option, or several"


def _same(a: str, b: str) -> bool:
    """Compare texts without case, spaces and wrappers; letters that only look alike differ."""
    a, b = (" ".join(unicodedata.normalize("NFC", _bare(text)).casefold().split()) for text in (a, b))
    return a == b != ""


def _bare(text: str) -> str:
    text = text.strip()
    if text.startswith("\\text{") and text.endswith("}") and text.count("{") == 1:
        text = text[len("\\text{") : -1]
    return text.strip(" .$*`\"'")
