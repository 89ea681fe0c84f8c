"""Options that several families of algorithms share, and what all of them are checked against."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

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
    shaped: list[str] = field(default_factory=list[str])
    """The specs of those with a gate or a scale."""
    max_steps: int = 1

    def mini_batch_findings(self, num_mini_batches: int) -> list[str]:
        """Return a finding where there are more mini-batches than groups to make them of."""
        if num_mini_batches <= self.num_prompts:
            return []
        return [
            f"algo.num_mini_batches {num_mini_batches} exceeds rollout.num_prompts {self.num_prompts}: mini-batches "
            "are made of whole groups; lower it, or raise rollout.num_prompts"
        ]


@option
class AlgorithmOptions:
    """What every kind of run reads of its algorithm, before a model loads."""

    samples: ClassVar[bool] = True
    """Whether the policy samples. Runs on a dataset alone have fewer sections."""
    reads_critic: ClassVar[bool] = False
    """Whether the section `critic` is read."""

    name: str
    """The preset. Options given beside it override it."""

    def findings(self) -> list[str]:
        """Return what is wrong among these options: one line each, with the fix."""
        return []

    def findings_with(self, setting: Setting) -> list[str]:
        """Return what is wrong between these options and the other sections: one line each, with the fix."""
        return []

    def cautions(self) -> list[str]:
        """Return what may well be meant, but rarely is."""
        return []


def sampling_batches(options: DynamicSampling | None) -> int:
    """Return the cap on the groups drawn for a batch, in batches; 1 without dynamic sampling."""
    return 1 if options is None else options.max_batches
