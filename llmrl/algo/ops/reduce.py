"""Token losses -> one number, with denominators that are global over ranks and micro-batches.

Each function returns this micro-batch's share of the batch loss: the shares of all micro-batches on all ranks sum to
the loss, however the batch is split. Groups without signal are not computed but stay in the denominators.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from llmrl.types import Counts, MicroBatch

LossType = Literal["grpo", "dapo", "dr_grpo", "sequence_sum", "prompt_mean"]
GROUP_TOKENS = "group_tokens"
"""Extra stream for prompt_mean: the number of trained tokens in the token's group."""


def aggregate(token_losses: Float[Tensor, " M"], batch: MicroBatch, counts: Counts, loss_type: LossType) -> Tensor:
    """Sum token losses with weights.

    - "dapo": mean over all trained tokens of the batch, sum / num_tokens. Long sequences count more.
    - "grpo": mean over sequences of each sequence's mean over tokens. A token of a long sequence counts less.
    - "dr_grpo": sum / (num_sequences * max_completion_length). No length bias; the scale is a constant.
    - "sequence_sum": sum / num_sequences: mean over sequences of each sequence's sum.
    - "prompt_mean": mean over prompts of the mean over all tokens of the prompt's group.

    Args:
        token_losses: loss of each trained token of this micro-batch.
        batch: holds the sequence of each token and the length of each sequence.
        counts: the global denominators.
        loss_type: see above.

    Returns:
        A scalar.

    References:
        Shao et al. 2024, arXiv:2402.03300 (grpo); Yu et al. 2025, arXiv:2503.14476 (dapo); Liu et al. 2025,
        arXiv:2503.20783 (dr_grpo); Khatri et al. 2025, arXiv:2510.13786 (prompt_mean).
    """
    if loss_type == "dapo":
        return token_losses.sum() / counts.num_tokens
    if loss_type == "dr_grpo":
        return token_losses.sum() / (counts.num_sequences * counts.max_completion_length)
    if loss_type == "grpo":
        lengths = batch.sequence_lengths.to(token_losses.dtype)[batch.sequence_ids]
        return (token_losses / lengths).sum() / counts.num_sequences
    if loss_type == "sequence_sum":
        return token_losses.sum() / counts.num_sequences
    if loss_type == "prompt_mean":
        if not token_losses.numel():
            return token_losses.sum()
        return (token_losses / batch.extras[GROUP_TOKENS]).sum() / counts.num_groups
    raise ValueError(f"unknown loss_type {loss_type!r}")
