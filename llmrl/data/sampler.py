"""The order of the tasks: a list of tasks and a seed in, batches of tasks out, resumable at any point."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from llmrl.errors import UserError
from llmrl.types import RolloutGroup, Task

STREAM_BLOCK = 1024
"""Tasks of a stream that are shuffled among themselves."""


class Sampler(Protocol):
    """Chooses the tasks of each step."""

    @property
    def position(self) -> int:
        """Tasks returned so far. Read it before `next`: task i of that batch is number `position + i` of the run."""
        ...

    def next(self, n: int) -> list[Task]:
        """Return the next `n` tasks, all different."""
        ...

    def check(self, n: int) -> None:
        """Raise UserError unless `n` different tasks fit in a batch."""
        ...

    def update(self, groups: Sequence[RolloutGroup]) -> None:
        """Learn from the scored groups of a step (a curriculum does)."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return everything that `load_state_dict` needs, as values that survive JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore from `state_dict`: `next` continues where that sampler stopped."""
        ...


class TaskSampler:
    """Gives every task once per epoch, in a new order each epoch that depends on (seed, epoch) only.

    When an epoch ends inside a batch, the batch continues with the next epoch. Tasks of the new epoch that are already
    in the batch are deferred to the start of the next batch, so no batch has a task twice and no epoch loses one.

    Args:
        tasks: at least one; their ids must differ.
        seed: at least 0.
        shuffle: False keeps the order of `tasks` in every epoch.
        streams: a longer run has further tasks behind these. They are then shuffled in blocks of STREAM_BLOCK, so that
            a run can be resumed with more steps.

    Raises:
        UserError: there are no tasks, an id repeats, or the seed is negative.
    """

    def __init__(self, tasks: Sequence[Task], *, seed: int, shuffle: bool = True, streams: bool = False) -> None:
        ids = [task.id for task in tasks]
        if not ids:
            raise UserError("there are no tasks to sample from")
        task_id, count = Counter(ids).most_common(1)[0]
        if count > 1:
            raise UserError(f"{count} tasks have the id {task_id!r}: ids must differ, because resuming relies on them")
        if seed < 0:
            raise UserError(f"train.seed is {seed}: it must be at least 0")
        self._tasks, self._streams = list(tasks), streams
        self._identity = {
            "seed": seed,
            "shuffle": shuffle,
            "num_tasks": len(ids),
            "fingerprint": self._fingerprint(len(ids)),
        }
        self._position = 0
        self._start_epoch(0)

    def __len__(self) -> int:
        """Return the number of tasks."""
        return len(self._tasks)

    def _fingerprint(self, count: int) -> str:
        """Return a hash of the ids of the first `count` tasks."""
        return hashlib.sha256("\n".join(task.id for task in self._tasks[:count]).encode()).hexdigest()[:16]

    @property
    def position(self) -> int:
        """Tasks returned so far. Read it before `next`: task i of that batch is number `position + i` of the run."""
        return self._position

    @property
    def epoch(self) -> int:
        """Epoch of the next task, from 0."""
        return self._epoch + (self._cursor == len(self._tasks) and not self._deferred)

    def check(self, n: int) -> None:
        """Raise UserError unless `n` different tasks fit in a batch."""
        if not 1 <= n <= len(self._tasks):
            raise UserError(
                f"rollout.num_prompts {n} cannot be drawn from {len(self._tasks)} tasks without repeating one in a "
                f"batch: use a number from 1 to {len(self._tasks)}"
            )

    def next(self, n: int) -> list[Task]:
        """Return the next `n` tasks, all different.

        Raises:
            UserError: `n` is not between 1 and the number of tasks.
        """
        self.check(n)
        batch = {index: self._tasks[index] for index in self._deferred[:n]}
        self._deferred = self._deferred[n:]
        while len(batch) < n:
            index = self._next_index(batch)
            batch[index] = self._tasks[index]
        self._position += n
        return list(batch.values())

    def update(self, groups: Sequence[RolloutGroup]) -> None:
        """Do nothing: the order does not depend on scores."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and what identifies the tasks and their order, as values that survive JSON."""
        return self._identity | {
            "position": self._position,
            "epoch": self._epoch,
            "cursor": self._cursor,
            "passed_over": list(self._deferred),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore from `state_dict`: `next` returns what that sampler would have returned.

        Raises:
            UserError: the tasks, the seed or the shuffling differ from that sampler's; the message names which.
        """
        now = dict(self._identity)
        if self._streams and state["epoch"] == 0 and state["num_tasks"] < len(self._tasks):  # the run got longer
            now |= {"num_tasks": state["num_tasks"], "fingerprint": self._fingerprint(state["num_tasks"])}
        changed = [
            f"{name} was {state.get(name)} and is {value}" for name, value in now.items() if state.get(name) != value
        ]
        if changed:
            raise UserError(
                f"cannot resume the order of the tasks: {'; '.join(changed)}. (The fingerprint covers the ids of the "
                "tasks and their order.) Resume with the data and seed of the first start, or start a new run"
            )
        self._position = state["position"]
        self._start_epoch(state["epoch"])
        self._cursor = state["cursor"]
        self._deferred = list(state["passed_over"])

    def _start_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._cursor = 0
        self._deferred: list[int] = []
        count = len(self._tasks)
        # A generator of its own per epoch: resuming needs no random state, only the epoch and a cursor.
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self._identity["seed"], epoch])))
        self._order = list(range(count))
        if self._identity["shuffle"]:
            block = STREAM_BLOCK if self._streams else count
            starts = range(0, count, block)
            self._order = [s + i for s in starts for i in generator.permutation(min(block, count - s)).tolist()]

    def _next_index(self, batch: dict[int, Task]) -> int:
        """Return the index of the next task that is not in `batch`; defer those that are to the next batch."""
        while True:
            if self._cursor == len(self._order):
                self._start_epoch(self._epoch + 1)
            index = self._order[self._cursor]
            self._cursor += 1
            if index not in batch:
                return index
            self._deferred.append(index)
