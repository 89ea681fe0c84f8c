"""Rows of stored completions: lines of JSON become rollouts, and scored rollouts become lines of JSON again.

A row has `completion` (text or messages), the columns that the rewards name, `completion_ids` for rewards that count
tokens, and `prefilled` where the prompt already began the completion's message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmrl.data.tasks import ANSWER_COLUMNS, PROMPT_COLUMNS
from llmrl.errors import UserError
from llmrl.types import Message, Rollout, Score, Task, Turn

ROLLOUT_COLUMNS = ("completion", "completion_ids", "prefilled")
"""Columns that describe the rollout; the others are those of its task."""


def read_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, row) for each line that is not blank.

    Raises:
        UserError: the file or a line cannot be read, or a row has no usable `completion`; the message has the file,
            the line and the field.
    """
    for number, row in read_tasks(file):
        check_row(row, f"{file}, line {number}")
        yield number, row


def read_tasks(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, row) for each line that is not blank; a row needs no `completion`.

    Raises:
        UserError: the file or a line cannot be read; the message has the file and the line.
    """
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _parse_row(line, f"{file}, line {number}")
    except OSError as error:
        raise UserError(f"--input {file}: {error.strerror}") from None


def _parse_row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be a JSON object, this is a {type(row).__name__}")
    return row


def check_row(row: dict[str, Any], where: str) -> None:
    """Raise a UserError, which begins with `where`, if a row has no usable `completion`."""
    if "completion" not in row:
        raise UserError(f"{where}, field completion: missing; the row has {', '.join(row) or 'no fields'}")
    if not isinstance(row.get("prefilled") or "", str):
        raise UserError(f"{where}, field prefilled: must be text, not {row['prefilled']!r}")
    completion = row["completion"]
    if isinstance(completion, str):
        return
    messages = completion if isinstance(completion, list) else None
    if not messages or not all(isinstance(message, dict) and "role" in message for message in messages):
        raise UserError(f"{where}, field completion: must be text or a list of messages with a `role` each")
    if messages[0]["role"] != "assistant":
        raise UserError(
            f"{where}, field completion: its first message must be the assistant's, not {messages[0]['role']!r}"
        )


def is_conversational(row: dict[str, Any]) -> bool:
    """Return whether TRL functions get this row's completion as messages."""
    return isinstance(row["completion"], list)


def row_to_rollout(row: dict[str, Any], *, name: str, index: int = 0, answer_column: str | None = None) -> Rollout:
    """Return the rollout that a row describes.

    Args:
        row: ROLLOUT_COLUMNS, and columns that become `task.meta`.
        name: id of the task.
        index: position of the rollout in its group.
        answer_column: column that holds the answer; default: the first of ANSWER_COLUMNS that the row has.

    Raises:
        UserError: there is no column `answer_column`.
    """
    if answer_column is not None and answer_column not in row:
        raise UserError(f"field {answer_column}: missing (--answer_column); the row has {', '.join(row)}")
    answer_column = answer_column or next((c for c in ANSWER_COLUMNS if c in row), None)
    meta = {key: value for key, value in row.items() if key not in ROLLOUT_COLUMNS}
    answer = row.get(answer_column) if answer_column else None
    task = Task(id=name, messages=_prompt(row), answer=answer, meta=meta)
    return Rollout(task=task, index=index, turns=_turns(row))


def _prompt(row: dict[str, Any]) -> list[Message]:
    prompt = next((row[c] for c in PROMPT_COLUMNS if c in row), None)
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    is_messages = isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt)
    return list(prompt) if is_messages and prompt is not None else []


def _turns(row: dict[str, Any]) -> list[Turn]:
    """Return one turn for each assistant message; the messages up to the next one are its replies."""
    completion = row["completion"]
    messages = [Message(role="assistant", content=completion)] if isinstance(completion, str) else completion
    ids = row.get("completion_ids") or []
    turns: list[Turn] = []
    for message in messages:
        if message.get("role") == "assistant":
            turns.append(
                Turn(
                    prompt_ids=[],
                    completion_ids=[] if turns else list(ids),
                    rollout_logprobs=[],
                    finish="stop",
                    policy_version=(0, 0),
                    message=message,
                    prefilled=row.get("prefilled") or "",
                )
            )
        else:
            turns[-1].replies.append(message)
    return turns


def row_key(row: dict[str, Any]) -> str:
    """Return a key that is equal for attempts at the same task: rows that differ in nothing but their completion."""
    return json.dumps({k: v for k, v in row.items() if k not in ROLLOUT_COLUMNS}, sort_keys=True)


_UNSAFE = re.compile("[\x85\u2028\u2029\ud800-\udfff]")
"""Characters that some readers take for a line end, and lone surrogates, which UTF-8 cannot encode."""


def result_line(row: dict[str, Any], score: Score) -> str:
    """Return the row with its score as one line of JSON."""
    result = row | {"reward": score.reward, "parts": score.parts, "info": score.info, "error": score.error}
    line = json.dumps(result, ensure_ascii=False, default=str)
    if _UNSAFE.search(line):
        line = json.dumps(result, default=str)
    return line + "\n"
