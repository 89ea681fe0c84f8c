"""This project's decoder for the Llama family of architectures: static key-value memory, prompts shared by their group.

Prompts in (`admit`), one token per row in (`step`), logits of each row's next token out. Rows are numbered 0..N-1
without gaps. A stored prompt is called a lane; its rows attend to it and, in the same softmax, to their own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Complex64, Float, Float32, Int
from torch import Tensor

from llmrl.engines.hf.memory import KeyValueMemory, grown
from llmrl.engines.hf.weights import FusedWeights, LayerWeights
from llmrl.model.logprob_head import float32_product, keeps_logits_in_float32

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LANE_ROWS = 16
"""Most rows that share one stored prompt. A larger group stores the prompt again: the (lane, place) rectangle of the
attention is as wide as its fullest lane, so one huge group would leave it mostly empty."""
IDLE_LANES = 0.25
"""Share of lanes that may be computed although no row reads them: moving a lane costs more than a few steps with it."""
PREFILL_TOKENS = 8192
"""Largest number of padded tokens in one prefill pass; bounds its activations."""
LOGITS_ELEMENTS = 1 << 24
"""Number of logits that `logprobs` holds at once: 64 MiB of float32."""

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, queries, keys, values) -> outputs of all heads, flattened to one vector per token."""


@dataclass(slots=True, eq=False)
class _Lane:
    """A stored prompt."""

    prompt: tuple[int, ...]
    index: int
    rows: int = 0
    """Number of running rows that read it."""


class FastDecoder:
    """Continuous batching over `FusedWeights`; see the module's docstring.

    All rows write their newest key and value into the same column of the suffix memory, so that a step is a few dense
    products. A row that joined later masks the columns before its first one.

    Args:
        config: one for which `unsupported_reason` (in `weights.py`) is None.
        dtype: type in which weights, keys and values are held.
        device: where the decoder runs.
    """

    def __init__(self, config: PretrainedConfig, *, dtype: torch.dtype, device: torch.device | str) -> None:
        self.weights = FusedWeights(config, dtype, device)
        self.dtype, self.device = dtype, device
        self.float32_head = keeps_logits_in_float32(config)
        self.epsilon = config.rms_norm_eps
        self.norm_floor = torch.tensor((self.weights.hidden * self.epsilon) ** 0.5, device=device)
        self.activation = {"silu": F.silu, "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh")}[
            config.hidden_act
        ]
        # Rounded to the type of the weights, as in the reference implementation.
        scale = torch.tensor(self.weights.hidden**0.5, dtype=dtype).item()
        self.embed_scale = scale if config.model_type == "gemma" else 1.0
        powers = torch.arange(0, self.weights.head_dim, 2, dtype=torch.float32) / self.weights.head_dim
        self.inverse_frequencies = (1.0 / config.rope_parameters["rope_theta"] ** powers).to(device)
        self.shapes = self.weights.shapes
        self.load, self.finish_load, self.holds = self.weights.load, self.weights.finish, self.weights.holds
        self.reset()

    def in_memory(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        """Return tensors of a checkpoint in the form that `load` takes: the checkpoints of these families have it."""
        return weights

    def reset(self) -> None:
        """Drop all rows and prompts and release their memory."""
        w = self.weights
        shape = (len(w.layers), w.kv_heads, w.head_dim)
        self.suffix = KeyValueMemory(*shape, dtype=self.dtype, device=self.device)
        self.prefix = KeyValueMemory(*shape, dtype=self.dtype, device=self.device)
        self.suffix_bias = self._zeros(0, self.suffix.num_columns)
        self.positions = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.lane_hidden = self._zeros(0, w.hidden)
        self.lane_length = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.column = 0
        self.row_lane: list[_Lane] = []
        self.row_start: list[int] = []
        self.lanes: list[_Lane] = []
        self.open_lane: dict[tuple[int, ...], _Lane] = {}
        self.arranged = False

    def drop_prefixes(self) -> None:
        """Keep later rows from using the prompts stored so far. Running rows keep theirs."""
        self.open_lane.clear()

    # --- rows come and go -----------------------------------------------------------------------------------------

    def admit(self, prompts: Sequence[tuple[int, ...]]) -> Float[Tensor, "n V"]:
        """Append one row per prompt; return the logits of each row's first token. Equal prompts are computed once."""
        lanes = self._find_lanes(prompts)
        first, count = len(self.row_lane), len(prompts)
        if first == 0:
            self.column = 0
        self._reserve_rows(first + count)
        distinct = {lane.index: i for i, lane in enumerate({lane.index: lane for lane in lanes}.values())}
        lane_ids = self._index([lane.index for lane in lanes])
        self.positions[first : first + count] = self.lane_length[lane_ids]
        self.suffix_bias[first : first + count, : self.column] = -torch.inf
        self.suffix_bias[first : first + count, self.column :] = 0
        self.row_lane += lanes
        self.row_start += [self.column] * count
        self.arranged = False
        logits = self._logits(self.lane_hidden[self._index(list(distinct))])
        return logits.index_select(0, self._index([distinct[lane.index] for lane in lanes]))

    def remove(self, finished: list[int], target: list[int], source: list[int]) -> None:
        """Drop the rows `finished`; row source[i] is renumbered to target[i], the others keep their numbers."""
        for row in finished:
            self.row_lane[row].rows -= 1
        if target:
            into, out_of = self._index(target), self._index(source)
            self.suffix.copy(into, out_of, slice(min(self.row_start), self.column))
            self.suffix_bias[into] = self.suffix_bias[out_of]
            self.positions[into] = self.positions[out_of]
        for new, old in zip(target, source, strict=True):
            self.row_lane[new], self.row_start[new] = self.row_lane[old], self.row_start[old]
        remaining = len(self.row_lane) - len(finished)
        del self.row_lane[remaining:], self.row_start[remaining:]
        self.arranged = False

    def _find_lanes(self, prompts: Sequence[tuple[int, ...]]) -> list[_Lane]:
        """Return the lane of each prompt. A missing lane is computed, or copied if the prompt's lane is full."""
        chosen, fresh, copies = [], [], []
        for prompt in prompts:
            lane = self.open_lane.get(prompt)
            if lane is None or lane.rows == LANE_ROWS:
                full, lane = lane, _Lane(prompt, -1)
                if full is None:
                    fresh.append(lane)
                else:
                    copies.append((lane, full))
                self.open_lane[prompt] = lane
            lane.rows += 1
            chosen.append(lane)
        fresh.sort(key=lambda lane: len(lane.prompt))
        self._drop_idle_lanes()
        self._add_lanes(fresh + [lane for lane, _ in copies])
        for chunk in _chunks([len(lane.prompt) for lane in fresh]):
            self._prefill(fresh[chunk])
        for lane, full in copies:
            self._copy_lane(lane.index, full.index)
        return chosen

    def _add_lanes(self, lanes: list[_Lane]) -> None:
        """Number new lanes and make room for them."""
        for lane in lanes:
            lane.index = len(self.lanes)
            self.lanes.append(lane)
        size = _rounded(len(self.lanes), 8)
        self.prefix.reserve(size, _rounded(max((len(lane.prompt) for lane in lanes), default=0), 32))
        self.lane_hidden, self.lane_length = grown(self.lane_hidden, 0, size), grown(self.lane_length, 0, size)

    def _copy_lane(self, target: int, source: int) -> None:
        columns = slice(0, int(self.lane_length[source]))
        self.prefix.copy(self._index([target]), self._index([source]), columns)
        self.lane_hidden[target], self.lane_length[target] = self.lane_hidden[source], self.lane_length[source]

    def _drop_idle_lanes(self) -> None:
        """Drop lanes that no row reads, and move the last lane into each gap."""
        for lane in [lane for lane in reversed(self.lanes) if lane.rows == 0]:
            if self.open_lane.get(lane.prompt) is lane:
                del self.open_lane[lane.prompt]
            last = self.lanes.pop()
            if last is not lane:
                self._copy_lane(lane.index, last.index)
                last.index = lane.index
                self.lanes[last.index] = last

    def _reserve_rows(self, count: int) -> None:
        size = _rounded(count, 16)
        self.suffix.reserve(size, 0)
        self.suffix_bias, self.positions = grown(self.suffix_bias, 0, size), grown(self.positions, 0, size)

    def _reserve_column(self) -> None:
        """Make room for one more column: move the columns still in use to the front, or double the memory."""
        size = self.suffix.num_columns
        if self.column < size:
            return
        low = min(self.row_start)
        if low >= size // 2:
            used = self.column - low
            self.suffix.shift(low, self.column)
            self.suffix_bias[:, :used] = self.suffix_bias[:, low : self.column].clone()
            self.suffix_bias[:, used:] = 0
            self.row_start = [start - low for start in self.row_start]
            self.column = used
            self.arranged = False
        else:
            self.suffix.reserve(0, 2 * size)
            self.suffix_bias = grown(self.suffix_bias, 1, 2 * size)

    # --- one step -------------------------------------------------------------------------------------------------

    def step(self, tokens: Int[Tensor, " N"]) -> Float[Tensor, "N V"]:
        """Append one token to every row and return the logits of the next."""
        self._reserve_column()
        if not self.arranged:
            self._arrange()
        positions = self.positions[: len(self.row_lane)]
        hidden = self._forward(tokens, self._rotations(positions).unsqueeze(1), self._attend_step)
        positions += 1
        self.column += 1
        return self._logits(hidden)

    def _arrange(self) -> None:
        """Work out where each row is in the (lane, key-value head, place) rectangle, after rows came or went."""
        if sum(lane.rows == 0 for lane in self.lanes) > IDLE_LANES * len(self.lanes):
            self._drop_idle_lanes()
        kv_heads, num_lanes, num_rows = self.weights.kv_heads, len(self.lanes), len(self.row_lane)
        lane = np.array([lane.index for lane in self.row_lane])
        per_lane = np.bincount(lane, minlength=num_lanes)
        width = int(per_lane.max())
        order = np.argsort(lane, kind="stable")
        place = np.empty(num_rows, dtype=np.int64)
        place[order] = np.arange(num_rows) - np.repeat(np.cumsum(per_lane) - per_lane, per_lane)
        # An empty place repeats row 0; its result is not read.
        row_at = np.zeros((num_lanes, 1, width), dtype=np.int64)
        row_at[lane, 0, place] = np.arange(num_rows)
        heads = np.arange(kv_heads)
        self.to_place = self._index((row_at * kv_heads + heads[:, None]).ravel())
        self.to_row = self._index(((lane[:, None] * kv_heads + heads) * width + place[:, None]).ravel())
        self.width = width
        lengths = [len(lane.prompt) for lane in self.lanes]
        self.prefix_length = max(lengths)
        self.prefix_bias = None
        if min(lengths) < self.prefix_length:
            columns = torch.arange(self.prefix_length, device=self.device)
            beyond = columns >= self.lane_length[:num_lanes, None]
            self.prefix_bias = self._zeros(*beyond.shape).masked_fill_(beyond, -torch.inf).unsqueeze(1)
        self.low = min(self.row_start)
        self.ragged = max(self.row_start) > self.low
        self.arranged = True

    def _attend_step(
        self, layer: int, q: Float[Tensor, "N H D"], k: Float[Tensor, "N K D"], v: Float[Tensor, "N K D"]
    ) -> Float[Tensor, "N H*D"]:
        """Attend from each row's query to its lane's prompt and its own suffix, in one softmax."""
        kv_heads, dim = self.weights.kv_heads, self.weights.head_dim
        num_rows, num_lanes, width = q.shape[0], len(self.lanes), self.width
        repeat = q.shape[1] // kv_heads
        newest, used = slice(self.column, self.column + 1), slice(self.low, self.column + 1)
        self.suffix.write(layer, slice(0, num_rows), newest, k.unsqueeze(2), v.unsqueeze(2))
        suffix_k, suffix_v = self.suffix.read(layer, num_rows, used)
        prefix_k, prefix_v = self.prefix.read(layer, num_lanes, slice(0, self.prefix_length))

        q = q.reshape(num_rows * kv_heads, repeat, dim)
        own = torch.bmm(q, suffix_k)
        if self.ragged:
            own.view(num_rows, kv_heads * repeat, -1).add_(self.suffix_bias[:num_rows, None, used])
        # Rows -> places, so that one product covers all rows of a lane and its prompt.
        own = own.view(num_rows * kv_heads, -1).index_select(0, self.to_place)
        q = q.view(num_rows * kv_heads, -1).index_select(0, self.to_place)
        shared = torch.bmm(q.view(num_lanes * kv_heads, width * repeat, dim), prefix_k)
        if self.prefix_bias is not None:
            shared.view(num_lanes, -1, self.prefix_length).add_(self.prefix_bias)
        scores = torch.cat([shared, own.view(num_lanes * kv_heads, width * repeat, -1)], 2)
        probabilities = scores.softmax(2)
        out = torch.bmm(probabilities[:, :, : self.prefix_length], prefix_v)
        own = probabilities[:, :, self.prefix_length :].reshape(num_lanes * kv_heads * width, -1)
        # Places -> rows.
        own = own.index_select(0, self.to_row).view(num_rows * kv_heads, repeat, -1)
        out = out.view(num_lanes * kv_heads * width, -1).index_select(0, self.to_row).view(-1, repeat, dim)
        return torch.baddbmm(out, own, suffix_v).view(num_rows, -1)

    # --- whole sequences ------------------------------------------------------------------------------------------

    def _prefill(self, lanes: list[_Lane]) -> None:
        """Compute and store prompts. Shorter ones are padded on the right, which causal attention never sees."""
        hidden = self._causal([lane.prompt for lane in lanes], store=slice(lanes[0].index, lanes[-1].index + 1))
        lengths = torch.tensor([len(lane.prompt) for lane in lanes], device=self.device)
        ids = self._index([lane.index for lane in lanes])
        self.lane_length[ids] = lengths
        self.lane_hidden[ids] = hidden[torch.arange(len(lanes), device=self.device), lengths - 1]

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return log-probabilities at temperature 1. Entry t of a row is log p(sequence[t + 1] | sequence[: t + 1])."""
        results: list[list[float]] = [[] for _ in sequences]
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        step = max(1, LOGITS_ELEMENTS // self.weights.head.shape[0])
        for chunk in _chunks([len(sequences[i]) for i in order]):
            hidden = self._causal([sequences[i] for i in order[chunk]])
            for row, i in enumerate(order[chunk]):
                targets = torch.tensor(sequences[i][1:], dtype=torch.int64, device=self.device)
                for first in range(0, len(targets), step):
                    part = targets[first : first + step]
                    logits = self._logits(hidden[row, first : first + len(part)]).float()
                    results[i] += logits.log_softmax(-1).gather(1, part.unsqueeze(1)).squeeze(1).tolist()
        return results

    def _causal(self, sequences: Sequence[Sequence[int]], store: slice | None = None) -> Float[Tensor, "B T C"]:
        """Return the final hidden states of whole sequences, and store keys and values in the lanes `store`."""
        longest = max(map(len, sequences))
        tokens = np.zeros((len(sequences), longest), dtype=np.int64)
        for row, sequence in enumerate(sequences):
            tokens[row, : len(sequence)] = sequence

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            if store is not None:
                self.prefix.write(layer, store, slice(0, longest), k, v)
            # Repeated here, because not every fused kernel can repeat them.
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
            return out.transpose(1, 2).flatten(2)

        rotations = self._rotations(torch.arange(longest, device=self.device)).unsqueeze(1)
        return self._forward(self._index(tokens), rotations, attend)

    def _forward(self, tokens: Int[Tensor, ...], rotations: Tensor, attend: Attend) -> Float[Tensor, "... C"]:
        """Run the transformer up to its last norm. `rotations` must broadcast to [..., heads, D/2]."""
        w = self.weights
        x = F.embedding(tokens, w.embed)
        if self.embed_scale != 1.0:
            x = x * self.embed_scale
        shape = x.shape
        x = x.view(-1, w.hidden)
        for index, layer in enumerate(w.layers):
            qkv = F.linear(self._norm(x, layer.input_gain), layer.qkv, layer.qkv_bias)
            q, k, v = self._split(qkv.view(*shape[:-1], -1, w.head_dim), layer, rotations)
            x = torch.addmm(x, attend(index, q, k, v).view(x.shape[0], -1), layer.o.t())
            inner = F.linear(self._norm(x, layer.post_gain), layer.gate_up)
            gate, up = inner.chunk(2, -1)
            x = torch.addmm(x, self.activation(gate).mul_(up), layer.down.t())
        x = self._norm(x, w.final_gain)
        return (x * w.final_gain if w.folded else x).view(shape)

    def _split(
        self, qkv: Float[Tensor, "... H+2K D"], layer: LayerWeights, rotations: Complex64[Tensor, "... 1 D/2"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries (scaled by 1/sqrt(D)) and keys, and values."""
        w = self.weights
        qk, v = qkv.split([w.heads + w.kv_heads, w.kv_heads], -2)
        qk = qk.float()
        if layer.qk_gain is not None:
            qk = F.rms_norm(qk, (w.head_dim,), None, self.epsilon) * layer.qk_gain
        # Rotary pairs are adjacent in `FusedWeights`, so a rotation is one complex product.
        torch.view_as_complex(qk.unflatten(-1, (-1, 2))).mul_(rotations)
        q, k = qk.split([w.heads, w.kv_heads], -2)
        if w.query_scale != 1.0:
            q = q * w.query_scale
        return q.to(self.dtype), k.to(self.dtype), v

    def _norm(self, x: Float[Tensor, "T C"], gain: Float32[Tensor, " C"]) -> Float[Tensor, "T C"]:
        """Scale by 1 / rms(x) and the gain; if the weights are folded, only by 1 / sqrt(|x|^2 + C epsilon)."""
        if not self.weights.folded:
            return F.rms_norm(x.float(), (x.shape[-1],), gain, self.epsilon).to(self.dtype)
        return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.norm_floor)

    def _rotations(self, positions: Int[Tensor, " T"]) -> Complex64[Tensor, "T D/2"]:
        angles = positions.unsqueeze(1).float() * self.inverse_frequencies
        return torch.polar(torch.ones_like(angles), angles)

    def _logits(self, hidden: Float[Tensor, "T C"]) -> Float[Tensor, "T V"]:
        if self.float32_head:
            return float32_product(hidden, self.weights.head)
        return F.linear(hidden, self.weights.head)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def _index(self, values: list[int] | np.ndarray) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int64, device=self.device)


def _chunks(lengths: list[int]) -> list[slice]:
    """Cut ascending lengths into passes of at most PREFILL_TOKENS padded tokens and about a quarter of padding."""
    chunks, first = [], 0
    for i, length in enumerate(lengths):
        if i > first and ((i + 1 - first) * length > PREFILL_TOKENS or length > 1.25 * lengths[first] + 8):
            chunks.append(slice(first, i))
            first = i
    return [*chunks, slice(first, len(lengths))] if lengths else []


def _rounded(count: int, step: int) -> int:
    return -(-count // step) * step
