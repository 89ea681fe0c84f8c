"""The module that is trained: a causal language model with our output head, and maybe a critic.

In: rows of a micro-batch. Out: log-probabilities of the trained tokens, their entropies, values and KL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from llmrl.model.attention import decoder_of, last_hidden_states
from llmrl.model.logprob_head import Head, ReferenceHead, keeps_logits_in_float32, token_logprobs, token_logprobs_and_kl
from llmrl.model.precision import checkpoint_gradients, compute_in
from llmrl.model.weights import head_weight

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformers import PreTrainedModel

    from llmrl.model.critic import Critic
    from llmrl.types import Visibility


class PolicyModule(nn.Module):
    """What data-parallel wrappers wrap: packed rows in, log-probabilities of trained tokens out.

    Args:
        model: a causal language model.
        temperature: that of the distribution.
        dtype: the type it computes in.
    """

    def __init__(self, model: nn.Module, *, temperature: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.dtype = dtype
        self.critic: Critic | None = None
        if self.causal_lm.is_gradient_checkpointing:
            checkpoint_gradients(self.causal_lm)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model; adapters (if any) are injected into its layers."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # pyright: ignore

    def hidden_states(
        self,
        input_ids: Int[Tensor, "B T"],
        position_ids: Int[Tensor, "B T"],
        visibility: Visibility | None = None,
    ) -> Float[Tensor, "B T H"]:
        """Compute the last hidden states (after the final norm)."""
        decoder = decoder_of(self.causal_lm)
        with compute_in(self.dtype, decoder):
            return last_hidden_states(decoder, input_ids, position_ids, visibility)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        position_ids: Int[Tensor, "B T"],
        predict_from: Int[Tensor, " M"],
        targets: Int[Tensor, " M"],
        visibility: Visibility | None = None,
        temperature: float | None = None,
        with_hidden: bool = False,
        with_values: bool = False,
        reference: ReferenceHead | None = None,
    ) -> dict[str, Tensor]:
        """Compute the fields of `ForwardOutputs` for `targets`, each predicted by the state at its `predict_from`.

        The tensors are fields of `MicroBatch`. `temperature` is the policy's own by default. Hidden states come without
        gradient, values only where there is a critic, and the KL with the `reference` from `Policy.reference_head`.
        """
        hidden = self.hidden_states(input_ids, position_ids, visibility).flatten(0, 1)[predict_from]
        head, outputs = self.head(temperature), dict[str, "Tensor"]()
        if reference is None:
            outputs["logprobs"], outputs["entropy"] = token_logprobs(hidden, head, targets)
        else:
            found = token_logprobs_and_kl(hidden, head, targets, reference)
            outputs["logprobs"], outputs["entropy"], outputs["kl"] = found
        if with_values and self.critic is not None:
            outputs["values"] = self.critic(hidden, input_ids, position_ids, predict_from, visibility)
        if with_hidden:
            outputs["hidden"] = hidden.detach()
        return outputs

    def head(self, temperature: float | None = None) -> Head:
        """Return the output head with the constants of this architecture; `temperature` is the policy's by default.

        With adapters its weight is the trained one; `Policy.without_adapter` gives the original.
        """
        linear, config = cast("nn.Linear", self.causal_lm.get_output_embeddings()), self.causal_lm.config
        return Head(
            weight=head_weight(linear),
            bias=getattr(linear, "bias", None),
            softcap=getattr(config, "final_logit_softcapping", None),
            scale=(getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0),
            temperature=self.temperature if temperature is None else temperature,
            float32=keeps_logits_in_float32(config),
        )
