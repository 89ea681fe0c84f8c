"""Hostile text for extractor tests: hypothesis strategies, 10 MB inputs, and a check that work grows linearly."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

SMALL, LARGE, HUGE = 125_000, 1_000_000, 10_000_000


def texts(fragments: list[str]) -> st.SearchStrategy[str]:
    """Generate any text, including lone surrogates and NUL, mixed with the fragments an extractor looks for."""
    anything = st.text(st.characters(exclude_categories=()), max_size=20)
    return st.lists(st.one_of(st.sampled_from(fragments), anything), max_size=25).map("".join)


def repeated(pattern: str, size: int) -> str:
    """Repeat the pattern to `size` characters."""
    return (pattern * (size // len(pattern) + 1))[:size]


def assert_linear(function: Callable[[str], Any], pattern: str) -> None:
    """Run on 125 kB and on 1 MB of a repeated pattern; quadratic work would take 64 times as long, linear 8."""
    # A busy machine may stretch one measurement; quadratic work fails every time.
    for _ in range(3):
        seconds = [_seconds(function, repeated(pattern, size)) for size in (SMALL, LARGE)]
        # The constant covers fixed costs and the clock's resolution; quadratic work at 1 MB is far above it.
        if seconds[0] < 1 and seconds[1] < 25 * seconds[0] + 0.2:
            return
    raise AssertionError(f"{pattern!r}: {seconds} s for {SMALL} and {LARGE} characters")


def _seconds(function: Callable[[str], Any], text: str) -> float:
    start = time.process_time()
    function(text)
    return time.process_time() - start
