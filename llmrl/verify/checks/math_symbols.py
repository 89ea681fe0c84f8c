"""Equivalence of formulas, by math-verify and sympy, with bounds on what a hostile formula may cost.

Two normalized answers in; whether they have the same value out. A formula that takes longer than CPU_LIMIT_S of this
process's own time is not shown to be equal, so it is different: never an error, and the same on a busy machine.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import signal
import threading
from collections.abc import Iterator
from itertools import accumulate
from math import prod
from types import FrameType
from typing import Any, cast

from llmrl.verify.checks.math_spelling import closing

CPU_LIMIT_S = 3.0
"""Processor time for reading or comparing one pair."""
MAX_POWER = 10**7
"""Largest product of the exponents in one answer."""
MAX_NESTING = 40
"""Deepest nesting of brackets; the LaTeX parser's time grows steeply with it."""
MAX_UNION = 20
"""Most parts of a union; sympy's time grows with its square."""
_WILD = re.compile(
    r"\^\s*\{?\s*[-+]?\d{5,}|(?:\d{5,}|\^\s*\{?\s*\d+)[\s})\]]*!|!\s*!|\^\s*\d+\s*\^"  # 9^{99999}, 99999!, 9!!, 9^9^9
    r"|\^\s*\{[^{}]*\^\s*\{[^{}]*\^"  # e^{e^{e^9}}
    r"|\([^()]*[-+][^()]*\)\s*\^\s*\{?\s*\d{4,}"  # (x+1)^{2000} is multiplied out
    r"|\\(?:[dt]?binom|sum|prod|Gamma|int)(?![a-zA-Z]).*(?:\d{5,}|\d\s*\^\s*\{?\s*\d)",
    re.DOTALL,
)
OPERATOR = re.compile(r"\\(?:i*int|oint|sum|prod|lim)(?![a-zA-Z])")
"""What has to be carried out before there is a value."""


def is_tame(answer: str) -> bool:
    """Return False for an answer that takes too long to parse or evaluate, as only attacks on a verifier do."""
    if _WILD.search(answer) or answer.count("\\cup") + answer.count("\\cap") > MAX_UNION:
        return False
    if max(accumulate((c in "([{") - (c in ")]}") for c in answer), default=0) > MAX_NESTING:
        return False
    if prod(int(power) for power in re.findall(r"\^\s*\{?\s*[-+]?([1-9]\d*)", answer)) > MAX_POWER:
        return False
    for start in (match.end() for match in re.finditer(r"\^\s*\{", answer)):
        exponent = answer[start : closing(answer, start)]
        if "^" in exponent and not re.search(r"[a-zA-Z]", re.sub(r"\\(?:cdot|times)", "", exponent)):
            return False
    return True


@functools.lru_cache(maxsize=1024)
def parse(answer: str) -> list[Any]:
    """Parse one short answer with math-verify, without its signal-based time limit.

    Returns:
        math-verify's readings. Empty if the parser failed, or read something that has no value (complex infinity from
        a division by zero, not a number): two of these would be equal to each other.
    """
    from latex2sympy2_extended.math_normalization import NormalizationConfig
    from math_verify import LatexExtractionConfig
    from math_verify import parse as math_verify_parse

    _load()
    # Units are removed by their spelling before; math-verify takes the letters of 2ab and 3t for units too.
    spelling = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
    )
    config = LatexExtractionConfig(boxed_match_priority=0, normalization_config=spelling)
    text = f"\\boxed{{{_for_parser(answer)}}}"
    with cpu_limit() as within:
        found = math_verify_parse(text, [config], extraction_mode="first_match", parsing_timeout=None)  # type: ignore[arg-type]
        return [] if any(_has_no_value(reading) for reading in found) else found
    assert not within
    return []


def _for_parser(answer: str) -> str:
    r"""Rename what the parser takes for something else: \gamma for a function, E_1 and I_1 for constants."""
    if "gamma" in answer:
        answer = re.sub(r"\\gamma(?![a-zA-Z])", r"\\upsilon ", answer)
    if "_" in answer:
        answer = re.sub(r"(?<![a-zA-Z\\])E(?=_)", r"\\Xi", answer)
        answer = re.sub(r"(?<![a-zA-Z\\])e(?=_)", r"\\epsilon", answer)
        answer = re.sub(r"(?<![a-zA-Z\\])I(?=_)", r"\\iota", answer)
        answer = re.sub(
            r"_\s*\{?\s*\\(max|min|text\s*\{\s*(\w+)\s*\}|mathrm\s*\{\s*(\w+)\s*\})\s*\}?", _subscript, answer
        )
    return answer


def _subscript(match: re.Match[str]) -> str:
    return f"_{{{match.group(2) or match.group(3) or match.group(1)}}}"


def _has_no_value(reading: Any) -> bool:
    if isinstance(reading, str):
        return False
    from sympy import Basic, nan, zoo

    return isinstance(reading, Basic) and reading.has(zoo, nan)


@functools.lru_cache(maxsize=4096)
def verify(gold: str, prediction: str) -> bool:
    """Compare two short answers with math-verify. Results are cached, because the answers of a group repeat."""
    from math_verify import verify as math_verify_verify

    theirs, ours = parse(gold), parse(prediction)
    if not theirs or not ours:
        return False
    with cpu_limit():
        if surely_differ(theirs[0], ours[0]):
            return False
        return bool(math_verify_verify(theirs, ours, allow_set_relation_comp=True, timeout_seconds=None))
    return False


def surely_differ(gold: Any, prediction: Any) -> bool:
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
        numbers = [expression.subs(point).evalf(15) for expression in (gold, prediction)]
    except Exception:
        return False
    try:
        values = [complex(number) for number in numbers]
        return abs(values[0] - values[1]) > 1e-5 * max(1.0, *map(abs, values))
    except OverflowError:  # beyond 10^308, where only sympy's own numbers reach
        return _far_apart(*numbers)
    except Exception:
        return False


def _far_apart(a: Any, b: Any) -> bool:
    try:
        return bool(abs(a - b) > 1e-5 * abs(a) and abs(a - b) > 1e-5 * abs(b))
    except Exception:
        return False


# --- a limit of processor time ----------------------------------------------------------------------------------------


class _TookTooLong(BaseException):
    """Raised in the middle of a computation; a BaseException, because sympy catches Exception in many places."""


@contextlib.contextmanager
def cpu_limit(seconds: float = CPU_LIMIT_S) -> Iterator[list[bool]]:
    """End the block silently when it has used `seconds` of this process's processor time; code after it goes on.

    It works in the main thread on systems with interval timers. Elsewhere the block runs to its end, and the worker
    pool's own limit holds. Limits do not nest.

    Yields:
        A list that is empty unless the block was ended.
    """
    ended: list[bool] = []
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield ended
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TookTooLong

    before = signal.signal(signal.SIGVTALRM, stop)
    # Repeated, in case a bare `except` somewhere inside swallows the first one.
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.25)
    try:
        yield ended
    except _TookTooLong:
        ended.append(True)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@functools.cache
def _load() -> None:
    """Load math-verify, its grammars and sympy by a first use: ending an import in the middle would break the process.

    Its warning that its own time limit is off is silenced; the limits here replace it.
    """
    from math_verify import parse as first_parse
    from math_verify import verify as first_verify

    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for pair in (("\\frac{x}{2}+9", "\\sqrt{y}"), ("(1,2]", "x>1"), ("\\{1,2\\}", "\\sin x")):
        read: Any = [first_parse(f"\\boxed{{{text}}}", parsing_timeout=cast("Any", None)) for text in pair]
        first_verify(*read, timeout_seconds=None)
