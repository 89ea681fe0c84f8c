"""Comparing what a program printed or returned with what its row expects."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

FLOAT_TOLERANCE = 1e-6
"""Relative and absolute tolerance for numbers that are written with a point or an exponent, and for floats."""
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?")


def same_output(printed: str, expected: str, *, tolerance: float = FLOAT_TOLERANCE, strip: bool = False) -> bool:
    """Return whether two outputs agree line by line, ignoring white space at line ends and blank lines at the end.

    Lines that differ are compared token by token. Two tokens agree if they are equal, or if both are decimal numbers,
    at least one is written with a point or an exponent, and they differ by at most the tolerance, relative or absolute.

    Args:
        printed: the program's output.
        expected: the test's.
        tolerance: see above.
        strip: ignore blank lines at the beginning too.
    """
    texts = (printed, expected)
    given, wanted = ((text.strip() if strip else text.rstrip()).split("\n") for text in texts)
    if len(given) != len(wanted):
        return False
    pairs = zip(given, wanted, strict=True)
    return all(_same_line(one.split(), other.split(), tolerance) for one, other in pairs)


def _same_line(given: list[str], wanted: list[str], tolerance: float) -> bool:
    if given == wanted:
        return True
    return len(given) == len(wanted) and all(map(partial(_same_token, tolerance), given, wanted))


def _same_token(tolerance: float, given: str, wanted: str) -> bool:
    if given == wanted:
        return True
    if len(given) > 400 or not (_NUMBER.fullmatch(given) and _NUMBER.fullmatch(wanted)):
        return False
    if not set(".eE") & set(given + wanted):
        return False
    return math.isclose(float(given), float(wanted), rel_tol=tolerance, abs_tol=tolerance)


def same_value(given: Any, expected: Any) -> bool:
    """Return whether a returned value is the expected one.

    Tuples count as lists, because JSON has no tuples. True is not 1. A float may differ by FLOAT_TOLERANCE, relative or
    absolute. All other values must be equal and of the same type.
    """
    if type(given).__name__ == "ndarray" and isinstance(expected, list):
        given = given.tolist()
    if isinstance(given, (list, tuple)) and isinstance(expected, (list, tuple)):
        return len(given) == len(expected) and all(map(same_value, given, expected))
    if isinstance(given, dict) and isinstance(expected, dict):
        # Expected values come from JSON, whose keys are text.
        texts = {str(key): value for key, value in given.items()}
        return texts.keys() == expected.keys() and all(same_value(texts[key], expected[key]) for key in expected)
    if type(given) is float or type(expected) is float:
        return _close(given, expected)
    return type(given) is type(expected) and bool(given == expected)


def _close(given: Any, expected: Any) -> bool:
    if not all(type(value) in (int, float) for value in (given, expected)):
        return False
    try:
        return math.isclose(given, expected, rel_tol=FLOAT_TOLERANCE, abs_tol=FLOAT_TOLERANCE)
    except OverflowError:  # an integer larger than any float
        return False
