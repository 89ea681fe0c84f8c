"""Finding the program in an answer that may be in another language than Python."""

from __future__ import annotations

import re

from llmrl.sandbox.languages import LANGUAGES, language
from llmrl.verify.thinking import without_thinking

_FENCE = re.compile(r"(`{3,}|~{3,})[ \t]*([\w+#.-]+)[^\n`]*\r?\n(.*?)(?:\1|\Z)", re.DOTALL)


def labelled_program(answer: str, name: str) -> str | None:
    """Return the last block of an answer that is labelled as of a language, or None if there is none.

    Args:
        answer: text of the completion.
        name: the language, such as `cpp`.
    """
    labels = language(name).labels
    blocks = [content for _, label, content in _FENCE.findall(without_thinking(answer)) if label.lower() in labels]
    return blocks[-1] if blocks else None


def language_of(answer: str) -> str:
    """Return the language of the last labelled block: `python` unless it names another one."""
    for _, label, _ in reversed(_FENCE.findall(without_thinking(answer))):
        for one in LANGUAGES:
            if label.lower() in one.labels:
                return one.labels[0]
        if label.lower() in ("python", "py", "python3"):
            break
    return "python"
