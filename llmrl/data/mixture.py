"""Several sources mixed by weight: each keeps an order of its own, and every batch has its share of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from llmrl.data.options import SourceConfig
from llmrl.data.sampler import Sampler, TaskSampler
from llmrl.errors import UserError
from llmrl.types import RolloutGroup, Task


def make_sampler(
    tasks: Sequence[Task], sources: Sequence[SourceConfig], *, seed: int, shuffle: bool, streams: bool
) -> Sampler:
    """Return the order of the tasks of a run: of one dataset, or of several mixed by their weights.

    Args:
        tasks: of all sources.
        sources: `data.sources`; empty for a single dataset.
        seed: of the order.
        shuffle: False keeps the order of each dataset.
        streams: a longer run will have more tasks, behind these.

    Raises:
        UserError: two sources have the same name, or one has no tasks.
    """
    if not sources:
        return TaskSampler(tasks, seed=seed, shuffle=shuffle, streams=streams)
    by_source: dict[str, list[Task]] = {}
    for task in tasks:
        by_source.setdefault(task.source, []).append(task)
    if len(by_source) < len(sources):
        raise UserError(
            f"data.sources: {len(sources)} sources, but tasks from {', '.join(by_source)} alone: give each source a "
            "`name` of its own"
        )
    # Tasks are read in the order of the sources, so the k-th name is that of the k-th source.
    weights = {name: source.weight for name, source in zip(by_source, sources, strict=True)}
    samplers = {
        name: TaskSampler(found, seed=seed, shuffle=shuffle, streams=streams) for name, found in by_source.items()
    }
    return MixtureSampler(samplers, weights)


class MixtureSampler:
    """Draws from several samplers so that the numbers drawn stay within one of the shares given by the weights.

    Args:
        samplers: one per source, by name.
        weights: relative, one per source.
    """

    def __init__(self, samplers: dict[str, TaskSampler], weights: dict[str, float]) -> None:
        self.samplers = samplers
        total = sum(weights.values())
        self.shares = {name: weights[name] / total for name in samplers}
        self._drawn = dict.fromkeys(samplers, 0)

    @property
    def position(self) -> int:
        """Tasks returned so far."""
        return sum(self._drawn.values())

    def check(self, n: int) -> None:
        """Raise UserError unless every batch of `n` tasks can have its share of each source without repeating one."""
        for name, sampler in self.samplers.items():
            most, there = math.ceil(n * self.shares[name]) + 1, len(sampler)
            if most > there and n > 0:
                raise UserError(
                    f"data.sources {name}: it has {there} tasks, and up to {most} of the {n} of a batch "
                    f"(rollout.num_prompts) come from it: lower its weight, or use a larger source"
                )

    def next(self, n: int) -> list[Task]:
        """Return the next `n` tasks, all different, in the order in which their sources' turns come."""
        turns = [self._turn() for _ in range(n)]
        drawn = {
            name: iter(sampler.next(turns.count(name))) for name, sampler in self.samplers.items() if name in turns
        }
        return [next(drawn[name]) for name in turns]

    def _turn(self) -> str:
        """Return the source that is farthest behind its share, and count a task of it."""
        due = self.position + 1
        name = max(self.shares, key=lambda each: self.shares[each] * due - self._drawn[each])
        self._drawn[name] += 1
        return name

    def update(self, groups: Sequence[RolloutGroup]) -> None:
        """Do nothing: the order does not depend on scores."""

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all sources and how many tasks each has given, as values that survive JSON."""
        return {
            "shares": self.shares,
            "drawn": self._drawn,
            "sources": {name: sampler.state_dict() for name, sampler in self.samplers.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore from `state_dict`.

        Raises:
            UserError: the sources or their weights differ.
        """
        if state.get("shares") != self.shares:
            raise UserError(
                f"cannot resume the order of the tasks: data.sources had the shares {state.get('shares')} and has "
                f"{self.shares}. Resume with the sources and weights of the first start, or start a new run"
            )
        self._drawn = dict(state["drawn"])
        for name, sampler in self.samplers.items():
            sampler.load_state_dict(state["sources"][name])
