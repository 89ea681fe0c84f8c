"""Options of rollouts."""

from __future__ import annotations

from llmrl.engines.options import EngineConfig
from llmrl.option import Count, Natural, NotNegative, PositiveShare, option


@option
class BatchConfig:
    """The size of a batch."""

    num_prompts: Count = 16
    """P: tasks per step, over all processes."""


@option
class SamplingConfig(EngineConfig):
    """How completions are drawn."""

    num_generations: Count = 8
    """G: rollouts of each task, the group."""
    max_completion_length: Count = 512
    """Tokens per rollout."""
    temperature: NotNegative = 1.0
    """Softmax temperature. Training needs more than 0."""
    top_p: PositiveShare = 1.0
    """Sample from the most likely tokens with this much probability. Training needs all of it, 1."""
    top_k: Natural = 0
    """Sample from this many of the most likely tokens. Training needs the whole vocabulary, 0."""


@option
class RolloutConfig(SamplingConfig, BatchConfig):
    """How the rollouts of a training run are drawn."""

    max_staleness: Natural = 0
    """Generate ahead while the learner updates: rollouts may be this many policy versions old when they are trained on.
    0: strictly on-policy, generation and training take turns."""
