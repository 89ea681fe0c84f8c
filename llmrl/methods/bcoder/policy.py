"""B-Coder's Q function: a policy whose logits are advantages, and its value heads.

For every trained token it computes the token's advantage, that of the anchor token (the greedy token of the model
before training), and the value of the state. The folder of a trained model also holds `bcoder/heads.safetensors` and
`bcoder/bcoder.json`.
"""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import nn

from llmrl.errors import UserError
from llmrl.methods.bcoder.bellman import SOUND_SOFTABS, capped_value, raw_of_value
from llmrl.methods.bcoder.options import BCoderOptions, PolicyStage, ValueStage
from llmrl.model.adapters import snapshot
from llmrl.model.logprob_head import greedy_tokens, token_logprobs
from llmrl.model.policy import Policy, PolicyModule
from llmrl.model.precision import hold
from llmrl.types import ForwardOutputs

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from llmrl.data.chat import Chat
    from llmrl.types import MicroBatch, Visibility

FOLDER, HEADS, DESCRIPTION = "bcoder", "heads.safetensors", "bcoder.json"
ANCHORS, BASE_VALUES = "anchors", "base_values"
"""Streams of a sample: the anchor tokens, and V_phi of their states (before the cap)."""


class ValueHead(nn.Module):
    """A hidden state -> the input of `capped_value`. At first it is `bias` for all states."""

    def __init__(self, size: int, width: int, *, bias: float = 0.0) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(size, width), nn.Linear(width, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.constant_(self.outer.bias, bias)

    def forward(self, hidden: Float[Tensor, "M H"]) -> Float[Tensor, " M"]:
        return self.outer(nn.functional.gelu(self.inner(hidden.float())))[:, 0]


class QModule(PolicyModule):
    """The language model, V_phi, and the residual value head1 - head2, whose second half never changes."""

    def __init__(
        self, model: nn.Module, options: BCoderOptions, *, hidden_size: int | None, dtype: torch.dtype
    ) -> None:
        super().__init__(model, temperature=1.0, dtype=dtype)
        self.stage = options.stage.kind
        self.const = SOUND_SOFTABS if options.softabs_const is None else options.softabs_const
        size = self.causal_lm.config.get_text_config().hidden_size
        self.width = width = hidden_size or size
        self.value_head = ValueHead(size, width, bias=raw_of_value(0.0, self.const))
        self.residual_head = ValueHead(size, width)
        nn.init.normal_(self.residual_head.outer.weight, std=width**-0.5)
        self.residual_anchor = copy.deepcopy(self.residual_head).requires_grad_(False)
        if self.stage == "value":
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
        visibility: Visibility | None = None,
        anchors: Int[Tensor, " M"] | None = None,
        base_values: Float[Tensor, " M"] | None = None,
    ) -> dict[str, Any]:
        """Return the fields of `ForwardOutputs`; `extras` has l(target) - max l and (no gradient) l(anchor) - max l."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.stage == "policy"):
            hidden = self.hidden_states(input_ids, position_ids, visibility).flatten(0, 1)[predict_from]
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
        """Return the parameters of the value heads, by name."""
        state = self.state_dict()
        names = ("value_head.", "residual_head.", "residual_anchor.")
        return {name: tensor.detach().contiguous() for name, tensor in state.items() if name.startswith(names)}

    def load_heads(self, folder: Path) -> None:
        """Load the value heads of a saved model."""
        state = load_file(folder / FOLDER / HEADS)
        missing = self.load_state_dict(state, strict=False)
        if missing.unexpected_keys or set(self.heads()) - state.keys():
            raise UserError(f"{folder / FOLDER / HEADS}: these are not the heads of this model")


class QPolicy(Policy):
    """A `Policy` that also computes what the Bellman error needs.

    Args:
        model: the language model; in stage policy that of a run of stage value.
        options: the algorithm's options.
        base_model: folder of the model before training.
        chat: `prompt_format` and `chat_template`, saved for ranking.
        dtype: the type it computes in; by default the model's own.
    """

    def __init__(
        self,
        model: nn.Module,
        options: BCoderOptions,
        *,
        base_model: str,
        chat: dict[str, Any],
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, temperature=1.0, keep_reference=False, dtype=dtype)
        self.options, self.base_model, self.chat = options, base_model, chat
        stage = options.stage
        hidden_size = stage.hidden_size if isinstance(stage, ValueStage) else read_description(base_model)["width"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.wrapped = self.module = QModule(model, options, hidden_size=hidden_size, dtype=self.dtype).to(
                self.device
            )
        if isinstance(stage, PolicyStage):
            self.module.load_heads(Path(base_model))
            if not self.has_adapters:
                self.set_reference(copy.deepcopy(model))
            elif not self.base_is_reference:
                self._reference_adapter = snapshot(model)

    def set_reference(self, model: nn.Module) -> None:
        """Use `model` as the one before training."""
        self._reference = PolicyModule(model, temperature=1.0, dtype=self.dtype).eval().requires_grad_(False)
        hold(self._reference.model, self.dtype)

    def forward(self, batch: MicroBatch, **_: Any) -> ForwardOutputs:
        """Return log-probabilities, advantages and values of the trained tokens, through the data-parallel wrapper."""
        anchors, base_values = batch.extras[ANCHORS].long(), batch.extras[BASE_VALUES]
        rows = (batch.input_ids, batch.position_ids, batch.predict_from, batch.targets, batch.visibility)
        return ForwardOutputs(**self.wrapped(*rows, anchors, base_values))

    @torch.no_grad()
    def streams(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Return the anchors, and V_phi before the cap; both are of the model before training and never change."""
        before = self.reference() if isinstance(self.options.stage, PolicyStage) else nullcontext(self.module)
        with before as module:
            hidden = module.hidden_states(batch.input_ids, batch.position_ids, batch.visibility)
            hidden = hidden.flatten(0, 1)[batch.predict_from]
            greedy = greedy_tokens(hidden, module.head())
        return {ANCHORS: greedy.float(), BASE_VALUES: self.module.value_head(hidden)}

    def save_pretrained(self, folder: Path) -> None:
        """Save the model (or adapter), the value heads, and what ranking needs to know about them."""
        super().save_pretrained(folder)
        (folder / FOLDER).mkdir(exist_ok=True)
        save_file(self.module.heads(), folder / FOLDER / HEADS)
        base = str(Path(self.base_model).resolve())
        description = {"options": asdict(self.options), "width": self.module.width, "base_model": base, **self.chat}
        (folder / FOLDER / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def read_description(folder: Path | str) -> dict[str, Any]:
    """Read the description that a B-Coder run saved with its model.

    Raises:
        UserError: `folder` is not the model/ folder of such a run.
    """
    file = Path(folder) / FOLDER / DESCRIPTION
    if not file.is_file() or not file.with_name(HEADS).is_file():
        raise UserError(
            f"{folder}: no value heads there ({FOLDER}/{HEADS}); name the model/ folder of a run with algo.name bcoder"
        )
    return json.loads(file.read_text())


def load_q(folder: Path, *, device: str) -> tuple[QPolicy, Chat]:
    """Load a trained Q function, and the renderer of its prompts.

    Raises:
        UserError: `folder` has no value heads, or the model that they were trained from is gone.
    """
    from llmrl.data.chat import Chat
    from llmrl.model.load import load_generation_config, load_model, load_tokenizer
    from llmrl.model.options import ModelConfig

    description = read_description(folder)
    options, base = saved_options(description), description["base_model"]
    if isinstance(options.stage, PolicyStage) and not Path(base).is_dir():
        raise UserError(f"{folder}: the model it was trained from, {base}, is gone: correct {DESCRIPTION}")
    source = ModelConfig(path=str(folder))
    tokenizer = load_tokenizer(source)
    template = {name: description[name] for name in ("prompt_format", "chat_template")}
    chat = Chat(tokenizer, generation_config=load_generation_config(source), **template)
    target = torch.device(device)
    model = load_model(source, tokenizer, seed=0).to(target)  # pyright: ignore[reportArgumentType]
    q = QPolicy(model, options, base_model=base, chat=template)
    if isinstance(options.stage, PolicyStage):
        before = load_model(ModelConfig(path=base), tokenizer, seed=0).to(target)  # pyright: ignore[reportArgumentType]
        q.set_reference(before)
    q.module.load_heads(folder)
    return q, chat


def saved_options(description: dict[str, Any]) -> BCoderOptions:
    """Return the options that a model was trained with."""
    return TypeAdapter(BCoderOptions).validate_python(description["options"])


def check_start(options: BCoderOptions, model_path: str) -> None:
    """Check that stage policy starts from a run of stage value with the same constants.

    Raises:
        UserError: `model_path` is not the model of a first stage, or alpha, gamma or softabs_const differ from it.
    """
    if isinstance(options.stage, ValueStage):
        return
    saved = saved_options(read_description(model_path))
    if not isinstance(saved.stage, ValueStage):
        raise UserError(f"model.path {model_path} is of stage policy; algo.stage policy starts from stage value")
    for name in ("alpha", "gamma", "softabs_const"):
        mine, theirs = getattr(options, name), getattr(saved, name)
        if mine != theirs:
            raise UserError(f"algo.{name} is {mine}, but {model_path} was trained with {theirs}: use that")
