"""Which positions see each other -> what the model's attention kernel takes: a mask, a block mask, or boundaries.

| kernel | `model.attn_implementation` | rows of several sequences | shared prefixes |
|---|---|---|---|
| masked | `sdpa`, `eager` | a mask [T, T], multiplied in full except for its causal beginning | the same mask |
| blocks | `flex_attention` | blocks of 128 x 128; hidden ones are skipped | the same blocks |
| varlen | `flash_attention_2`, `_3`, flash kernels of the hub | one flat row and its boundaries | impossible |

Masks and blocks are made on the device for one forward pass and never kept.
"""

from __future__ import annotations

import inspect
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_kernels_available

from llmrl.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

    from llmrl.types import Visibility

CAUSAL_HEAD = "llmrl_sdpa"
"""The name under which transformers knows `causal_head_attention`."""

BLOCK = 128
"""Positions of a block, which FlexAttention computes or skips as a whole."""

FORMS = 64
"""Forms of its inputs that FlexAttention may be compiled for."""


class Kernel(StrEnum):
    """What an attention kernel takes; see the module's table."""

    MASKED = "masked"
    BLOCKS = "blocks"
    VARLEN = "varlen"


def kernel_of(config: PretrainedConfig) -> Kernel:
    """Return the kind of kernel that a model with this configuration runs on."""
    name = config.get_text_config()._attn_implementation or ""
    if "flash" in name:
        return Kernel.VARLEN
    return Kernel.BLOCKS if name == "flex_attention" else Kernel.MASKED


def check_attention(name: str, dtype: str, device: str, *, training: bool = True) -> None:
    """Check that an attention kernel can run here, before anything is loaded.

    Args:
        name: `model.attn_implementation`.
        dtype: `model.dtype`.
        device: type of the device (`cuda` ...).
        training: whether gradients are needed.

    Raises:
        UserError: its package is missing, it does not compute in this type, or it has no backward pass on this device.
    """
    instead = "or set model.attn_implementation to sdpa, or on a GPU to flex_attention"
    packages = {
        "flash_attention_2": ("flash-attn", is_flash_attn_2_available),
        "flash_attention_3": ("flash-attn-3", is_flash_attn_3_available),
    }
    package, available = packages.get(name, ("kernels", is_kernels_available))
    if "flash" in name and not available() and not is_kernels_available():
        raise UserError(
            f"model.attn_implementation {name} needs a GPU and the package `{package}`, which transformers does not "
            f"find: install it, {instead}"
        )
    if "flash" in name and device != "cpu" and dtype != "bfloat16":
        raise UserError(
            f"model.attn_implementation {name} does not compute in {dtype}: set model.dtype bfloat16, {instead}"
        )
    if name == "flex_attention" and training and device == "cpu":
        raise UserError(f"model.attn_implementation {name} has no backward pass on a CPU: set it to sdpa")


def decoding_attention(name: str) -> str:
    """Return the kernel for sampling token by token with padded rows: `eager` where it was asked for, else `sdpa`.

    Kernels for long packed rows gain nothing on a single query, and some take no weights in float32.
    """
    return "eager" if name == "eager" else "sdpa"


# --- masked: transformers' sdpa, without the half of the mask that needs no mask --------------------------------------


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

    The mask says what the last S queries see. The queries before them are causal. A mask of [T, T] is read and
    multiplied in full, while plain causal attention skips half of it, and rows begin with a long stretch that is
    plainly causal: a prompt that completions share, or the first sequence.
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
    """Let a model that runs on `sdpa` understand masks with fewer rows than queries.

    A model that caps its attention scores runs on `eager` instead, since `sdpa` leaves the cap out.
    """
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager" if caps_scores(model.config) else CAUSAL_HEAD)


def caps_scores(config: PretrainedConfig) -> bool:
    """Return whether a model caps its attention scores (such as Gemma 2), which transformers' `sdpa` leaves out."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None


def understands_causal_head(config: PretrainedConfig) -> bool:
    """Return whether `use_causal_head` has changed the model with this configuration."""
    return config.get_text_config()._attn_implementation == CAUSAL_HEAD


def tree_mask(
    segment_ids: Int[Tensor, "B T"], branch_ids: Int[Tensor, "B T"], *, skip: int = 0
) -> Bool[Tensor, "B 1 S T"]:
    """Return which keys (last axis) each query may see: itself and earlier ones of its own branch or its tree's prefix.

    Args:
        segment_ids: the tree of each position; 0 is padding.
        branch_ids: 0 in a tree's prefix (and in padding), otherwise the number of the branch in its tree.
        skip: leave out the rows of the first `skip` queries (S = T - skip).
    """
    places = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    visible = branch_ids[:, skip:, None] == branch_ids[:, None, :]
    visible |= branch_ids[:, None, :] == 0  # in place: each of these is a [T, T]
    visible &= segment_ids[:, skip:, None] == segment_ids[:, None, :]
    visible &= places[skip:, None] >= places
    return visible[:, None]


# --- blocks: FlexAttention --------------------------------------------------------------------------------------------


def block_mask(segment_ids: Int[Tensor, "B T"], branch_ids: Int[Tensor, "B T"]) -> BlockMask:
    """Return what `tree_mask` says as blocks of 128 x 128: hidden ones are left out, and whole ones need no mask.

    Which blocks are hidden follows from the smallest and largest numbers in them, without a [T, T] mask. A block that
    is taken for partly visible although it is hidden costs time only.
    """
    length = segment_ids.shape[1]
    extent = [_block_extent(ids) for ids in (segment_ids, branch_ids)]
    (segments, same_segment), (branches, same_branch) = ((_overlap(*e), _constant(*e)) for e in extent)
    in_prefix = [bound[:, None, :] == 0 for bound in extent[1]]
    places = torch.arange(segments.shape[1], device=segment_ids.device)
    some = segments & (in_prefix[0] | branches) & (places[:, None] >= places)
    whole = same_segment & (in_prefix[1] | same_branch) & (places[:, None] > places)
    whole &= places[:, None] < length // BLOCK  # not where the last block is cut short

    def sees(batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_tree = segment_ids[batch, query] == segment_ids[batch, key]
        own = (branch_ids[batch, key] == 0) | (branch_ids[batch, key] == branch_ids[batch, query])
        return same_tree & own & (query >= key)

    blocks = (*_listed(some & ~whole), *_listed(whole))
    return BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length))


def compile_for_all_forms() -> None:
    """Let torch compile FlexAttention for every form of rows that a run has.

    They differ in whether there is one row, one block, one position, a gradient, a second type: more forms than the 8
    after which torch gives up and computes every score of every pair, unfused, with one warning.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, FORMS)


def _block_extent(ids: Int[Tensor, "B T"]) -> tuple[Int[Tensor, "B N"], Int[Tensor, "B N"]]:
    """Return the smallest and the largest number in each block; a last block that is cut short repeats its last one."""
    missing = -ids.shape[1] % BLOCK
    blocks = torch.cat([ids, ids[:, -1:].expand(-1, missing)], dim=1).unflatten(1, (-1, BLOCK))
    return blocks.amin(-1), blocks.amax(-1)


def _overlap(low: Int[Tensor, "B N"], high: Int[Tensor, "B N"]) -> Bool[Tensor, "B N N"]:
    """Return whether the ranges of numbers of two blocks (queries, keys) meet."""
    return (low[:, :, None] <= high[:, None, :]) & (low[:, None, :] <= high[:, :, None])


def _constant(low: Int[Tensor, "B N"], high: Int[Tensor, "B N"]) -> Bool[Tensor, "B N N"]:
    """Return whether two blocks (queries, keys) hold one and the same number throughout."""
    return (low == high)[:, :, None] & (low == high)[:, None, :] & (low[:, :, None] == low[:, None, :])


def _listed(blocks: Bool[Tensor, "B N N"]) -> tuple[Int[Tensor, "B 1 N"], Int[Tensor, "B 1 N N"]]:
    """Return for each block of queries how many blocks of keys there are, and their places, the others behind them."""
    numbers = blocks.int()
    order = numbers.argsort(dim=-1, descending=True, stable=True)
    return numbers.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]


# --- one forward pass -------------------------------------------------------------------------------------------------


def decoder_of(model: PreTrainedModel) -> Any:
    """Return the trunk of a causal language model, without its output head."""
    found: Any = model.get_decoder()
    return found.model if found is model else found  # Llama 4 gives itself


def last_hidden_states(
    decoder: nn.Module,
    input_ids: Int[Tensor, "B T"],
    position_ids: Int[Tensor, "B T"],
    visibility: Visibility | None = None,
) -> Float[Tensor, "B T H"]:
    """Compute the hidden states of a transformers decoder, after its final norm.

    Where there is nothing else, transformers tells the sequences of a packed row apart by their restarting positions.
    It does so only without a cache and without a two-dimensional mask; with either it silently lets sequences see each
    other. `train.selfcheck.check_forward` proves on the model at hand that they do not.

    Args:
        decoder: of a causal language model.
        input_ids: packed rows.
        position_ids: of each token in its sequence.
        visibility: how the sequences of a row are kept apart; None where each row holds one sequence.

    Raises:
        ValueError: sequences share a prefix, and the kernel takes boundaries.
    """
    inputs: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": None}
    if visibility is not None:
        inputs |= _kept_apart(decoder, inputs, visibility)
    hidden = decoder(**inputs, use_cache=False).last_hidden_state
    return hidden.view(*input_ids.shape, -1)


def _kept_apart(decoder: Any, inputs: dict[str, Any], visibility: Visibility) -> dict[str, Any]:
    """Return the inputs that the decoder's kernel needs, so that no sequence sees another."""
    kernel, branch_ids = kernel_of(decoder.config), visibility.branch_ids
    if kernel is Kernel.VARLEN:
        return _flat_row(decoder, inputs, visibility)
    if branch_ids is None:
        return {}
    if kernel is Kernel.BLOCKS:
        return {"attention_mask": block_mask(visibility.segment_ids, branch_ids)}
    if visibility.alone:
        return {}
    skip = visibility.causal_head if understands_causal_head(decoder.config) else 0
    visible = tree_mask(visibility.segment_ids, branch_ids, skip=skip)
    # As numbers: from a Boolean mask every layer would make them again.
    mask = torch.zeros(visible.shape, dtype=decoder.dtype, device=visible.device)
    return {"attention_mask": mask.masked_fill_(~visible, float("-inf"))}


def _flat_row(decoder: nn.Module, inputs: dict[str, Any], visibility: Visibility) -> dict[str, Any]:
    """Lay all rows out as one, with the boundaries of its sequences by transformers' names.

    transformers would look for restarting positions in every layer, and only in a single row; with more rows it lets
    the sequences of a row see each other. Rows of one sequence each stay as they are.
    """
    if visibility.boundaries is None and not visibility.alone:
        raise ValueError("sequences share a prefix: flash attention knows only sequences one after another")
    if visibility.boundaries is None or (visibility.alone and len(inputs["input_ids"]) > 1):
        return {}
    flat = {name: inputs[name].view(1, -1) for name in ("input_ids", "position_ids")}
    takes_boundaries = any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD
        for parameter in inspect.signature(decoder.forward).parameters.values()
    )
    if not takes_boundaries:
        return flat
    boundaries, longest = visibility.boundaries, visibility.longest
    return flat | {
        "cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip


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
