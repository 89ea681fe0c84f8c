"""Verifiable instructions (IFEval): whether the response has the words, length, format and language it was told to.

Rows have the columns of google/IFEval (`instruction_id_list`, `kwargs`), or `ground_truth` as in open-instruct's data:
`[{"instruction_id": [...], "kwargs": [...]}]`, also as JSON text. The reward is 1.0 if all instructions are followed.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from llmrl.errors import UserError
from llmrl.types import Score
from llmrl.verify.checks.instructions import find_check, follows
from llmrl.verify.thinking import without_thinking

_NO_COMMA = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
_TWO = {
    "instruction_id_list": ["keywords:existence", "length_constraints:number_words"],
    "kwargs": [{"keywords": ["tea"], "num_words": None}, {"num_words": 5.0, "relation": "at least"}],
}
_TITLE = {"ground_truth": '[{"instruction_id": ["detectable_format:title"], "kwargs": [null]}]'}
EXAMPLES = [
    # good
    {**_TWO, "completion": "I like green tea a lot.", "reward": 1.0},
    {**_NO_COMMA, "completion": "No pause here.", "reward": 1.0},
    {**_TITLE, "completion": "<<Dawn>>\nA poem.", "reward": 1.0},
    {**_NO_COMMA, "completion": "<think>Well, no commas.</think>Done.", "reward": 1.0},
    # bad
    {**_TWO, "completion": "Green tea.", "reward": 0.0},
    {**_TWO, "completion": "Green tea.", "outcome": "fraction", "reward": 0.5},
    {**_NO_COMMA, "completion": "Well, no.", "reward": 0.0},
    {**_TITLE, "completion": "<<>>\nA poem.", "reward": 0.0},
    # loose: without the first line
    {**_NO_COMMA, "completion": "Sure, here it is:\nDone.", "reward": 0.0},
    {**_NO_COMMA, "completion": "Sure, here it is:\nDone.", "mode": "loose", "reward": 1.0},
    # hostile: an empty response breaks no rule, and follows none
    {**_NO_COMMA, "completion": "", "reward": 0.0},
    {**_NO_COMMA, "completion": "<think>Done.", "reward": 0.0},
    {**_NO_COMMA, "completion": "done", "prefilled": "<think>", "reward": 0.0},
    {**_TWO, "completion": "I like green t\u0435\u0430 a lot.", "reward": 0.0},
]


def instruction_following(
    completion: str,
    instruction_id_list: Any = None,
    kwargs: Any = None,
    ground_truth: Any = None,
    prefilled: str = "",
    mode: Literal["strict", "loose"] = "strict",
    outcome: Literal["all", "fraction"] = "all",
) -> Score:
    """Check the response against each instruction of its row.

    Args:
        completion: the policy's response; its thinking is not read.
        instruction_id_list: ids of instructions (IFEval).
        kwargs: their arguments, one mapping each.
        ground_truth: both together, as in open-instruct's data.
        prefilled: how the prompt already begins the response, such as `<think>`.
        mode: `loose` also accepts the response without its first or last line or asterisks, as IFEval's loose score.
        outcome: `all`: 1.0 if every instruction is followed; `fraction`: the share of those followed.

    Raises:
        UserError: the row has no instructions, an unknown one, or wrong arguments; or a mode or outcome is unknown.
    """
    if mode not in ("strict", "loose") or outcome not in ("all", "fraction"):
        raise UserError(f"instruction_following: mode {mode!r} (strict, loose), outcome {outcome!r} (all, fraction)")
    pairs = _instructions(instruction_id_list, kwargs, ground_truth)
    response = without_thinking(prefilled + completion).strip()
    try:
        followed = [(name, follows(response, name, arguments, loose=mode == "loose")) for name, arguments in pairs]
    except ValueError as error:
        raise UserError(f"instruction_following: {error}") from None
    share = sum(done for _, done in followed) / len(followed)
    return Score(
        reward=share if outcome == "fraction" else float(share == 1),
        info={"broken": [name for name, done in followed if not done], "num_instructions": len(followed)},
    )


def check(row: dict[str, Any]) -> str | None:
    """Say which instruction of a row is unknown or lacks arguments."""
    try:
        pairs = _instructions(row.get("instruction_id_list"), row.get("kwargs"), row.get("ground_truth"))
        for name, arguments in pairs:
            find_check(name)
            if not name.startswith(("language:", "change_case:english")):  # these load a model
                follows("a b", name, arguments)
    except (UserError, ValueError) as error:
        return str(error)
    return None


def _instructions(names: Any, arguments: Any, ground_truth: Any) -> list[tuple[str, dict[str, Any]]]:
    """Return (id, arguments) of each instruction of a row."""
    if names is None and ground_truth is not None:
        truth = _decoded(ground_truth)
        truth = truth[0] if isinstance(truth, list) and truth else truth
        if isinstance(truth, dict):
            names, arguments = truth.get("instruction_id", truth.get("instruction_id_list")), truth.get("kwargs")
    names, arguments = _decoded(names), _decoded(arguments)
    names = [names] if isinstance(names, str) else list(names) if names is not None else []
    arguments = (
        [arguments] if isinstance(arguments, dict) else list(arguments) if arguments is not None else [{}] * len(names)
    )
    if not names or len(names) != len(arguments):
        raise UserError(
            f"instruction_following: the row has {len(names)} instruction ids and {len(arguments)} kwargs; rows need "
            "`instruction_id_list` and `kwargs` of the same length, or `ground_truth`"
        )
    return [(str(name), dict(given or {})) for name, given in zip(names, arguments, strict=True)]


def _decoded(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError as error:
            raise UserError(f"instruction_following: {value[:60]!r} is not JSON: {error}") from None
    return value
