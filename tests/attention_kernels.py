"""Kernels that need a GPU, written in plain torch, so that what is sent to them can be tested on a CPU.

flash-attn's two functions have its signatures; transformers' own code around them is used as it is. FlexAttention runs
on a CPU, but without a backward pass: its mask function is written out instead.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from transformers import PreTrainedModel, masking_utils, modeling_flash_attention_utils, modeling_utils
from transformers.integrations import flash_attention
from transformers.integrations import flex_attention as flex

from llmrl.model import attention

SLOWLY = {"_compile": False}
"""Compiling a mask function takes a CPU longer than running it."""
CALLS: list[str] = []
"""Which of the two functions of flash-attn were called."""


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """Attend in [batch, tokens, heads, width]. Queries are aligned with the last keys; a window counts keys beside."""
    CALLS.append("plain")
    return _attend(q, k, v, softmax_scale, causal, window_size, softcap)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """Attend in [tokens, heads, width], each sequence to itself. What the kernel takes for granted is checked here."""
    CALLS.append("varlen")
    for bounds, longest, tokens in ((cu_seqlens_q, max_seqlen_q, q), (cu_seqlens_k, max_seqlen_k, k)):
        assert bounds.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == len(tokens)
        lengths = bounds.diff()
        assert (lengths > 0).all() and lengths.max() <= int(longest)
    pieces = zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:], strict=True)
    parts = [
        _attend(q[a:b][None], k[c:d][None], v[c:d][None], softmax_scale, causal, window_size, softcap)[0]
        for a, b, c, d in pieces
    ]
    return torch.cat(parts)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, window: tuple[int, int], softcap: float
) -> Tensor:
    repeat = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    behind = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2] - torch.arange(k.shape[2])
    hidden = behind < 0 if causal else torch.zeros_like(behind, dtype=torch.bool)
    if window[0] >= 0:
        hidden = hidden | (behind > window[0])
    if window[1] >= 0:
        hidden = hidden | (-behind > window[1])
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let transformers find flash-attn. Returns the list that records which of its functions are called."""
    process = modeling_flash_attention_utils._lazy_define_process_function(flash_attn_varlen_func)
    pad, unpad = modeling_flash_attention_utils._pad_input, modeling_flash_attention_utils._unpad_input
    found = ((flash_attn_func, flash_attn_varlen_func, None, pad, unpad), (process, dict))
    for module in (modeling_flash_attention_utils, modeling_utils):
        monkeypatch.setattr(module, "lazy_import_flash_attention", lambda *_, **__: found)
    # These functions take float32, which flash-attn's do not: nothing has to be cast.
    monkeypatch.setattr(flash_attention, "get_target_dtype", lambda *_: None)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True)
    for version in (2, 3):
        monkeypatch.setattr(attention, f"is_flash_attn_{version}_available", lambda: True)
    CALLS.clear()
    return CALLS


@pytest.fixture
def flex_with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let FlexAttention write its mask function out, so that gradients exist on a CPU."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *, block_mask: BlockMask, scale: float, **options: Any) -> Tensor:
        assert block_mask.shape[-2:] == (q.shape[2], k.shape[2]) and options["return_aux"] is None
        mask = create_mask(block_mask.mask_mod, block_mask.shape[0], 1, q.shape[2], k.shape[2], device="cpu")
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        # What transformers does to scores here, a soft cap, is the same everywhere.
        scores = options["score_mod"](q @ k.transpose(2, 3) * scale, None, None, None, None)
        return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v

    monkeypatch.setattr(flex, "compile_friendly_flex_attention", attend)
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda **options: create_block_mask(**options | SLOWLY))
