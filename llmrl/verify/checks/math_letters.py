"""Options of a multiple choice: the letters that an answer chooses, and what an option's text is worth."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmrl.verify.checks.math_spelling import words

_LEAD = re.compile(
    r"^(?:the\s+)?(?:correct\s+)?(?:option|choice|answer|options|choices|\u7b54\u6848|\u9009\u9879?|\u9078\u9805?)"
    r"\s*(?:is|are|\u662f|:)?\s*",
    re.IGNORECASE,
)
_LETTERS = re.compile(r"\(?([A-J])\)?(?:(?:\s*(?:,|;|/|&|\band\b)\s*|\s*)\(?([A-J])\)?)*")
_WITH_TEXT = re.compile(r"(?:\(([A-J])\)|([A-J])\s*[).:])\s*(?=\S)(.+)", re.DOTALL)
_ANOTHER = re.compile(r"\([A-J]\)|\b[A-J]\s*[).:](?:\s|$)|\b(?:or|not|nor)\b")


def chosen_letters(normal: str) -> frozenset[str]:
    """Return the option letters that an answer chooses (`(B)`, `Option B`, `B. 12`, `A and C`); empty for others.

    A letter before a text counts if the text names no other option. The same letter twice chooses nothing.
    """
    if len(normal) > 300:
        return frozenset()
    text = re.sub(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r"\1", normal)
    text = " ".join(text.split()).strip(" .{}")
    bare = _LEAD.sub("", text)
    if re.fullmatch(r"\([a-j]\)|[a-j]\)", bare) or (bare != text and re.fullmatch(r"[a-j]", bare)):
        bare = bare.upper()
    text = bare
    if _LETTERS.fullmatch(text):
        letters = re.findall(r"[A-J]", text)
        return frozenset(letters) if len(set(letters)) == len(letters) else frozenset()
    if (match := _WITH_TEXT.fullmatch(text)) and not _ANOTHER.search(match.group(3)):
        return frozenset(match.group(1) or match.group(2))
    return frozenset()


def with_options(golds: Sequence[str], options: Any) -> list[str]:
    """Return the golds together with the text of the gold letter's option, or the letter of the gold text's option.

    Args:
        golds: accepted answers.
        options: texts in the order of their letters, or letter -> text. Anything else adds nothing.
    """
    texts = options_by_letter(options)
    if len(texts) < 2 or len(set(texts.values())) != len(texts):
        return list(golds)
    added: list[str] = []
    for gold in golds:
        letters = chosen_letters(gold)
        text = texts.get(next(iter(letters)), "") if len(letters) == 1 else ""
        if text and not chosen_letters(text):  # a text that is itself a letter would make another option right
            added.append(text)
        elif not letters:
            added += [
                letter for letter, text in texts.items() if text.strip() == gold.strip() or _same_words(text, gold)
            ]
    return [*golds, *added]


def letter_and_text(normal: str) -> tuple[str, str]:
    """Return the letter and the text of an answer such as `B) 12`, or two empty strings."""
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r"\1", normal)
    match = _WITH_TEXT.fullmatch(" ".join(_LEAD.sub("", text.strip()).split()))
    return (match.group(1) or match.group(2), match.group(3)) if match else ("", "")


def options_by_letter(options: Any) -> dict[str, str]:
    """Return letter -> text of options given as a list, a mapping, or {"label": [...], "text": [...]}; else {}."""
    if hasattr(options, "tolist"):
        options = options.tolist()
    if isinstance(options, Mapping):
        if {"label", "text"} <= set(options):  # as in ARC and CommonsenseQA
            return {str(k): str(v) for k, v in zip(options["label"], options["text"], strict=False)}
        return {str(key).strip("(). ").upper(): str(value) for key, value in options.items()}
    if isinstance(options, (list, tuple)):
        marks = [re.match(r"\s*\(?([A-J])[).:]\s*(.+)", str(option), re.DOTALL) for option in options]
        if options and all(marks):
            return {match.group(1): match.group(2) for match in marks if match}
        return {chr(ord("A") + i): str(option) for i, option in enumerate(options[:26])}
    return {}


def _same_words(a: str, b: str) -> bool:
    return words(a) != "" and words(a).casefold() == words(b).casefold()
