"""The policy: a causal language model (whole or with adapters), its reference, and what is taken out of it.

In: a model folder or hub id. Out: log-probabilities of trained tokens, and the weights an engine should serve.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmrl.errors import RunFailed, UserError
from llmrl.train.logprob_head import token_logprobs
from llmrl.types import ForwardOutputs

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from llmrl.config import LoraConfig, ModelConfig
    from llmrl.types import MicroBatch

TINY = "tiny:"
CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
"""Largest log-probability gap (nats) that rounding explains between two ways of computing the same thing."""


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a hub model or local folder, or the byte tokenizer of a tiny model (`tiny:ARCH`).

    Raises:
        UserError: there is none.
    """
    if config.path.startswith(TINY):
        from llmrl.tiny import byte_tokenizer

        return byte_tokenizer()
    from transformers import AutoTokenizer

    source = config.tokenizer or config.path
    options = {} if config.tokenizer else {"revision": config.revision}
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code, **options)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise UserError(
            f"model {source!r}: no tokenizer can be loaded from it ({_first_line(error)}); save one beside the model, or "
            "name another folder or hub id with --model.tokenizer"
        ) from error


def load_generation_config(config: ModelConfig) -> GenerationConfig | None:
    """The model's generation configuration (its stop tokens), or None where the folder has none."""
    from transformers import GenerationConfig

    if config.path.startswith(TINY):
        return None
    try:
        return GenerationConfig.from_pretrained(config.path, revision=config.revision)
    except OSError:
        return None


def load_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreTrainedModel:
    """Load a causal language model from the hub or a local folder, or make a tiny random one (`tiny:ARCH`).

    Raises:
        UserError: there is none, or the architecture is unknown.
    """
    dtype = getattr(torch, config.dtype)
    if config.path.startswith(TINY):
        from llmrl.tiny import build_tiny_model

        model = build_tiny_model(
            config.path.removeprefix(TINY),
            vocab_size=len(tokenizer),
            seed=seed,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ).to(dtype)
        model.set_attn_implementation(config.attn_implementation)
        return model
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            config.path,
            revision=config.revision,
            dtype=dtype,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"model {config.path!r}: cannot be loaded: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def add_lora(model: PreTrainedModel, config: LoraConfig, *, seed: int) -> nn.Module:
    """Wrap `model` with fresh adapters; only they are trained.

    Raises:
        UserError: no layer matches `target_modules`, or the output head is among them.
    """
    import peft

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **asdict(config)))
        except ValueError as error:
            raise UserError(f"model.lora: {_first_line(error)}") from error
    head = model.get_output_embeddings()
    if any(module is head for module in wrapped.modules() if hasattr(module, "lora_A")):
        raise UserError("model.lora.target_modules names the output head, which cannot carry an adapter; leave it out")
    return wrapped


class PolicyModule(nn.Module):
    """What data-parallel wrappers wrap: packed rows in, log-probabilities of trained tokens out."""

    def __init__(self, model: nn.Module, *, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model, adapters (if any) injected into its layers."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # pyright: ignore

    def hidden_states(
        self, input_ids: Int[Tensor, "B T"], position_ids: Int[Tensor, "B T"]
    ) -> Float[Tensor, "B T H"]:
        """Last hidden states (after the final norm).

        Packed rows are told apart by their restarting positions alone. That is right only without a cache and without
        an attention mask; with either, transformers silently lets sequences see each other. `check_forward` proves it.
        """
        decoder = self.causal_lm.get_decoder()
        return decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        position_ids: Int[Tensor, "B T"],
        predict_from: Int[Tensor, " M"],
        targets: Int[Tensor, " M"],
        temperature: float | None = None,
    ) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"]]:
        """(log-probabilities, entropies) of `targets`, each predicted by the hidden state at its `predict_from`."""
        hidden = self.hidden_states(input_ids, position_ids).flatten(0, 1)[predict_from]
        head = self.causal_lm.get_output_embeddings()
        config = self.causal_lm.config
        return token_logprobs(
            hidden,
            head.weight,
            targets,
            temperature=self.temperature if temperature is None else temperature,
            bias=getattr(head, "bias", None),
            softcap=getattr(config, "final_logit_softcapping", None),
            scale=(getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0),
        )


class Policy:
    """The model being trained.

    Attributes:
        module: the `PolicyModule`, replaced by its data-parallel wrapper once the learner has prepared it.
    """

    def __init__(self, model: nn.Module, *, temperature: float, keep_reference: bool) -> None:
        self.bare = PolicyModule(model, temperature=temperature)
        self.module: nn.Module = self.bare
        self.has_adapters = hasattr(model, "disable_adapter")
        self._reference: PolicyModule | None = None
        if keep_reference and not self.has_adapters:
            self._reference = copy.deepcopy(self.bare).eval().requires_grad_(False)

    def forward(self, batch: MicroBatch) -> ForwardOutputs:
        """Log-probabilities (with gradient) of the trained tokens, through the data-parallel wrapper."""
        logprobs, entropy = self.module(batch.input_ids, batch.position_ids, batch.predict_from, batch.targets)
        return ForwardOutputs(logprobs=logprobs, entropy=entropy)

    @torch.no_grad()
    def reference_logprobs(self, batch: MicroBatch) -> Float[Tensor, " M"]:
        """The same under the reference: the adapters switched off, or the frozen copy taken at the start."""
        inputs = (batch.input_ids, batch.position_ids, batch.predict_from, batch.targets)
        if self.has_adapters:
            with self.bare.model.disable_adapter():  # pyright: ignore[reportCallIssue]
                return self.module(*inputs)[0]
        if self._reference is None:
            raise RunFailed("reference log-probabilities were asked for, but no reference model was kept")
        return self._reference.to(batch.input_ids.device)(*inputs)[0]

    def _exact(self, *inputs: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """The forward pass in the type of the weights: accelerate's mixed precision replaces the instance's `forward`."""
        return PolicyModule.forward(self.bare, *inputs, **options)

    @torch.no_grad()
    def sequence_logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        """log p(token | what is before it) at temperature 1 of every token after the first, one sequence at a time."""
        device = next(self.bare.parameters()).device
        with evaluating(self.bare):
            rows = []
            for sequence in sequences:
                ids = torch.tensor([sequence], device=device)
                places = torch.arange(len(sequence), device=device)
                logprobs, _ = self._exact(ids, places[None], places[:-1], ids[0, 1:], temperature=1.0)
                rows.append(logprobs.tolist())
        return rows

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, tensor) of what an engine should serve: adapters merged, one layer at a time.

        The base weights are never written to. Tied weights appear once. Buffers that are saved with the model are
        included.
        """
        causal_lm = self.bare.causal_lm
        inside_adapters: set[str] = set()
        seen: set[int] = set()
        for name, layer in causal_lm.named_modules():
            if not hasattr(layer, "lora_A"):
                continue
            inside_adapters.add(name + ".")
            base = layer.get_base_layer()
            yield f"{name}.weight", _merged_weight(layer)
            if getattr(base, "bias", None) is not None:
                yield f"{name}.bias", base.bias.detach()
        for name, tensor in causal_lm.state_dict(keep_vars=True).items():
            if any(name.startswith(prefix) for prefix in inside_adapters) or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            yield name, tensor.detach()

    @torch.no_grad()
    def check_forward(self, *, packing: bool = True) -> None:
        """Prove on this model that the log-prob head and packed rows equal the model's own plain forward pass.

        Raises:
            RunFailed: with the measured gap, when either differs by more than rounding.
        """
        model = self.bare.causal_lm
        device, vocabulary = next(model.parameters()).device, model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        first, second = (torch.randint(vocabulary, (n,), generator=generator).to(device) for n in (7, 5))
        with evaluating(self.bare):
            plain = []
            for ids in (first, second):
                logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
                plain.append(logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0])
            row = torch.cat([first, second])[None]
            positions = torch.cat([torch.arange(7), torch.arange(5)])[None].to(device)
            places = torch.tensor([*range(6), *range(7, 11)], device=device)
            packed, _ = self._exact(row, positions, places, row[0, places + 1], temperature=1.0)
            alone, _ = self._exact(first[None], positions[:, :7], places[:6], first[1:], temperature=1.0)
        tolerance = CHECK_TOLERANCE[next(model.parameters()).dtype]
        unknown_head = "this architecture changes its logits in a way that is not known here"
        no_packing = "set train.packing false, or try model.attn_implementation sdpa"
        checks = [("log-prob head", alone, plain[0], unknown_head)]
        if packing:
            checks.append(("packed row", packed, torch.cat(plain), no_packing))
        for what, ours, reference, fix in checks:
            gap = (ours - reference).abs().max().item()
            if not gap <= tolerance:
                raise RunFailed(
                    f"{type(model).__name__}: the {what} gives log-probabilities {gap:.2g} nats away from the model's "
                    f"plain forward pass (rounding explains {tolerance:g}); {fix}"
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
