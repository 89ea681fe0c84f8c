"""The Engine protocol: token ids in, token ids and their log-probabilities out; and a scripted engine for tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from llmrl.types import Adapter, Completion, Sampling, WeightSource


class Engine(Protocol):
    """Samples from the policy. It owns the weights it serves; what is pushed is the only way they change."""

    takes_adapters: bool
    """It keeps the base weights, and a push brings the adapter alone: `load_adapter` instead of `load_weights`."""

    async def generate(self, prompt_ids: list[int], sampling: Sampling, *, session: str) -> Completion:
        """Draw one completion.

        Requests are submitted concurrently and each returns as soon as it is finished, so that verification can start
        while others still generate. The tokens depend on `prompt_ids`, `sampling` and the weights only.

        Args:
            prompt_ids: what the completion continues; requests with equal prompts share its computation.
            sampling: how tokens are drawn, with this request's own seed.
            session: names the conversation, so that an engine with replicas can keep it where its cache is.
        """
        ...

    async def logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        """Log-probabilities (temperature 1) that the served weights give to each token after the first.

        Entry t of a row is log p(sequence[t + 1] | sequence[: t + 1]). Used to prove which weights are served.
        """
        ...

    async def load_weights(self, source: WeightSource, *, version: int) -> None:
        """Serve the weights of `source` from now on, as policy `version`; prefix caches of older weights go."""
        ...

    async def load_adapter(self, adapter: Adapter, *, version: int) -> None:
        """Serve the base weights with `adapter` from now on; only where `takes_adapters`."""
        ...

    async def sleep(self) -> None:
        """No request comes before the next push: give the device's memory to the learner, if told to."""
        ...

    async def close(self) -> None:
        """Release memory and processes. Safe to call twice."""
        ...


class FakeEngine:
    """Scripted completions and latencies, for tests and for trying a schedule without a model.

    Args:
        script: from (prompt_ids, sampling) to the token ids of the completion (stop token included if it stopped).
        latency: seconds each completion takes, as a function of the same; default none.
        logprob: log-probability reported for every token.
    """

    takes_adapters = False

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

    async def sleep(self) -> None:
        pass

    async def close(self) -> None:
        pass
