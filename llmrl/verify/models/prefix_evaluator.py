"""IRCoCo's evaluator: token ids go in, and after each of them the expected quality of the completion comes out.

The rewards of single tokens are computed from these values. The evaluator is a causal transformer with one output, so
one forward pass gives the values of all prefixes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmrl.errors import UserError
from llmrl.verify.models.classifier import SharedBatches, batches_by_length, load_classifier, pad_right

if TYPE_CHECKING:
    from jaxtyping import Float

Boundary = Literal["token", "line"]
Values = Callable[[Sequence[list[int]]], Any]
"""An evaluator, or any function that takes sequences and returns one value per token for each."""


def telescoping_rewards(values: Float[np.ndarray, " T+1"], ends: Sequence[int], num_tokens: int) -> list[float]:
    """Return rewards whose sum is the evaluator's last value minus its first: r_t = E(x + y[:t]) - E(x + y[:t-1]).

    When a segment between two boundaries has several tokens, they share its difference equally. Tokens after the last
    boundary (the stop token) get 0.

    Args:
        values: E after 0, 1, 2 ... tokens of the completion.
        ends: the number of tokens after which each segment ends, increasing, each at least 1.
        num_tokens: number of rewards to return.

    References:
        Li et al. 2024, arXiv:2401.16637, section 3.3 (boundaries at every token; rounded to 4 digits there, not here).
    """
    rewards, start = [0.0] * num_tokens, 0
    for end in ends:
        share = (float(values[end]) - float(values[start])) / (end - start)
        rewards[start:end] = [share] * (end - start)
        start = end
    return rewards


class PrefixEvaluator:
    """A causal sequence classifier with one output, read at every position.

    Concurrent calls share batches: sequences that arrive while a batch is computed form the next one.

    Args:
        path: folder or hub id, such as the `evaluator/` folder of an IRCoCo run. It must have the policy's tokenizer.
        device: such as `cuda:1`; by default the current accelerator, or the CPU if there is none.
        dtype: data type of the weights.
        max_tokens: most tokens of one forward pass, including padding.

    Raises:
        UserError: the model cannot be loaded, has several outputs, or its values depend on later tokens.
    """

    def __init__(
        self, path: str, *, device: str | None = None, dtype: str = "float32", max_tokens: int = 16384
    ) -> None:
        self.path, self.max_tokens = path, max_tokens
        self.model, self.tokenizer = load_classifier(path, device=device, dtype=dtype)
        if not hasattr(self.model, "score"):
            raise UserError(f"evaluator {path!r}: {type(self.model).__name__} is not a classifier of a causal model")
        self._shared = SharedBatches(self.values)
        first, second = self._forward([[0, 1, 2, 3], [0, 1, 2, 4]])
        if np.abs(first[:3] - second[:3]).max() > 1e-2 * np.abs(first).max():
            raise UserError(f"evaluator {path!r}: later tokens change its earlier values: it must be a causal model")

    def values(self, sequences: Sequence[list[int]]) -> list[Float[np.ndarray, " L"]]:
        """Return E after each token of each sequence, as float64.

        Raises:
            UserError: a token is not in the evaluator's vocabulary, or a sequence is longer than its positions.
        """
        settings = self.model.config
        longest, room = max(map(len, sequences), default=0), getattr(settings, "max_position_embeddings", None)
        if room is not None and longest > room:
            raise UserError(f"evaluator {self.path!r}: {longest} tokens are more than its {room} positions")
        if max((max(ids, default=0) for ids in sequences), default=0) >= settings.vocab_size:
            raise UserError(
                f"evaluator {self.path!r}: a token of the policy is not in its vocabulary: train one for this policy"
            )
        found: list[Any] = [None] * len(sequences)
        for batch in batches_by_length(sequences, self.max_tokens):
            for i, values in zip(batch, self._forward([sequences[i] for i in batch]), strict=True):
                found[i] = values[: len(sequences[i])]
        return found

    def _forward(self, sequences: list[list[int]]) -> Float[np.ndarray, "B L"]:
        import torch

        ids = pad_right(sequences, self.tokenizer.pad_token_id, device=self.model.device)
        with torch.inference_mode():  # without a mask, because padding at the end changes nothing before it
            hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            return self.model.score(hidden)[..., 0].double().cpu().numpy()

    async def __call__(self, sequences: Sequence[list[int]]) -> list[Float[np.ndarray, " L"]]:
        """Return `values` of the sequences, which share batches with those of concurrent calls."""
        return await self._shared(list(sequences))

    def check_text(self, ids: Sequence[int], text: str) -> None:
        """Raise UserError if the policy's token ids decode to another text with the evaluator's tokenizer."""
        own = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if "".join(own.split()) != "".join(text.split()):
            raise UserError(
                f"evaluator {self.path!r}: it does not have the policy's tokenizer: {text[:80]!r} is {own[:80]!r} "
                "in its own. Train an evaluator for this policy (recipes/ircoco/train.py)"
            )

    @functools.cached_property
    def line_ends(self) -> frozenset[int]:
        """Tokens whose text contains a line break."""
        texts = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
        return frozenset(i for i, text in enumerate(texts) if "\n" in text)


def segment_ends(ids: Sequence[int], boundary: Boundary, line_ends: frozenset[int]) -> list[int]:
    """Return the numbers of tokens after which E is read: every number, or those after a line break and the last."""
    if boundary == "token":
        return list(range(1, len(ids) + 1))
    return [i for i, token in enumerate(ids, start=1) if token in line_ends or i == len(ids)]


@functools.cache
def get_prefix_evaluator(
    path: str, *, device: str | None = None, dtype: str = "float32", max_tokens: int = 16384
) -> PrefixEvaluator:
    """Return the evaluator with these options, loaded once per process."""
    return PrefixEvaluator(path, device=device, dtype=dtype, max_tokens=max_tokens)
