"""Stage 6, weight sync: push the learner's weights to the engine, and prove that they arrived.

Two proofs complete each other. By content: the engine holds, bit for bit, what was sent. An update of a thousandth is
smaller than the rounding of a forward pass in bfloat16, so nothing else shows whether it arrived. By what it computes:
on text that the policy itself draws, the engine's log-probabilities are no further from the learner's than rounding
explains.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

import numpy as np
import torch

from llmrl.engines.vllm.agreement import ReplicasDisagree
from llmrl.errors import RunFailed
from llmrl.model.rounding import QUANTIZED, likely_sequences, rounding_errors
from llmrl.noise import Gap, Limit
from llmrl.types import Receipt

if TYPE_CHECKING:
    from jaxtyping import Float

    from llmrl.engines.base import Engine
    from llmrl.model.policy import Policy

HISTORY = 8
"""Number of earlier versions to compare with when the engine serves something else."""
MORE_DRAWS = 8
"""Rounding errors drawn when a push looks wrong, before it is called wrong."""
SHOWN = 4
"""Names of tensors in a message."""


class WeightSync:
    """Push weights, and after every push compare what the engine holds and computes with the learner.

    What rounding explains is measured on the learner before the first push, and again before a push is refused: logits
    sharpen while a model trains, and rounding grows with them.

    Args:
        policy: the model being trained.
        engine: the engine that serves it; it knows the type it computes in.
    """

    def __init__(self, policy: Policy, engine: Engine) -> None:
        self.policy = policy
        self.engine = engine
        self.exact = engine.dtype == policy.dtype == torch.float32 and not engine.quantized
        self.history: deque[tuple[int, np.ndarray]] = deque(maxlen=HISTORY)
        self.previous_served: np.ndarray | None = None
        self.limit = self._measure()

    @property
    def probes(self) -> list[list[int]]:
        """The sequences that learner and engine both score after a push."""
        return likely_sequences(self.policy)

    async def push(self, version: int) -> Receipt:
        """Make the engine serve the learner's weights as `version`.

        Raises:
            RunFailed: the engine's log-probabilities differ from the learner's by more than rounding, or it does not
                hold what was sent. The message names what they match instead: an older version (the push did not
                arrive), the base without its adapter, the adapter counted twice, or nothing (wrong weights, or some in
                the wrong module).
        """
        start = time.perf_counter()
        if self.engine.takes_adapters:
            await self.engine.load_adapter(self.policy.adapter(), version=version)
        else:
            await self.engine.load_weights(self.policy.weights, version=version)
        pushed = time.perf_counter()
        expected, served = self._learner_logprobs(), await self._served_logprobs()
        gap = Gap.between(served, expected)
        if not self.limit.explains(gap):
            self.limit = self._measure(draws=MORE_DRAWS)
            if not self.limit.explains(gap):
                raise RunFailed(self._explain(version, gap, expected, served, self.limit))
        await self._check_content(version)
        change = float(np.abs(expected - self.history[-1][1]).max()) if self.history else 0.0
        self._check_moved(version, change, served)
        self.history.append((version, expected))
        self.previous_served = served
        done = time.perf_counter()
        return Receipt(
            version=version,
            max_gap=gap.largest,
            mean_gap=gap.mean,
            limit=self.limit.mean,
            change=change,
            seconds=done - start,
            proof_seconds=done - pushed,
        )

    def _measure(self, draws: int = 1) -> Limit:
        """Measure what rounding explains, on the learner, and let the engine know."""
        errors = rounding_errors(
            self.policy.module,
            self.policy.causal_lm,
            lambda: torch.tensor(self._learner_logprobs()),
            dtype=self.engine.dtype,
            relative=QUANTIZED if self.engine.quantized else None,
            draws=draws,
        )
        limit = Limit.of(errors)
        self.engine.limit = limit
        return limit

    def _learner_logprobs(self) -> Float[np.ndarray, " n"]:
        return _flat(self.policy.sequence_logprobs(self.probes))

    async def _served_logprobs(self) -> Float[np.ndarray, " n"]:
        try:
            return _flat(await self.engine.logprobs(self.probes))
        except ReplicasDisagree:
            self.limit = self._measure(draws=MORE_DRAWS)
            return _flat(await self.engine.logprobs(self.probes))

    async def _check_content(self, version: int) -> None:
        """Check that the engine holds what the learner has, however small the difference."""
        sent = self.policy.adapter() if self.engine.takes_adapters else self.policy.weights
        if different := await self.engine.differing(sent):
            raise RunFailed(
                f"weight sync: after pushing policy version {version} the engine holds other numbers than were sent in "
                f"{_few(different)}: the push did not arrive, or only a part of it, or some in the wrong module"
            )
        if self.engine.takes_adapters and (different := await self.engine.differing(self.policy.base_weights)):
            raise RunFailed(
                f"weight sync: under the adapter of policy version {version} the engine has another base than the "
                f"learner: it loaded other numbers in {_few(different)}; start it with the model that is trained"
            )

    def _check_moved(self, version: int, change: float, served: np.ndarray) -> None:
        """Check that what an engine computes in float32 moves with the learner: it may hold weights and use others."""
        before = self.previous_served
        if self.exact and change > 0 and before is not None and np.array_equal(served, before):
            raise RunFailed(
                f"weight sync: the learner's log-probabilities moved by {change:.3g} nats, but after pushing policy "
                f"version {version} the engine's are those of version {self.history[-1][0]}, bit for bit: the push "
                "did not arrive"
            )

    def _explain(self, version: int, gap: Gap, expected: np.ndarray, served: np.ndarray, limit: Limit) -> str:
        message = f"weight sync: after pushing policy version {version} the engine's log-probabilities"
        if served.shape != expected.shape:
            return f"{message} are {len(served)} instead of {len(expected)}"
        message += f" are off the learner's by {limit.describe(gap)}"
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
        gaps = [Gap.between(served, row) for row, _, _ in causes]
        nearest = int(np.argmin([found.mean for found in gaps])) if gaps else 0
        if gaps and limit.explains(gaps[nearest]):
            return f"{message}, but {causes[nearest][1]} to {gaps[nearest].mean:.3g}: {causes[nearest][2]}"
        return f"{message}, and match no earlier version: part of the weights arrived, or some in the wrong module"


def _few(names: list[str]) -> str:
    return f"{len(names)} tensors ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"


def _flat(rows: list[list[float]]) -> Float[np.ndarray, " n"]:
    return np.asarray([value for row in rows for value in row], dtype=np.float64)
