"""The critic: hidden states of a trunk -> the value of the state before each trained token. Three kinds of trunk.

- separate: a model of its own, at first a copy of the policy's trunk (or another model's).
- shared: the policy's own trunk; only the value head is new.
- adapter: the policy's frozen base seen through adapters of its own. The modules are copied, the base weights are not:
  they are the same tensors.

A critic is a part of the `PolicyModule`, so that data-parallel wrappers see one module, but not of the language model
in it: neither weights that go to engines nor the saved model hold it.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import nn

from llmrl.errors import RunFailed, UserError
from llmrl.model.attention import last_hidden_states

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from llmrl.config import Config
    from llmrl.types import MicroBatch


class ValueHead(nn.Module):
    """Linear map of a hidden state to a value, in float32 under any precision; at first 0 everywhere."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, hidden: Float[Tensor, "M H"]) -> Float[Tensor, " M"]:
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.float() @ self.weight + self.bias


class Critic(nn.Module):
    """A trunk (None: the policy's) and a value head.

    Args:
        trunk: a transformers decoder; adapters may be injected into it.
        hidden_size: width of its hidden states.
        train_trunk: with the policy's trunk, whether the value's gradient goes into it.
    """

    def __init__(self, trunk: nn.Module | None, *, hidden_size: int, train_trunk: bool = True) -> None:
        super().__init__()
        self.trunk = trunk
        self.train_trunk = train_trunk
        self.head = ValueHead(hidden_size)

    def forward(
        self,
        policy_hidden: Float[Tensor, "M H"] | None,
        input_ids: Int[Tensor, "B T"],
        position_ids: Int[Tensor, "B T"],
        predict_from: Int[Tensor, " M"],
        attention_mask: Bool[Tensor, "B 1 S T"] | None = None,
    ) -> Float[Tensor, " M"]:
        """Value of the state before each trained token: at the position that predicts it.

        `policy_hidden` are the policy's hidden states there, which only a critic without a trunk reads; the rest is as
        in `PolicyModule.forward`.
        """
        if self.trunk is not None:
            return self.head(self.hidden_states(input_ids, position_ids, predict_from, attention_mask))
        assert policy_hidden is not None
        return self.head(policy_hidden if self.train_trunk else policy_hidden.detach())

    def hidden_states(
        self,
        input_ids: Int[Tensor, "B T"],
        position_ids: Int[Tensor, "B T"],
        predict_from: Int[Tensor, " M"],
        attention_mask: Bool[Tensor, "B 1 S T"] | None = None,
    ) -> Float[Tensor, "M H"]:
        """Of the critic's own trunk. As in the policy, restarting positions tell packed rows apart."""
        assert self.trunk is not None
        return last_hidden_states(self.trunk, input_ids, position_ids, attention_mask).flatten(0, 1)[predict_from]


def build_critic(config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Critic:
    """The critic that `config.critic` (resolved) describes.

    Args:
        config: of the run.
        model: the policy's language model, before adapters are put into it.
        tokenizer: of the policy.

    Raises:
        UserError: `critic.path` is no model, or one with a smaller vocabulary.
    """
    c = config.critic
    assert c is not None
    if c.kind == "shared":
        hidden_size = model.config.get_text_config().hidden_size
        return Critic(None, hidden_size=hidden_size, train_trunk=bool(c.train_trunk)).to(model.device)
    from llmrl.model.load import add_lora

    if c.kind == "adapter":
        base = copy.deepcopy(model, memo={id(p): p for p in model.parameters()})
    elif c.path is not None:
        base = _other_model(config, model, tokenizer)
    else:
        base = copy.deepcopy(model)
    if c.lora is not None:
        add_lora(base, c.lora, seed=config.train.seed + 1)
    critic = Critic(base.get_decoder(), hidden_size=base.config.get_text_config().hidden_size)
    if c.path is not None and _is_reward_model(base.config):
        _take_score(critic.head, config)
    return critic.to(model.device)


def check_layout(critic: Critic | None, what: str, alone: MicroBatch, together: MicroBatch, fix: str) -> None:
    """Prove that a critic with a trunk of its own, maybe of another architecture, bears a layout of sequences.

    Raises:
        RunFailed: its hidden states differ from those of the sequences `alone` by more than rounding.
    """
    from llmrl.model.policy import CHECK_TOLERANCE, evaluating

    if critic is None or critic.trunk is None:
        return
    with torch.no_grad(), evaluating(critic):
        expected, found = (
            critic.hidden_states(b.input_ids, b.position_ids, b.predict_from, b.attention_mask).float()
            for b in (alone, together)
        )
    tolerance = CHECK_TOLERANCE[next(critic.trunk.parameters()).dtype]
    gap = ((found - expected).abs().max() / expected.abs().max()).item()
    if not gap <= tolerance:
        raise RunFailed(
            f"the critic's {type(critic.trunk).__name__}: the {what} changes its hidden states by {gap:.2g} of the "
            f"largest (rounding explains {tolerance:g}); {fix}"
        )


def _is_reward_model(config: PretrainedConfig) -> bool:
    """Whether a model was saved as a sequence classifier with one label."""
    return any("ForSequenceClassification" in name for name in config.architectures or ()) and config.num_labels == 1


def _take_score(head: ValueHead, config: Config) -> None:
    """Start the value head as the last layer of the reward model at `critic.path`."""
    from transformers import AutoModelForSequenceClassification

    assert config.critic is not None and config.critic.path is not None
    model = AutoModelForSequenceClassification.from_pretrained(
        config.critic.path, dtype=getattr(torch, config.model.dtype), trust_remote_code=config.model.trust_remote_code
    )
    score = getattr(model, "score", None)
    if not isinstance(score, nn.Linear) or score.weight.shape != (1, len(head.weight)):
        raise UserError(
            f"critic.path {config.critic.path!r} is a reward model, but has no linear layer `score` from hidden states "
            "to one number: save it in the form of transformers' decoder classifiers, as recipes/reward_model.py does"
        )
    with torch.no_grad():
        head.weight.copy_(score.weight[0])
        if score.bias is not None:
            head.bias.copy_(score.bias[0])


def _other_model(config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    from llmrl.model.load import load_model

    assert config.critic is not None and config.critic.path is not None
    wanted = dataclasses.replace(config.model, path=config.critic.path, revision=None)
    other = load_model(wanted, tokenizer, seed=config.train.seed)
    if config.model.gradient_checkpointing:
        other.gradient_checkpointing_enable()
    sizes = [m.config.get_text_config().vocab_size for m in (other, model)]
    if sizes[0] < sizes[1]:
        raise UserError(
            f"critic.path {config.critic.path!r} has a vocabulary of {sizes[0]} tokens, the policy one of {sizes[1]}: "
            "the critic has to know the same tokens; choose a model of the same family"
        )
    return other
