"""The policy: a causal language model (whole or with adapters), its critic, its reference, and what engines get of it.

In: a model folder or hub id. Out: log-probabilities of trained tokens, and the weights an engine should serve.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from llmrl.errors import RunFailed, UserError
from llmrl.model import adapters
from llmrl.model.attention import (
    Kernel,
    compile_for_all_forms,
    kernel_of,
    shortest_window,
    understands_causal_head,
    use_causal_head,
)
from llmrl.model.logprob_head import (
    ReferenceHead,
    restricted_probabilities,
    token_collisions,
)
from llmrl.model.modes import evaluating
from llmrl.model.module import PolicyModule
from llmrl.model.positions import longest_exact
from llmrl.model.precision import compute_in, compute_type, hold, own_type
from llmrl.model.quantized import is_quantized
from llmrl.model.save import save_language_model
from llmrl.model.weights import checkpoint_weights, merge_obstacle, served_config
from llmrl.types import ForwardOutputs

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

    from llmrl.model.critic import Critic
    from llmrl.model.parallel import Parallel
    from llmrl.types import Adapter, MicroBatch


class Policy:
    """The model being trained.

    Attributes:
        module: the `PolicyModule`. Calling it directly goes past the data-parallel wrapper.
        dtype: the type it computes in, which engines serve too unless they are told another; by default the type of
            the model given. Once a learner has it, what it trains is held in float32.
        wrapped: `module`, or its data-parallel wrapper after `distribute`. Forward passes of training go through it.
        is_quantized: whether the base of the adapters is.
        base_is_saved: whether the base of the adapters is a model that can be loaded; if not, they are saved merged.
        can_pack: whether sequences in one row do not see each other; `check_forward` finds out.
        can_share_prefixes: whether attention masks of ours are right on this model; `check_forward` finds out, too.
        kernel: what its attention (and its critic's) takes, which decides how rows are laid out.
        own_masks: whether masks of ours are faster than those that transformers makes from restarting positions.
        longest: tokens up to which the positions of a sequence do not depend on its neighbors, or None.
        window: tokens that the layer with the shortest view sees, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float,
        keep_reference: bool,
        critic: Critic | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.dtype = dtype or own_type(model)
        self.module = PolicyModule(model, temperature=temperature, dtype=self.dtype)
        self.wrapped: nn.Module = self.module
        self.parallel: Parallel | None = None
        self.has_adapters = hasattr(model, "disable_adapter")
        self.is_quantized = is_quantized(model)
        self.base_is_saved = not (self.has_adapters and adapters.base_is_changed(model))
        self.can_pack = True
        if self.has_adapters and adapters.active_config(model).is_prompt_learning:
            raise UserError(f"{type(model).__name__}: adapters that change the prompt are not supported; use LoRA")
        self.module.head()  # refuses an adapter on the head that log-probabilities cannot be computed with
        self.can_share_prefixes = False
        self.likely: list[list[int]] | None = None
        """What `rounding.likely_sequences` has drawn."""
        trunks: list[Any] = [self.causal_lm]
        if critic is not None and critic.trunk is not None:
            trunks.append(critic.trunk)
        for trunk in trunks:
            use_causal_head(trunk)
        kernels = {kernel_of(trunk.config) for trunk in trunks}
        # Of two, the one that takes less.
        self.kernel = next(kind for kind in (Kernel.VARLEN, Kernel.MASKED, Kernel.BLOCKS) if kind in kernels)
        if self.kernel is Kernel.BLOCKS:
            compile_for_all_forms()
        causal_heads = all(understands_causal_head(trunk.config) for trunk in trunks)
        self.own_masks = self.kernel is Kernel.BLOCKS or causal_heads
        self.longest = min((n for trunk in trunks if (n := longest_exact(trunk.config))), default=None)
        self.window = min((w for trunk in trunks if (w := shortest_window(trunk.config))), default=None)
        self._reference: PolicyModule | None = None
        self._reference_adapter: dict[str, Tensor] | None = None
        self.base_is_reference = self.has_adapters and adapters.base_is_start(model)
        self.reference_moved = False
        if keep_reference and self.has_adapters and not self.base_is_reference:
            self._reference_adapter = adapters.snapshot(model)
        elif keep_reference and not self.has_adapters:
            self._reference = copy.deepcopy(self.module).eval().requires_grad_(False)
            hold(self._reference.model, self.dtype)
        self.module.critic = critic  # after the copy: the reference has no use for a critic

    # --- what it is made of ---

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model, for what only transformers knows."""
        return self.module.causal_lm

    @property
    def model_config(self) -> PretrainedConfig:
        """The configuration of the transformers model."""
        return self.causal_lm.config

    @property
    def text_config(self) -> Any:
        """The part of the configuration that describes the language model; its fields differ by architecture."""
        return cast("Any", self.model_config).get_text_config()

    @property
    def vocab_size(self) -> int:
        return self.text_config.vocab_size

    @property
    def critic(self) -> Critic | None:
        return self.module.critic

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def supports_masks(self, longest: int) -> bool:
        """Whether attention masks of ours (so shared prefixes) are right for sequences of up to `longest` tokens."""
        return self.can_share_prefixes and (self.window is None or longest <= self.window)

    # --- training ---

    def hold(self) -> None:
        """Hold what is trained in float32 from now on, and what is frozen in the type that it is used in."""
        hold(self.module.model, self.dtype)
        if self.critic is not None and self.critic.trunk is not None:
            hold(self.critic.trunk, self.critic.dtype)

    def distribute(self, parallel: Parallel, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Spread the module over the processes. Returns the optimizer to use from now on."""
        self.parallel = parallel
        self.wrapped, optimizer = parallel.wrap(self.module, optimizer)
        return optimizer

    def parameters_to_train(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the trained parameters: (the policy's, the critic's own)."""
        own: set[int] = set() if self.critic is None else {id(p) for p in self.critic.parameters()}
        trained = [p for p in self.module.parameters() if p.requires_grad]
        return [p for p in trained if id(p) not in own], [p for p in trained if id(p) in own]

    def forward(
        self,
        batch: MicroBatch,
        *,
        with_hidden: bool = False,
        reference: ReferenceHead | None = None,
        past_wrapper: bool = False,
    ) -> ForwardOutputs:
        """Compute log-probabilities, entropies and values of the trained tokens, with gradient.

        Args:
            batch: packed rows.
            with_hidden: give the hidden states that they come from, too.
            reference: what `reference_head` gave, for the KL from it.
            past_wrapper: skip the data-parallel wrapper, whose passes every process has to make equally often.
        """
        module = self.module if past_wrapper else self.wrapped
        options = {"with_hidden": with_hidden, "with_values": True, "reference": reference}
        return ForwardOutputs(**module(*_inputs(batch), **options))

    def values(self, batch: MicroBatch) -> Float[Tensor, " M"]:
        """Compute the critic's values alone, past the data-parallel wrapper, with gradient in its own parameters."""
        if self.critic is None:
            raise RunFailed("values were asked for, but there is no critic")
        with torch.no_grad():
            hidden = self._hidden(self.module, batch) if self.critic.trunk is None else None
        return self.critic(hidden, batch.input_ids, batch.position_ids, batch.predict_from, batch.visibility)

    @torch.no_grad()
    def collisions(self, batch: MicroBatch) -> Float[Tensor, " M"]:
        """Compute sum_v p(v)^2 of the distribution that each trained token was drawn from."""
        return token_collisions(self._hidden(self.module, batch), self.module.head())

    def streams(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Compute further streams of the trained tokens, for an algorithm with `Needs.policy_streams`. Override it."""
        raise NotImplementedError

    def restricted_probabilities(
        self,
        hidden: Float[Tensor, "M H"],
        logprobs: Float[Tensor, " M"],
        vocabulary: Int[Tensor, " W"],
        columns: Int[Tensor, " M"],
    ) -> Float[Tensor, "M W"]:
        """Compute probabilities of the tokens in `vocabulary`; see the function of the same name."""
        return restricted_probabilities(hidden, self.module.head(), logprobs, vocabulary, columns)

    # --- the reference ---

    @contextlib.contextmanager
    def reference(self) -> Generator[PolicyModule]:
        """Give the module that computes as the reference does inside the block.

        The reference is the policy as it started: a frozen copy of a whole model; of a model with adapters the same
        module, with its adapters switched off where they started without effect, else with those that it started with.

        Raises:
            RunFailed: no reference was kept.
        """
        if self._reference is not None:
            yield self._reference.to(self.device)
        elif self._reference_adapter is not None:
            with adapters.replaced(self.module.model, self._reference_adapter):
                yield self.module
        elif self.base_is_reference:
            with self.without_adapter():
                yield self.module
        else:
            raise RunFailed("the reference was asked for, but no reference model was kept")

    @torch.no_grad()
    def reference_logprobs(self, batch: MicroBatch) -> Float[Tensor, " M"]:
        """Compute log-probabilities under the reference."""
        with self.reference() as module:
            return module(*_inputs(batch))["logprobs"]

    @torch.no_grad()
    def reference_head(self, batch: MicroBatch) -> ReferenceHead:
        """Compute what the exact KL reads of the reference: hidden states of the trained tokens, and its head."""
        with self.reference() as module, evaluating(module):
            return ReferenceHead(hidden=self._hidden(module, batch), head=module.head())

    @torch.no_grad()
    def move_reference(self, alpha: float) -> None:
        """Make the reference alpha * policy + (1 - alpha) * reference; with adapters alpha is 1.

        Source: Gorbatovski et al. 2024, arXiv:2404.09656 (TR-DPO), equations 6 and 7.
        """
        if self.has_adapters and alpha == 1:
            self._reference_adapter = adapters.snapshot(self.module.model)
        elif self._reference is None:
            raise RunFailed("the reference is to move, but no reference model was kept")
        else:
            self._reference.float()  # small steps would be lost in a narrower type
            for theirs, ours in zip(self._reference.parameters(), self.module.parameters(), strict=True):
                theirs.lerp_(self._full(ours).to(theirs.device), alpha)
        self.reference_moved = True

    def reference_state(self) -> dict[str, Tensor]:
        """Return what a checkpoint has to hold of the reference, by name: adapters, or a whole model that has moved.

        What is missing here is as it was at the start.
        """
        if self._reference_adapter is not None:
            return self._reference_adapter
        if self._reference is None or not self.reference_moved:
            return {}
        return {name: parameter.detach() for name, parameter in self._reference.named_parameters()}

    @torch.no_grad()
    def load_reference_state(self, state: dict[str, Tensor]) -> None:
        """Restore from `reference_state`."""
        if not state:
            return
        if self.has_adapters:
            self._reference_adapter = {name: tensor.to(self.device) for name, tensor in state.items()}
        elif self._reference is not None:
            self._reference.float()
            for name, parameter in self._reference.named_parameters():
                parameter.copy_(state[name])
        self.reference_moved = True

    # --- adapters ---

    def without_adapter(self) -> AbstractContextManager[None]:
        """Switch the adapters off inside the block, where there are any."""
        if not self.has_adapters:
            return contextlib.nullcontext()
        return cast("Any", self.module.model).disable_adapter()

    def scaled(self, factor: float) -> AbstractContextManager[None]:
        """Multiply the adapter's update by `factor` inside the block."""
        return adapters.scaled(self.module.model, factor)

    def adapter(self) -> Adapter:
        """Return the trained adapter, for engines that keep the base weights."""
        return adapters.current_adapter(self.module.model)

    @property
    def adapter_kind(self) -> str | None:
        """Kind of the adapters, with their rank where they have one; None for a whole model."""
        if not self.has_adapters:
            return None
        config = adapters.active_config(self.module.model)
        rank = getattr(config, "r", None)
        return f"{adapters.plain(config.peft_type)}{f' of rank {rank}' if rank else ''}"

    @property
    def adapter_rank(self) -> int:
        return adapters.active_config(self.module.model).r

    def adapter_obstacle(self) -> str | None:
        """Return why vLLM cannot serve the adapter beside the base weights, or None when it can."""
        return adapters.adapter_obstacle(self.module.model)

    def merge_obstacle(self) -> str | None:
        """Return why no engine can serve weights with the adapters merged in, or None when they can."""
        return merge_obstacle(self.module.model) if self.has_adapters else None

    # --- exact numbers, for proofs ---

    @torch.no_grad()
    def exact_logprobs(self, batch: MicroBatch) -> Float[Tensor, " M"]:
        """Compute log-probabilities at temperature 1, dropout off."""
        with evaluating(self.module):
            return self._exact(*_inputs(batch), temperature=1.0)["logprobs"]

    @torch.no_grad()
    def sequence_logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        """Compute log p(token | those before it), temperature 1, of every token but the first.

        It runs one sequence at a time, so that no layout can be wrong.
        """
        with (
            evaluating(self.module),
            compute_in(self.module.dtype, self.causal_lm),
        ):  # cast once, not for every sequence
            rows: list[list[float]] = []
            for sequence in sequences:
                ids = torch.tensor([sequence], device=self.device)
                places = torch.arange(len(sequence), device=self.device)
                outputs = self._exact(ids, places[None], places[:-1], ids[0, 1:], temperature=1.0)
                rows.append(outputs["logprobs"].tolist())
        return rows

    def _exact(self, *inputs: Any, **options: Any) -> dict[str, Tensor]:
        # The module of a method may have a forward pass of its own, which computes more.
        return PolicyModule.forward(self.module, *inputs, **options)

    def computing(self) -> AbstractContextManager[None]:
        """Let the transformers model itself compute as it does in training inside the block."""
        return compute_in(self.dtype, self.causal_lm)

    # --- weights ---

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name in a checkpoint, whole tensor) of what an engine should serve; see `checkpoint_weights`.

        They are what the policy computes with: in its `dtype`, even where they are held in float32.
        """
        return checkpoint_weights(self.causal_lm, merged=True, served=self._served)

    def base_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the same without the adapters."""
        return checkpoint_weights(self.causal_lm, merged=False, served=self._served)

    def _served(self, name: str, tensor: Tensor) -> Tensor:
        """Return a whole tensor in the type that the model computes with."""
        return self._full(tensor).to(compute_type(self.causal_lm, name, tensor, self.dtype))

    @property
    def served_config(self) -> PretrainedConfig:
        """The configuration that fits `weights`."""
        return served_config(self.causal_lm)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole tensor) of every parameter, the critic's and the adapters' included."""
        for name, parameter in self.module.named_parameters():
            yield name, self._full(parameter)

    def trained_parameters(self) -> dict[str, Tensor]:
        """Return the whole tensors that training changes, by name, for a checkpoint."""
        return {name: self._full(p) for name, p in self.module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def load_trained_parameters(self, state: dict[str, Tensor]) -> None:
        """Restore from `trained_parameters`."""
        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                continue
            if self.parallel is None:
                parameter.copy_(state[name])
            else:
                self.parallel.load(parameter, state[name])

    def save_pretrained(self, folder: Path) -> None:
        """Write the model, or its adapter, for `from_pretrained`."""
        if not self.has_adapters:
            save_language_model(self.causal_lm, folder)
        elif self.base_is_saved:
            adapters.save(self.module.model, folder)
        else:
            save_language_model(copy.deepcopy(cast("Any", self.module.model)).merge_and_unload(), folder)

    def merge_adapter(self) -> None:
        """Merge the adapter into the weights: from here on the model is whole.

        Raises:
            UserError: there is no adapter.
        """
        if not self.has_adapters:
            raise UserError("there is no adapter to merge: the whole model was trained")
        self.module.model = cast("Any", self.module.model).merge_and_unload()
        self.has_adapters = False

    def _full(self, tensor: Tensor) -> Tensor:
        return tensor.detach() if self.parallel is None else self.parallel.full(tensor)

    def _hidden(self, module: PolicyModule, batch: MicroBatch) -> Float[Tensor, "M H"]:
        """Compute the hidden states that predict the trained tokens, past the data-parallel wrapper."""
        hidden = module.hidden_states(batch.input_ids, batch.position_ids, batch.visibility)
        return hidden.flatten(0, 1)[batch.predict_from]


def _inputs(batch: MicroBatch) -> tuple[Any, ...]:
    return (batch.input_ids, batch.position_ids, batch.predict_from, batch.targets, batch.visibility)
