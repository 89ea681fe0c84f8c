"""Whether replicas serve the same weights: told by the log-probabilities they give to the same sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmrl.errors import RunFailed

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Served:
    """What `version` gave on `sequences`: one log-probability per token after the first, one sequence after another."""

    version: int | None
    sequences: list[list[int]]
    logprobs: Float[np.ndarray, " tokens"]


class Agreement:
    """Compares replicas with each other, and one that returns with what the others gave.

    Args:
        tolerance: largest gap (nats) between replicas that serve the same weights.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.last: Served | None = None

    def check(self, version: int | None, sequences: list[list[int]], answers: list[tuple[str, list]]) -> None:
        """Compare the `answers` of all replicas, by their names, and remember the first.

        Raises:
            RunFailed: they do not agree; the message names the one that serves something else.
        """
        rows = [(name, _flat(answer)) for name, answer in answers]
        first = rows[0][1]
        if not all(_gap(row, first) <= self.tolerance for _, row in rows[1:]):
            raise RunFailed(self._disagreement(version, sequences, rows))
        self.last = Served(version, sequences, first)

    def check_one(self, served: Served, answer: list[list[float]]) -> None:
        """Compare what a replica that returned gives on `served.sequences`.

        Raises:
            RunFailed: it is something else.
        """
        gap = _gap(_flat(answer), served.logprobs)
        if not gap <= self.tolerance:
            raise RunFailed(
                f"after it was given version {served.version} its log-probabilities are {gap:.3g} nats away from what "
                f"that version gives (tolerance {self.tolerance:g})"
            )

    def _disagreement(self, version: int | None, sequences: list[list[int]], rows: list[tuple[str, np.ndarray]]) -> str:
        """Which replica is the odd one: the one that gives what was served before, else the one far from most."""
        before = self.last.logprobs if self.last is not None and self.last.sequences == sequences else None
        lines = []
        for name, row in rows:
            others = [_gap(row, other) for who, other in rows if who != name]
            line = f"{name}: {min(others):.3g} to {max(others):.3g} nats from the others"
            if before is not None and _gap(row, before) <= self.tolerance:
                line += ", but as before the push: the push did not arrive there"
            lines.append(line)
        return (
            f"the vLLM servers serve different weights (version {version}, tolerance {self.tolerance:g}):\n  "
            + "\n  ".join(lines)
        )


def _flat(rows: list[list[float]]) -> np.ndarray:
    return np.asarray([value for row in rows for value in row])


def _gap(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference; infinite where the shapes differ or a value is not a number."""
    if a.shape != b.shape:
        return math.inf
    gap = float(np.abs(a - b).max(initial=0.0))
    return gap if math.isfinite(gap) else math.inf
