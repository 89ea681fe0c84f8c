"""Mathematical answers: extraction from a completion, and equivalence on top of math-verify.

A completion and a gold answer in; the extracted answer and whether it equals the gold answer out. Extraction is linear
in the length of the text, and math-verify only sees the short extracted answer.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from math import prod
from typing import Any

from llmrl.verify.thinking import without_thinking

MAX_ANSWER_LENGTH = 1000
"""Characters; anything longer does not count as an answer."""
TAIL_LENGTH = 10_000
"""Without a box, the answer is searched in this many characters at the end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Extraction:
    """The answer that was found in a completion."""

    answer: str | None
    """None if the completion gives no answer."""
    num_boxes: int
    """Number of \\boxed{} or \\fbox{} in the completion, outside the thinking."""


# --- extraction -------------------------------------------------------------------------------------------------------


def extract_answer(completion: str, *, require_box: bool = False) -> Extraction:
    """Find the answer of a completion: its last box; without a box, `#### x`, then `answer is x`, then the last number.

    Only the last box counts. If it is unreadable (empty, never closed) there is no answer, and no earlier box replaces
    it, so several boxes never buy several guesses.

    Args:
        completion: any text; its thinking is removed first.
        require_box: return no answer if there is no box.
    """
    text = without_thinking(completion)
    num_boxes = text.count("\\boxed") + text.count("\\fbox")
    if num_boxes:
        return Extraction(answer=last_box(text), num_boxes=num_boxes)
    found = None if require_box else _unboxed_answer(text[-TAIL_LENGTH:])
    return Extraction(answer=found if found is not None and len(found) <= MAX_ANSWER_LENGTH else None, num_boxes=0)


def last_box(text: str) -> str | None:
    r"""Return what the last \boxed{...}, \boxed x or \fbox{...} holds; None if it is empty, unclosed or too long."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[start : start + MAX_ANSWER_LENGTH + len("\\boxed{}")]
    rest = rest.removeprefix("\\boxed").removeprefix("\\fbox").lstrip()
    if not rest.startswith("{"):  # \boxed 5
        bare = re.match(r"[^\s${}\\]+", rest)
        return bare.group().rstrip(".,;") or None if bare else None
    depth, escaped = 0, False
    for i, character in enumerate(rest):
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return rest[1:i].strip() or None
    return None


_NUMBER = r"[-+\u2212]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|[-+\u2212]?\.\d+"
_LAST_NUMBER = re.compile(rf"(?<![\d.])(?:{_NUMBER})(?:\s*/\s*\d+(?![\d.]))?\s*(?:\\?%)?")
_ANSWER_IS = re.compile(r"answer\s*(?:is|are|was|would be|should be|=|:)+[\s:*=]*", re.IGNORECASE)


def _unboxed_answer(tail: str) -> str | None:
    if "####" in tail:
        return _first_line(tail[tail.rfind("####") + 4 :])
    starts = [match.end() for match in _ANSWER_IS.finditer(tail)]
    if starts and (answer := _first_sentence(tail[starts[-1] :])):
        return answer
    numbers = _LAST_NUMBER.findall(tail)
    return numbers[-1].strip() if numbers else None


def _first_line(text: str) -> str | None:
    line = text.strip().split("\n", 1)[0].strip().strip("*").rstrip(".").strip()
    return line if 0 < len(line) <= MAX_ANSWER_LENGTH else None


def _first_sentence(text: str) -> str | None:
    """Return the text up to the end of its first sentence, or the mathematics in dollars or brackets it begins with."""
    line = _first_line(text)
    if line is None:
        return None
    in_dollars = re.match(r"\$+([^$]+)\$+", line) or re.match(r"\\[(\[](.+?)\\[)\]]", line)
    if in_dollars:
        return in_dollars.group(1).strip()
    return (
        re.split(r"\.(?:\s|$)|[!?;](?:\s|$)|,?\s(?:because|since|which)\b|,\s+(?:so|as)\b", line)[0].strip(" *`\"'")
        or None
    )


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
        and any(character.isalnum() or character == "\u221e" for character in found)
    )
    return [found] if found and usable else []


@functools.lru_cache(maxsize=4096)
def is_readable(gold: str) -> bool:
    """Return whether answers can be compared with this gold: a number, words, or anything math-verify can parse."""
    normal = normalize(gold)
    if _as_fraction(normal) is not None or re.fullmatch(r"[^\W\d_][\w\s.,'()-]*", words(normal)):
        return True
    return any(not isinstance(parsed, str) for parsed in _parse(normal))


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
    r"(?:[\w\s+\-*/=<>.,:;!|'%()\[\]{}^&]|\\[{}|\\ ]"
    r"|\\(?:frac|sqrt|pi|cdot|times|infty|cup|cap|le|leq|ge|geq|neq|pm|circ|theta|alpha|beta|gamma|lambda|omega|angle"
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


def equals_gold(prediction: str | None, golds: Iterable[str], *, allow_unevaluated: bool = False) -> bool | None:
    r"""Return whether a prediction is equivalent to one of several accepted answers; None if none of these can be read.

    Call it in a process that can be killed, because some expressions take forever to simplify.

    Args:
        prediction: from `extract_answer`.
        golds: from `gold_answers`.
        allow_unevaluated: accept a sum or product that evaluates to a numeric gold (17 \cdot 24 for 408). Otherwise it
            is wrong, because it may only restate the question.
    """
    golds = list(golds)
    if prediction is not None and any(_same(normalize(prediction), normalize(gold)) for gold in golds):
        return True
    readable = [gold for gold in golds if is_readable(gold)]
    if not readable:
        return None
    return prediction is not None and any(
        _equivalent(normalize(prediction), normalize(gold), allow_unevaluated) for gold in readable
    )


def _same(ours: str, theirs: str) -> bool:
    """Return whether two answers are equal as strings, words or plain numbers."""
    if not ours or ours == theirs:
        return bool(ours)
    a, b = words(ours), words(theirs)
    if a == b != "" or (len(a) > 1 and a.casefold() == b.casefold()):
        return True
    value = _as_fraction(ours)
    return value is not None and value == _as_fraction(theirs)


def _equivalent(ours: str, theirs: str, allow_unevaluated: bool) -> bool:
    """Compare answers that are not the same: decide numbers here, as math-verify would; leave the rest to it."""
    if not ours or len(ours) > MAX_ANSWER_LENGTH:
        return False
    a, b = _as_fraction(ours), _as_fraction(theirs)
    if b is not None and a is not None and abs(a - b) > Fraction(2, 10**6):  # it rounds to 6 digits
        return False
    if b is not None and a is None and not allow_unevaluated and _is_unevaluated(ours):
        return False
    return is_tame(ours) and not _JUXTAPOSED.search(ours) and _verify(theirs, ours)


_SCIENTIFIC = re.compile(r"(?<=\d)\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{\s*[-+]?\d+\s*\}|[-+]?\d+)")
_OPERATION = re.compile(
    r"\\(?:times|cdot|div|pm|mp|sum|prod|int|lim|[dt]?binom|gcd|lcm|max|min|lfloor|lceil|bmod|pmod|mod)(?![a-zA-Z])"
    r"|[*!+\u00f7]|(?<=[\w)}\]%])\s*-"
)


def _is_unevaluated(answer: str) -> bool:
    r"""Return whether the last side of an equation still contains an operation: 17 \cdot 24, \binom{5}{2}, 5!."""
    depths = accumulate((c == "{") - (c == "}") for c in answer)
    equals = [i for i, (c, depth) in enumerate(zip(answer, depths, strict=True)) if c == "=" and depth == 0]
    last = answer[equals[-1] + 1 :] if equals else answer
    return _OPERATION.search(_SCIENTIFIC.sub("", last)) is not None


_UNICODE = str.maketrans(
    {"\u2212": "-", "\u00b0": "^\\circ", "\u221e": "\\infty ", "\u03c0": "\\pi ", "\u00d7": "\\times "}
    | {"\u00b7": "\\cdot ", "\u2264": "\\le ", "\u2265": "\\ge ", "\u222a": "\\cup ", "\u2229": "\\cap "}
    | dict.fromkeys("\u00a3\u20ac\u00a5")
)
"""Unicode characters as LaTeX; currency signs are removed."""
_JUXTAPOSED = re.compile(r"\d\s+\d")
"""Two numbers side by side, which math-verify would add up."""
_SPACING = re.compile(r"\\[!,;:> ]|\\(?:quad|qquad|left|right|displaystyle)(?![a-zA-Z])|~")
_GROUPED = re.compile(r"(?<=\d)(?:\{,\}|\s*\\[!,;: ]\s*|,\s*\\!\s*|\s)(?=\d{3}(?!\d))")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_NOT_UNITS = (
    "hundred|thousand|million|billion|trillion|dozen|percent|half|halves|quarters?|thirds?|fourths?|fifths?|sixths?|"
    "sevenths?|eighths?|ninths?|tenths?|hundredths?|thousandths?|squared|cubed|factorial|plus|minus|times|over|mod|"
    "or|and|pi|sqrt|sin|cos|tan|log|exp"
)
"""Words after a number that change its value."""
_TRAILING_UNIT = re.compile(
    rf"^({_NUMBER}|-?\d+/\d+)\s*(?![a-zA-Z\s]*\b(?:{_NOT_UNITS})\b)"
    r"(?:\s(?:[a-zA-Z]{3,}|cm|mm|km|kg|mg|ml|ft|in|lb|oz|hr)(?:\s*\^?\d)?(?:[\s/]+[a-zA-Z]+){0,3})\.?$"
)
_MIXED = re.compile(r"^([-+]?\d+)\s+(\d+)\s*/\s*(\d+)$")


@functools.lru_cache(maxsize=4096)
def normalize(answer: str) -> str:
    """Unify the spelling of an answer: spacing, thousands separators, currency, degrees, units, wrappers."""
    text = answer.strip().strip("$").strip()
    text = text.translate(_UNICODE).replace("\\%", "%").replace("\\$", "").replace("$", "")
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = _GROUPED.sub("", text)
    text = re.sub(r"^([-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?)(?=\D|$)", lambda m: m.group().replace(",", ""), text)
    text = _SPACING.sub(" ", text)
    whole = _TEXT.fullmatch(text.strip())
    if whole and whole.group(1)[:1].isdigit():
        text = whole.group(1)
    text = re.sub(r"^\\approx(?![a-zA-Z])\s*", "", text.strip())
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", " ", text).strip().rstrip(".").strip()
    if unit := _TRAILING_UNIT.match(text):
        text = unit.group(1)
    return _MIXED.sub(r"\1\\frac{\2}{\3}", text)


def words(answer: str) -> str:
    r"""Return the answer as plain words, without \text{} and outer spaces; '' if it contains mathematics."""
    plain = " ".join(_TEXT.sub(r"\1", answer).split()).strip("() ")
    return "" if re.search(r"[\\{}^=<>+*]", plain) else plain


def _as_fraction(text: str) -> Fraction | None:
    """Return a plain number, fraction or mixed number as an exact value; None for anything else."""
    text = re.sub(r"(?:\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})|\s*\\text\s*\{[^{}\d]*\})$", "", text)
    if match := re.fullmatch(r"([-+]?)(\d+)?\\frac(?:\{(\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d))", text):
        sign, whole, *parts = match.groups()
        top, bottom = int(parts[0] or parts[1]), int(parts[2] or parts[3])
        value = int(whole or 0) + Fraction(top, bottom) if bottom else None
        return -value if value is not None and sign == "-" else value
    if re.fullmatch(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?", text):
        return Fraction(text)
    if match := re.fullmatch(r"([-+]?\d+)\s*/\s*(\d+)", text):
        return Fraction(int(match.group(1)), int(match.group(2))) if int(match.group(2)) else None
    return None


MAX_POWER = 10**7
"""Largest product of the exponents in one answer."""
MAX_NESTING = 40
"""Deepest nesting of brackets; the LaTeX parser's time grows steeply with it."""
_WILD = re.compile(
    r"\^\s*\{?\s*[-+]?\d{5,}|(?:\d{5,}|\^\s*\{?\s*\d+)[\s})\]]*!|!\s*!|\^\s*\d+\s*\^"  # 9^{99999}, 99999!, 9!!, 9^9^9
    r"|\^\s*\{[^{}]*\^\s*\{[^{}]*\^"  # e^{e^{e^9}}
    r"|\([^()]*[-+][^()]*\)\s*\^\s*\{?\s*\d{4,}"  # (x+1)^{2000} is multiplied out
    r"|\\(?:[dt]?binom|sum|prod|Gamma|int)(?![a-zA-Z]).*(?:\d{5,}|\d\s*\^\s*\{?\s*\d)",
    re.DOTALL,
)


def is_tame(answer: str) -> bool:
    """Return False for an answer that takes too long to parse or evaluate, as only attacks on a verifier do."""
    if _WILD.search(answer):
        return False
    if max(accumulate((c in "([{") - (c in ")]}") for c in answer), default=0) > MAX_NESTING:
        return False
    if prod(int(power) for power in re.findall(r"\^\s*\{?\s*[-+]?([1-9]\d*)", answer)) > MAX_POWER:
        return False
    for start in (match.end() for match in re.finditer(r"\^\s*\{", answer)):
        exponent = answer[start : _closing(answer, start)]
        if "^" in exponent and not re.search(r"[a-zA-Z]", re.sub(r"\\(?:cdot|times)", "", exponent)):
            return False
    return True


def _closing(text: str, start: int) -> int:
    depth = 1
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return i
    return len(text)


@functools.lru_cache(maxsize=1024)
def _parse(answer: str) -> list[Any]:
    """Parse one short answer with math-verify, without its signal-based time limit."""
    from math_verify import LatexExtractionConfig, parse

    _silence()
    config = LatexExtractionConfig(boxed_match_priority=0)
    return parse(f"\\boxed{{{answer}}}", [config], extraction_mode="first_match", parsing_timeout=None)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=4096)
def _verify(gold: str, prediction: str) -> bool:
    """Compare two short answers with math-verify. Results are cached, because the answers of a group repeat."""
    from math_verify import verify

    _silence()
    theirs, ours = _parse(gold), _parse(prediction)
    if theirs and ours and _surely_differ(theirs[0], ours[0]):
        return False
    return bool(verify(theirs, ours, allow_set_relation_comp=True, timeout_seconds=None))


def _surely_differ(gold: Any, prediction: Any) -> bool:
    """Return whether two expressions have clearly different values after numbers replace their symbols.

    This saves most of math-verify's time, because it simplifies the difference before it answers no. False means "ask
    math-verify": the values are closer than its rounding, not finite, or follow special rules there (percentages, and
    lone symbols, which are often words).
    """
    from sympy import Expr, Rational, Symbol, UnevaluatedExpr

    for expression in (gold, prediction):
        if not isinstance(expression, Expr) or isinstance(expression, Symbol) or expression.has(UnevaluatedExpr):
            return False
    symbols = sorted(gold.free_symbols | prediction.free_symbols, key=str)
    point = {symbol: Rational(7 + 6 * i, 5 + 4 * i) for i, symbol in enumerate(symbols)}
    try:
        values = [complex(expression.subs(point).evalf(15)) for expression in (gold, prediction)]
    except Exception:
        return False
    return abs(values[0] - values[1]) > 1e-5 * max(1.0, *map(abs, values))


@functools.cache
def _silence() -> None:
    """Silence math-verify's warning that its time limit is off; the worker pool has one of its own."""
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)
