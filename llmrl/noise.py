"""What rounding can explain: from the errors of right computations, measured, the limit on the gap between two of them.

A gap is the absolute difference (nats) between two computations of the log-probability of one token. A single gap says
little: it grows with the logits, and where a mixture of experts routes a token differently it is large for no fault.
Gaps are therefore judged over many tokens, by their mean and by a high quantile. A larger mean or quantile than the
limit means that one side computes something else: it holds other weights, or its masks are off by a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float

MARGIN = 2.0
"""Kernels may round this many times worse than the computation that was measured."""
SIGMAS = 6.0
"""Standard errors that a mean may be off by chance."""
HIGH = 0.9
"""The quantile that is compared. It leaves room for the few tokens that another choice of experts moves far."""
FLOOR_MEAN = 3e-5
"""Nats that the mean may differ where nothing is rounded measurably: float32 has this little to hide."""
FLOOR_HIGH = 3e-4


@dataclass(frozen=True, slots=True)
class Gap:
    """Statistics of the gaps over the same tokens."""

    mean: float
    high: float
    """Their quantile `HIGH`."""
    largest: float

    @staticmethod
    def between(found: Float[np.ndarray, " n"], expected: Float[np.ndarray, " n"]) -> Gap:
        """Return the statistics; all are infinite where the shapes differ or a value is NaN or infinite."""
        if found.shape != expected.shape or not (np.isfinite(found).all() and np.isfinite(expected).all()):
            return Gap(math.inf, math.inf, math.inf)
        gaps = np.abs(found - expected)
        if not len(gaps):
            return Gap(0.0, 0.0, 0.0)
        return Gap(float(gaps.mean()), float(np.quantile(gaps, HIGH)), float(gaps.max()))


@dataclass(frozen=True, slots=True)
class Limit:
    """The largest mean and high quantile (nats) that rounding explains."""

    mean: float
    high: float

    @staticmethod
    def of(errors: Float[np.ndarray, " n"]) -> Limit:
        """Return the limit that follows from what rounding does to the two computations to compare.

        Args:
            errors: for each token, the difference that rounding makes between the two (nats; root mean square).
        """
        num = max(1, len(errors))
        chance = SIGMAS * float(errors.std()) / math.sqrt(num) if len(errors) else 0.0
        mean = float(errors.mean()) if len(errors) else 0.0
        # The quantile of a sample is off by chance as well: by this much of its rank.
        rank = min(1.0, HIGH + 3 * math.sqrt(HIGH * (1 - HIGH) / num))
        high = float(np.quantile(errors, rank)) if len(errors) else 0.0
        return Limit(FLOOR_MEAN + MARGIN * mean + chance, FLOOR_HIGH + MARGIN * high)

    def explains(self, gap: Gap) -> bool:
        """Return whether a gap is no larger than rounding makes it."""
        return gap.mean <= self.mean and gap.high <= self.high

    def doubled(self) -> Limit:
        """Return the limit between two engines that may each be as far from the learner as this."""
        return Limit(2 * self.mean, 2 * self.high)

    def describe(self, gap: Gap) -> str:
        """Return the numbers of a comparison, for a message."""
        return (
            f"{gap.mean:.3g} nats on average and {gap.high:.3g} in one token of ten (rounding explains "
            f"{self.mean:.3g} and {self.high:.3g})"
        )
