"""What the parameters of a reward function can be filled with: the rollout, and the columns of its row."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmrl.types import Message, Rollout, Task

ROLLOUT_ARGUMENTS = ("completion", "messages", "prefilled", "rollout", "task")
"""Names that mean the rollout and not a column."""
_TYPES = {"task": "Task", "rollout": "Rollout", "messages": "Message"}


def available_arguments(rollout: Rollout) -> dict[str, Any]:
    """Return all arguments that a function can name: the row's columns, `prompt`, `answer`, and ROLLOUT_ARGUMENTS.

    ROLLOUT_ARGUMENTS take precedence over columns of the same names, a column `prompt` over the prompt itself.
    """
    return row_arguments(rollout.task) | {
        "completion": rollout.completion,
        "messages": rollout.messages,
        "prefilled": rollout.prefilled,
        "rollout": rollout,
        "task": rollout.task,
    }


def row_arguments(task: Task) -> dict[str, Any]:
    """Return the arguments that come from the row: its columns, `prompt` and `answer`. Row checks get the same."""
    prompt = next((m.get("content") for m in reversed(task.messages) if m.get("role") == "user"), None)
    row = ({"prompt": prompt} if prompt is not None else {}) | task.meta
    return row if task.answer is None else row | {"answer": task.answer}


def columns(task: Task) -> dict[str, Any]:
    """Return the row's columns as TRL passes them on: all but prompt, completion and completion_ids."""
    row = dict(task.meta)
    if task.answer is not None:
        row.setdefault("answer", task.answer)
    return {k: v for k, v in row.items() if k not in ("prompt", "completion", "completion_ids")}


def trl_prompt(task: Task, conversational: bool) -> str | list[Message]:
    """Return the prompt as TRL passes it on: messages, or their text."""
    return list(task.messages) if conversational else "".join(str(m.get("content") or "") for m in task.messages)


def trl_completion(rollout: Rollout, conversational: bool) -> str | list[Message]:
    """Return everything after the prompt: assistant and tool messages in order, or the completion's text."""
    return rollout.messages[len(rollout.task.messages) :] if conversational else rollout.completion


def trl_completion_ids(rollout: Rollout) -> list[int]:
    """Return the tokens of all turns with the tool results between them, as one sequence without padding."""
    if not rollout.turns:
        return []
    last = rollout.turns[-1]  # its prompt holds all turns before it
    return last.prompt_ids[len(rollout.turns[0].prompt_ids) :] + last.completion_ids


def ambiguous(
    parameters: Mapping[str, inspect.Parameter], row: Mapping[str, Any], prompt: Sequence[Message]
) -> str | None:
    """Return a text about a parameter that could mean a column as well as an object of ours, or None.

    A column `task` and a parameter `task` look as if one filled the other, but the parameter gets the Task. An
    annotation with our type says that this is meant. `completion` always means the policy's, and `messages` too, where
    the column is a prompt: only a column that ends with an assistant's message is a conversation of its own.

    Args:
        parameters: those of the reward that are not fixed.
        row: the columns.
        prompt: the task's messages.
    """
    for name in parameters.keys() & {"task", "rollout", "prefilled", "messages"} & row.keys():
        kind = _TYPES.get(name)
        if kind is not None and re.search(rf"\b{kind}\b", _text(parameters[name].annotation)):
            continue
        if name == "messages" and (not _is_conversation(row[name]) or row[name] == prompt):
            continue
        annotated = f"list[{kind}]" if name == "messages" else kind
        ours = f" For llmrl's own, write `{name}: {annotated}` (from llmrl.types)." if kind is not None else ""
        return (
            f"its parameter {name!r} could mean the row's column {name!r} or llmrl's own {name!r} (docs/rewards.md)."
            f"{ours} For the column, rename it in the data, or take `rollout: Rollout` and read "
            f"rollout.task.meta[{name!r}]."
        )
    return None


def _text(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else str(annotation)


def _is_conversation(value: Any) -> bool:
    last = value[-1] if isinstance(value, list | tuple) and value else None
    return isinstance(last, Mapping) and last.get("role") == "assistant"
