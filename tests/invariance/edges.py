"""Which tokens rounding may move over the edge of a clip, so that fractions are compared as exactly as they can be.

Two layouts of the same update differ by rounding. What is continuous (losses, gradients, weights) agrees to rounding,
but a fraction jumps by a whole token where a token lies at an edge. The recorder counts those tokens while an update
runs in one process; a fraction may differ by their share and by nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llmrl.algo.base import Algorithm
from llmrl.algo.ops import losses, values
from llmrl.train.learner import Learner

EDGE = 1e-5
"""How close to a bound a ratio or a value has to be for rounding to carry it over."""


@contextlib.contextmanager
def recorded_edges(learner: Learner, algorithm: Algorithm) -> Iterator[dict[str, float]]:
    """Yield, by name of metric, the share of tokens that may flip; it is complete after the block."""
    shares: dict[str, float] = {}
    num_tokens, begin = 1, learner.num_updates
    loss, clip_masks, value_loss = algorithm.loss, losses.clip_masks, values.value_loss

    def add(key: str, near: Tensor) -> None:
        shares[key] = shares.get(key, 0.0) + near.sum().item() / num_tokens

    def remember_counts(outputs: Any, batch: Any, counts: Any) -> Any:
        nonlocal num_tokens
        num_tokens = counts.num_tokens
        return loss(outputs, batch, counts)

    def look_at_ratios(ratio: Tensor, advantages: Tensor, **bounds: float) -> Any:
        add("loss/clip_low_frac", ((ratio - 1 + bounds["epsilon"]).abs() <= EDGE) & (advantages < 0))
        add("loss/clip_high_frac", ((ratio - 1 - bounds["epsilon_high"]).abs() <= EDGE) & (advantages > 0))
        return clip_masks(ratio, advantages, **bounds)

    def look_at_values(new: Tensor, old: Tensor, returns: Tensor, *, clip: float) -> Any:
        may_flip = ((new - old).abs() - clip).abs() <= EDGE
        add("value/clip_frac", may_flip if clip else torch.zeros_like(may_flip))
        return value_loss(new, old, returns, clip=clip)

    algorithm.loss = remember_counts  # pyright: ignore
    losses.clip_masks, values.value_loss = look_at_ratios, look_at_values
    try:
        yield shares
    finally:
        algorithm.loss, losses.clip_masks, values.value_loss = loss, clip_masks, value_loss  # pyright: ignore
        for key in shares:  # a fraction is a mean over optimizer steps
            shares[key] /= max(1, learner.num_updates - begin)
