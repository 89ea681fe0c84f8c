"""What gives the loop scored groups, and what it serves weights to.

A kind of run is told apart by its source: an engine with an environment and a rubric (`collector.py`), rows of
preferences (`preferences.py`), stored programs (`methods/bcoder/source.py`). A `Feed` holds the data before there is a
model, so that whatever is wrong with it is found first.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmrl.data.sampler import TaskSampler
    from llmrl.engines.base import Engine
    from llmrl.train.learner import Learner
    from llmrl.types import Receipt, RolloutGroup, Task

Push = Callable[[int], Awaitable["Receipt"]]
"""Make the engine serve the learner's weights as this version, and prove it."""
StartEngine = Callable[[], "tuple[Engine, Push]"]
"""Start the engine of a run. It is called only where something samples."""


class Source:
    """The base of all sources: the defaults are those of a source without an engine. Override `collect`.

    Attributes:
        accuracy: name of the reward that says right or wrong; "" is the reward itself.
        max_staleness: how many policy versions old a rollout may be; None where no policy wrote the completions.
    """

    accuracy: str = ""
    max_staleness: int | None = None

    async def collect(
        self,
        tasks: list[Task],
        positions: list[int],
        *,
        num_generations: int | None = None,
        temperature: float | None = None,
        salt: str = "train",
    ) -> list[RolloutGroup]:
        """Collect one scored group per task, in the order of `tasks`.

        Args:
            tasks: the work of this process.
            positions: each task's place in the run's sequence; with the run's seed it fixes the random numbers of its
                rollouts, whatever process runs them and whatever else is in the batch.
            num_generations: G, if not the configured one.
            temperature: if not the configured one; 0 is greedy.
            salt: keeps the random numbers of different uses (training, evaluation) apart.
        """
        raise NotImplementedError

    async def open(self, learner: Learner) -> list[str]:
        """Prepare before the first step, once the model is loaded. Returns lines to show."""
        return []

    def begin_step(self, step: int, *, max_steps: int, epoch: float) -> None:
        """Note where the run is, for rewards that depend on it."""

    def check(self, groups: list[RolloutGroup]) -> None:
        """Raise RunFailed when too many rollouts of a step have no score."""

    def metrics(self, groups: list[RolloutGroup], version: int) -> dict[str, float]:
        """Metrics of a step's groups; `version` is the policy's. Without rewards that were measured: lengths alone."""
        lengths = [rollout.num_completion_tokens for group in groups for rollout in group.rollouts]
        return {
            "rollout/length/mean": fmean(lengths) if lengths else 0.0,
            "rollout/length/max": float(max(lengths, default=0)),
            "rollout/num_tokens": float(sum(lengths)),
        }

    async def rest(self) -> None:
        """Nothing is collected before the next `serve`: give device memory to the learner, if that was asked for."""

    async def serve(self, version: int) -> Receipt | None:
        """Serve the learner's weights as `version`; returns the proof, or None where nothing samples."""
        return None

    async def close(self) -> None:
        """Release processes and memory. Safe to call twice."""


class Feed:
    """The data of a run. It is read and checked before a model loads and becomes a source afterwards.

    Attributes:
        tasks: what the sampler draws from.
        eval_tasks: the held-out ones.
        rewards: weight of each reward by name; empty where nothing is scored.
        has_reference: the feed brings the reference's log-probabilities, so no reference model is kept.
    """

    tasks: list[Task]
    eval_tasks: list[Task]
    rewards: dict[str, float]
    has_reference: bool = False

    def encode(self, tokenizer: Any, generation: Any) -> list[str]:
        """Render prompts with the tokenizer. Returns lines to show.

        Raises:
            UserError: rows that cannot be rendered, or none left.
        """
        raise NotImplementedError

    def sampler(self, num_prompts: int) -> TaskSampler:
        """The order of the tasks.

        Raises:
            UserError: fewer tasks than `num_prompts`.
        """
        raise NotImplementedError

    def source(self, start_engine: StartEngine) -> Source:
        """The source of the run, after `encode`."""
        raise NotImplementedError
