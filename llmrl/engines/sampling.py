"""Sampling: next-token logits in, tokens and the log-probabilities they were drawn with out.

Each row takes one number per token from its own stream of uniforms, so a sample does not depend on the rest of the
batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int
from torch import Tensor

from llmrl.errors import UserError
from llmrl.types import Sampling

ONE_LEVEL_VOCABULARY = 1024
"""Up to this size of the vocabulary, one cumulative sum over the row is cheapest."""


def uniform_stream(seed: int, length: int) -> np.ndarray:
    """Return the uniforms in [0, 1) of one request, float64 [length]. The t-th sampled token uses the t-th number.

    A longer stream of the same seed begins with the shorter one. Philox is counter-based (Salmon et al. 2011, "Parallel
    random numbers: as easy as 1, 2, 3"), so neighbouring seeds give independent streams.
    """
    return np.random.Generator(np.random.Philox(key=seed % 2**64)).random(length)


def check_sampling(sampling: Sampling) -> None:
    """Raise UserError for settings that do not describe a distribution."""
    rules = {
        "max_tokens must be at least 1": sampling.max_tokens >= 1,
        "temperature must be 0 (greedy) or above": sampling.temperature >= 0,
        "top_p must be above 0 and at most 1": 0 < sampling.top_p <= 1,
        "top_k must be 0 (off) or above": sampling.top_k >= 0,
    }
    for rule, holds in rules.items():
        if not holds:
            raise UserError(f"sampling: {rule}; got {sampling}")


def check_tokens(token_ids: list[int], vocab_size: int) -> None:
    """Raise UserError if the prompt is empty or has tokens outside the vocabulary."""
    if not token_ids:
        raise UserError("the prompt is empty: give at least one token (such as the tokenizer's bos token)")
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        raise UserError(
            f"token ids from {min(token_ids)} to {max(token_ids)} do not fit the model's vocabulary of "
            f"{vocab_size}: tokenizer and model do not belong together"
        )


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """The sampling settings of the rows of a batch, as tensors."""

    inverse_temperature: Float32[Tensor, "N 1"] | None
    """None if every row samples at temperature 1 or is greedy."""
    greedy: Bool[Tensor, " N"] | None
    """Rows that take the most probable token. None if there are none."""
    truncated: Int[Tensor, " K"] | None
    """Indices of the K rows with a top_k or top_p. None if there are none."""
    top_k: Int[Tensor, "K 1"] | None
    top_p: Float32[Tensor, "K 1"] | None

    @classmethod
    def build(cls, samplings: Sequence[Sampling], device: torch.device | str = "cpu") -> SamplingRows:
        """Collect the settings of all rows, one request each."""
        greedy = [s.temperature == 0 for s in samplings]
        inverse = [1.0 if s.temperature == 0 else 1.0 / s.temperature for s in samplings]
        cut = [i for i, s in enumerate(samplings) if not greedy[i] and (s.top_k > 0 or s.top_p < 1)]
        no_limit = torch.iinfo(torch.int64).max
        top_k = [samplings[i].top_k or no_limit for i in cut]
        # Rounding can lift a cumulative sum to 1 before the last token, so "off" is any number above 1.
        top_p = [samplings[i].top_p if samplings[i].top_p < 1 else 2.0 for i in cut]
        return cls(
            inverse_temperature=(
                torch.tensor(inverse, device=device).unsqueeze(1) if any(x != 1 for x in inverse) else None
            ),
            greedy=torch.tensor(greedy, device=device) if any(greedy) else None,
            truncated=torch.tensor(cut, device=device) if cut else None,
            top_k=torch.tensor(top_k, device=device).unsqueeze(1) if cut else None,
            top_p=torch.tensor(top_p, device=device).unsqueeze(1) if cut else None,
        )


def sample_tokens(
    logits: Float[Tensor, "N V"], uniforms: Float64[Tensor, " N"], rows: SamplingRows
) -> tuple[Int[Tensor, " N"], Float32[Tensor, " N"], Bool[Tensor, " N"]]:
    """Draw one token per row by inverting the cumulative distribution at that row's uniform number.

    The distribution is softmax(logits / temperature), cut to the top_k most probable tokens and then to the smallest
    set of them with mass top_p, renormalized. A token of probability 0 (logit -inf, or below the smallest float32) is
    never drawn. Greedy rows take the argmax and report its log-probability at temperature 1.

    Returns:
        The tokens, their natural log-probabilities under the distribution they were drawn from, and whether each row's
        logits were usable (no NaN, no +inf, not all -inf). For a row whose logits were not, the other two are
        meaningless.
    """
    peak = logits.amax(-1, keepdim=True).float()
    shifted = logits.float() - peak
    if rows.inverse_temperature is not None:
        shifted *= rows.inverse_temperature
    if rows.truncated is not None:
        assert rows.top_k is not None and rows.top_p is not None, "truncated, top_k and top_p are set together"
        kept = _truncate(shifted.index_select(0, rows.truncated), rows.top_k, rows.top_p)
        shifted.index_copy_(0, rows.truncated, kept)
    tokens, total = _inverse_cdf(shifted.exp(), uniforms)
    if rows.greedy is not None:
        tokens = torch.where(rows.greedy, logits.argmax(-1), tokens)
    logprobs = shifted.gather(1, tokens.unsqueeze(1)).squeeze(1) - total.log().float()
    return tokens, logprobs, peak.squeeze(1).isfinite()


def _inverse_cdf(
    weights: Float32[Tensor, "N V"], uniforms: Float64[Tensor, " N"]
) -> tuple[Int[Tensor, " N"], Float64[Tensor, " N"]]:
    """Return the tokens whose slice of the cumulative weight holds uniforms * total, and the total weight.

    For a large vocabulary, block sums first locate the block that holds the point, then the token is found inside it:
    one pass over the weights instead of a cumulative sum of all of them.
    """
    vocabulary = weights.shape[1]
    if vocabulary <= ONE_LEVEL_VOCABULARY:
        cumulative = weights.cumsum(1, dtype=torch.float64)
        total = cumulative[:, -1]
        return _first_above(cumulative, uniforms * total), total
    size = _block_size(vocabulary)
    whole = vocabulary - vocabulary % size
    blocks = weights[:, :whole].unflatten(1, (-1, size)).sum(-1)
    if whole < vocabulary:
        blocks = torch.cat([blocks, weights[:, whole:].sum(-1, keepdim=True)], 1)
    cumulative = blocks.cumsum(1, dtype=torch.float64)
    total = cumulative[:, -1]
    target = uniforms * total
    block = _first_above(cumulative, target)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp_(min=0).unsqueeze(1)).squeeze(1), 0.0)
    columns = (block * size).unsqueeze(1) + torch.arange(size, device=weights.device)
    inside = weights.gather(1, columns.clamp(max=vocabulary - 1)).masked_fill_(columns >= vocabulary, 0.0)
    offset = _first_above(inside.cumsum(1, dtype=torch.float64), target - before)
    return (block * size + offset).clamp_(max=vocabulary - 1), total


def _first_above(cumulative: Float64[Tensor, "N K"], target: Float64[Tensor, " N"]) -> Int[Tensor, " N"]:
    """Return the first index whose cumulative weight exceeds the target; its own weight is therefore above 0.

    The target is kept below the last cumulative weight, because rounding could otherwise make them equal.
    """
    below_total = torch.nextafter(cumulative[:, -1], torch.zeros_like(target))
    target = torch.minimum(target, below_total).clamp_(min=0.0)
    index = torch.searchsorted(cumulative, target.unsqueeze(1), right=True).squeeze(1)
    return index.clamp_(max=cumulative.shape[1] - 1)  # past the end only if NaN breaks the order


def _block_size(vocabulary: int) -> int:
    """Return a power of two near the square root of the vocabulary, at least 64 so that block sums vectorize."""
    return max(64, 1 << round(vocabulary.bit_length() / 2))


def _truncate(
    shifted: Float32[Tensor, "K V"], top_k: Int[Tensor, "K 1"], top_p: Float32[Tensor, "K 1"]
) -> Float32[Tensor, "K V"]:
    """Set to -inf all but the top_k tokens, and of these all but the smallest set with mass top_p."""
    ordered, order = shifted.sort(dim=1, descending=True, stable=True)
    rank = torch.arange(shifted.shape[1], device=shifted.device)
    ordered = ordered.masked_fill(rank >= top_k, -torch.inf)
    probabilities = ordered.softmax(1)
    mass_before = probabilities.cumsum(1) - probabilities
    ordered = ordered.masked_fill(mass_before >= top_p, -torch.inf)
    return torch.empty_like(shifted).scatter_(1, order, ordered)
