"""Messages of any dataset -> messages in the OpenAI format, with nothing dropped: what cannot be kept is refused."""

from __future__ import annotations

import difflib
import json
from typing import Any

from llmrl.data.report import BadRow
from llmrl.errors import UserError
from llmrl.types import Message

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool_response": "tool",
    "tool": "tool",
}
"""Roles of other formats (ShareGPT, "Human" and "Assistant" ...), in lower case. Any other role stays as it is."""
SYSTEM_COLUMNS = ("system", "system_prompt")
"""Columns with the system message of a row."""
MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")
LOST_COLUMNS = (*MEDIA_COLUMNS, "history")
"""Columns that shape a prompt in other tools and are not shown here."""
SHAPING_COLUMNS = (*SYSTEM_COLUMNS, "tools", "chat_template_kwargs", "input", *LOST_COLUMNS)
"""All columns that `ignore_columns` can switch off."""


def conversation(prompt: list[Any], place: str) -> list[Message]:
    """Return a list of messages in the OpenAI format.

    ShareGPT's `from` and `value` become `role` and `content`, known roles of other formats become the usual ones, and
    keys without a value are dropped: tables add a key to all rows when one row has it.

    Raises:
        BadRow: the list is empty, or an entry is not a message.
    """
    if not prompt:
        raise BadRow(place, "the list of messages is empty")
    return [_message(message, i, place) for i, message in enumerate(prompt)]


def as_messages(value: Any) -> Any:
    """Return a list of messages where a value is one in another form: a single message, or JSON text of a list.

    Tables that cannot nest hold conversations as text. Other values are returned as they are.
    """
    if isinstance(value, dict) and ("role" in value or "from" in value):
        return [value]
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    are_messages = all(
        isinstance(m, dict) and ({"role", "content"} <= m.keys() or {"from", "value"} <= m.keys()) for m in found
    )
    return found if are_messages else value


def _message(message: Any, i: int, place: str) -> Message:
    if isinstance(message, dict) and "role" not in message and "from" in message:
        renamed = {"from": "role", "value": "content"}
        message = {renamed.get(key, key): value for key, value in message.items()}
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
        found = f"keys {', '.join(map(str, message))}" if isinstance(message, dict) else type(message).__name__
        raise BadRow(place, f"message {i}: a message needs `role` (text) and `content`, found {found}")
    kept: Any = {key: value for key, value in message.items() if value is not None or key == "content"}
    if not isinstance(kept["content"], str | list) and not kept.get("tool_calls"):
        raise BadRow(place, f"message {i}: `content` must be text or a list of parts, found {kept['content']!r}")
    if isinstance(kept["content"], list):
        _check_parts(kept["content"], i, place)
    role = kept["role"]
    if role == "function_call":
        return _sharegpt_call(kept["content"], i, place)
    return kept | {"role": ROLES.get(role.strip().lower(), role)}


def _sharegpt_call(content: Any, i: int, place: str) -> Message:
    """Turn a message of ShareGPT whose content is a call of a tool, as JSON text, into an assistant's."""
    try:
        found = json.loads(content)
        calls = [{"name": call["name"], "arguments": call["arguments"]} for call in _listed(found)]
    except (ValueError, TypeError, KeyError):
        raise BadRow(place, f"message {i}: the role function_call needs JSON with `name` and `arguments`") from None
    return Message(role="assistant", content="", tool_calls=[{"type": "function", "function": call} for call in calls])


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check_parts(parts: list[Any], i: int, place: str) -> None:
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise BadRow(
                place,
                f"message {i}: a part of type {kind!r} would be lost, because models are given text alone: leave such "
                "rows out",
            )


def joined(content: Any) -> str:
    """Return content as text: parts are joined."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def without_parts(messages: list[Message]) -> list[Message]:
    """Return messages whose contents are text."""
    return [message | {"content": joined(message.get("content"))} for message in messages]  # pyright: ignore


def check_ignored(ignored: list[str], place: str, row: dict[str, Any]) -> None:
    """Raise UserError if `ignore_columns` names a column that shapes nothing and that the first row does not have."""
    for column in ignored:
        if column not in row and column not in SHAPING_COLUMNS:
            near = difflib.get_close_matches(column, [*SHAPING_COLUMNS, *map(str, row)], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{place}: data.ignore_columns names {column!r}, but there is no such column{hint}")


def lost_columns(row: dict[str, Any], ignored: list[str]) -> str | None:
    """Return the reason why a row cannot be used if a column that is not shown would be dropped."""
    lost = [column for column in LOST_COLUMNS if row.get(column) and column not in ignored]
    lost = [column for column in lost if column in MEDIA_COLUMNS or isinstance(row[column], list)]
    if not lost:
        return None
    names = ", ".join(lost)
    return (
        f"column {lost[0]}: the model would not see it, because prompts are text alone: leave such rows out, or set "
        f"data.ignore_columns [{names}] to train without"
    )


def tools_of(row: dict[str, Any], place: str, ignored: list[str]) -> list[Any] | None:
    """Return the tools that a row shows to the policy: JSON schemas, which tables may hold as text.

    Raises:
        BadRow: the column holds something else.
    """
    value = _from_json(row.get("tools"), place, "tools") if "tools" not in ignored else None
    if not value:
        return None
    if isinstance(value, dict):
        value = [value]
    value = [_from_json(tool, place, "tools") for tool in value] if isinstance(value, list) else value
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow(
            place,
            "column tools: must be a list of JSON schemas, or the same as JSON text; if it is something else, set "
            "data.ignore_columns [tools]",
        )
    # Templates expect OpenAI's form. A bare function (xlam, BFCL) is what it holds.
    return [tool if "function" in tool or "name" not in tool else _as_function(tool) for tool in value]


def _as_function(tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type") == "function":  # the form of OpenAI's responses
        tool = {key: value for key, value in tool.items() if key != "type"}
    return {"type": "function", "function": tool}


def template_options_of(row: dict[str, Any], place: str, ignored: list[str]) -> dict[str, Any]:
    """Return the variables that a row sets for the chat template, from its column `chat_template_kwargs`.

    Raises:
        BadRow: the column holds no mapping.
    """
    column = "chat_template_kwargs"
    value = _from_json(row.get(column), place, column) if column not in ignored else None
    if not value:
        return {}
    if not isinstance(value, dict):
        raise BadRow(place, f"column {column}: must be a mapping such as {{'enable_thinking': false}}")
    return {key: inner for key, inner in value.items() if inner is not None}  # tables add keys to all rows


def _from_json(value: Any, place: str, column: str) -> Any:
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(
            place,
            f"column {column}: not valid JSON ({error}); if it is something else, set data.ignore_columns [{column}]",
        ) from None
