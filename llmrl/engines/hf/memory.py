"""Keys and values of all layers, in two tensors that grow. The fast decoder has one for prompts, one for rows."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class KeyValueMemory:
    """E entries (prompts, or rows) of T columns (tokens), in each of L layers with K heads of width D.

    Keys are stored transposed, which makes queries x keys up to twice as fast on a CPU. Unused places hold finite
    numbers: a masked value is multiplied by 0, which would not remove a NaN.
    """

    def __init__(
        self, num_layers: int, kv_heads: int, head_dim: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.keys: Float[Tensor, "L E K D T"] = torch.zeros(
            num_layers, 0, kv_heads, head_dim, 32, dtype=dtype, device=device
        )
        self.values: Float[Tensor, "L E K T D"] = self.keys.transpose(3, 4).contiguous()

    @property
    def num_columns(self) -> int:
        return self.keys.shape[4]

    def reserve(self, entries: int, columns: int) -> None:
        """Make room for at least `entries` entries of `columns` columns."""
        entries, columns = max(entries, self.keys.shape[1]), max(columns, self.num_columns)
        self.keys = grown(grown(self.keys, 1, entries), 4, columns)
        self.values = grown(grown(self.values, 1, entries), 3, columns)

    def write(self, layer: int, entries: slice, columns: slice, k: Tensor, v: Tensor) -> None:
        """Store keys and values, both [entries K columns D]."""
        self.keys[layer, entries, :, :, columns] = k.transpose(2, 3)
        self.values[layer, entries, :, columns] = v

    def read(
        self, layer: int, entries: int, columns: slice
    ) -> tuple[Float[Tensor, "E*K D W"], Float[Tensor, "E*K W D"]]:
        """Return keys and values of the first `entries` entries, one matrix per entry and head."""
        keys, values = self.keys[layer, :entries].flatten(0, 1), self.values[layer, :entries].flatten(0, 1)
        return keys[:, :, columns], values[:, columns]

    def copy(self, target: Tensor, source: Tensor, columns: slice) -> None:
        """Copy the entries `source` over the entries `target`."""
        self.keys[:, target, :, :, columns] = self.keys[:, source, :, :, columns]
        self.values[:, target, :, columns] = self.values[:, source, :, columns]

    def shift(self, first: int, last: int) -> None:
        """Move columns first..last - 1 of all entries to the front."""
        self.keys[..., : last - first] = self.keys[..., first:last].clone()
        self.values[:, :, :, : last - first] = self.values[:, :, :, first:last].clone()


def grown(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Return the tensor, or a copy extended with zeros if its dimension `dim` is shorter than `size`."""
    if tensor.shape[dim] >= size:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = size
    larger = tensor.new_zeros(shape)
    larger.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return larger
