"""The `hf` engine's record of its running rows, in tensors: limits, random streams, and tokens so far.

Sampled tokens go in once per step for all rows; plain lists come out once per finished row.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int
from torch import Tensor

from llmrl.engines.sampling import uniform_stream
from llmrl.types import Completion, Sampling

RUNNING, LENGTH, STOP, BAD_LOGITS = 0, 1, 2, 3
"""State of a row after a step."""


@dataclass(slots=True, eq=False)
class Request:
    """One call of `generate`, waiting or running."""

    prompt: tuple[int, ...]
    sampling: Sampling
    session: str
    future: asyncio.Future[Completion]
    oldest_version: int = 0
    """Version of the weights that its first token was drawn from."""


class RowState:
    """Tensors with R rows (T tokens, S stop tokens each). Rows beyond the running ones hold stale values."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = device

        def empty(dtype: torch.dtype, dimensions: int) -> Tensor:
            return torch.zeros([0] * dimensions, dtype=dtype, device=device)

        self.tokens: Int[Tensor, "R T"] = empty(torch.int64, 2)
        self.logprobs: Float32[Tensor, "R T"] = empty(torch.float32, 2)
        self.uniforms: Float64[Tensor, "R T"] = empty(torch.float64, 2)
        self.stops: Int[Tensor, "R S"] = empty(torch.int64, 2)
        """Token ids that end the row, padded with -1."""
        self.count: Int[Tensor, " R"] = empty(torch.int64, 1)
        """Number of tokens so far."""
        self.limit: Int[Tensor, " R"] = empty(torch.int64, 1)
        """Number of tokens at which the row ends."""
        self.last: Int[Tensor, " R"] = empty(torch.int64, 1)
        """The newest token."""

    def append(self, first: int, samplings: Sequence[Sampling]) -> None:
        """Start one row per entry of `samplings`, numbered first, first + 1, ..."""
        rows, length = slice(first, first + len(samplings)), max(s.max_tokens for s in samplings)
        self._reserve(rows.stop, length, max(len(s.stop_token_ids) for s in samplings))
        self.count[rows] = 0
        self.limit[rows] = torch.tensor([s.max_tokens for s in samplings], device=self.device)
        stops = np.full((len(samplings), self.stops.shape[1]), -1, dtype=np.int64)
        uniforms = np.zeros((len(samplings), length))
        for row, sampling in enumerate(samplings):
            stops[row, : len(sampling.stop_token_ids)] = sampling.stop_token_ids
            uniforms[row, : sampling.max_tokens] = uniform_stream(sampling.seed, sampling.max_tokens)
        self.stops[rows] = torch.from_numpy(stops).to(self.device)
        self.uniforms[rows, :length] = torch.from_numpy(uniforms).to(self.device)

    def next_uniforms(self, rows: slice) -> Float64[Tensor, " n"]:
        """Return the random number for each row's next token."""
        return self.uniforms[rows].gather(1, self.count[rows].unsqueeze(1)).squeeze(1)

    def record(
        self, rows: slice, tokens: Int[Tensor, " n"], logprobs: Float32[Tensor, " n"], usable: Bool[Tensor, " n"]
    ) -> list[int]:
        """Append one token to each of `rows`, and return RUNNING, LENGTH, STOP or BAD_LOGITS for each."""
        count = self.count[rows].unsqueeze(1)
        self.tokens[rows].scatter_(1, count, tokens.unsqueeze(1))
        self.logprobs[rows].scatter_(1, count, logprobs.unsqueeze(1))
        self.last[rows] = tokens
        count += 1
        state = (self.count[rows] >= self.limit[rows]).long()
        state.masked_fill_((self.stops[rows] == tokens.unsqueeze(1)).any(1), STOP)
        state.masked_fill_(~usable, BAD_LOGITS)
        return state.tolist()

    def results(self, rows: list[int]) -> list[tuple[list[int], list[float]]]:
        """Return token ids and log-probabilities of some rows."""
        index = torch.tensor(rows, device=self.device)
        counts = self.count[index].tolist()
        longest = max(counts)
        tokens, logprobs = self.tokens[index, :longest].tolist(), self.logprobs[index, :longest].tolist()
        return [(tokens[i][:count], logprobs[i][:count]) for i, count in enumerate(counts)]

    def move(self, target: list[int], source: list[int]) -> None:
        """Renumber row source[i] to target[i]."""
        into, out_of = (torch.tensor(rows, device=self.device) for rows in (target, source))
        for stored in (self.tokens, self.logprobs, self.uniforms, self.stops, self.count, self.limit, self.last):
            stored[into] = stored[out_of]

    def _reserve(self, rows: int, length: int, stops: int) -> None:
        """Make room for `rows` rows with `length` tokens and `stops` stop tokens each."""
        rows = max(rows, self.count.shape[0])
        for name, width in (("tokens", length), ("logprobs", length), ("uniforms", length), ("stops", stops)):
            old = getattr(self, name)
            self._extend(name, (rows, max(width, old.shape[1])), fill=-1 if name == "stops" else 0)
        for name in ("count", "limit", "last"):
            self._extend(name, (rows,), fill=0)

    def _extend(self, name: str, shape: tuple[int, ...], *, fill: int) -> None:
        old = getattr(self, name)
        if tuple(old.shape) != shape:
            new = old.new_full(shape, fill)
            new[tuple(slice(0, size) for size in old.shape)] = old
            setattr(self, name, new)
