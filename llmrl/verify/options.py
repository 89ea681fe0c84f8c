"""Options of rewards and of how they are computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Annotated, Any

from pydantic import BeforeValidator

from llmrl.option import MISSING, Count, Positive, Share, option


def _to_call(reward: Any) -> Any:
    """Return the method of an object that scores groups and cannot be called itself."""
    method = getattr(reward, "score_group", None)
    return method if callable(method) and not callable(reward) else reward


@option
class RewardConfig:
    """One reward function. The first one with weight > 0 is the accuracy that pass@k and filters use."""

    fn: Annotated[str | Callable[..., Any], BeforeValidator(_to_call)] = MISSING
    """`rewards/file.py:function`, `package.module:function`, or the name of an installed `llmrl.rewards` entry. In
    Python also the function itself."""
    weight: float = 1.0
    """Factor in the sum of rewards. 0 logs the reward without training on it."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments fixed for the whole run."""
    gate: str | None = None
    """Name of another reward. This one counts only where that one is above 0."""
    scale: tuple[float, float] | None = None
    """[low, high]: map this range to [0, 1] and clip, before the weight is applied."""
    sources: list[str] = field(default_factory=list)
    """Score only tasks of these sources: names of `data.sources`, or what a row's column data_source (dataset, source)
    says. Default: all tasks."""
    time_limit_s: Positive | None = None
    """Time limit of one call in seconds. A call that exceeds it is given up and is an error of its rollout, or of its
    group, for rewards that see groups. Default: 20 in the pool of worker processes, or 20 times what the reward says it
    needs; 1,200 elsewhere, where a reward may wait for a judge that is being restarted."""

    @property
    def name(self) -> str:
        """The spec, or the name of a function given in Python."""
        return self.fn if isinstance(self.fn, str) else str(getattr(self.fn, "__name__", type(self.fn).__name__))


@option
class VerifyConfig:
    """How rewards are computed."""

    num_workers: Count | None = None
    """Worker processes for CPU-bound rewards. Default: the cores of this machine shared by its training processes."""
    memory_limit_gb: Positive = 4.0
    """Address space of each worker process."""
    max_unscored_frac: Share = 0.05
    """Stop the run when more than this share of a step's rollouts has no score because something failed (an error in a
    reward, an environment or the engine). At least one error per step is allowed."""
    max_abstained_frac: Share | None = None
    """Stop the run when more than this share of a step's rollouts was not judged because a reward abstained. Default:
    never stop, warn."""
