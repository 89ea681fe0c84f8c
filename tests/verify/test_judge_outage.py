"""A judge that is away for minutes costs no sample, is not hammered, and in the end is an abstention with its name."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from llmrl.endpoint import EndpointError
from llmrl.verify.judge.judge import Judge, JudgeConfig, Question
from llmrl.verify.judge.outage import LONGEST_WAIT_S, JudgeAway, Outage

QUESTION = Question(name="correct", instructions="Is it right?", fields={"correct": bool})


class Clock:
    """Time that passes only when everybody waits."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self.numbers = itertools.count()

    async def sleep(self, seconds: float) -> None:
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self.sleepers, (self.now + seconds, next(self.numbers), future))
        await future

    async def run(self, *work: Awaitable[Any]) -> list[Any]:
        """Run until all work is done; return its results and exceptions."""
        everything = asyncio.gather(*work, return_exceptions=True)
        while not everything.done():
            for _ in range(50):  # let everybody reach the next wait
                await asyncio.sleep(0)
            if not everything.done() and self.sleepers:
                at, _, future = heapq.heappop(self.sleepers)
                if not future.done():
                    self.now = max(self.now, at)
                    future.set_result(None)
        return everything.result()


class Server:
    """A judge that is away in some intervals. Every attempt takes a second."""

    def __init__(self, clock: Clock, away: Callable[[float], bool], poison: Callable[[int], bool] = lambda i: False):
        self.clock, self.away, self.poison = clock, away, poison
        self.attempts: list[float] = []
        self.open_now = 0
        self.most_open_while_away = 0

    async def post(self, number: int) -> int:
        self.attempts.append(self.clock.now)
        self.open_now += 1
        if self.away(self.clock.now) and self.clock.now > 20:
            self.most_open_while_away = max(self.most_open_while_away, self.open_now)
        await self.clock.sleep(1.0)
        self.open_now -= 1
        if self.away(self.clock.now):
            raise EndpointError("http://judge: ConnectError refused")
        if self.poison(number):
            raise EndpointError("http://judge: HTTP 500", status=500)
        return number


def outage(clock: Clock, budget_s: float = 600.0, retries: int = 5) -> Outage:
    jitter = itertools.cycle((0.9, 0.3, 0.6)).__next__
    return Outage(
        "m at http://judge",
        budget_s=budget_s,
        retries=retries,
        clock=lambda: clock.now,
        sleep=clock.sleep,
        jitter=jitter,
    )


def run(server: Server, shared: Outage, count: int) -> list[Any]:
    async def main() -> list[Any]:
        return await server.clock.run(*(shared.send(lambda i=i: server.post(i)) for i in range(count)))

    return asyncio.run(main())


def test_a_judge_that_is_away_for_five_minutes_costs_no_sample() -> None:
    clock = Clock()
    server = Server(clock, lambda now: now < 300)
    assert run(server, outage(clock), 64) == list(range(64))
    assert 300 <= clock.now <= 300 + LONGEST_WAIT_S + 10
    # The 64 that were under way when it went away, then one probe at a time, then everybody.
    assert server.most_open_while_away == 1
    assert len(server.attempts) < 64 + 60 + 64


def test_a_judge_that_goes_away_in_the_middle_costs_no_sample() -> None:
    clock = Clock()
    server = Server(clock, lambda now: 5 < now < 200)
    shared = outage(clock)

    async def later(i: int) -> int:
        await clock.sleep(i % 10)
        return await shared.send(lambda: server.post(i))

    async def main() -> list[Any]:
        return await clock.run(*(later(i) for i in range(64)))

    assert asyncio.run(main()) == list(range(64))


def test_a_judge_that_never_comes_back_is_given_up_after_the_budget() -> None:
    clock = Clock()
    server = Server(clock, lambda now: True)
    found = run(server, outage(clock), 20)
    assert all(isinstance(error, JudgeAway) for error in found)
    assert "judge m at http://judge has not answered for" in str(found[0])
    assert "outage_budget_s 600" in str(found[0]) and "ConnectError refused" in str(found[0])
    assert 600 <= clock.now <= 600 + LONGEST_WAIT_S + 2


def test_after_the_budget_new_requests_do_not_wait_and_find_the_judge_when_it_is_back() -> None:
    clock = Clock()
    server = Server(clock, lambda now: now < 1000)
    shared = outage(clock)
    run(server, shared, 3)
    gone = clock.now
    found = run(server, shared, 10)
    assert all(isinstance(error, JudgeAway) for error in found) and clock.now - gone <= 2
    clock.now = 1001.0
    found = run(server, shared, 1)
    assert found == [0]
    assert run(server, shared, 5) == [0, 1, 2, 3, 4]


def test_a_request_that_always_fails_while_others_are_answered_is_an_error_and_holds_nobody_up() -> None:
    clock = Clock()
    server = Server(clock, lambda now: False, poison=lambda i: i == 7)
    shared = outage(clock, retries=2)

    async def steady(i: int) -> int:
        await clock.sleep(2.0 * i)
        return await shared.send(lambda: server.post(i))

    async def main() -> list[Any]:
        return await clock.run(*(steady(i) for i in range(40)))

    found = asyncio.run(main())
    assert isinstance(found[7], EndpointError) and not isinstance(found[7], JudgeAway)
    assert [value for value in found if isinstance(value, int)] == [i for i in range(40) if i != 7]
    assert clock.now < 120


def test_a_refused_request_is_final_and_shows_that_the_judge_is_there() -> None:
    clock = Clock()
    shared = outage(clock)

    async def refuse() -> None:
        raise EndpointError("http://judge: HTTP 400", status=400)

    async def main() -> list[Any]:
        return await clock.run(shared.send(refuse))

    (error,) = asyncio.run(main())
    assert error.status == 400 and clock.now == 0.0 and not shared.away


def test_retry_after_is_honored() -> None:
    clock = Clock()
    shared = outage(clock)
    times: list[float] = []

    async def busy() -> str:
        times.append(clock.now)
        if len(times) == 1:
            raise EndpointError("http://judge: HTTP 429", status=429, retry_after=17.0)
        return "ok"

    async def main() -> list[Any]:
        return await clock.run(shared.send(busy))

    assert asyncio.run(main()) == ["ok"] and times == [0.0, 17.0]


def test_a_judge_that_stays_away_is_an_abstention_that_names_it() -> None:
    judge = Judge(JudgeConfig(base_url="http://127.0.0.1:9/v1", model="some-judge", outage_budget_s=0.0))

    async def ask() -> Any:
        try:
            return await judge.ask(QUESTION, {"response": "4"})
        finally:
            await judge.close()

    verdict = asyncio.run(ask())
    assert verdict.values is None
    assert (verdict.problem or "").startswith("judge some-judge at http://127.0.0.1:9/v1 has not answered for")
    assert judge.metrics()["judge/given_up"] == 1


def test_the_budget_is_not_negative() -> None:
    with pytest.raises(Exception, match="outage_budget_s is -1"):
        JudgeConfig(base_url="http://x", model="m", outage_budget_s=-1)
