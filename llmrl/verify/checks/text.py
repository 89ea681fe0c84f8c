"""How close a text comes to a reference: edit similarity, exact match of code, and smoothed BLEU of token ids."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from rapidfuzz import fuzz

LITERALS = {"<NUM_LIT>": "0", "<STR_LIT>": "", "<CHAR_LIT>": ""}
"""CodeXGLUE's placeholders for literals that it left out, and the text that its metrics read instead."""
KEPT_LITERAL = re.compile(r"<(?:NUM|STR|CHAR)_LIT:([^>]*)>")
"""A frequent literal, which CodeXGLUE keeps inside the placeholder."""
BLEU_ORDER = 4


def without_placeholders(code: str) -> str:
    """Replace CodeXGLUE's placeholders of literals: `<STR_LIT:utf-8>` by `utf-8`, `<NUM_LIT>` by `0`."""
    for name, text in LITERALS.items():
        code = code.replace(name, text)
    return KEPT_LITERAL.sub(r"\1", code)


def edit_similarity(prediction: str, reference: str) -> float:
    """Return the similarity of two pieces of code, from 0 to 1 (equal): 1 - d / (m + n).

    d is the smallest number of inserted and deleted characters that turns one into the other; m and n are their
    lengths. This is CodeXGLUE's edit similarity (`fuzz.ratio`, 0 to 100 there) without rounding to whole percents.
    """
    return fuzz.ratio(without_placeholders(prediction.strip()), without_placeholders(reference.strip())) / 100


def code_exact_match(prediction: str, reference: str) -> float:
    """Return 1.0 if both have the same words between white space, else 0.0 (CodeXGLUE, line completion)."""
    return float(without_placeholders(prediction).split() == without_placeholders(reference).split())


def sentence_bleu(prediction: Sequence[int], reference: Sequence[int]) -> float:
    """Compute BLEU-4 of token ids, from 0 to 1, adding 1 to the matches and to the total of n-grams for n above 1.

    References:
        Papineni et al. 2002 (BLEU); Lin and Och 2004, "ORANGE" (the smoothing).
    """
    logarithms = 0.0
    for n in range(1, BLEU_ORDER + 1):
        found, wanted = _ngrams(prediction, n), _ngrams(reference, n)
        matches, total = (found & wanted).total() + (n > 1), found.total() + (n > 1)
        if not matches:
            return 0.0
        logarithms += math.log(matches / total)
    brevity = min(0.0, 1 - len(reference) / len(prediction))
    return math.exp(brevity + logarithms / BLEU_ORDER)


def _ngrams(tokens: Sequence[int], n: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
