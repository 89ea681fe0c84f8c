"""The Engine protocol: token ids in, token ids and their log-probabilities out. Also a scripted engine for tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import torch

from llmrl.noise import Limit
from llmrl.types import Adapter, Completion, Sampling, WeightSource


class Engine(Protocol):
    """Samples from the policy. It owns the weights it serves, and they change only by a push."""

    takes_adapters: bool
    """The engine keeps the base weights, and a push brings only the adapter: `load_adapter`, not `load_weights`."""
    dtype: torch.dtype
    """The type it computes in."""
    quantized: bool
    """Whether it also rounds weights to fewer bits."""
    limit: Limit | None
    """What rounding explains between it and the learner, once measured. Replicas may differ as much."""

    async def generate(self, prompt_ids: list[int], sampling: Sampling, *, session: str) -> Completion:
        """Draw one completion.

        Requests are submitted concurrently and each returns as soon as it is finished, so that verification can start
        while others still generate. The tokens depend only on `prompt_ids`, `sampling` and the weights.

        Args:
            prompt_ids: what the completion continues; requests with equal prompts share its computation.
            sampling: how tokens are drawn, with this request's own seed.
            session: names the conversation, so that an engine with replicas can send it where its cache is.
        """
        ...

    async def logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        """Return the log-probabilities (temperature 1) that the served weights give to each token after the first.

        Entry t of a row is log p(sequence[t + 1] | sequence[: t + 1]). They prove which weights are served.
        """
        ...

    async def load_weights(self, source: WeightSource, *, version: int) -> None:
        """Serve the weights of `source` from now on, as policy `version`, and drop prefix caches of older weights."""
        ...

    async def load_adapter(self, adapter: Adapter, *, version: int) -> None:
        """Serve the base weights with `adapter` from now on. Only for an engine with `takes_adapters`."""
        ...

    async def differing(self, sent: WeightSource | Adapter) -> list[str]:
        """Return the names of tensors that it does not hold as they are in `sent`, bit for bit in the type it uses.

        It compares as much as it can: what it was given, what it holds, or both. An engine that takes adapters compares
        weights with the base that it was started with.
        """
        ...

    async def sleep(self) -> None:
        """Lend the device's memory to the learner, if the options ask for it. No request comes before the next push."""
        ...

    async def close(self) -> None:
        """Release memory and processes. Safe to call twice."""
        ...


class FakeEngine:
    """Scripted completions and latencies, for tests and for trying a schedule without a model.

    Args:
        script: maps (prompt_ids, sampling) to the token ids of the completion, including the stop token if it stopped.
        latency: maps the same arguments to the seconds that the completion takes. Default: no time.
        logprob: log-probability reported for every token.
    """

    takes_adapters = False
    dtype = torch.float32
    quantized = False

    def __init__(
        self,
        script: Callable[[list[int], Sampling], list[int]],
        *,
        latency: Callable[[list[int], Sampling], float] | None = None,
        logprob: float = -1.0,
    ) -> None:
        self.script = script
        self.latency = latency
        self.logprob = logprob
        self.version = 0
        self.limit: Limit | None = None
        self.calls: list[tuple[list[int], Sampling, str]] = []

    async def generate(self, prompt_ids: list[int], sampling: Sampling, *, session: str) -> Completion:
        started_with = self.version
        self.calls.append((list(prompt_ids), sampling, session))
        if self.latency is not None:
            await asyncio.sleep(self.latency(prompt_ids, sampling))
        token_ids = list(self.script(prompt_ids, sampling))[: sampling.max_tokens]
        stopped = bool(token_ids) and token_ids[-1] in sampling.stop_token_ids
        return Completion(
            token_ids=token_ids,
            logprobs=[self.logprob] * len(token_ids),
            finish="stop" if stopped else "length",
            policy_version=(started_with, self.version),
        )

    async def logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        return [[self.logprob] * (len(sequence) - 1) for sequence in sequences]

    async def load_weights(self, source: WeightSource, *, version: int) -> None:
        self.version = version

    async def load_adapter(self, adapter: Adapter, *, version: int) -> None:
        self.version = version

    async def differing(self, sent: WeightSource | Adapter) -> list[str]:
        return []

    async def sleep(self) -> None:
        pass

    async def close(self) -> None:
        pass
