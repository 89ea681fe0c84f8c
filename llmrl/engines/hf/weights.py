"""Architectures the fast decoder supports, and their weights in its form: fused, folded, rotary pairs adjacent.

In: a transformers configuration, and tensors under their Hugging Face names. Out: `FusedWeights`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "gemma")
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


def unsupported_reason(config: PretrainedConfig, max_model_len: int | None) -> str | None:
    """Return why the fast decoder does not support `config`, or None if it computes every feature of it correctly.

    Args:
        config: transformers' configuration of the model.
        max_model_len: longest sequence that the engine will see; a sliding window at least this long never hides a
            token.
    """
    if config.model_type not in FAMILIES or not type(config).__module__.startswith("transformers.models."):
        return f"model_type {config.model_type!r} is not one of {', '.join(FAMILIES)}"
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type") != "default" or set(rope) - {"rope_type", "rope_theta"}:
        return f"rope_parameters {rope} is not the default type"
    if config.hidden_act not in ACTIVATIONS:
        return f"hidden_act {config.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}"
    for name in ("attention_bias", "mlp_bias", "use_bidirectional_attention", "quantization_config"):
        if getattr(config, name, None):
            return f"{name} is set"
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layer_types - {"full_attention", "sliding_attention"}:
        return f"layer_types {sorted(layer_types)} contain an unsupported type"
    # Mistral uses its sliding window in every layer and has no layer_types; the others use it where layer_types says.
    slides = "sliding_attention" in layer_types or config.model_type == "mistral"
    window = getattr(config, "sliding_window", None) if slides else None
    if window is not None and (max_model_len is None or window < max_model_len):
        return f"sliding_window {window} is shorter than the longest sequence ({max_model_len})"
    if head_dim(config) % 2 or config.num_attention_heads % config.num_key_value_heads:
        return "head_dim is odd, or the query heads do not divide over the key-value heads"
    return None


def head_dim(config: PretrainedConfig) -> int:
    """Return the width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@dataclass(slots=True)
class LayerWeights:
    """One transformer block. H query heads, K key-value heads of width D; hidden size C, intermediate size I."""

    input_gain: Float[Tensor, " C"]
    qkv: Float[Tensor, "(H+2K)*D C"]
    qkv_bias: Float[Tensor, " (H+2K)*D"] | None
    q_gain: Float[Tensor, " D"] | None
    """Gain of the norm over each query head (Qwen3); float32."""
    k_gain: Float[Tensor, " D"] | None
    """Gain of the norm over each key head (Qwen3); float32."""
    qk_gain: Float[Tensor, "H+K D"] | None
    """The two gains above, one row per head, with 1/sqrt(D) included for the queries; float32."""
    o: Float[Tensor, "C H*D"]
    post_gain: Float[Tensor, " C"]
    gate_up: Float[Tensor, "2*I C"]
    down: Float[Tensor, "C I"]


@dataclass(slots=True)
class _Target:
    """Where a named tensor is stored: a view in its Hugging Face shape."""

    view: Tensor
    rotary_heads: int = 0
    """If not 0, rows are reordered in each of this many heads so that the members of a rotary pair are adjacent."""
    offset: float = 0.0
    """Added to the tensor, because Gemma stores norm gains minus 1."""
    gain: Tensor | None = None
    """If weights are folded: the norm before this matrix, by which its columns are multiplied."""
    factor: float = 1.0
    """If weights are folded: what the tensor is multiplied by after that."""


class FusedWeights:
    """The parameters of one model of `FAMILIES`, held once and replaced in place.

    In float32 the norm gains and 1/sqrt(D) are folded into the matrices that follow them, exact to rounding. So is
    sqrt(C), which lets the decoder divide by the length of a hidden vector where the model divides by its root mean
    square. In narrower types nothing is folded (`folded` is False), because the product would be rounded a second time.
    """

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        self.dtype, self.device = dtype, device
        self.folded = dtype == torch.float32
        self.hidden = config.hidden_size
        self.intermediate = config.intermediate_size
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = head_dim(config)
        self.has_bias = config.model_type == "qwen2"
        self.has_qk_norm = config.model_type == "qwen3"
        self.gain_offset = 1.0 if config.model_type == "gemma" else 0.0
        self.scale = self.head_dim**-0.5
        """Factor of the attention scores; folded into the queries wherever that is exact."""
        self.query_scale = 1.0 if self.folded or self.has_qk_norm else self.scale
        """The part of this factor that the decoder still has to apply."""

        self.embed = self._empty(config.vocab_size, self.hidden)
        self.final_gain = self._empty(self.hidden, dtype=torch.float32)
        self.head = self.embed if config.tie_word_embeddings else self._empty(config.vocab_size, self.hidden)
        self.layers = [self._new_layer() for _ in range(config.num_hidden_layers)]
        self._targets = self._name_targets(tied=bool(config.tie_word_embeddings))
        self.shapes = {name: tuple(target.view.shape) for name, target in self._targets.items()}
        """Every Hugging Face name that must be loaded, and its shape."""

    def load(self, name: str, tensor: Tensor) -> None:
        """Copy one parameter to its place. Call `finish` after all of `shapes` are loaded."""
        target = self._targets[name]
        target.view.copy_(_arranged(tensor, target))
        if target.offset:
            target.view.add_(target.offset)

    def holds(self, name: str, tensor: Tensor) -> bool:
        """Return whether one parameter is held, bit for bit, as `load` and `finish` leave it."""
        target = self._targets[name]
        wanted = torch.empty_like(target.view).copy_(_arranged(tensor, target))
        if target.offset:
            wanted.add_(target.offset)
        self._fold(wanted, target)
        return torch.equal(wanted, target.view)

    def finish(self) -> None:
        """Fold gains and the score factor into the matrices, after a complete load."""
        for layer in self.layers:
            if layer.qk_gain is not None:
                assert layer.q_gain is not None and layer.k_gain is not None, "the three gains are set together"
                layer.qk_gain[: self.heads] = layer.q_gain * self.scale
                layer.qk_gain[self.heads :] = layer.k_gain
        for target in self._targets.values():
            self._fold(target.view, target)

    def _fold(self, tensor: Tensor, target: _Target) -> None:
        """Fold gains and factors into a tensor that is arranged as `target`, in place."""
        if not self.folded:
            return
        if target.gain is not None:
            tensor *= target.gain * self.hidden**0.5
        if target.factor != 1.0:
            tensor *= target.factor

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def _new_layer(self) -> LayerWeights:
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        normed = self.has_qk_norm
        return LayerWeights(
            input_gain=self._empty(self.hidden, dtype=torch.float32),
            qkv=self._empty(rows, self.hidden),
            qkv_bias=self._empty(rows) if self.has_bias else None,
            q_gain=self._empty(self.head_dim, dtype=torch.float32) if normed else None,
            k_gain=self._empty(self.head_dim, dtype=torch.float32) if normed else None,
            qk_gain=(self._empty(self.heads + self.kv_heads, self.head_dim, dtype=torch.float32) if normed else None),
            o=self._empty(self.hidden, self.heads * self.head_dim),
            post_gain=self._empty(self.hidden, dtype=torch.float32),
            gate_up=self._empty(2 * self.intermediate, self.hidden),
            down=self._empty(self.hidden, self.intermediate),
        )

    def _name_targets(self, *, tied: bool) -> dict[str, _Target]:
        gain: dict[str, Any] = {"offset": self.gain_offset}
        targets = {
            "model.embed_tokens.weight": _Target(self.embed),
            "model.norm.weight": _Target(self.final_gain, **gain, factor=self.hidden**0.5),
        }
        if not tied:
            targets["lm_head.weight"] = _Target(self.head)
        for index, layer in enumerate(self.layers):
            prefix = f"model.layers.{index}."
            targets[prefix + "input_layernorm.weight"] = _Target(layer.input_gain, **gain)
            targets[prefix + "post_attention_layernorm.weight"] = _Target(layer.post_gain, **gain)
            targets[prefix + "self_attn.o_proj.weight"] = _Target(layer.o)
            targets[prefix + "mlp.gate_proj.weight"] = _Target(layer.gate_up[: self.intermediate], gain=layer.post_gain)
            targets[prefix + "mlp.up_proj.weight"] = _Target(layer.gate_up[self.intermediate :], gain=layer.post_gain)
            targets[prefix + "mlp.down_proj.weight"] = _Target(layer.down)
            targets |= self._attention_targets(prefix + "self_attn.", layer)
        return targets

    def _attention_targets(self, prefix: str, layer: LayerWeights) -> dict[str, _Target]:
        targets = {}
        first = 0
        for letter, heads, rotary in (("q", self.heads, True), ("k", self.kv_heads, True), ("v", self.kv_heads, False)):
            rows = slice(first * self.head_dim, (first + heads) * self.head_dim)
            factor = self.scale if letter == "q" and not self.has_qk_norm else 1.0
            form: dict[str, Any] = {"rotary_heads": heads if rotary else 0, "factor": factor}
            targets[f"{prefix}{letter}_proj.weight"] = _Target(layer.qkv[rows], gain=layer.input_gain, **form)
            if layer.qkv_bias is not None:
                targets[f"{prefix}{letter}_proj.bias"] = _Target(layer.qkv_bias[rows], **form)
            first += heads
        if layer.q_gain is not None and layer.k_gain is not None:
            targets[prefix + "q_norm.weight"] = _Target(layer.q_gain, 1)
            targets[prefix + "k_norm.weight"] = _Target(layer.k_gain, 1)
        return targets


def _arranged(tensor: Tensor, target: _Target) -> Tensor:
    """Return a tensor with its rows in the order of `target`."""
    if not target.rotary_heads:
        return tensor
    pairs = tensor.reshape(target.rotary_heads, 2, -1, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
