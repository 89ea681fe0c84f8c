"""The seconds of a step, and coroutines run to their end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class Clock:
    """Seconds spent in each stage of a step."""

    def __init__(self) -> None:
        self.begin = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now

    def metrics(self, *, tokens: float) -> dict[str, float]:
        total = time.perf_counter() - self.begin
        times = {f"time/{name}_s": seconds for name, seconds in self.laps.items()}
        return times | {"time/step_s": total, "perf/tokens_per_s": tokens / total}


def run_async(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end. In a notebook, whose event loop is already running, use a thread."""
    if not _in_event_loop():
        return asyncio.run(coroutine)
    pool = ThreadPoolExecutor(1, "llmrl")
    try:
        return pool.submit(asyncio.run, coroutine).result()
    finally:
        pool.shutdown(wait=False)  # an interrupt of the notebook must not wait for the run


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
