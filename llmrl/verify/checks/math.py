"""Mathematical answers: whether the answer of a completion equals the reference, on top of math-verify.

The steps are in modules of their own: `math_extract` finds the answer, `math_spelling` and `math_units` unify how it is
written, `math_letters` reads options, `math_symbols` compares formulas.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from fractions import Fraction
from itertools import accumulate
from typing import Any, Literal, get_args

from llmrl.verify.checks.math_extract import MAX_ANSWER_LENGTH, Extraction, extract_answer, last_box
from llmrl.verify.checks.math_letters import chosen_letters
from llmrl.verify.checks.math_spelling import as_fraction, as_percent, normalize, skeleton, words
from llmrl.verify.checks.math_symbols import OPERATOR, is_tame, parse, verify
from llmrl.verify.checks.math_units import same_unit, unit_of

__all__ = [
    "UNITS",
    "Extraction",
    "Units",
    "equals_gold",
    "extract_answer",
    "gold_answers",
    "is_readable",
    "last_box",
    "reference_problem",
]
Units = Literal["ignore", "match", "require"]
UNITS: tuple[Units, ...] = get_args(Units)

# --- the gold answer --------------------------------------------------------------------------------------------------


def gold_answers(answer: Any) -> list[str]:
    r"""Return the accepted forms of a reference answer.

    Args:
        answer: a plain answer (text or number), a GSM8K solution that ends in `#### x`, a MATH solution with a
            \boxed{...}, or a list of accepted forms.

    Returns:
        Short answers; empty if none can be read.
    """
    if hasattr(answer, "tolist"):  # an array or a number of NumPy
        answer = answer.tolist()
    if isinstance(answer, (list, tuple)):
        return [form for entry in answer for form in gold_answers(entry)]
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        return []
    text = str(answer)
    if "\\boxed" in text or "\\fbox" in text:
        found = last_box(text)
    elif "####" in text:
        found = text[text.rfind("####") + 4 :].strip()
    else:
        found = text.strip()
    usable = (
        found
        and len(found) <= MAX_ANSWER_LENGTH
        and (
            any(character.isalnum() or character in "\u221e\u2205" for character in found) or found in ("{}", "\\{\\}")
        )
    )
    return [found] if found and usable else []


@functools.lru_cache(maxsize=4096)
def is_readable(gold: str) -> bool:
    """Return whether answers can be compared with this gold: a number, words, or anything math-verify can parse."""
    normal = normalize(gold)
    if as_fraction(normal) is not None or re.fullmatch(r"[^\W\d_][\w\s.,'()-]*", words(normal)):
        return True
    if re.fullmatch(r"\\\{.+(?:\||:|\\mid).+\\\}", normal):  # a set by its condition is compared as it is written
        return True
    # What cannot be parsed but is well formed (a || b, 5:00) is compared as it is written.
    return _is_plain(normal) or any(not isinstance(parsed, str) for parsed in parse(normal))


def reference_problem(answer: Any) -> str | None:
    r"""Return why completions cannot be compared with a reference, or None if they can. Fast enough for whole datasets.

    Numbers, words and plain LaTeX are recognized by their form (20 microseconds). Only what is left is parsed, which
    takes a thousand times longer; an expression that is not tame is not tried.

    Args:
        answer: as `gold_answers` takes it.
    """
    golds = gold_answers(answer)
    if not golds:
        if answer is None or (hasattr(answer, "__len__") and not len(answer)):
            return "the row has no answer"
        return f"the answer {_shown(answer)} has no part that can be compared: no number, word or closed \\boxed{{...}}"
    normal = [normalize(gold) for gold in golds]
    if any(_is_plain(form) or not is_tame(form) for form in normal) or any(map(is_readable, golds)):
        return None
    return f"the answer {_shown(golds[0] if len(golds) == 1 else golds)} cannot be read as a number, words or LaTeX"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:37]} ... {text[-37:]}"


_PLAIN = re.compile(
    r"(?:[\w\s+\-*/=<>.,:;!|'%()\[\]{}^&]|\\[{}|\\]|\\ "
    r"|\\(?:frac|sqrt|pi|cdot|times|infty|cup|cap|le|leq|ge|geq|neq|pm|circ|theta|alpha|beta|gamma|lambda|omega|angle|parallel|perp|sim|cong"
    r"|log|ln|exp|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|binom|overline|begin|end|in|mathbb|text|mathbf"
    r"|mbox|mathrm|textbf|textit|vec|dots|ldots|cdots|emptyset|varnothing|phi|mu|sigma|epsilon|delta|Delta|triangle"
    r")(?![a-zA-Z]))+"
)
"""LaTeX of the kind that references are made of."""


def _is_plain(normal: str) -> bool:
    """Return whether a normalized reference is a number, or LaTeX without unknown commands and with closed brackets."""
    if re.fullmatch(r"[-+]?\d+(?:\.\d+)?", normal):
        return True
    if not _PLAIN.fullmatch(normal) or normal.count("{") != normal.count("}"):
        return False
    return any(character.isalnum() for character in re.sub(r"\\[a-zA-Z]+", "", normal)) or "\\pi" in normal


# --- equivalence ------------------------------------------------------------------------------------------------------


def equals_gold(
    prediction: str | None,
    golds: Iterable[str],
    *,
    allow_unevaluated: bool = False,
    units: Units = "ignore",
    question: str = "",
) -> bool | None:
    r"""Return whether a prediction is equivalent to one of several accepted answers; None if none of these can be read.

    Call it in a process that can be killed, because some expressions take forever to simplify.

    Args:
        prediction: from `extract_answer`.
        golds: from `gold_answers`.
        allow_unevaluated: accept a sum or product that evaluates to a numeric gold (17 \cdot 24 for 408). Otherwise it
            is wrong, because it may only restate the question. A lone factorial or binomial is accepted either way.
        units: `ignore` compares values alone. With `match` a unit in the prediction must be the gold's; with `require`
            the prediction must also have one where the gold has.
        question: a lone factorial or binomial that stands in here restates it.
    """
    golds = list(golds)
    if prediction is not None and any(
        _same(normalize(prediction), normalize(gold)) and _units_agree(prediction, gold, units) for gold in golds
    ):
        return True
    readable = [gold for gold in golds if is_readable(gold)]
    if not readable:
        return None
    return prediction is not None and any(
        _units_agree(prediction, gold, units)
        and _equivalent(normalize(prediction), normalize(gold), allow_unevaluated, question)
        for gold in readable
    )


def _units_agree(prediction: str, gold: str, units: Units) -> bool:
    if "circ" in gold and re.search(r"\brad", prediction):
        return False
    if units == "ignore" or not (wanted := unit_of(gold)):
        return True
    given = unit_of(prediction)
    return same_unit(given, wanted) if given else units == "match"


def _same(ours: str, theirs: str) -> bool:
    """Return whether two answers are equal as strings, words, options or plain numbers."""
    if not ours or ours == theirs:
        return bool(ours)
    a, b = words(ours), words(theirs)
    if a == b != "" or (len(a) > 1 and a.rstrip(".").casefold() == b.rstrip(".").casefold()):
        return True
    value, gold = as_fraction(ours), as_fraction(theirs)
    if value is not None and gold is not None:
        return value == gold
    if ours.endswith("%") or theirs.endswith("%"):
        return _same_percent(ours, theirs)
    if value is not None:
        return False
    letters = chosen_letters(theirs)
    if letters:
        return letters == chosen_letters(ours)
    return theirs == "\\mathbb{R}" and ours in ("R", "\\mathbb R", "\\text{R}", "\\mathbf{R}", "\\mathrm{R}")


def _same_percent(ours: str, theirs: str) -> bool:
    """Compare where at least one is a percentage: 50% is 50% and 0.5, and also 50, because rows leave the sign out."""
    a, b = as_percent(ours), as_percent(theirs)
    if a is not None and b is not None:
        return a == b
    percent = a if a is not None else b
    number = as_fraction(theirs if a is not None else ours)
    if percent is None or number is None:
        return False
    return number == percent / 100 or (number == percent and abs(percent) >= 1)


def _equivalent(ours: str, theirs: str, allow_unevaluated: bool, question: str) -> bool:
    """Compare answers that are not the same: decide numbers here, as math-verify would; leave the rest to it."""
    if not ours or len(ours) > MAX_ANSWER_LENGTH:
        return False
    a, b = as_fraction(ours), as_fraction(theirs)
    if b is not None and a is not None and abs(a - b) > Fraction(2, 10**6):  # it rounds to 6 digits
        return False
    if b is not None and a is None and not allow_unevaluated and _is_unevaluated(ours, question):
        return False
    if not allow_unevaluated and OPERATOR.search(ours) and not OPERATOR.search(theirs):
        return False
    if b is not None and a is None:
        if measured := _WITH_LETTER_UNIT.fullmatch(ours):
            return Fraction(measured.group(1)) == b
        if not allow_unevaluated and _holds_variable(ours):
            return False
    if _other_kind(ours, theirs):
        return False
    if (named := _NAMED.fullmatch(theirs)) and theirs[1:4] == "(x)" and re.match(r"y\s*=", ours):
        ours = ours.partition("=")[2].strip()  # y = 2x + 1 for f(x) = 2x + 1
    if named and "=" not in ours:
        return _same(ours, named.group(1)) or _equivalent(ours, named.group(1), allow_unevaluated, question)
    if (bases := _same_base(ours, theirs)) is not None:
        return bases
    if _JUXTAPOSED.search(ours):
        return False
    return skeleton(ours) == skeleton(theirs) or (is_tame(ours) and is_tame(theirs) and verify(theirs, ours))


_NAMED = re.compile(r"[a-zA-Z]\w{0,3}\([^()]*\)\s*=\s*([^=]+)")
"""A value of a function: f(2) = 5."""
_BRACKETED = re.compile(r"[(\[][^()\[\]]*[)\]]")
"""A single tuple or interval."""
_SIMPLE_SIDE = re.compile(r"(?:\\angle\s*|\|)?\\?[a-zA-Z]+\|?(?:_\s*(?:\w|\{[^{}]*\}))?'?(?:\([^()]*\))?|[^a-zA-Z]*")
_WITH_LETTER_UNIT = re.compile(r"([-+]?\d+(?:\.\d+)?)\s*(?:m|s|g|h|L|N|J|W|V)")
_VARIABLE = re.compile(r"(?<![a-zA-Z\\])[a-df-hj-zA-Z](?![a-zA-Z])")


def _holds_variable(answer: str) -> bool:
    """Return whether the last side of an equation contains a letter other than e and i: `x^0` is not a number."""
    last = re.sub(r"\\[a-zA-Z]+\s*\{[a-zA-Z\s]*\}", "", answer.rpartition("=")[2])
    return "," not in answer and _VARIABLE.search(last) is not None


def _other_kind(ours: str, theirs: str) -> bool:
    """Return whether one is a set and the other a tuple or interval, or only the gold is an equation of two variables.

    math-verify takes these for each other.
    """
    if theirs.startswith("\\{") and "," in theirs and _BRACKETED.fullmatch(ours):
        return True
    if ours.startswith("\\{") and "," in ours and _BRACKETED.fullmatch(theirs):
        return True
    left, equals, _ = theirs.partition("=")
    return bool(equals) and "," not in theirs and "=" not in ours and not _SIMPLE_SIDE.fullmatch(left.strip())


_JUXTAPOSED = re.compile(r"(?<![_\d])\d+\s+\d")
"""Two numbers side by side, which math-verify would add up."""
_SCIENTIFIC = re.compile(r"(?<=\d)\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{\s*[-+]?\d+\s*\}|[-+]?\d+)")
_OPERATION = re.compile(
    r"\\(?:times|cdot|div|pm|mp|sum|prod|int|lim|[dt]?binom|gcd|lcm|max|min|lfloor|lceil|bmod|pmod|mod)(?![a-zA-Z])"
    r"|[*!+\u00f7]|(?<=[\w)}\]%])\s*-"
)
_LONE = re.compile(r"\d{1,3}\s*!|\\[dt]?binom\s*(?:\{\s*\d{1,3}\s*\}|\d)\s*(?:\{\s*\d{1,3}\s*\}|\d)")
"""One factorial or binomial of numbers: how an answer to a counting question is often given."""


def _is_unevaluated(answer: str, question: str) -> bool:
    r"""Return whether the last side of an equation still contains an operation: 17 \cdot 24, 5!-4!.

    A lone 5! or \binom{5}{2} is a value, unless the question contains it.
    """
    depths = accumulate((c == "{") - (c == "}") for c in answer)
    equals = [i for i, (c, depth) in enumerate(zip(answer, depths, strict=True)) if c == "=" and depth == 0]
    last = answer[equals[-1] + 1 :].strip() if equals else answer
    if _LONE.fullmatch(last):
        return _squeezed(last) in _squeezed(question)
    return _OPERATION.search(_SCIENTIFIC.sub("", last)) is not None


def _squeezed(text: str) -> str:
    return re.sub(r"[\s{}]|(?<=\\)[dt](?=binom)", "", text)


_BASED = re.compile(r"([0-9A-F]+)_\s*(?:\{\s*(\d+)\s*\}|(\d+))")


def _same_base(ours: str, theirs: str) -> bool | None:
    """Compare numbers with a base, such as 110_2; the base may be left out in the answer. None if neither has one."""
    gold, mine = _BASED.fullmatch(theirs), _BASED.fullmatch(ours)
    if gold and mine:
        return mine.group(1) == gold.group(1) and _base(mine) == _base(gold)
    if gold:
        return ours == gold.group(1)
    return _base(mine) == "10" and mine.group(1) == theirs if mine else None


def _base(match: re.Match[str]) -> str:
    return match.group(2) or match.group(3)
