"""Token losses -> one number, with denominators that are global over ranks and micro-batches.

Each function returns this micro-batch's share of the batch loss: the shares of all micro-batches on all ranks add up to
the loss, whatever the split. Groups without signal stay in the denominators although they are not computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from llmrl.types import Counts, MicroBatch

LossType = Literal["grpo", "dapo", "dr_grpo", "sequence_sum", "prompt_mean"]
GROUP_TOKENS = "group_tokens"
"""Extra stream that prompt_mean needs: trained tokens of the token's whole group."""


def aggregate(token_losses: Float[Tensor, " M"], batch: MicroBatch, counts: Counts, loss_type: LossType) -> Tensor:
    """Weighted sum of token losses.

    - "dapo": mean over all trained tokens of the batch, sum / num_tokens. Long sequences weigh more.
    - "grpo": mean over sequences of each sequence's mean over tokens. A token of a long sequence weighs less.
    - "dr_grpo": sum / (num_sequences * max_completion_length). No length bias; the scale is a constant.
    - "sequence_sum": sum / num_sequences: mean over sequences of each sequence's sum.
    - "prompt_mean": mean over prompts of the mean over all tokens of the prompt's group.

    Args:
        token_losses: loss of each trained token of this micro-batch.
        batch: says which sequence each token belongs to, and how long that sequence is.
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
