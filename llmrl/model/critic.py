"""The critic: hidden states of a trunk -> the value of the state before each trained token. Three kinds of trunk.

- separate: a model of its own that starts as a copy of the policy's trunk (or as another model's).
- shared: the policy's own trunk; only the value head is new.
- adapter: the policy's frozen base with a second set of adapters. The modules are copied; the base weights are the same
  tensors.

A critic is part of the `PolicyModule`, because data-parallel wrappers take a single module. It is not part of the
language model in it: the weights that go to engines and the saved model leave it out.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from llmrl.errors import UserError
from llmrl.model.attention import decoder_of, last_hidden_states
from llmrl.model.load import add_lora, load_model, merged
from llmrl.model.precision import checkpoint_gradients, compute_in
from llmrl.model.quantized import is_quantized

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from llmrl.model.options import CriticConfig, ModelConfig
    from llmrl.types import Visibility


class ValueHead(nn.Module):
    """A linear map of a hidden state to a value, always in float32. It starts as 0 everywhere."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, hidden: Float[Tensor, "M H"]) -> Float[Tensor, " M"]:
        return hidden.float() @ self.weight + self.bias


class Critic(nn.Module):
    """A trunk and a value head.

    Args:
        trunk: a transformers decoder, with or without adapters in it; None for the policy's own.
        hidden_size: width of its hidden states.
        train_trunk: with the policy's trunk, whether the value loss also trains it.
        dtype: the type that the trunk computes in.
    """

    def __init__(
        self,
        trunk: nn.Module | None,
        *,
        hidden_size: int,
        train_trunk: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.dtype = dtype
        if trunk is not None and cast("Any", trunk).is_gradient_checkpointing:
            checkpoint_gradients(trunk)
        self.train_trunk = train_trunk
        self.head = ValueHead(hidden_size)

    def forward(
        self,
        policy_hidden: Float[Tensor, "M H"] | None,
        input_ids: Int[Tensor, "B T"],
        position_ids: Int[Tensor, "B T"],
        predict_from: Int[Tensor, " M"],
        visibility: Visibility | None = None,
    ) -> Float[Tensor, " M"]:
        """Compute the value of the state before each trained token, at the position that predicts the token.

        `policy_hidden` are the policy's hidden states there, which only a critic without a trunk reads. The other
        arguments are those of `PolicyModule.forward`.
        """
        if self.trunk is not None:
            return self.head(self.hidden_states(input_ids, position_ids, predict_from, visibility))
        assert policy_hidden is not None
        return self.head(policy_hidden if self.train_trunk else policy_hidden.detach())

    def hidden_states(
        self,
        input_ids: Int[Tensor, "B T"],
        position_ids: Int[Tensor, "B T"],
        predict_from: Int[Tensor, " M"],
        visibility: Visibility | None = None,
    ) -> Float[Tensor, "M H"]:
        """Compute the hidden states of the critic's own trunk at `predict_from`, in rows packed as for the policy."""
        assert self.trunk is not None
        with compute_in(self.dtype, self.trunk):
            hidden = last_hidden_states(self.trunk, input_ids, position_ids, visibility)
        return hidden.flatten(0, 1)[predict_from]


def build_critic(
    options: CriticConfig,
    model_options: ModelConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
) -> Critic:
    """Build the critic that the options describe.

    Args:
        options: which kind of critic.
        model_options: those of the policy; another model is loaded as it was.
        model: the policy's language model, before fresh adapters are put into it.
        tokenizer: the policy's.
        seed: the run's.

    Raises:
        UserError: `critic.path` cannot be loaded, or has a smaller vocabulary than the policy.
    """
    if options.kind == "shared":
        hidden_size = model.config.get_text_config().hidden_size
        return Critic(None, hidden_size=hidden_size, train_trunk=bool(options.train_trunk)).to(model.device)
    path, lora = None, options.lora
    if options.kind == "adapter":
        # The memo makes deepcopy keep the parameters: the modules are new, their weights are the policy's.
        base: Any = copy.deepcopy(model, memo={id(p): p for p in model.parameters()})
        lora = lora or model_options.lora
        base = base.unload() if hasattr(base, "unload") else base
    elif options.path is not None:
        path = options.path
        base = _other_model(path, model_options, model, tokenizer, seed=seed, trained=lora is None)
    elif is_quantized(model):
        raise UserError(
            f"critic.kind {options.kind} starts as a copy of the policy, whose weights are quantized: use critic.kind "
            "adapter or shared, or name another model with critic.path"
        )
    else:
        base = merged(copy.deepcopy(model))
    if lora is not None:
        add_lora(base, lora, seed=seed + 1)
    hidden_size, dtype = base.config.get_text_config().hidden_size, getattr(torch, model_options.dtype)
    critic = Critic(decoder_of(base), hidden_size=hidden_size, dtype=dtype)
    if path is not None and _is_reward_model(base.config):
        _take_score(critic.head, path, model_options)
    return critic.to(model.device)


def _is_reward_model(config: PretrainedConfig) -> bool:
    """Return whether a model was saved as a sequence classifier with one label."""
    return any("ForSequenceClassification" in name for name in config.architectures or ()) and config.num_labels == 1


def _take_score(head: ValueHead, path: str, model_options: ModelConfig) -> None:
    """Start the value head as the last layer of the reward model at `path`."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        path, dtype=torch.float32, trust_remote_code=model_options.trust_remote_code
    )
    score = getattr(model, "score", None)
    if not isinstance(score, nn.Linear) or score.weight.shape != (1, len(head.weight)):
        raise UserError(
            f"critic.path {path!r} is a reward model, but has no linear layer `score` from hidden states "
            "to one number: save it in the form of transformers' decoder classifiers, as recipes/reward_model.py does"
        )
    with torch.no_grad():
        head.weight.copy_(score.weight[0])
        if score.bias is not None:
            head.bias.copy_(score.bias[0])


def _other_model(
    path: str,
    model_options: ModelConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    trained: bool,
) -> PreTrainedModel:
    options = dataclasses.replace(
        model_options, path=path, revision=None, adapter=None, base=None, lora=None, peft=None, quantization=None
    )
    other = merged(load_model(options, tokenizer, seed=seed, trained=trained))
    if model_options.gradient_checkpointing:
        other.gradient_checkpointing_enable()
    sizes = [m.config.get_text_config().vocab_size for m in (other, model)]
    if sizes[0] < sizes[1]:
        raise UserError(
            f"critic.path {path!r} has a vocabulary of {sizes[0]} tokens, the policy one of {sizes[1]}: "
            "the critic has to know the same tokens; choose a model of the same family"
        )
    return other
