"""Asking a judge that may be away for minutes: an attempt goes in, its reply or an EndpointError comes out.

A judge is away when several requests in a row failed and none was answered. From then on one request at a time asks
whether it is back, and all others wait for that. Its absence counts against a budget of real time that all requests
share, and not against the attempts of each; a request that fails while others are answered has a fault of its own.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from llmrl.endpoint import EndpointError, is_transient

T = TypeVar("T")
_logger = logging.getLogger(__name__)
AWAY_AFTER = 3
"""Failures in a row that mean that the judge is away."""
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0


class JudgeAway(EndpointError):
    """The judge has not answered anyone for longer than its budget. Rewards abstain."""


class Outage:
    """What all requests of one event loop know about whether a judge answers.

    Args:
        name: the judge, for messages.
        budget_s: how long it may be away before requests are given up, in seconds.
        retries: further attempts of a request that fails while the judge answers others.
        on_retry: called before each further attempt.
        clock: returns the time in seconds.
        sleep: waits.
        jitter: returns a number from 0 to 1; a wait is this share of the longest one.
    """

    def __init__(
        self,
        name: str,
        *,
        budget_s: float,
        retries: int,
        on_retry: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.name, self.budget_s, self.retries = name, budget_s, retries
        self.on_retry, self.clock, self.sleep, self.jitter = on_retry, clock, sleep, jitter
        self.down_since: float | None = None
        """When the first of the failures happened since which the judge has answered nobody."""
        self._failures = 0
        self._answers = 0
        self._last_probe = 0.0
        self._last_error: EndpointError | None = None
        self._probe = asyncio.Lock()
        self._answered = asyncio.Event()

    @property
    def away(self) -> bool:
        """Whether the judge is taken to be away."""
        return self._failures >= AWAY_AFTER

    async def send(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Repeat an attempt until it succeeds.

        Raises:
            JudgeAway: the judge was away for longer than its budget.
            EndpointError: it refuses this request, or fails it again and again while it answers others.
        """
        own_failures, tries, answers = 0, 0, self._answers
        while True:
            try:
                return await self._probed(attempt, tries) if self.away else await self._tried(attempt)
            except JudgeAway:
                raise
            except EndpointError as error:
                if not is_transient(error):
                    raise
                own_failures += self._answers > answers
                answers = self._answers
                if own_failures > self.retries:
                    raise
                self._check_budget()
                if not self.away:
                    await self._pause(error, tries)
            tries += 1
            self.on_retry()

    async def _tried(self, attempt: Callable[[], Awaitable[T]]) -> T:
        try:
            reply = await attempt()
        except EndpointError as error:
            if is_transient(error):
                self._note_failure(error)
            else:  # it is there, and refuses the request
                self._note_answer()
            raise
        self._note_answer()
        return reply

    async def _probed(self, attempt: Callable[[], Awaitable[T]], tries: int) -> T:
        """Wait for a turn, then ask whether the judge is back; if another one has found it back, just ask."""
        if self._over_budget() and (self._probe.locked() or self.clock() - self._last_probe < LONGEST_WAIT_S):
            raise self._given_up()
        async with self._probe:  # first come, first served, so that no request that always fails asks for all of them
            self._check_turn()
            if self.away and not self._over_budget():
                await self._pause(self._last_error, self._failures - AWAY_AFTER)
            if self.away:
                self._last_probe = self.clock()
                return await self._tried(attempt)
        return await self._tried(attempt)

    def _check_turn(self) -> None:
        """Give up a request that waited for its turn while the budget ran out."""
        if self._over_budget() and self.clock() - self._last_probe < LONGEST_WAIT_S:
            raise self._given_up()

    async def _pause(self, error: EndpointError | None, tries: int) -> None:
        """Wait for as long as the server asked, else for a random time whose limit doubles; less if it answers."""
        longest = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(tries, 16))
        asked = error.retry_after if error is not None else None
        waits = {asyncio.ensure_future(self.sleep(self.jitter() * longest if asked is None else asked))}
        if self.away:
            waits.add(asyncio.ensure_future(self._answered.wait()))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def _note_failure(self, error: EndpointError) -> None:
        self._last_error = error
        self._failures += 1
        if self.down_since is None:
            self.down_since = self.clock()
        if self._failures == AWAY_AFTER:
            self._answered.clear()
            _logger.warning(
                "judge %s does not answer (%s); asking again, one request at a time, for up to %g s",
                self.name,
                error,
                self.budget_s,
            )

    def _note_answer(self) -> None:
        if self.away and self.down_since is not None:
            _logger.warning("judge %s answers again, after %.0f s", self.name, self.clock() - self.down_since)
        self._answers += 1
        self._failures, self.down_since = 0, None
        self._answered.set()

    def _over_budget(self) -> bool:
        return self.down_since is not None and self.clock() - self.down_since >= self.budget_s

    def _check_budget(self) -> None:
        if self._over_budget():
            raise self._given_up()

    def _given_up(self) -> JudgeAway:
        seconds = self.clock() - (self.down_since or self.clock())
        return JudgeAway(
            f"judge {self.name} has not answered for {seconds:.0f} s (outage_budget_s {self.budget_s:g}): "
            f"{self._last_error}"
        )
