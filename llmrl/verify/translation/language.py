"""Check whether a text is written in a language: by script, and among languages of one script by statistics.

The character statistics are py3langid's (extra `translation`). A language with a script of its own needs no library.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from llmrl.errors import UserError

SCRIPTS = {
    "Latin": r"A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff",
    "Cyrillic": r"\u0400-\u052f",
    "Greek": r"\u0370-\u03ff\u1f00-\u1fff",
    "Hebrew": r"\u0590-\u05ff",
    "Arabic": r"\u0600-\u06ff\u0750-\u077f",
    "Devanagari": r"\u0900-\u097f",
    "Thai": r"\u0e00-\u0e7f",
    "Hangul": r"\u1100-\u11ff\u3130-\u318f\uac00-\ud7af",
    "Kana": r"\u3040-\u30ff\u31f0-\u31ff",
    "Han": r"\u3400-\u4dbf\u4e00-\u9fff",
}
LANGUAGES = {
    "Latin": [
        "en",
        "de",
        "fr",
        "es",
        "it",
        "pt",
        "nl",
        "pl",
        "cs",
        "sk",
        "sl",
        "hr",
        "ro",
        "hu",
        "tr",
        "sv",
        "da",
        "no",
        "fi",
        "et",
        "lv",
        "lt",
        "vi",
        "id",
        "ca",
        "sq",
    ],
    "Cyrillic": ["ru", "uk", "bg", "sr", "mk", "be", "kk", "mn"],
    "Greek": ["el"],
    "Hebrew": ["he"],
    "Arabic": ["ar", "fa", "ur"],
    "Devanagari": ["hi", "mr", "ne"],
    "Thai": ["th"],
    "Hangul": ["ko"],
}
SCRIPT_OF = {language: script for script, languages in LANGUAGES.items() for language in languages}
TARGET_SCRIPTS = {language: {script} for language, script in SCRIPT_OF.items()} | {"zh": {"Han"}, "ja": {"Kana", "Han"}}

MIN_SHARE = 0.7
"""Smallest share of letters in the target's scripts. Names kept from the source are ignored; ideographs count twice,
because one carries about as much as two letters."""
MIN_LETTERS_FOR_STATISTICS = 20
"""Shorter texts in the right script are accepted, because statistics on them are guesses."""
MIN_HAN_WITHOUT_KANA = 12
"""A text with more ideographs than this and no kana is Chinese rather than Japanese."""

_WORD = re.compile(r"[^\W\d_]+")
_COUNTED = {script: re.compile(f"[{ranges}]") for script, ranges in SCRIPTS.items()}


def base_language(code: str) -> str:
    """Return the language of a code: 'zh' for 'zh-CN', 'ZH_Hans' or 'zh'.

    Raises:
        UserError: this module does not know the language.
    """
    language = re.split(r"[-_]", code.strip().lower())[0]
    if language not in TARGET_SCRIPTS:
        known = " ".join(sorted(TARGET_SCRIPTS))
        raise UserError(f"language {code!r} is unknown: use an ISO 639-1 code, one of {known}")
    return language


def is_language(text: str, target: str, *, source_text: str = "") -> bool:
    """Return whether `text` is written in language `target`.

    Capitalized words that also occur in `source_text` are names and are ignored. A text without any letter of the
    target's script is never in that language.

    Args:
        text: the text to check.
        target: ISO 639-1 code; a region or script suffix is allowed.
        source_text: the text it was translated from.

    Raises:
        UserError: `target` shares its script with other languages and py3langid is not installed.
    """
    language = base_language(target)
    names = {word for word in _WORD.findall(source_text) if word[0].isupper()}
    rest = " ".join(word for word in _WORD.findall(text) if word not in names)
    scripts = TARGET_SCRIPTS[language]
    if not any(_COUNTED[script].search(text) for script in scripts):
        return False
    counts = {
        script: len(pattern.findall(rest)) * (2 if script == "Han" else 1) for script, pattern in _COUNTED.items()
    }
    wanted, total = sum(counts[script] for script in scripts), sum(counts.values())
    if wanted < MIN_SHARE * total:
        return False
    if language == "ja":
        return counts["Kana"] > 0 or counts["Han"] / 2 <= MIN_HAN_WITHOUT_KANA
    rivals = _rivals(language)
    if not rivals:
        return wanted > 0
    letters = len(_COUNTED[SCRIPT_OF[language]].findall(text))
    return letters < MIN_LETTERS_FOR_STATISTICS or most_likely(text, rivals) == language


def check_language(target: str) -> None:
    """Raise a UserError if texts cannot be checked to be in a language: it is unknown, or py3langid is missing."""
    if _rivals(base_language(target)):
        _identifier()


def _rivals(language: str) -> list[str]:
    """Return the languages of the same script, with the language itself; empty if it has a script of its own."""
    languages = LANGUAGES.get(SCRIPT_OF.get(language, ""), [])
    return languages if len(languages) > 1 else []


def most_likely(text: str, languages: list[str]) -> str:
    """Return the most likely of `languages` (ISO 639-1) for `text`, by character statistics."""
    return next(language for language, _score in _identifier().rank(text) if language in languages)


@cache
def _identifier() -> Any:
    try:
        import py3langid
    except ImportError:
        raise UserError(
            "telling apart languages of one script needs py3langid: pip install 'llmrl[translation]'"
        ) from None
    return py3langid
