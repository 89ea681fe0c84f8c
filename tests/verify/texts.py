"""Hostile text for extractor tests: hypothesis strategies, 10 MB inputs, and a check that work grows linearly."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

SMALL, LARGE, HUGE = 125_000, 1_000_000, 10_000_000


def texts(fragments: list[str]) -> st.SearchStrategy[str]:
    """Any text, lone surrogates and NUL included, mixed with the fragments an extractor looks for."""
    anything = st.text(st.characters(exclude_categories=()), max_size=20)
    return st.lists(st.one_of(st.sampled_from(fragments), anything), max_size=25).map("".join)


def repeated(pattern: str, size: int) -> str:
    """`size` characters of the pattern, over and over."""
    return (pattern * (size // len(pattern) + 1))[:size]


def assert_linear(function: Callable[[str], Any], pattern: str) -> None:
    """Run on 125 kB and on 1 MB of a repeated pattern; quadratic work would take 64 times as long, linear 8."""
    seconds = []
    for size in (SMALL, LARGE):
        text = repeated(pattern, size)
        start = time.process_time()
        function(text)
        seconds.append(time.process_time() - start)
        assert seconds[0] < 1, f"{pattern!r}: {seconds[0]:.1f} s for {SMALL} characters"
    # The constant covers what does not grow, and the clock; quadratic work at 1 MB is far above it.
    assert seconds[1] < 25 * seconds[0] + 0.2, f"{pattern!r}: {seconds} s"
