"""Checks that replicas serve the same weights, by the log-probabilities they give to the same sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmrl.errors import RunFailed
from llmrl.noise import Gap, Limit

if TYPE_CHECKING:
    from jaxtyping import Float


class ReplicasDisagree(RunFailed):
    """Replicas give different log-probabilities. Rounding may explain it once it has been measured again."""


@dataclass(frozen=True)
class Served:
    """What `version` gave for `sequences`: one log-probability per token after the first, all sequences in one row."""

    version: int | None
    sequences: list[list[int]]
    logprobs: Float[np.ndarray, " tokens"]


class Agreement:
    """Compares replicas with each other, and a replica that returns with what the others gave.

    Attributes:
        limit: what rounding explains between two replicas that serve the same weights. None: not measured yet, so that
            nothing is refused.
        last: what the replicas agreed on.
    """

    def __init__(self, limit: Limit | None = None) -> None:
        self.limit = limit
        self.last: Served | None = None

    def check(self, version: int | None, sequences: list[list[int]], answers: list[tuple[str, list]]) -> None:
        """Compare the `answers` of all replicas and remember the first one.

        Args:
            version: the policy version they should serve.
            sequences: the token ids they were asked about.
            answers: (name of the replica, log-probabilities per sequence).

        Raises:
            ReplicasDisagree: they do not agree; the message names the replica that serves something else.
        """
        rows = [(name, _flat(answer)) for name, answer in answers]
        first = rows[0][1]
        if not all(self._explains(Gap.between(row, first)) for _, row in rows[1:]):
            raise ReplicasDisagree(self._disagreement(version, sequences, rows))
        self.last = Served(version, sequences, first)

    def check_one(self, served: Served, answer: list[list[float]]) -> None:
        """Compare the answer of a replica that returned, for `served.sequences`, with what the others gave.

        Raises:
            RunFailed: it differs by more than rounding.
        """
        gap = Gap.between(_flat(answer), served.logprobs)
        if not self._explains(gap):
            limit = self.limit or Limit(0.0, 0.0)
            raise RunFailed(
                f"after it was given version {served.version} its log-probabilities are off what that version gives by "
                f"{limit.describe(gap)}"
            )

    def _explains(self, gap: Gap) -> bool:
        return math.isfinite(gap.mean) if self.limit is None else self.limit.explains(gap)

    def _disagreement(self, version: int | None, sequences: list[list[int]], rows: list[tuple[str, np.ndarray]]) -> str:
        """Describe each replica by its distance from the others, and name one that still serves the old weights."""
        before = self.last.logprobs if self.last is not None and self.last.sequences == sequences else None
        lines = []
        for name, row in rows:
            others = [Gap.between(row, other).mean for who, other in rows if who != name]
            line = f"{name}: {min(others):.3g} to {max(others):.3g} nats from the others on average"
            if before is not None and self._explains(Gap.between(row, before)):
                line += ", and the same as before the push: the push did not arrive there"
            lines.append(line)
        explained = "" if self.limit is None else f", rounding explains {self.limit.mean:.3g} nats"
        return f"the vLLM servers serve different weights (version {version}{explained}):\n  " + "\n  ".join(lines)


def _flat(rows: list[list[float]]) -> np.ndarray:
    return np.asarray([value for row in rows for value in row])
