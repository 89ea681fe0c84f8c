"""Requests over replicas: balanced, sent where their prompt is cached, and never lost when a replica is.

This module knows nothing about HTTP or weights: a replica is anything with a name and a `check`, and work is a
coroutine that runs on one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from llmrl.errors import RunFailed

MAX_ATTEMPTS = 5
"""After this many failures the request itself is at fault: it must not take down one replica after another."""
FRESH_S = 5.0
"""A replica whose last check is older gets a check before it gets work. No server restarts faster than this."""
MAX_HOMES = 65_536
"""Number of prompts and sessions whose replica is remembered."""


class ReplicaFailed(Exception):
    """A replica answered that it failed at this request. It may be healthy otherwise."""


class ReplicaLost(ReplicaFailed):
    """A replica died, hangs, or was restarted: nothing that was on it can be relied on."""


class Replica(Protocol):
    """What `Replicas` needs of a replica."""

    name: str

    async def check(self) -> None:
        """Raise ReplicaLost unless the replica is healthy and serves what it should."""
        ...


R = TypeVar("R", bound=Replica)
T = TypeVar("T")


@dataclass(eq=False)
class Slot(Generic[R]):
    """A replica and what this process knows about it."""

    replica: R
    up: bool = True
    in_flight: set[asyncio.Future] = field(default_factory=set)
    load: int = 0
    """Requests assigned to it, including those that wait for its check."""
    checked_at: float = 0.0
    error: str = ""
    """Why it is down, or its last failure."""


class Replicas(Generic[R]):
    """Balances requests over replicas and survives the loss of replicas.

    A request goes where its session or its prompt went before, as long as that replica has at most `slack` more
    requests in flight than the least busy one; otherwise it goes to the least busy one. When a replica is lost, its
    requests move to others, or wait until one returns. A replica that answers again is passed to `restore` before it
    gets work.

    Args:
        replicas: at least one.
        restore: brings a lost replica up to date. If it raises, the replica stays out.
        slack: about the size of a group, so that one group's requests stay together.
        most: requests that this process has in flight on one replica; the others wait here, in order. More would wait
            there, each with a connection of its own, and a replica that is busy could not be told from one that hangs.
        first: index of the replica that gets the first request. Processes that know nothing of each other would all
            begin with the same one.
        return_timeout_s: how long requests wait for a replica to return when none is left.
        interval_s: seconds between checks of replicas that are busy or lost.
        say: called with a line about each replica that is lost or returns.
    """

    def __init__(
        self,
        replicas: Iterable[R],
        *,
        restore: Callable[[R], Awaitable[None]],
        slack: int = 8,
        most: int = 1_000_000,
        first: int = 0,
        return_timeout_s: float = 600.0,
        interval_s: float = 2.0,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.slots = [Slot(replica) for replica in replicas]
        self.restore, self.slack, self.say = restore, slack, say
        self.most = most
        self._order = {slot: (i - first) % len(self.slots) for i, slot in enumerate(self.slots)}
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.return_timeout_s, self.interval_s = return_timeout_s, interval_s
        self.num_moved = 0
        """Requests that were sent again because their replica failed."""
        self._homes: OrderedDict[Hashable, Slot[R]] = OrderedDict()
        self._watchers: list[asyncio.Task[None]] = []
        self._checks: dict[Slot[R], asyncio.Future[bool]] = {}
        self._changed = asyncio.Event()
        self.lock = asyncio.Lock()
        """Held while a replica is restored. Code that changes what `restore` delivers must hold it too."""

    @property
    def live(self) -> list[R]:
        return [slot.replica for slot in self.slots if slot.up]

    async def call(self, work: Callable[[R], Awaitable[T]], *, session: str, prompt: Sequence[int]) -> T:
        """Run `work` on a replica, and again on others if that fails.

        Raises:
            RunFailed: no replica returned in time, or the request failed on every replica it was tried on.
        """
        self.watch()
        keys: tuple[Hashable, ...] = (session, hash(tuple(prompt)))
        failures: list[str] = []
        avoid: Slot[R] | None = None
        while len(failures) < MAX_ATTEMPTS:
            slot = await self._choose(keys, avoid)
            try:
                return await self._run(slot, work)
            except ReplicaFailed as error:
                avoid = slot
                failures.append(f"{slot.replica.name}: {error}")
                self.num_moved += 1
        tried = "\n  ".join(failures)
        raise RunFailed(f"a request (session {session!r}, {len(prompt)} prompt tokens) failed everywhere:\n  {tried}")

    async def each(self, work: Callable[[R], Awaitable[T]]) -> list[tuple[R, T]]:
        """Run `work` on all live replicas at once. Replicas lost on the way are left out, and restored later.

        Raises:
            RunFailed: a healthy replica failed at it, so the others would fail too.
        """
        self.watch()

        async def attempt(slot: Slot[R]) -> tuple[R, T] | None:
            try:
                return slot.replica, await work(slot.replica)
            except ReplicaFailed as error:
                if not isinstance(error, ReplicaLost) and await self._is_healthy(slot):
                    raise RunFailed(f"{slot.replica.name}: {error}") from None
                self.lost(slot.replica, str(error))
                return None

        results = await asyncio.gather(*(attempt(slot) for slot in self.slots if slot.up))
        return [result for result in results if result is not None]

    async def wait_for_one(self) -> None:
        """Wait until at least one replica is up.

        Raises:
            RunFailed: no replica returned in time.
        """
        self.watch()
        deadline = time.monotonic() + self.return_timeout_s
        while not self.live:
            if time.monotonic() > deadline:
                states = "\n  ".join(f"{slot.replica.name}: {slot.error}" for slot in self.slots)
                raise RunFailed(
                    "no vLLM server is left, and none returned within rollout.server.return_timeout_s "
                    f"{self.return_timeout_s:g}:\n  {states}"
                )
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), timeout=min(1.0, self.return_timeout_s))

    def lost(self, replica: R, reason: str) -> None:
        """Take a replica out; its requests move to others."""
        slot = next(slot for slot in self.slots if slot.replica is replica)
        if not slot.up:
            return
        slot.up, slot.error = False, reason
        moved = len(slot.in_flight)
        for task in slot.in_flight:
            task.cancel()
        for _ in range(len(self._waiting)):  # they may have to wait for a replica now instead of for a place
            self._next()
        self._homes = OrderedDict((key, home) for key, home in self._homes.items() if home is not slot)
        self.say(f"lost {replica.name} ({reason}); {moved} requests move, {len(self.live)} replicas are left")

    async def close(self) -> None:
        """Stop watching. Safe to call twice."""
        watchers, self._watchers = self._watchers, []
        here = [task for task in watchers if not task.done() and task.get_loop() is asyncio.get_running_loop()]
        for task in here:
            task.cancel()
        await asyncio.gather(*here, return_exceptions=True)

    # --- one request ------------------------------------------------------------------------------------------------

    async def _run(self, slot: Slot[R], work: Callable[[R], Awaitable[T]]) -> T:
        """Run `work` on one replica. Raises ReplicaFailed if the replica is lost meanwhile, for any reason."""
        task = asyncio.ensure_future(work(slot.replica))
        slot.in_flight.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            # `lost` cancels the task of a replica that is down; any other cancellation comes from the caller.
            if slot.up or (current is not None and current.cancelling()):
                task.cancel()
                raise
            raise ReplicaLost(slot.error) from None
        except ReplicaLost as error:
            self.lost(slot.replica, str(error))
            raise
        except ReplicaFailed:
            if not await self._is_healthy(slot):
                self.lost(slot.replica, slot.error)
            raise
        finally:
            slot.in_flight.discard(task)
            self._leave(slot)

    async def _turn(self, again: bool) -> None:
        """Wait until a place may be free; behind those that wait already, unless it was this one's turn before."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.appendleft(turn) if again else self._waiting.append(turn)
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled():  # somebody else's turn, then
                self._next()
            raise

    def _next(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                return turn.set_result(None)

    def _leave(self, slot: Slot[R]) -> None:
        slot.load -= 1
        self._next()

    async def _choose(self, keys: tuple[Hashable, ...], avoid: Slot[R] | None) -> Slot[R]:
        """Choose a replica for a request and check it. `avoid` failed at it and is taken only if no other has room."""
        had_turn = False
        while True:
            if not self.live:
                await self.wait_for_one()
                continue
            free = [slot for slot in self.slots if slot.up and slot.load < self.most]
            free = [slot for slot in free if slot is not avoid] or free
            if not free or (self._waiting and not had_turn):
                await self._turn(had_turn)
                had_turn = True
                continue
            least = min(slot.load for slot in free)
            homes = (self._homes.get(key) for key in keys)
            slot = next((h for h in homes if h in free and h.load <= least + self.slack), None)
            slot = slot or min(free, key=lambda slot: (slot.load, self._order[slot]))
            for key in keys:
                self._homes[key] = slot
                self._homes.move_to_end(key)
            while len(self._homes) > MAX_HOMES:
                self._homes.popitem(last=False)
            slot.load += 1
            try:
                if time.monotonic() - slot.checked_at < FRESH_S or await self._check(slot):
                    return slot
            except BaseException:
                self._leave(slot)
                raise
            self._leave(slot)

    # --- checks -----------------------------------------------------------------------------------------------------

    async def _is_healthy(self, slot: Slot[R]) -> bool:
        try:
            await slot.replica.check()
        except ReplicaFailed as error:
            slot.error = str(error)
            return False
        slot.checked_at = time.monotonic()
        return True

    async def _check(self, slot: Slot[R]) -> bool:
        """Return whether the replica is healthy, and take it out if it is not."""
        # Many requests ask at once; one check answers all of them.
        pending = self._checks.get(slot)
        if pending is None:
            pending = self._checks[slot] = asyncio.ensure_future(self._is_healthy(slot))
            pending.add_done_callback(lambda _: self._checks.pop(slot, None))
        healthy = await asyncio.shield(pending)
        if not healthy:
            self.lost(slot.replica, slot.error)
        return healthy

    def watch(self) -> None:
        """Start watching every replica on this event loop, if that is not running yet."""
        loop = asyncio.get_running_loop()
        if self._watchers and self._watchers[0].get_loop() is loop and not self._watchers[0].done():
            return
        self._changed, self._checks, self.lock = asyncio.Event(), {}, asyncio.Lock()
        self._waiting.clear()
        self._watchers = [asyncio.create_task(self._watch_one(slot), name=slot.replica.name) for slot in self.slots]

    async def _watch_one(self, slot: Slot[R]) -> None:
        """Check a replica while it is busy, since it may hang, and restore it after it was lost."""
        while True:
            await asyncio.sleep(self.interval_s)
            if slot.up:
                if slot.in_flight:
                    await self._check(slot)
                continue
            async with self.lock:
                try:
                    await self.restore(slot.replica)
                except ReplicaFailed as error:
                    slot.error = str(error)
                    continue
                except Exception as error:
                    if str(error) != slot.error:
                        self.say(f"{slot.replica.name} answers again but cannot be used: {error}")
                    slot.error = str(error)
                    continue
                slot.up, slot.error, slot.checked_at = True, "", time.monotonic()
            self._changed.set()
            for _ in range(len(self._waiting)):
                self._next()
            self.say(f"{slot.replica.name} is back and up to date; {len(self.live)} replicas serve")
