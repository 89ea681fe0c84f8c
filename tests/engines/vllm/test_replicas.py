"""Replicas: requests are balanced, sent where their prompt is cached, and not lost with a replica."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest

from llmrl.engines.vllm.replicas import MAX_ATTEMPTS, ReplicaFailed, ReplicaLost, Replicas
from llmrl.errors import RunFailed

pytestmark = pytest.mark.slow


class Scripted:
    """A replica without a server."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.healthy = True
        self.checks = 0

    async def check(self) -> None:
        self.checks += 1
        if not self.healthy:
            raise ReplicaLost("is gone")


def pool(count: int, **options: object) -> tuple[Replicas[Scripted], list[str]]:
    """Replicas a, b, ...; and the names that were restored, in order."""
    restored: list[str] = []

    async def restore(replica: Scripted) -> None:
        await replica.check()
        restored.append(replica.name)

    settings: dict = {"interval_s": 0.01, "slack": 2} | options
    return Replicas([Scripted(name) for name in "abcdefgh"[:count]], restore=restore, **settings), restored


async def after(seconds: float, replica: Scripted, log: list[str]) -> str:
    log.append(replica.name)
    await asyncio.sleep(seconds)
    return replica.name


def run(main: Callable[[], Awaitable[object]]) -> None:
    asyncio.run(main())  # pyright: ignore[reportArgumentType]


# --- where requests go ------------------------------------------------------------------------------------------------


def test_groups_stay_together_and_are_spread_evenly(seed: int) -> None:
    async def main() -> None:
        replicas, _ = pool(4, slack=8)
        prompts = [[random.Random(seed + p).randrange(1000) for _ in range(20)] for p in range(16)]
        log: list[str] = []
        where = await asyncio.gather(
            *(
                replicas.call(lambda r: after(0.02, r, log), session=f"{p}/{g}", prompt=prompt)
                for p, prompt in enumerate(prompts)
                for g in range(8)
            )
        )
        groups = [set(where[8 * p : 8 * p + 8]) for p in range(16)]
        assert all(len(group) == 1 for group in groups), "a group's prompt is computed on one replica only"
        assert set(Counter(where).values()) == {32}, "16 groups of 8 on 4 replicas"
        await replicas.close()

    run(main)


def test_a_session_stays_where_its_earlier_turns_are_cached() -> None:
    async def main() -> None:
        replicas, _ = pool(3)
        log: list[str] = []
        first = await replicas.call(lambda r: after(0, r, log), session="s", prompt=[1])
        for turn in range(5):
            assert await replicas.call(lambda r: after(0, r, log), session="s", prompt=[1] * (turn + 2)) == first
        await replicas.close()

    run(main)


def test_affinity_gives_way_when_its_replica_is_busier_than_slack_allows() -> None:
    async def main() -> None:
        replicas, _ = pool(2, slack=2)
        log: list[str] = []
        calls = [replicas.call(lambda r: after(0.02, r, log), session=str(i), prompt=[7]) for i in range(8)]
        load = Counter(await asyncio.gather(*calls))
        assert max(load.values()) - min(load.values()) <= 3
        await replicas.close()

    run(main)


# --- what is lost -----------------------------------------------------------------------------------------------------


def test_requests_of_a_lost_replica_move_at_once_and_none_is_answered_twice() -> None:
    async def main() -> None:
        replicas, _ = pool(2, slack=0)
        a = replicas.slots[0].replica
        log: list[str] = []

        async def work(replica: Scripted) -> str:
            log.append(replica.name)
            if replica.name == "a":
                await asyncio.Event().wait()  # a hangs
            return replica.name

        calls = [asyncio.ensure_future(replicas.call(work, session=str(i), prompt=[i])) for i in range(6)]
        while sum(call.done() for call in calls) < 3 or len(log) < 6:
            await asyncio.sleep(0)
        a.healthy = False  # the next check of the busy replica finds out
        assert await asyncio.gather(*calls) == ["b"] * 6
        assert replicas.num_moved == 3
        assert Counter(log) == {"a": 3, "b": 6}
        await replicas.close()

    run(main)


def test_a_replica_that_returns_is_restored_before_it_serves() -> None:
    async def main() -> None:
        replicas, restored = pool(1)
        a = replicas.slots[0].replica
        a.healthy, order = False, []

        async def work(replica: Scripted) -> str:
            order.append(list(restored))
            return replica.name

        call = asyncio.ensure_future(replicas.call(work, session="s", prompt=[1]))
        while replicas.live:
            await asyncio.sleep(0)
        assert not call.done()
        a.healthy = True
        assert await call == "a"
        assert order == [["a"]], "restored once, and before the request"
        await replicas.close()

    run(main)


def test_waiting_for_a_return_has_a_limit_that_is_named() -> None:
    async def main() -> None:
        replicas, _ = pool(2, return_timeout_s=0.05)
        for slot in replicas.slots:
            slot.replica.healthy = False
        with pytest.raises(RunFailed, match=r"(?s)return_timeout_s 0.05.*a: is gone.*b: is gone"):
            await replicas.call(lambda r: after(0, r, []), session="s", prompt=[1])
        await replicas.close()

    run(main)


def test_a_request_that_fails_everywhere_takes_nobody_down() -> None:
    async def main() -> None:
        replicas, _ = pool(3)
        tried: list[str] = []

        async def work(replica: Scripted) -> str:
            tried.append(replica.name)
            raise ReplicaFailed("answered 500")

        with pytest.raises(RunFailed, match=r"failed everywhere:\n  a: answered 500"):
            await replicas.call(work, session="s", prompt=[1])
        assert len(tried) == MAX_ATTEMPTS and len(set(tried[:2])) == 2, "not twice in a row on the same one"
        assert len(replicas.live) == 3
        await replicas.close()

    run(main)


def test_a_500_of_an_unhealthy_replica_takes_it_out() -> None:
    async def main() -> None:
        replicas, _ = pool(2)

        async def work(replica: Scripted) -> str:
            if replica.name == "a":
                replica.healthy = False
                raise ReplicaFailed("engine dead")
            return replica.name

        assert await replicas.call(work, session="s", prompt=[1]) == "b"
        assert [replica.name for replica in replicas.live] == ["b"]
        await replicas.close()

    run(main)


def test_cancelling_a_request_cancels_its_work_and_nothing_else() -> None:
    async def main() -> None:
        replicas, _ = pool(1)
        begun, ended = asyncio.Event(), []

        async def work(replica: Scripted) -> str:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(replica.name)
            return ""

        call = asyncio.ensure_future(replicas.call(work, session="s", prompt=[1]))
        await begun.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert ended == ["a"] and len(replicas.live) == 1 and replicas.slots[0].load == 0
        await replicas.close()

    run(main)


def test_many_requests_share_one_check() -> None:
    async def main() -> None:
        replicas, _ = pool(2, interval_s=3600)  # the watchers' checks would count too
        await asyncio.gather(*(replicas.call(lambda r: after(0, r, []), session=str(i), prompt=[i]) for i in range(50)))
        assert [slot.replica.checks for slot in replicas.slots] == [1, 1]
        await replicas.close()

    run(main)
