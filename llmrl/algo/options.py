"""Options that several families of algorithms share, and what all of them are checked against."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmrl.option import Count, option


@option
class DynamicSampling:
    """Draw further tasks in place of groups whose accuracies are all equal, until the batch is full (DAPO)."""

    max_batches: Count = 10
    """Draw at most `max_batches` * num_prompts tasks; then groups without signal fill the rest."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The values of other sections that an algorithm's options must agree with."""

    num_prompts: int
    has_adapters: bool = False
    """The policy is trained through adapters."""
    num_generations: int | None = None
    """None where nothing is sampled; the fields below then keep their defaults."""
    temperature: float = 1.0
    max_staleness: int = 0
    rewards: dict[str, float] = field(default_factory=dict[str, float])
    """Weight of each reward by its spec."""
    max_steps: int = 1

    def mini_batch_findings(self, num_mini_batches: int) -> list[str]:
        """Return a finding where there are more mini-batches than groups to make them of."""
        if num_mini_batches <= self.num_prompts:
            return []
        return [
            f"algo.num_mini_batches {num_mini_batches} exceeds rollout.num_prompts {self.num_prompts}: mini-batches "
            "are made of whole groups; lower it, or raise rollout.num_prompts"
        ]


def sampling_batches(options: DynamicSampling | None) -> int:
    """Return the cap on the groups drawn for a batch, in batches; 1 without dynamic sampling."""
    return 1 if options is None else options.max_batches
