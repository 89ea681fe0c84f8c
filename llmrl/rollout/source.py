"""Where the loop gets its scored groups, and whom it serves new weights to.

Each kind of run has its own source: an engine with environments and a rubric (`collector.py`), rows of preferences
(`preferences.py`), or stored programs (`methods/bcoder/source.py`). A source needs the model, and loading one is slow,
so a `Feed` reads and checks the data first.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmrl.data.report import Finding
    from llmrl.data.sampler import Sampler
    from llmrl.engines.base import Engine
    from llmrl.train.learner import Learner
    from llmrl.types import ModelLimits, Receipt, RolloutGroup, Task

Push = Callable[[int], Awaitable["Receipt"]]
"""Make the engine serve the learner's weights as this version, and prove it."""
StartEngine = Callable[[], "tuple[Engine, Push]"]
"""Start the engine of a run. A feed calls it only if its source samples."""


class Source:
    """The base of all sources. Override `collect`; the other defaults fit a source without an engine.

    The loop calls `open` once, then in every step `begin_step`, `collect` (through its queue, possibly for later steps
    too), `check`, `rest`, `serve` and `metrics`, and `close` at the end, even if `open` failed.

    Attributes:
        accuracy: name of the reward that tells right from wrong; "" means the total reward.
        max_staleness: how many policy versions old a rollout may be. None if no policy wrote the completions, so that
            their age means nothing.
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
            tasks: the tasks of this process.
            positions: each task's place in the run's sequence. It seeds the random numbers of the task's rollouts, so
                they depend neither on the process that runs them nor on the rest of the batch.
            num_generations: G, if not the configured one.
            temperature: if not the configured one; 0 is greedy.
            salt: separates the random numbers of different uses (training, evaluation).
        """
        raise NotImplementedError

    async def open(self, learner: Learner) -> list[str]:
        """Prepare for the first step, now that the model is loaded. Returns lines to show."""
        return []

    def begin_step(self, step: int, *, max_steps: int, epoch: float) -> None:
        """Record where the run is, for rewards that depend on it."""

    def check(self, groups: list[RolloutGroup], *, what: str = "rollouts of this step") -> None:
        """Raise RunFailed if too many rollouts have no score; `what` is what the message calls them."""

    def take_reported(self) -> dict[str, float]:
        """Return what rewards reported (TRL's `log_metric`) since the last call, or since the last `metrics`."""
        return {}

    def metrics(self, groups: list[RolloutGroup], version: int) -> dict[str, float]:
        """Return metrics of a step's groups, for policy `version`. Rewards that a dataset gives were not measured."""
        lengths = [rollout.num_completion_tokens for group in groups for rollout in group.rollouts]
        return {
            "rollout/length/mean": fmean(lengths) if lengths else 0.0,
            "rollout/length/max": float(max(lengths, default=0)),
            "rollout/num_tokens": float(sum(lengths)),
        }

    def commit(self, groups: list[RolloutGroup]) -> list[dict[str, Any]]:
        """Let rewards with a state learn from the groups of a step; return what changed, for the ledger."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the rewards, for the checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""

    async def rest(self) -> None:
        """Lend the engine's device memory to the learner: nothing is collected before the next `serve`."""

    async def serve(self, version: int) -> Receipt | None:
        """Serve the learner's weights as `version`. Returns the proof, or None if nothing samples."""
        return None

    async def close(self) -> None:
        """Release processes and memory. Calling it twice is safe."""


class Feed:
    """The data of a run, read and checked before a model loads. Call `encode`, then `sampler` and `source`.

    Attributes:
        tasks: what the sampler draws from.
        eval_tasks: held-out tasks.
        rewards: weight of each reward by name; empty if nothing is scored.
        has_reference: the feed supplies the reference's log-probabilities, so no reference model is kept.
        streams: the tasks are those that the run needs, of a stream of unknown length.
    """

    rewards: dict[str, float]
    has_reference: bool = False

    @property
    def streams(self) -> bool:
        return False

    @property
    def longest(self) -> int | None:
        """Tokens of the longest sequence that the rows can lead to, after `encode`; None if nothing is sampled."""
        return None

    @property
    def tasks(self) -> list[Task]:
        raise NotImplementedError

    @property
    def eval_tasks(self) -> list[Task]:
        raise NotImplementedError

    def encode(self, tokenizer: Any, generation: Any, limits: ModelLimits) -> list[str]:
        """Render and check every row.

        Args:
            tokenizer: the policy's.
            generation: the model's generation configuration.
            limits: what the model can take, as far as it is known.

        Returns:
            Lines to show.

        Raises:
            UserError: rows cannot be used, or none are left.
        """
        raise NotImplementedError

    def check_vocabulary(self, tokenizer: Any, vocab_size: int) -> None:
        """Raise UserError if the data has tokens that the loaded model has no embedding for.

        A tokenizer may have such tokens (those of images, for example) as long as nothing uses them.
        """
        raise NotImplementedError

    def dropped(self) -> list[Finding]:
        """Return the rows that were left out, and why."""
        raise NotImplementedError

    def preview(self) -> str:
        """Return the first row as the model sees it."""
        raise NotImplementedError

    def sampler(self, num_prompts: int) -> Sampler:
        """Return the order of the tasks. Raises UserError if there are fewer than `num_prompts`."""
        raise NotImplementedError

    def source(self, start_engine: StartEngine) -> Source:
        """Return the source of the run."""
        raise NotImplementedError
