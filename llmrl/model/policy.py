"""The policy: a causal language model (whole or with adapters), its reference, and what is taken out of it.

In: a model folder or hub id. Out: log-probabilities of trained tokens, and the weights an engine should serve.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from llmrl.errors import RunFailed
from llmrl.model.attention import last_hidden_states, shortest_window, understands_causal_head, use_causal_head
from llmrl.model.critic import Critic, check_layout
from llmrl.model.logprob_head import (
    restricted_probabilities,
    token_collisions,
    token_logprobs,
    token_logprobs_and_kl,
)
from llmrl.train.packing import build_micro_batch
from llmrl.train.prefixes import Cost, Tree
from llmrl.types import ForwardOutputs, Sample

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor
    from transformers import PreTrainedModel

    from llmrl.types import MicroBatch

    ReferenceHead = tuple[Float[Tensor, "M H"], Float[Tensor, "V H"], Float[Tensor, " V"] | None]

CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Largest log-probability gap (nats) that rounding explains between two ways of computing the same thing."""


class PolicyModule(nn.Module):
    """What data-parallel wrappers wrap: packed rows in, log-probabilities of trained tokens out."""

    def __init__(self, model: nn.Module, *, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.critic: Critic | None = None

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model, adapters (if any) injected into its layers."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # pyright: ignore

    def hidden_states(
        self,
        input_ids: Int[Tensor, "B T"],
        position_ids: Int[Tensor, "B T"],
        attention_mask: Bool[Tensor, "B 1 S T"] | None = None,
    ) -> Float[Tensor, "B T H"]:
        """Last hidden states (after the final norm)."""
        return last_hidden_states(self.causal_lm.get_decoder(), input_ids, position_ids, attention_mask)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        position_ids: Int[Tensor, "B T"],
        predict_from: Int[Tensor, " M"],
        targets: Int[Tensor, " M"],
        attention_mask: Bool[Tensor, "B 1 S T"] | None = None,
        temperature: float | None = None,
        with_hidden: bool = False,
        with_values: bool = False,
        reference: ReferenceHead | None = None,
    ) -> dict[str, Tensor]:
        """Fields of `ForwardOutputs` of `targets`, each predicted by the hidden state at its `predict_from`.

        With the `reference` that `Policy.reference_head` gives, its KL too.
        """
        hidden = self.hidden_states(input_ids, position_ids, attention_mask).flatten(0, 1)[predict_from]
        options = self.head_options()
        if temperature is not None:
            options["temperature"] = temperature
        head = (hidden, self.head_weight, targets)
        found = token_logprobs_and_kl(*head, reference, **options) if reference else token_logprobs(*head, **options)
        outputs: dict[str, Tensor] = dict(zip(("logprobs", "entropy", "kl"), found, strict=False))  # pyright: ignore
        if with_values and self.critic is not None:
            outputs["values"] = self.critic(hidden, input_ids, position_ids, predict_from, attention_mask)
        return outputs | {"hidden": hidden.detach()} if with_hidden else outputs

    @property
    def head_weight(self) -> Float[Tensor, "V H"]:
        """The output head."""
        return cast("nn.Linear", self.causal_lm.get_output_embeddings()).weight

    def head_options(self) -> dict[str, Any]:
        """What the log-prob head has to know about the output head besides its weight."""
        config = self.causal_lm.config
        return {
            "temperature": self.temperature,
            "bias": getattr(self.causal_lm.get_output_embeddings(), "bias", None),
            "softcap": getattr(config, "final_logit_softcapping", None),
            "scale": (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0),
        }


class Policy:
    """The model being trained.

    Attributes:
        module: the `PolicyModule`, replaced by its data-parallel wrapper once the learner has prepared it.
    """

    def __init__(
        self, model: nn.Module, *, temperature: float, keep_reference: bool, critic: Critic | None = None
    ) -> None:
        self.bare = PolicyModule(model, temperature=temperature)
        self.module: nn.Module = self.bare
        self.has_adapters = hasattr(model, "disable_adapter")
        self.can_share_prefixes = False  # until check_forward has proved it
        trunks = [self.bare.causal_lm, *([critic.trunk] if critic is not None and critic.trunk is not None else [])]
        for trunk in trunks:
            use_causal_head(trunk)
        self.causal_head = all(understands_causal_head(trunk) for trunk in trunks)
        self.window = min((w for trunk in trunks if (w := shortest_window(trunk.config))), default=None)
        self._reference: PolicyModule | None = None
        self.reference_moved = False
        if keep_reference and not self.has_adapters:
            self._reference = copy.deepcopy(self.bare).eval().requires_grad_(False)
        self.bare.critic = critic

    def forward(
        self,
        batch: MicroBatch,
        *,
        with_hidden: bool = False,
        reference: ReferenceHead | None = None,
        alone: bool = False,
    ) -> ForwardOutputs:
        """Log-probabilities and values (with gradient) of the trained tokens; if asked for, what they come from, and
        the KL to what `reference_head` gave.

        It goes through the data-parallel wrapper; `alone` goes round it, so that processes may call it differently
        often.
        """
        module = self.bare if alone else self.module
        options = {"with_hidden": with_hidden, "with_values": True, "reference": reference}
        return ForwardOutputs(**module(*_inputs(batch), **options))

    @torch.no_grad()
    def values(self, batch: MicroBatch) -> Float[Tensor, " M"]:
        """The critic's values alone, round the data-parallel wrapper."""
        critic = self.bare.critic
        if critic is None:
            raise RunFailed("values were asked for, but there is no critic")
        inputs = (batch.input_ids, batch.position_ids, batch.attention_mask)
        hidden = (
            None if critic.trunk is not None else self.bare.hidden_states(*inputs).flatten(0, 1)[batch.predict_from]
        )
        return critic(hidden, batch.input_ids, batch.position_ids, batch.predict_from, batch.attention_mask)

    def bears_masks(self, longest: int) -> bool:
        """Whether attention masks of ours (so shared prefixes) are right for sequences of up to `longest` tokens."""
        return self.can_share_prefixes and (self.window is None or longest <= self.window)

    def own_logprobs(self, batch: MicroBatch) -> Float[Tensor, " M"]:
        """Log-probabilities of the trained tokens alone."""
        return self.forward(batch).logprobs

    @torch.no_grad()
    def reference_logprobs(self, batch: MicroBatch) -> Float[Tensor, " M"]:
        """The same under the reference: the adapters switched off, or the frozen copy taken at the start."""
        if self.has_adapters:
            with self.bare.model.disable_adapter():  # pyright: ignore[reportCallIssue]
                return self.module(*_inputs(batch))["logprobs"]
        return self._kept_reference(batch)(*_inputs(batch))["logprobs"]

    @torch.no_grad()
    def reference_head(self, batch: MicroBatch) -> ReferenceHead:
        """Hidden states of the trained tokens under the reference, its output head and that one's bias."""
        off = self.bare.model.disable_adapter() if self.has_adapters else contextlib.nullcontext()  # pyright: ignore
        model = self.bare if self.has_adapters else self._kept_reference(batch)
        with off, evaluating(model):
            hidden = model.hidden_states(batch.input_ids, batch.position_ids, batch.attention_mask)
        return hidden.flatten(0, 1)[batch.predict_from], model.head_weight.detach(), model.head_options()["bias"]

    def _kept_reference(self, batch: MicroBatch) -> PolicyModule:
        if self._reference is None:
            raise RunFailed("the reference was asked for, but no reference model was kept")
        return self._reference.to(batch.input_ids.device)

    @torch.no_grad()
    def move_reference(self, alpha: float) -> None:
        """Make the reference alpha * policy + (1 - alpha) * reference.

        Source: Gorbatovski et al. 2024, arXiv:2404.09656 (TR-DPO), equations 6 and 7.
        """
        if self._reference is None:
            raise RunFailed("the reference is to move, but no reference model was kept")
        for theirs, ours in zip(self._reference.parameters(), self.bare.parameters(), strict=True):
            theirs.lerp_(ours.detach().to(theirs.device), alpha)
        self.reference_moved = True

    def reference_state(self) -> dict[str, Tensor]:
        """The reference's parameters by name, once it has moved: a checkpoint has to hold it. Empty before."""
        if self._reference is None or not self.reference_moved:
            return {}
        return {name: parameter.detach() for name, parameter in self._reference.named_parameters()}

    @torch.no_grad()
    def load_reference_state(self, state: dict[str, Tensor]) -> None:
        """Undo `reference_state`."""
        if self._reference is not None and state:
            for name, parameter in self._reference.named_parameters():
                parameter.copy_(state[name])
            self.reference_moved = True

    @torch.no_grad()
    def collisions(self, batch: MicroBatch) -> Float[Tensor, " M"]:
        """sum_v p(v)^2 of the distribution that each trained token was drawn from."""
        hidden = self.bare.hidden_states(batch.input_ids, batch.position_ids, batch.attention_mask)
        hidden = hidden.flatten(0, 1)[batch.predict_from]
        return token_collisions(hidden, self.bare.head_weight, **self.bare.head_options())

    def restricted_probabilities(
        self,
        hidden: Float[Tensor, "M H"],
        logprobs: Float[Tensor, " M"],
        vocabulary: Int[Tensor, " W"],
        columns: Int[Tensor, " M"],
    ) -> Float[Tensor, "M W"]:
        """Probabilities of the tokens of `vocabulary`; the targets are at `columns` of it and have `logprobs`."""
        options = self.bare.head_options()
        return restricted_probabilities(hidden, self.bare.head_weight, logprobs, vocabulary, columns, **options)

    def _exact(self, *inputs: Any, **options: Any) -> dict[str, Tensor]:
        """The forward pass in the weights' own type: accelerate's mixed precision replaces the instance's `forward`."""
        return PolicyModule.forward(self.bare, *inputs, **options)

    @torch.no_grad()
    def sequence_logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        """Give log p(token | those before it), temperature 1, of every token but the first; one sequence at a time."""
        with evaluating(self.bare):
            rows = []
            for sequence in sequences:
                ids = torch.tensor([sequence], device=self.device)
                places = torch.arange(len(sequence), device=self.device)
                outputs = self._exact(ids, places[None], places[:-1], ids[0, 1:], temperature=1.0)
                rows.append(outputs["logprobs"].tolist())
        return rows

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, tensor) of what an engine should serve: adapters merged, one layer at a time.

        The base weights are never written to. Tied weights appear once. Buffers that are saved with the model are
        included.
        """
        return self._weights(merged=True)

    def base_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The same without the adapters."""
        return self._weights(merged=False)

    def _weights(self, *, merged: bool) -> Iterator[tuple[str, Tensor]]:
        causal_lm = self.bare.causal_lm
        inside_adapters: set[str] = set()
        seen: set[int] = set()
        for name, layer in causal_lm.named_modules():
            if not hasattr(layer, "lora_A"):
                continue
            inside_adapters.add(name + ".")
            base = cast("Any", layer).get_base_layer()
            yield f"{name}.weight", _merged_weight(layer) if merged else base.weight.detach()
            if getattr(base, "bias", None) is not None:
                yield f"{name}.bias", base.bias.detach()
        for name, tensor in causal_lm.state_dict(keep_vars=True).items():
            if any(name.startswith(prefix) for prefix in inside_adapters) or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            yield name, tensor.detach()

    @torch.no_grad()
    def check_forward(self, *, packing: bool = True) -> None:
        """Prove on this model that the log-prob head and packed rows equal the model's own plain forward pass, and find
        out whether sequences can share a prefix (`can_share_prefixes`: not with recurrent layers, say).

        Raises:
            RunFailed: with the measured gap, when the head or packing differs by more than rounding.
        """
        model = self.bare.causal_lm
        vocabulary = model.config.get_text_config().vocab_size
        random = np.random.Generator(np.random.Philox(key=0))
        prompt = random.integers(0, vocabulary, 12)
        samples = [_probe(prompt, random.integers(0, vocabulary, length)) for length in (3, 1, 5)]
        plain = self._plain_logprobs(samples)
        lay_out = partial(build_micro_batch, samples, device=self.device)
        unknown_head = "this architecture changes its logits in a way that is not known here"
        no_packing = "set train.packing false, or try model.attn_implementation sdpa"
        self._compare("log-prob head", lay_out([[0], [1], [2]]), plain, unknown_head)
        if packing:
            self._compare("packed row", lay_out([[0, 1, 2]]), plain, no_packing)
            check_layout(self.bare.critic, "packed row", lay_out([[0], [1], [2]]), lay_out([[0, 1, 2]]), no_packing)
        tree = Tree(samples=(0, 1, 2), prefix=len(prompt), length=len(prompt) + 9)
        try:
            for causal_head in {False, self.causal_head}:
                shared = lay_out([[0]], trees=[tree], causal_head=causal_head)
                self._compare("shared prefix", shared, plain, "")
                check_layout(self.bare.critic, "shared prefix", lay_out([[0], [1], [2]]), shared, "")
            self.can_share_prefixes = True
        except (RunFailed, RuntimeError, ValueError, TypeError):
            self.can_share_prefixes = False

    def _plain_logprobs(self, samples: list[Sample]) -> Float[Tensor, " M"]:
        """Trained tokens of each sample through the transformers model as anybody would call it."""
        model = self.bare.causal_lm
        found = []
        with evaluating(self.bare):
            for sample in samples:
                ids = torch.from_numpy(sample.input_ids).to(self.device)[None]
                logprobs = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)[0, :-1]
                chosen = logprobs.gather(1, ids[0, 1:, None])[:, 0]
                found.append(chosen[torch.from_numpy(sample.loss_mask[1:]).to(self.device)])
        return torch.cat(found)

    def _compare(self, what: str, batch: MicroBatch, plain: Float[Tensor, " M"], fix: str) -> None:
        with evaluating(self.bare):
            ours = self._exact(*_inputs(batch), temperature=1.0)["logprobs"]
        tolerance = CHECK_TOLERANCE[next(self.bare.parameters()).dtype]
        gap = (ours - plain).abs().max().item()
        if not gap <= tolerance:
            raise RunFailed(
                f"{type(self.bare.causal_lm).__name__}: the {what} gives log-probabilities {gap:.2g} nats away from "
                f"the model's plain forward pass (rounding explains {tolerance:g}); {fix}"
            )

    def save_pretrained(self, folder: Path) -> None:
        """Write the model, or its adapter, for `from_pretrained`."""
        self.bare.model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]

    @property
    def device(self) -> torch.device:
        return next(self.bare.parameters()).device

    def cost(self) -> Cost:
        """Arithmetic of one decoder layer, for the decision which prefixes to share."""
        config = self.bare.causal_lm.config.get_text_config()
        embeddings = {id(m.weight) for m in self.bare.causal_lm.modules() if isinstance(m, nn.Embedding)}
        embeddings.add(id(self.bare.head_weight))
        inside = sum(p.numel() for p in self.bare.causal_lm.parameters() if id(p) not in embeddings)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return Cost(per_token=inside / config.num_hidden_layers, per_pair=2.0 * head_dim * config.num_attention_heads)


def _inputs(batch: MicroBatch) -> tuple[Tensor | None, ...]:
    return (batch.input_ids, batch.position_ids, batch.predict_from, batch.targets, batch.attention_mask)


def _probe(prompt: np.ndarray, completion: np.ndarray) -> Sample:
    """A sample for checking a forward pass."""
    trained = np.zeros(len(completion), np.float32)
    return Sample(
        input_ids=np.concatenate([prompt, completion]).astype(np.int64),
        loss_mask=np.concatenate([np.zeros(len(prompt), bool), np.ones(len(completion), bool)]),
        advantages=trained,
        rollout_logprobs=trained,
        group=0,
        index=0,
    )


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off inside the block; the mode it was in afterwards."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


@torch.no_grad()
def _merged_weight(layer: Any) -> Tensor:
    """Base weight plus the adapter's update, through peft's own merge on a copy of this one layer."""
    merged = copy.deepcopy(layer)
    merged.merge(safe_merge=False)
    return merged.get_base_layer().weight.detach()
