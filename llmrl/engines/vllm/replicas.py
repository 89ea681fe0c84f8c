"""Requests over replicas: balanced, kept where their prompt is cached, and never lost when a replica is.

Knows nothing of HTTP or of weights: a replica is anything with a name and a `check`, work is a coroutine on one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from llmrl.errors import RunFailed

MAX_ATTEMPTS = 5
"""A request that failed on so many replicas is at fault itself: it must not take one down after the other."""
FRESH_S = 5.0
"""A replica that has not been checked for so long is checked before it gets work. No server restarts faster."""
MAX_HOMES = 65_536
"""Prompts and sessions whose replica is remembered."""


class ReplicaFailed(Exception):
    """A replica answered that it failed at this request; it may be well otherwise."""


class ReplicaLost(ReplicaFailed):
    """A replica died, hangs, or came back as another: nothing on it can be counted on."""


class Replica(Protocol):
    """What is balanced over."""

    name: str

    async def check(self) -> None:
        """Raise ReplicaLost unless the replica is well and serves what it should."""
        ...


R = TypeVar("R", bound=Replica)
T = TypeVar("T")


@dataclass(eq=False)
class Slot(Generic[R]):
    """A replica and what this process knows of it."""

    replica: R
    up: bool = True
    in_flight: set[asyncio.Future] = field(default_factory=set)
    load: int = 0
    """Requests given to it, those included that wait for its check."""
    checked_at: float = 0.0
    error: str = ""
    """Why it is down, or what it last failed at."""


class Replicas(Generic[R]):
    """Balances requests and survives replicas.

    A request goes where its session or its prompt went before, as long as that replica has at most `slack` requests
    more in flight than the least busy one; otherwise to the least busy one. When a replica is lost, its requests go to
    others, or wait until one returns. A replica that answers again is handed to `restore` before it gets work.

    Args:
        replicas: at least one.
        restore: brings a replica that was lost up to date; what it raises keeps the replica out.
        slack: about the size of a group, so that one group's requests stay together.
        return_timeout_s: how long requests wait for any replica to return.
        interval_s: seconds between checks of replicas that are busy or lost.
        say: told of replicas that are lost and of those that return.
    """

    def __init__(
        self,
        replicas: Iterable[R],
        *,
        restore: Callable[[R], Awaitable[None]],
        slack: int = 8,
        return_timeout_s: float = 600.0,
        interval_s: float = 2.0,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.slots = [Slot(replica) for replica in replicas]
        self.restore, self.slack, self.say = restore, slack, say
        self.return_timeout_s, self.interval_s = return_timeout_s, interval_s
        self.num_moved = 0
        """Requests that were sent again because their replica failed."""
        self._homes: OrderedDict[Hashable, Slot[R]] = OrderedDict()
        self._watchers: list[asyncio.Task[None]] = []
        self._checks: dict[Slot[R], asyncio.Future[bool]] = {}
        self._changed = asyncio.Event()
        self.lock = asyncio.Lock()
        """Held while a replica is restored. Whoever changes what `restore` hands over holds it too."""

    @property
    def live(self) -> list[R]:
        return [slot.replica for slot in self.slots if slot.up]

    async def call(self, work: Callable[[R], Awaitable[T]], *, session: str, prompt: Sequence[int]) -> T:
        """Run `work` on a replica, and again on another one as often as that is needed.

        Raises:
            RunFailed: no replica returned in time, or the request failed wherever it was tried.
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
        """Run `work` on all live replicas at once; those that are lost on the way are left out, and restored later.

        Raises:
            RunFailed: one failed at this and is well otherwise: so would the others.
        """
        self.watch()

        async def attempt(slot: Slot[R]) -> tuple[R, T] | None:
            try:
                return slot.replica, await work(slot.replica)
            except ReplicaFailed as error:
                if not isinstance(error, ReplicaLost) and await self._is_well(slot):
                    raise RunFailed(f"{slot.replica.name}: {error}") from None
                self.lost(slot.replica, str(error))
                return None

        results = await asyncio.gather(*(attempt(slot) for slot in self.slots if slot.up))
        return [result for result in results if result is not None]

    async def wait_for_one(self) -> None:
        """Wait until some replica is up.

        Raises:
            RunFailed: none returned in time.
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
        """Take a replica out; what runs there goes elsewhere."""
        slot = next(slot for slot in self.slots if slot.replica is replica)
        if not slot.up:
            return
        slot.up, slot.error = False, reason
        moved = len(slot.in_flight)
        for task in slot.in_flight:
            task.cancel()
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
        """`work` on one replica; raises ReplicaFailed when the replica is lost meanwhile, for whatever reason."""
        task = asyncio.ensure_future(work(slot.replica))
        slot.in_flight.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if slot.up or (current is not None and current.cancelling()):
                task.cancel()
                raise
            raise ReplicaLost(slot.error) from None
        except ReplicaLost as error:
            self.lost(slot.replica, str(error))
            raise
        except ReplicaFailed:
            if not await self._is_well(slot):
                self.lost(slot.replica, slot.error)
            raise
        finally:
            slot.in_flight.discard(task)
            slot.load -= 1

    async def _choose(self, keys: tuple[Hashable, ...], avoid: Slot[R] | None) -> Slot[R]:
        """The replica for a request, checked a moment ago. `avoid` failed at it; it is taken if there is no other."""
        while True:
            candidates = [slot for slot in self.slots if slot.up and slot is not avoid]
            candidates = candidates or [slot for slot in self.slots if slot.up]
            if not candidates:
                await self.wait_for_one()
                continue
            least = min(slot.load for slot in candidates)
            homes = (self._homes.get(key) for key in keys)
            slot = next((h for h in homes if h in candidates and h.load <= least + self.slack), None)
            slot = slot or min(candidates, key=lambda slot: slot.load)
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
                slot.load -= 1
                raise
            slot.load -= 1

    # --- checks -----------------------------------------------------------------------------------------------------

    async def _is_well(self, slot: Slot[R]) -> bool:
        try:
            await slot.replica.check()
        except ReplicaFailed as error:
            slot.error = str(error)
            return False
        slot.checked_at = time.monotonic()
        return True

    async def _check(self, slot: Slot[R]) -> bool:
        """Whether the replica is well; if not it is out."""
        # Many requests ask at once: the first one's answer is everyone's.
        pending = self._checks.get(slot)
        if pending is None:
            pending = self._checks[slot] = asyncio.ensure_future(self._is_well(slot))
            pending.add_done_callback(lambda _: self._checks.pop(slot, None))
        well = await asyncio.shield(pending)
        if not well:
            self.lost(slot.replica, slot.error)
        return well

    def watch(self) -> None:
        """Have every replica watched on this event loop."""
        loop = asyncio.get_running_loop()
        if self._watchers and self._watchers[0].get_loop() is loop and not self._watchers[0].done():
            return
        self._changed, self._checks, self.lock = asyncio.Event(), {}, asyncio.Lock()
        self._watchers = [asyncio.create_task(self._watch_one(slot), name=slot.replica.name) for slot in self.slots]

    async def _watch_one(self, slot: Slot[R]) -> None:
        """Find out that a busy replica hangs; bring a lost one back."""
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
            self.say(f"{slot.replica.name} is back and up to date; {len(self.live)} replicas serve")
