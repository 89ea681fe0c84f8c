"""Stages 1 to 3 ahead of the learner: rollouts of later batches run while it updates, none older than allowed.

With max_staleness 0 the queue holds nothing between two batches.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from llmrl.errors import RunFailed
from llmrl.rollout.staleness import staleness
from llmrl.types import RolloutGroup, Task

if TYPE_CHECKING:
    from llmrl.data.sampler import Sampler
    from llmrl.model.parallel import Parallel
    from llmrl.run.ledger import Ledger

T = TypeVar("T")
WINDOW = 1 / 3
"""Share of a batch that may overtake an unfinished group, where max_staleness leaves room for it (2 or more)."""


@dataclass(slots=True, eq=False)
class Entry:
    """A group that was begun and has not been taken."""

    position: int
    task: Task
    mine: bool
    """Whether this process collects it; the others receive it when it is taken."""
    work: asyncio.Task[RolloutGroup] | None = None
    """None until it runs, and on the processes that do not collect it."""

    @property
    def ready(self) -> bool:
        return not self.mine or (self.work is not None and self.work.done())


class RolloutQueue:
    """Groups under way, oldest task first.

    Let P be the tasks of a batch, k the allowed staleness, L the groups left under way when a batch is handed over,
    and W the window: only the W tasks from the oldest one on may be handed over, so at most W - 1 younger ones overtake
    a straggler, and then the batch waits for it. A group begun at version v has at most P + L - 1 older ones before it
    and W - 1 younger ones that overtake it, so it is handed over at version v + floor((L + W - 2) / P) + 1 or before.
    L = k P - (W - 1) makes that at most v + k. With k = 1 all of it goes into working ahead (W = 1: task order); from
    k = 2 on W - 1 is a third of a batch. Each group is handed over once, whatever its length: nothing is dropped.

    With several processes each collects its share of the groups and W is 1, so that all take the same ones.

    Args:
        sampler: where tasks come from.
        collect: returns the scored rollouts of one task at its position in the run.
        num_prompts: P.
        max_staleness: k; None if no policy writes the completions, so that their age means nothing.
        max_steps: steps of the run; nothing is begun that it will not train on.
        parallel: the processes.
        ledger: records every task that is begun (on the main process).
    """

    def __init__(
        self,
        sampler: Sampler,
        collect: Callable[[Task, int], Awaitable[RolloutGroup]],
        *,
        num_prompts: int,
        max_staleness: int | None,
        max_steps: int,
        parallel: Parallel,
        ledger: Ledger | None = None,
    ) -> None:
        self.sampler, self.collect, self.ledger, self.parallel = sampler, collect, ledger, parallel
        self.num_prompts, self.max_staleness, self.max_steps = num_prompts, max_staleness, max_steps
        self.rank, self.world = parallel.rank, parallel.world
        allowed = max_staleness or 0
        overtaking = int(WINDOW * num_prompts) if allowed > 1 and self.world == 1 else 0
        self.window = 1 + overtaking
        self.ahead = allowed * num_prompts - overtaking
        self.entries: list[Entry] = []

    async def take(self, count: int, *, step: int, version: int) -> list[RolloutGroup]:
        """Return the next `count` groups, in task order, once they are finished; later ones keep running.

        Args:
            count: at most `num_prompts`.
            step: the step of the run, from 1.
            version: the version of the policy that will be trained on them.

        Raises:
            RunFailed: a rollout is older than `max_staleness` allows.
        """
        ahead = min(self.ahead, (self.max_steps - step) * self.num_prompts)
        self._begin(count + ahead, step)
        while (chosen := self._choose(count)) is None:
            running = [entry.work for entry in self.entries if entry.work is not None and not entry.work.done()]
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            self._raise_failures()
        self._raise_failures()
        self.entries = [entry for entry in self.entries if entry not in chosen]
        mine = [(entry.position, entry.work.result()) for entry in chosen if entry.work is not None]
        if self.world > 1:  # on a thread, so that rollouts, rewards and requests of this process go on meanwhile
            gathered = await asyncio.to_thread(self._gather, mine)
        else:
            gathered = mine
        groups = dict(gathered)
        taken = [groups[position] for position in sorted(groups)]
        oldest = max(staleness(taken, version), default=0)
        if self.max_staleness is not None and oldest > self.max_staleness:
            raise RunFailed(
                f"a rollout of step {step} was begun by policy version {version - oldest}, {oldest} versions ago, but "
                f"rollout.max_staleness is {self.max_staleness}: the engine serves, or names, the wrong weights"
            )
        return taken

    def _gather(self, mine: list[tuple[int, RolloutGroup]]) -> list[tuple[int, RolloutGroup]]:
        return on_device(self.parallel.device, lambda: self.parallel.gather_objects(mine))

    def _begin(self, count: int, step: int) -> None:
        """Have the `count` oldest groups under way: first those that a checkpoint left, then further tasks.

        A run that is resumed with a smaller max_staleness or num_prompts has more of them left than may be under way at
        once. The others wait, or they would be too old when their turn comes.
        """
        while (missing := count - len(self.entries)) > 0:
            size = min(missing, self.num_prompts)
            position, tasks = self.sampler.position, self.sampler.next(size)
            if self.ledger is not None:
                self.ledger.issued(step, position, tasks)
            self._add([(position + k, task) for k, task in enumerate(tasks)])
        for entry in self.entries[:count]:
            if entry.mine and entry.work is None:
                entry.work = asyncio.ensure_future(self.collect(entry.task, entry.position))  # pyright: ignore

    def _add(self, tasks: list[tuple[int, Task]]) -> None:
        """Deal tasks out over the processes."""
        for k, (position, task) in enumerate(tasks):
            self.entries.append(Entry(position, task, mine=k % self.world == self.rank))

    def _choose(self, count: int) -> list[Entry] | None:
        """Return the oldest `count` finished groups inside the window, or None while there are too few."""
        left, chosen = list(self.entries), list[Entry]()
        while len(chosen) < count:
            end = left[0].position + self.window
            entry = next((entry for entry in left if entry.position < end and entry.ready), None)
            if entry is None:
                return None
            left.remove(entry)
            chosen.append(entry)
        return chosen

    def _raise_failures(self) -> None:
        for entry in self.entries:
            if entry.work is not None and entry.work.done():
                entry.work.result()

    async def close(self) -> None:
        """Cancel the groups under way and wait for their end."""
        works = [entry.work for entry in self.entries if entry.work is not None]
        self.entries = []
        for work in works:
            work.cancel()
        await asyncio.gather(*works, return_exceptions=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the tasks under way. A resumed run draws their rollouts again, at the same positions."""
        return {"under_way": [[entry.position, entry.task.id] for entry in self.entries]}

    def load_state_dict(self, state: dict[str, Any], tasks: Mapping[str, Task]) -> None:
        """Restore from `state_dict`; `tasks` by their id."""
        self.entries = []
        self._add([(position, tasks[task_id]) for position, task_id in state["under_way"]])


def on_device(device: torch.device, function: Callable[..., T], *args: Any) -> T:
    """Call `function` with `device` as this thread's current one: every new thread starts with the first GPU."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        return function(*args)
