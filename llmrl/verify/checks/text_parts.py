"""Sentences of a text, by rules."""

from __future__ import annotations

import re

_ABBREVIATIONS = re.compile(
    r"\b(?:Mr|Mrs|Ms|Dr|St|Prof|Capt|Lt|Mt|Inc|Ltd|Jr|Sr|Co|vs|etc|e\.g|i\.e|U\.S|a\.m|p\.m|Ph\.D|No(?=\.\s?\d))\.|\b[A-Z]\.(?=\s?[A-Z])"
)
_SENTENCE_END = re.compile(r"(?:[.!?]+[\"')\]\u201d]*(?=\s|$)|[\u3002\uff01\uff1f]+)")


def sentences(text: str) -> list[str]:
    """Split a text into sentences; abbreviations, initials and decimals do not end one."""
    hidden = _ABBREVIATIONS.sub(lambda match: match.group().replace(".", "\0"), " ".join(text.split()))
    pieces, start = [], 0
    for match in _SENTENCE_END.finditer(hidden):
        pieces.append(hidden[start : match.end()])
        start = match.end()
    pieces.append(hidden[start:])
    return [piece.replace("\0", ".").strip() for piece in pieces if re.search(r"\w", piece)]
