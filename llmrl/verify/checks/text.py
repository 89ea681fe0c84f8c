"""Text of a completion: what it says outside its thinking, and how close it comes to a reference text.

The measures are edit similarity, exact match of code, and smoothed BLEU of token ids.
"""

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


def without_thinking(text: str) -> str:
    """Return the part of a completion that answers: everything outside its `<think> ... </think>` blocks.

    Every verifier reads a completion through this function, so all of them judge the same text:

    - A closed block is removed wherever it stands. Blocks do not nest: the first `</think>` closes.
    - A block that is never closed is thinking without an answer; it is removed to the end.
    - Text before a first `</think>` that nothing opened is thinking too: many chat templates put `<think>` at the end
      of the prompt. (Such thinking that is cut off before its `</think>` looks like an answer.)
    - Any other `</think>` closes nothing; the tag alone is removed.

    What remains of several parts is joined by line breaks, so that removing a block never makes a new word or tag.
    The result holds no thinking tag: applying the function twice changes nothing. Time is linear in the length.

    Example:
        >>> without_thinking("<think>a</think>b<think>c")
        'b'
    """
    first, *later = text.split("</think>")
    if later and "<think>" not in first:
        first = ""
    # Each part ends where a `</think>` stood or the text ended, so thinking runs from its first `<think>` to its end.
    answers = (part.partition("<think>")[0] for part in (first, *later))
    return "\n".join(answer for answer in answers if answer)


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
