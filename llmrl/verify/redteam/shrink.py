"""Make an exploit smaller: a text and a test go in, the smallest text found that still passes it comes out."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

MAX_TESTS = 80


async def shrink(text: str, holds: Callable[[str], Awaitable[bool]], *, max_tests: int = MAX_TESTS) -> str:
    """Remove lines, then words, then characters, as long as the test holds (delta debugging).

    Args:
        text: a text for which the test holds.
        holds: the test.
        max_tests: how often it may be asked; it may cost a program's run or a judge's answer.
    """
    left = [max_tests]

    async def cheap(candidate: str) -> bool:
        if left[0] <= 0:
            return False
        left[0] -= 1
        return await holds(candidate)

    for pieces in (r"[^\n]*\n?", r"\S+\s*|\s+", r"(?s)."):
        parts = [part for part in re.findall(pieces, text) if part]
        text = "".join(await _minimal(parts, cheap))
    return text


async def _minimal(parts: list[str], holds: Callable[[str], Awaitable[bool]]) -> list[str]:
    """Drop pieces of halving size until none can be dropped."""
    size = max(1, len(parts) // 2)
    while parts:
        start, dropped = 0, False
        while start < len(parts):
            candidate = parts[:start] + parts[start + size :]
            if await holds("".join(candidate)):
                parts, dropped = candidate, True
            else:
                start += size
        if size == 1 and not dropped:
            break
        size = size if dropped and size == 1 else max(1, size // 2)
    return parts
