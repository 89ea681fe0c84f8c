"""Comparing two texts in both orders, so that a judge's preference for a position cancels."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Literal


async def both_orders(
    prefer: Callable[[str, str], Awaitable[float | None]],
    first: str,
    second: str,
    *,
    on_contradiction: Literal["tie", "abstain"] = "tie",
) -> float | None:
    """Return the preference for `first` over `second`, asked in both orders so that position bias cancels.

    Args:
        prefer: judges (a, b): above 0 if a is better, below 0 if b is, 0 for a tie, None for an abstention.
        first: one text.
        second: the other text.
        on_contradiction: the result when the two orders prefer different texts.

    Returns:
        The mean of both preferences as seen from `first`; 0 or None on contradiction; None if either order abstained.
    """
    forward, backward = await asyncio.gather(prefer(first, second), prefer(second, first))
    if forward is None or backward is None:
        return None
    # Equal signs contradict each other: both orders prefer the text at the same position.
    if forward * backward > 0:
        return 0.0 if on_contradiction == "tie" else None
    return (forward - backward) / 2
