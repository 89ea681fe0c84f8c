"""B-Coder's Q function: a policy whose logits are advantages, and the value heads beside it.

In: packed rows. Out, for every trained token: its advantage, that of the anchor token, and the value of the state.
The folder of a trained model holds, beside the model, `bcoder/heads.safetensors` and `bcoder/bcoder.json`.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llmrl.config.bcoder import BCoderConfig
from llmrl.errors import UserError
from llmrl.methods.bcoder.bellman import SOUND_SOFTABS, capped_value, raw_of_value
from llmrl.model.logprob_head import greedy_tokens, token_logprobs
from llmrl.model.policy import Policy, PolicyModule
from llmrl.types import ForwardOutputs

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from llmrl.data.chat import Chat
    from llmrl.types import MicroBatch

FOLDER, HEADS, DESCRIPTION = "bcoder", "heads.safetensors", "bcoder.json"
ANCHORS, BASE_VALUES = "anchors", "base_values"
"""Streams of a sample: the greedy token of the model before training, and V_phi there (before the cap)."""


class ValueHead(nn.Module):
    """A hidden state -> a number before `capped_value`; at first the same for all states, a value of 0."""

    def __init__(self, size: int, width: int, *, bias: float = 0.0) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(size, width), nn.Linear(width, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.constant_(self.outer.bias, bias)

    def forward(self, hidden: Float[Tensor, "M H"]) -> Float[Tensor, " M"]:
        return self.outer(nn.functional.gelu(self.inner(hidden.float())))[:, 0]


class QModule(PolicyModule):
    """The language model, V_phi, and the residual value head1 - head2, whose second half never changes."""

    def __init__(self, model: nn.Module, config: BCoderConfig) -> None:
        super().__init__(model, temperature=1.0)
        self.stage = config.stage
        self.const = SOUND_SOFTABS if config.softabs_const is None else config.softabs_const
        size = self.causal_lm.config.get_text_config().hidden_size
        width = config.value_hidden_size or size
        self.value_head = ValueHead(size, width, bias=raw_of_value(0.0, self.const))
        self.residual_head = ValueHead(size, width)
        nn.init.normal_(self.residual_head.outer.weight, std=width**-0.5)
        self.residual_anchor = copy.deepcopy(self.residual_head).requires_grad_(False)
        if config.stage == "value":
            model.requires_grad_(False)
            self.residual_head.requires_grad_(False)
        else:
            self.value_head.requires_grad_(False)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        position_ids: Int[Tensor, "B T"],
        predict_from: Int[Tensor, " M"],
        targets: Int[Tensor, " M"],
        attention_mask: Bool[Tensor, "B 1 S T"] | None = None,
        anchors: Int[Tensor, " M"] | None = None,
        base_values: Float[Tensor, " M"] | None = None,
    ) -> dict[str, Any]:
        """Fields of `ForwardOutputs`; in `extras` l(target) - max l and, without gradient, l(anchor) - max l."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.stage == "policy"):
            hidden = self.hidden_states(input_ids, position_ids, attention_mask).flatten(0, 1)[predict_from]
            logprobs, entropy = self._head(hidden, targets)
            # log p differs from l by a constant of the state, and so do l - max l and log p - max log p.
            with torch.no_grad():
                greedy = greedy_tokens(hidden, self.head())
                highest = self._head(hidden, greedy)[0]
                anchor = highest if anchors is None else self._head(hidden, anchors)[0]
            advantages = logprobs - (self._head(hidden, greedy)[0] if hidden.requires_grad else highest)
        if self.stage == "value" or base_values is None:
            raw = self.value_head(hidden)
        else:
            raw = base_values + self.residual_head(hidden) - self.residual_anchor(hidden)
        extras = {"advantages": advantages, "anchor_advantages": anchor - highest}
        return {"logprobs": logprobs, "entropy": entropy, "values": capped_value(raw, self.const), "extras": extras}

    def _head(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprobs(hidden, self.head(), targets)

    def heads(self) -> dict[str, Tensor]:
        """The parameters of the value heads, by name."""
        state = self.state_dict()
        names = ("value_head.", "residual_head.", "residual_anchor.")
        return {name: tensor.detach().contiguous() for name, tensor in state.items() if name.startswith(names)}

    def load_heads(self, folder: Path) -> None:
        """Take the value heads of a saved model."""
        state = load_file(folder / FOLDER / HEADS)
        missing = self.load_state_dict(state, strict=False)
        if missing.unexpected_keys or set(self.heads()) - state.keys():
            raise UserError(f"{folder / FOLDER / HEADS}: these are not the heads of this model")


class QPolicy(Policy):
    """A `Policy` that also computes what the Bellman error needs."""

    def __init__(self, model: nn.Module, config: BCoderConfig, *, base_model: str, chat: dict[str, Any]) -> None:
        super().__init__(model, temperature=1.0, keep_reference=False)
        self.config, self.base_model, self.chat = config, base_model, chat
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.wrapped = self.module = QModule(model, config).to(self.device)
        if config.stage == "policy":
            self.module.load_heads(Path(base_model))
            if not self.has_adapters:
                self.set_reference(copy.deepcopy(model))

    def set_reference(self, model: nn.Module) -> None:
        """Take `model` for the one before training."""
        self._reference = PolicyModule(model, temperature=1.0).eval().requires_grad_(False)

    def forward(self, batch: MicroBatch, **_: Any) -> ForwardOutputs:
        """Log-probabilities, advantages and values of the trained tokens, through the data-parallel wrapper."""
        anchors, base_values = batch.extras[ANCHORS].long(), batch.extras[BASE_VALUES]
        rows = (batch.input_ids, batch.position_ids, batch.predict_from, batch.targets, batch.attention_mask)
        return ForwardOutputs(**self.wrapped(*rows, anchors, base_values))

    @torch.no_grad()
    def streams(self, batch: MicroBatch) -> dict[str, Tensor]:
        """The greedy token and V_phi (before the cap) of the model before training; they never change."""
        module = self._reference or self.module
        with self.without_adapter():
            hidden = module.hidden_states(batch.input_ids, batch.position_ids, batch.attention_mask)
        hidden = hidden.flatten(0, 1)[batch.predict_from]
        greedy = greedy_tokens(hidden, module.head())
        return {ANCHORS: greedy.float(), BASE_VALUES: self.module.value_head(hidden)}

    def save_pretrained(self, folder: Path) -> None:
        """The model (or adapter), the value heads, and what ranking with them has to know."""
        super().save_pretrained(folder)
        (folder / FOLDER).mkdir(exist_ok=True)
        save_file(self.module.heads(), folder / FOLDER / HEADS)
        said = {**asdict(self.config), "base_model": str(Path(self.base_model).resolve()), **self.chat}
        (folder / FOLDER / DESCRIPTION).write_text(json.dumps(said, indent=2) + "\n")


def read_description(folder: Path | str) -> dict[str, Any]:
    """What a B-Coder run wrote beside its model.

    Raises:
        UserError: `folder` is not the model/ folder of one.
    """
    file = Path(folder) / FOLDER / DESCRIPTION
    if not file.is_file() or not file.with_name(HEADS).is_file():
        raise UserError(
            f"{folder}: no value heads there ({FOLDER}/{HEADS}); name the model/ folder of a run with algo.name bcoder"
        )
    return json.loads(file.read_text())


def load_q(folder: Path, *, device: str) -> tuple[QPolicy, Chat, dict[str, Any]]:
    """A trained Q function, what renders prompts for it, and its description.

    Raises:
        UserError: `folder` holds none, or the model that it was trained from is gone.
    """
    from llmrl.config import ModelConfig
    from llmrl.data.chat import Chat
    from llmrl.model.load import load_generation_config, load_model, load_tokenizer

    said = read_description(folder)
    config = BCoderConfig(**{f.name: said[f.name] for f in fields(BCoderConfig)})
    base = said["base_model"]
    if config.stage == "policy" and not Path(base).is_dir():
        raise UserError(f"{folder}: the model it was trained from, {base}, is gone: correct {DESCRIPTION}")
    source = ModelConfig(path=str(folder))
    tokenizer = load_tokenizer(source)
    template = {"prompt_format": said["prompt_format"], "chat_template": said["chat_template"]}
    chat = Chat(tokenizer, generation_config=load_generation_config(source), **template)
    target = torch.device(device)
    model = load_model(source, tokenizer, seed=0).to(target)  # pyright: ignore[reportArgumentType]
    q = QPolicy(model, config, base_model=base, chat=template)
    if config.stage == "policy":
        before = load_model(ModelConfig(path=base), tokenizer, seed=0).to(target)  # pyright: ignore[reportArgumentType]
        q.set_reference(before)
    q.module.load_heads(folder)
    return q, chat, said


def with_saved(config: BCoderConfig, model_path: str) -> BCoderConfig:
    """The second stage's configuration, with what the first one has fixed.

    Raises:
        UserError: `model_path` is not the model of a first stage, or alpha, gamma or softabs_const differ from it.
    """
    if config.stage == "value":
        return config
    saved = read_description(model_path)
    if saved["stage"] != "value":
        raise UserError(f"model.path {model_path} is of the second stage; bcoder.stage policy starts from the first")
    for name in ("alpha", "gamma", "softabs_const"):
        if saved[name] != getattr(config, name):
            raise UserError(
                f"bcoder.{name} is {getattr(config, name)}, but {model_path} was trained with {saved[name]}: use that"
            )
    return replace(config, value_hidden_size=saved["value_hidden_size"])
