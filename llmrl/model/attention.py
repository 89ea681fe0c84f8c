"""Attention over rows of several sequences: transformers' own, without the half of the mask that needs no mask.

A mask of [T, T] is read and multiplied in full, while plain causal attention skips half of it. Rows begin with a long
stretch that is plainly causal (a prompt that completions share, or the first sequence). Masks here therefore have rows
for the last queries only; the queries before them are causal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

CAUSAL_HEAD = "llmrl_sdpa"
"""The name under which transformers knows `causal_head_attention`."""


def causal_head_attention(
    module: nn.Module,
    query: Float[Tensor, "B N T D"],
    key: Float[Tensor, "B K T D"],
    value: Float[Tensor, "B K T D"],
    attention_mask: Float[Tensor, "B 1 S T"] | None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "B T N D"], None]:
    """Run transformers' `sdpa` with a mask that may have fewer rows (S) than there are queries (T).

    The mask says what the last S queries see. The queries before them are causal.
    """
    head = 0 if attention_mask is None else query.shape[2] - attention_mask.shape[2]
    if head == 0:
        return sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=is_causal, **options)
    causal = (query[:, :, :head], key[:, :, :head], value[:, :, :head], None)
    first, _ = sdpa_attention_forward(module, *causal, is_causal=True, **options)
    rest, _ = sdpa_attention_forward(module, query[:, :, head:], key, value, attention_mask, **options)
    return torch.cat([first, rest], dim=1), None


AttentionInterface.register(CAUSAL_HEAD, causal_head_attention)
AttentionMaskInterface.register(CAUSAL_HEAD, sdpa_mask)


def use_causal_head(model: PreTrainedModel) -> None:
    """Let a model that runs on `sdpa` understand masks with fewer rows than queries."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(CAUSAL_HEAD)


def understands_causal_head(model: PreTrainedModel) -> bool:
    """Return whether `use_causal_head` has changed the model."""
    return model.config.get_text_config()._attn_implementation == CAUSAL_HEAD


def last_hidden_states(
    decoder: nn.Module,
    input_ids: Int[Tensor, "B T"],
    position_ids: Int[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B 1 S T"] | None,
) -> Float[Tensor, "B T H"]:
    """Compute the hidden states of a transformers decoder, after its final norm.

    Without a mask, transformers tells the sequences of a packed row apart by their restarting positions. It does so
    only without a cache and without a two-dimensional mask; with either it silently lets sequences see each other.
    `train.selfcheck.check_forward` proves on the model at hand that they do not.
    """
    mask = None
    if attention_mask is not None:  # as numbers: from a Boolean mask every layer would make them again
        mask = torch.zeros(attention_mask.shape, dtype=decoder.dtype, device=input_ids.device)  # pyright: ignore
        mask.masked_fill_(~attention_mask, float("-inf"))
    return decoder(
        input_ids=input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False
    ).last_hidden_state


def shortest_window(config: PretrainedConfig) -> int | None:
    """Return how many tokens the layer with the shortest view sees, or None where all layers see everything.

    transformers takes a mask of four dimensions as it is, even for layers that should see less. Our masks are therefore
    right only for sequences that fit into every window.
    """
    text = config.get_text_config()
    sizes = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    kinds = set(getattr(text, "layer_types", None) or ())
    if kinds == {"full_attention"}:
        return None
    return min((size for size in sizes if size), default=None)
