"""Procedural tasks of reasoning-gym, scored by the package's own scorers.

Rows have `answer`, `metadata` (an object or its text) and the generator's name in `source_dataset` or in the metadata,
as `recipes/procedural.py` makes them. The answer is the last `<answer>...</answer>`, or the last box. Needs the extra
`llmrl[tasks]`. Runs in the worker pool, because scorers simulate puzzles and parse what the policy wrote.
"""

from __future__ import annotations

from typing import Any

from llmrl.errors import UserError
from llmrl.types import Score
from llmrl.verify.checks.answers import extract_tag
from llmrl.verify.checks.math_extract import last_box
from llmrl.verify.checks.procedural import read_metadata, scorer_of
from llmrl.verify.thinking import without_thinking

POOL = True
MAX_CHARS = 20_000
"""A longer answer is wrong."""
NONSENSE = "~?~"
"""An answer that is right for no task."""

_ROW = {"question": "What is 3 + 4?", "answer": "7", "metadata": {"source_dataset": "chain_sum"}}
# What the row's own answer and the form decide; all else needs the package.
EXAMPLES = [
    {**_ROW, "completion": "<answer>7</answer>", "reward": 1.0},
    {**_ROW, "completion": "<think>3 + 4</think> It is <answer> 7 </answer>.", "reward": 1.0},
    {**_ROW, "completion": r"It is \boxed{7}.", "reward": 1.0},
    {**_ROW, "metadata": '{"source_dataset": "chain_sum"}', "completion": "<answer>7</answer>", "reward": 1.0},
    # hostile
    {**_ROW, "completion": "", "reward": 0.0},
    {**_ROW, "completion": "What is 3 + 4?", "reward": 0.0},
    {**_ROW, "completion": "5, 6, 7, 8", "reward": 0.0},
    {**_ROW, "completion": "<answer></answer>", "reward": 0.0},
    {**_ROW, "completion": "<think><answer>7</answer>", "reward": 0.0},
    {**_ROW, "completion": f"<answer>{'7' * 30_000}</answer>", "reward": 0.0},
]


def reasoning_gym(
    completion: str,
    answer: Any = None,
    metadata: Any = None,
    source_dataset: str | None = None,
    question: str = "",
    prefilled: str = "",
    partial: bool = False,
) -> Score:
    """Score the response's answer by the scorer of its row's generator.

    Args:
        completion: the policy's response; its thinking is not read.
        answer: the generator's own answer, which is right; None or empty where it has none.
        metadata: what the generator noted about the task, as an object or as JSON text.
        source_dataset: the generator; by default metadata's `source_dataset`.
        question: the generator's question.
        prefilled: how the prompt already begins the response, such as `<think>`.
        partial: pass on scores between 0 and 1. By default only a full score counts, because many scorers pay a little
            for any answer, or for a list that contains the right one.

    Raises:
        UserError: the row names no generator, or one that does not exist; or the package is missing.
    """
    name, noted = _generator(metadata, source_dataset)
    text = without_thinking(prefilled + completion)
    found = extract_tag(text, "answer")
    found = (found if found is not None else last_box(text) or "").strip()
    if not found or len(found) > MAX_CHARS:
        return Score(reward=0.0, info={"reason": "no answer" if not found else f"{len(found)} characters"})
    info: dict[str, Any] = {"extracted": found[:200]}
    own = "" if answer is None else str(answer)
    if found == own.strip():
        return Score(reward=1.0, info=info)
    entry = {"question": question, "answer": own or None, "metadata": noted}
    score, problem = _scored(name, found, entry)
    if problem:
        return Score(reward=0.0, info=info | {"reason": problem})
    if score >= 1.0 and _scored(name, NONSENSE, entry)[0] >= 1.0:
        # Some scorers of yes-or-no tasks take any text for a yes.
        return Score(reward=0.0, info=info | {"reason": "the scorer pays for any answer, so only the row's own counts"})
    return Score(reward=score if partial else float(score >= 1.0), info=info | {"score": score})


def _scored(name: str, found: str, entry: dict[str, Any]) -> tuple[float, str]:
    """Return the scorer's number, from 0 to 1, and what went wrong in it."""
    scorer = scorer_of(name)
    try:
        return min(1.0, max(0.0, float(scorer(found, entry)))), ""
    except Exception as error:  # many scorers parse the answer without expecting that it has another form
        return 0.0, f"the scorer: {type(error).__name__}: {error}"[:300]


def check(row: dict[str, Any]) -> str | None:
    """Say that a row names no generator."""
    try:
        _generator(row.get("metadata"), row.get("source_dataset"))
    except UserError as error:
        return str(error)
    return None


def _generator(metadata: Any, source_dataset: str | None) -> tuple[str, dict[str, Any]]:
    noted = read_metadata(metadata)
    name = source_dataset or noted.get("source_dataset")
    if not isinstance(name, str):
        raise UserError("reasoning_gym: the row names no generator; it needs `source_dataset`, or it in `metadata`")
    return name, noted
