"""Stage 6, weight sync: the learner's weights into the engine, and the proof that they arrived."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from llmrl.errors import RunFailed
from llmrl.types import Receipt

if TYPE_CHECKING:
    from llmrl.rollout.engine import Engine
    from llmrl.train.policy import Policy

PROBE_LENGTH = 16
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.15}
"""Largest gap (nats) between two correct implementations, by the type the engine computes in."""


class WeightSync:
    """Pushes weights and compares log-probabilities on a fixed probe sequence, every time.

    Args:
        policy: the model being trained.
        engine: what serves it.
        vocab_size: probe tokens are drawn from it, seeded.
        dtype: the type the engine computes in; sets the tolerance.
    """

    def __init__(self, policy: Policy, engine: Engine, *, vocab_size: int, dtype: str = "float32") -> None:
        self.policy = policy
        self.engine = engine
        self.tolerance = TOLERANCE[dtype]
        self.probe = np.random.Generator(np.random.Philox(key=0)).integers(0, vocab_size, PROBE_LENGTH).tolist()
        self.exact = dtype == "float32"
        self.previous: np.ndarray | None = None
        self.previous_served: np.ndarray | None = None

    async def push(self, version: int) -> Receipt:
        """Make the engine serve the learner's weights as `version`.

        Raises:
            RunFailed: the engine's log-probabilities are not the learner's; the message says whether they match the
                previous version instead (the push did not arrive) or neither (the wrong weights did).
        """
        start = time.perf_counter()
        await self.engine.load_weights(self.policy.weights, version=version)
        expected = np.asarray(self.policy.sequence_logprobs([self.probe])[0])
        served = np.asarray((await self.engine.logprobs([self.probe]))[0])
        gap = float(np.abs(served - expected).max())
        change = 0.0 if self.previous is None else float(np.abs(expected - self.previous).max())
        if served.shape != expected.shape or not gap <= self.tolerance:
            raise RunFailed(self._explain(version, gap, served))
        if (
            self.exact
            and change > 0
            and self.previous_served is not None
            and np.array_equal(served, self.previous_served)
        ):
            raise RunFailed(
                f"weight sync: the learner's log-probabilities moved by {change:.3g} nats, but after pushing policy "
                f"version {version} the engine's are those of version {version - 1}, bit for bit: the push did not "
                "arrive"
            )
        self.previous, self.previous_served = expected, served
        return Receipt(version=version, max_gap=gap, change=change, seconds=time.perf_counter() - start)

    def _explain(self, version: int, gap: float, served: np.ndarray) -> str:
        message = (
            f"weight sync: after pushing policy version {version} the engine's log-probabilities are {gap:.3g} nats "
            f"away from the learner's (tolerance {self.tolerance:g})"
        )
        if not np.isfinite(served).all():
            return f"{message}: the engine computes NaN or infinity; its weights or caches are broken"
        if self.previous is not None:
            stale = float(np.abs(served - self.previous).max())
            if stale <= self.tolerance:
                return f"{message}, but match version {version - 1} to {stale:.3g}: the push did not arrive"
        return f"{message}, and match no earlier version: part of the weights, or other weights, arrived"
