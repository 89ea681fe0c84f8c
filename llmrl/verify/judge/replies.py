"""Reading a chat completion of an OpenAI-compatible server: its text, and the log-probabilities of its first token."""

from __future__ import annotations

from typing import Any


def text_of(reply: dict[str, Any]) -> tuple[str, str | None]:
    """Return (text, finish reason) of a chat completion; the text is '' if there is none.

    Content may come as a list of parts. A server with a reasoning parser may put all of it into the reasoning.
    """
    try:
        choice = reply["choices"][0]
        message = choice["message"]
        found = [_text(message.get(name)) for name in ("content", "reasoning_content", "reasoning")]
        return next((text for text in found if text.strip()), ""), choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        return "", None


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [part if isinstance(part, str) else part.get("text") for part in parts if isinstance(part, str | dict)]
    return "".join(text for text in texts if isinstance(text, str))
