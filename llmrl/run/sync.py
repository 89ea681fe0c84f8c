"""Stage 6, weight sync: push the learner's weights to the engine, and prove that they arrived."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from llmrl.errors import RunFailed
from llmrl.tolerance import served_gap
from llmrl.types import Receipt

if TYPE_CHECKING:
    from llmrl.engines.base import Engine
    from llmrl.model.policy import Policy

PROBE_LENGTH = 16
"""Tokens of the sequence that learner and engine both score after a push."""
HISTORY = 8
"""Number of earlier versions to compare with when the engine serves something else."""
ROUNDING = 1e-6
"""Gaps (nats) below this are rounding."""
CLEAR_CHANGE = 10
"""If the learner moved by more than this many times the usual gap, the engine must have moved too."""


class WeightSync:
    """Push weights, and after every push compare log-probabilities on a fixed probe sequence.

    Args:
        policy: the model being trained.
        engine: the engine that serves it.
        vocab_size: size of the vocabulary from which the probe tokens are drawn, with a fixed seed.
        dtype: type the engine computes in; it sets the tolerance.
        quantized: whether the engine also quantizes the weights.
    """

    def __init__(
        self, policy: Policy, engine: Engine, *, vocab_size: int, dtype: str = "float32", quantized: bool = False
    ) -> None:
        self.policy = policy
        self.engine = engine
        self.tolerance = served_gap(dtype, quantized=quantized)
        self.probe = np.random.Generator(np.random.Philox(key=0)).integers(0, vocab_size, PROBE_LENGTH).tolist()
        self.exact = dtype == "float32" and not quantized
        self.history: deque[tuple[int, np.ndarray]] = deque(maxlen=HISTORY)
        self.previous_served: np.ndarray | None = None
        self.usual_gap = ROUNDING
        """Largest gap (nats) of the pushes so far, all of which arrived."""

    async def push(self, version: int) -> Receipt:
        """Make the engine serve the learner's weights as `version`.

        Raises:
            RunFailed: the engine's log-probabilities differ from the learner's. The message names what they match
                instead: an older version (the push did not arrive), the base without its adapter, the adapter counted
                twice, or nothing (wrong weights, or some in the wrong module).
        """
        start = time.perf_counter()
        if self.engine.takes_adapters:
            await self.engine.load_adapter(self.policy.adapter(), version=version)
        else:
            await self.engine.load_weights(self.policy.weights, version=version)
        pushed = time.perf_counter()
        expected = self._learner_logprobs()
        served = np.asarray((await self.engine.logprobs([self.probe]))[0])
        if served.shape != expected.shape:
            raise RunFailed(
                f"weight sync: the engine returned {len(served)} log-probabilities instead of {len(expected)}"
            )
        gap = float(np.abs(served - expected).max())
        change = float(np.abs(expected - self.history[-1][1]).max()) if self.history else 0.0
        if not gap <= self.tolerance:
            raise RunFailed(self._explain(version, gap, expected, served))
        self._check_moved(version, gap, change, served)
        self.history.append((version, expected))
        self.previous_served = served
        self.usual_gap = max(self.usual_gap, gap)
        done = time.perf_counter()
        return Receipt(version=version, max_gap=gap, change=change, seconds=done - start, proof_seconds=done - pushed)

    def _learner_logprobs(self) -> np.ndarray:
        return np.asarray(self.policy.sequence_logprobs([self.probe])[0])

    def _check_moved(self, version: int, gap: float, change: float, served: np.ndarray) -> None:
        """Check that a change of the learner shows in the engine, even if it is smaller than the tolerance."""
        before = self.previous_served
        # Bit for bit the same although the learner moved: in float32 that cannot be rounding.
        unmoved = self.exact and change > 0 and before is not None and np.array_equal(served, before)
        if unmoved or (change > CLEAR_CHANGE * self.usual_gap and gap > change / 2):
            kept = "those of" if unmoved else "nearer to"
            raise RunFailed(
                f"weight sync: the learner's log-probabilities moved by {change:.3g} nats, but after pushing policy "
                f"version {version} the engine's are {gap:.3g} away and {kept} version {self.history[-1][0]}"
                f"{', bit for bit' if unmoved else ''}: the push did not arrive"
            )

    def _explain(self, version: int, gap: float, expected: np.ndarray, served: np.ndarray) -> str:
        message = (
            f"weight sync: after pushing policy version {version} the engine's log-probabilities are {gap:.3g} nats "
            f"away from the learner's (tolerance {self.tolerance:g})"
        )
        if not np.isfinite(served).all():
            return f"{message}: the engine computes NaN or infinity; its weights or caches are broken"
        older = [(row, f"match version {old}", "the push did not arrive") for old, row in reversed(self.history)]
        causes = older[:1]
        if self.policy.has_adapters:
            for factor, what, why in [
                (
                    0.0,
                    "match the base model without its adapter",
                    "the adapter was not delivered, or not requested",
                ),
                (2.0, "match the adapter counted twice", "it was added to weights that already contain it"),
            ]:
                with self.policy.scaled(factor):
                    causes.append((self._learner_logprobs(), what, why))
        causes += older[1:]
        distances = [float(np.abs(served - row).max()) for row, _, _ in causes]
        if distances and min(distances) <= self.tolerance:
            nearest = int(np.argmin(distances))
            return f"{message}, but {causes[nearest][1]} to {distances[nearest]:.3g}: {causes[nearest][2]}"
        return f"{message}, and match no earlier version: part of the weights arrived, or some in the wrong module"
