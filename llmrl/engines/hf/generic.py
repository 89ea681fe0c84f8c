"""A decoder for every causal language model of transformers, with the model's own forward pass and cache.

It has the interface of the fast decoder: prompts in (`admit`), one token per row in (`step`), next-token logits out.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from llmrl.errors import UserError
from llmrl.model.logprob_head import float32_product, keeps_logits_in_float32
from llmrl.model.weights import distinct_tensors, memory_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PREFILL_TOKENS = 8192
"""Largest number of padded tokens in one prefill pass; bounds its activations."""
CACHE_NAMES = ("past_key_values", "cache")
"""Names of the cache among a forward pass's arguments: until transformers 5.23, and from 5.24 on."""
LOGPROB_TOKENS = 256
"""Number of positions whose logits `logprobs` holds at once."""


@dataclass(slots=True, eq=False)
class _Cohort:
    """Rows that go through the model together. All end at the same column, so shorter rows begin later."""

    rows: list[int]
    cache: DynamicCache
    mask: Int[Tensor, "n S"]
    """1 where the column holds a token of the row; padding is on the left."""
    positions: Int[Tensor, " n"]
    """Position of the next token."""


class GenericDecoder:
    """Continuous batching over a transformers model; see the module's docstring.

    Rows of different lengths share a batch by padding on the left, with explicit masks and positions, if the cache
    consists of plain or sliding-window attention layers and the model takes positions. For anything else (such as
    recurrent layers), only prompts of equal length that arrive together share a batch, and nothing is ever padded.
    """

    def __init__(
        self, config: PretrainedConfig, *, dtype: torch.dtype, device: torch.device | str, attn_implementation: str
    ) -> None:
        try:
            with torch.random.fork_rng(devices=[]):  # building the model must not draw from the caller's random numbers
                self.model = AutoModelForCausalLM.from_config(
                    copy.deepcopy(config), dtype=dtype, attn_implementation=attn_implementation
                )
        except (ValueError, ImportError) as error:
            raise UserError(
                f"transformers cannot build {config.model_type!r} with attn_implementation {attn_implementation!r} "
                f"(model.attn_implementation; try eager): {error}"
            ) from error
        self.model.to(device).eval().requires_grad_(False)
        if keeps_logits_in_float32(config):
            head: Any = self.model.get_output_embeddings()
            head.forward = partial(_float32_linear, head)
        self.device = device
        accepted = inspect.signature(self.model.forward).parameters
        cache_name = next((name for name in CACHE_NAMES if name in accepted), None)
        if cache_name is None:
            raise UserError(
                f"the hf engine cannot serve {config.model_type!r}: the forward pass of its model in transformers "
                f"{transformers.__version__} takes neither {' nor '.join(CACHE_NAMES)}; use another model, or another "
                "rollout.engine"
            )
        self.cache_name = cache_name
        self.takes_positions = "position_ids" in accepted
        self.takes_logits_to_keep = "logits_to_keep" in accepted
        self.can_pad = self.takes_positions and all(
            type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in self._new_cache().layers
        )
        self._tensors = distinct_tensors(self.model)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.reset()
        try:
            with torch.inference_mode():
                self._sequence_logprobs(torch.zeros(1, 2, dtype=torch.int64, device=device))
        except (ValueError, TypeError, AttributeError) as error:  # a cache of its own, for example
            raise UserError(
                f"the hf engine cannot serve {config.model_type!r}: its forward pass with a cache fails ({error}); use "
                "another model, or another rollout.engine"
            ) from error

    def in_memory(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        """Convert tensors of a checkpoint to the form that `load` takes."""
        return memory_weights(self.model, weights)

    def load(self, name: str, tensor: Tensor) -> None:
        """Copy one parameter (or persistent buffer) into the model."""
        self._tensors[name].copy_(tensor)

    def holds(self, name: str, tensor: Tensor) -> bool:
        """Return whether one parameter is held as it is in `tensor`, bit for bit in the type of the model."""
        return torch.equal(self._tensors[name], tensor.to(self._tensors[name]))

    def finish_load(self) -> None:
        """Do nothing: this decoder derives nothing from the weights."""

    def reset(self) -> None:
        """Drop all rows."""
        self.cohorts: list[_Cohort] = []
        self.num_rows = 0

    def drop_prefixes(self) -> None:
        """Do nothing: only requests admitted together share a prompt, and it is not kept."""

    def admit(self, prompts: Sequence[tuple[int, ...]]) -> Float[Tensor, "n V"]:
        """Append one row per prompt; return the logits of each row's first token. Equal prompts are computed once."""
        distinct = list(dict.fromkeys(prompts))
        first, parts, rows = self.num_rows, [], []
        self.num_rows += len(prompts)
        for batch in self._batches(distinct):
            members = {prompt: i for i, prompt in enumerate(batch)}
            wanted = [(i, members[prompt]) for i, prompt in enumerate(prompts) if prompt in members]
            cohort, logits = self._prefill(batch)
            expand = torch.tensor([member for _, member in wanted], device=self.device)
            cohort.rows = [first + i for i, _ in wanted]
            _select(cohort, expand)
            self.cohorts.append(cohort)
            parts.append(logits.index_select(0, expand))
            rows += [i for i, _ in wanted]
        self._merge()
        result = torch.empty_like(torch.cat(parts))
        return result.index_copy_(0, torch.tensor(rows, device=self.device), torch.cat(parts))

    def step(self, tokens: Int[Tensor, " N"]) -> Float[Tensor, "N V"]:
        """Append one token to every row and return the logits of the next."""
        logits, rows = [], []
        for cohort in self.cohorts:
            own = torch.tensor(cohort.rows, device=self.device)
            cohort.mask = torch.cat([cohort.mask, cohort.mask.new_ones(len(cohort.rows), 1)], 1)
            logits.append(self._forward(tokens[own].unsqueeze(1), cohort, cohort.positions.unsqueeze(1))[:, -1])
            cohort.positions = cohort.positions + 1
            rows.append(own)
        joined = torch.cat(logits)
        return torch.empty_like(joined).index_copy_(0, torch.cat(rows), joined)

    def remove(self, finished: list[int], target: list[int], source: list[int]) -> None:
        """Drop the rows `finished`; row source[i] is renumbered to target[i], the others keep their numbers."""
        gone, renamed = set(finished), dict(zip(source, target, strict=True))
        for cohort in self.cohorts:
            keep = [i for i, row in enumerate(cohort.rows) if row not in gone]
            if keep and len(keep) < len(cohort.rows):
                cohort.rows = [cohort.rows[i] for i in keep]
                _select(cohort, torch.tensor(keep, device=self.device))
                if self.can_pad:
                    _realign(cohort, int(cohort.mask.sum(1).max()))
            elif not keep:
                cohort.rows = []
            cohort.rows = [renamed.get(row, row) for row in cohort.rows]
        self.cohorts = [cohort for cohort in self.cohorts if cohort.rows]
        self.num_rows -= len(finished)

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return log-probabilities at temperature 1. Entry t of a row is log p(sequence[t + 1] | sequence[: t + 1])."""
        return [self._sequence_logprobs(torch.tensor([list(s)], device=self.device)) for s in sequences]

    def plain_logprobs(self, sequence: Sequence[int]) -> list[float]:
        """Return the same for one sequence, by one forward pass without a cache. The self-check compares with this."""
        tokens = torch.tensor([list(sequence)], device=self.device)
        logprobs = self.model(input_ids=tokens, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        return logprobs.gather(1, tokens[0, 1:].unsqueeze(1)).squeeze(1).tolist()

    def _sequence_logprobs(self, tokens: Int[Tensor, "1 T"]) -> list[float]:
        # What a model does between its body and its logits differs (Gemma 2 caps them), so parts of the sequence run
        # through the whole model. A recurrent cache may not be extended by several tokens: it gets the whole sequence.
        step = LOGPROB_TOKENS if self.can_pad else tokens.shape[1]
        cohort = _Cohort([0], self._new_cache(), torch.ones_like(tokens[:, :0]), tokens.new_zeros(1))
        result: list[float] = []
        for first in range(0, tokens.shape[1] - 1, step):
            part = tokens[:, first : min(first + step, tokens.shape[1] - 1)]
            cohort.mask = torch.ones_like(tokens[:, : first + part.shape[1]])
            positions = torch.arange(first, first + part.shape[1], device=self.device).unsqueeze(0)
            logits = self._forward(part, cohort, positions, keep_all=True)[0].float()
            targets = tokens[0, first + 1 : first + 1 + part.shape[1]].unsqueeze(1)
            result += logits.log_softmax(-1).gather(1, targets).squeeze(1).tolist()
        return result

    def _batches(self, prompts: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
        """Split distinct prompts into passes of similar length, or of equal length if padding would not be exact."""
        batches: list[list[tuple[int, ...]]] = []
        for prompt in sorted(prompts, key=len):
            last = batches[-1] if batches else []
            fits = bool(last) and (len(last) + 1) * len(prompt) <= PREFILL_TOKENS
            if fits and (len(prompt) == len(last[0]) or (self.can_pad and len(prompt) <= 1.25 * len(last[0]) + 8)):
                last.append(prompt)
            else:
                batches.append([prompt])
        return batches

    def _prefill(self, prompts: list[tuple[int, ...]]) -> tuple[_Cohort, Float[Tensor, "n V"]]:
        longest = max(map(len, prompts))
        tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=self.device)
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        columns = torch.arange(longest, device=self.device)
        first = (longest - lengths).unsqueeze(1)
        cohort = _Cohort(list(range(len(prompts))), self._new_cache(), (columns >= first).long(), lengths)
        logits = self._forward(tokens, cohort, (columns - first).clamp_(min=0))
        return cohort, logits[:, -1]

    def _forward(self, tokens: Tensor, cohort: _Cohort, positions: Tensor, *, keep_all: bool = False) -> Tensor:
        extra: dict[str, Any] = {self.cache_name: cohort.cache}
        if self.takes_positions:
            extra["position_ids"] = positions
        if self.takes_logits_to_keep and not keep_all:
            extra["logits_to_keep"] = 1
        return self.model(input_ids=tokens, attention_mask=cohort.mask, use_cache=True, **extra).logits

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config)

    def _merge(self) -> None:
        """Join all cohorts into one, if padding is exact."""
        if not self.can_pad or len(self.cohorts) < 2:
            return
        width = max(cohort.mask.shape[1] for cohort in self.cohorts)
        for cohort in self.cohorts:
            _realign(cohort, width)
        first = self.cohorts[0]
        for layer, *others in zip(*(_key_value_layers(cohort) for cohort in self.cohorts), strict=True):
            layers = [layer, *others]
            layer.keys = torch.cat([one.keys for one in layers])
            layer.values = torch.cat([one.values for one in layers])
        first.mask = torch.cat([cohort.mask for cohort in self.cohorts])
        first.positions = torch.cat([cohort.positions for cohort in self.cohorts])
        first.rows = [row for cohort in self.cohorts for row in cohort.rows]
        self.cohorts = [first]


def _float32_linear(head: torch.nn.Linear, hidden: Tensor) -> Tensor:
    """Compute what the layer does, in float32."""
    logits = float32_product(hidden.flatten(0, -2), head.weight).unflatten(0, hidden.shape[:-1])
    return logits if head.bias is None else logits + head.bias.float()


def _select(cohort: _Cohort, index: Int[Tensor, " n"]) -> None:
    """Keep (or repeat) the batch entries `index`; the caller updates `rows`."""
    cohort.cache.reorder_cache(index)  # pyright: ignore[reportArgumentType]  # annotated as a torch.LongTensor
    cohort.mask = cohort.mask.index_select(0, index)
    cohort.positions = cohort.positions.index_select(0, index)


def _realign(cohort: _Cohort, width: int) -> None:
    """Pad or cut the cohort on the left to `width` columns. Only columns of padding may be cut."""
    shift = width - cohort.mask.shape[1]
    if shift == 0:
        return
    cohort.mask = _padded(cohort.mask, 1, width)
    for layer in _key_value_layers(cohort):
        stored, keys, values = width, layer.keys, layer.values
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = width
            stored = min(width, layer.sliding_window - 1)
        layer.keys, layer.values = _padded(keys, 2, stored), _padded(values, 2, stored)


def _key_value_layers(cohort: _Cohort) -> list[Any]:
    """Return the layers of its cache. Only caches of keys and values can be padded, so no other kind gets here."""
    return list(cohort.cache.layers)


def _padded(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Return the last `size` entries along `dim`, with zeros before them if there are fewer."""
    have = tensor.shape[dim]
    if have >= size:
        return tensor.narrow(dim, have - size, size)
    shape = list(tensor.shape)
    shape[dim] = size - have
    return torch.cat([tensor.new_zeros(shape), tensor], dim)
