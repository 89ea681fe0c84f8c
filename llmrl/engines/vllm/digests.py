"""Digests of tensors: what was sent, what arrived, and what is served, compared without moving it. Needs no vLLM."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmrl.types import Adapter

if TYPE_CHECKING:
    from torch import Tensor

WORDS = 1 << 16
"""Words of 8 bytes that one product covers; each has its own random factor."""
CHUNK = 64
"""Products computed at once: bounds the memory that a digest needs to some 100 MiB."""

_factors: dict[torch.device, Tensor] = {}


def digest(tensor: Tensor) -> str:
    """Return a digest of a tensor's bytes, computed on its own device.

    Every word of 8 bytes counts with a random odd factor for its place, modulo 2^64, so any single change changes the
    result, and many changes cancel each other once in 2^32 times at most. That is for accidents, not for attackers.
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8 or len(flat) % 8:
        flat = torch.cat([flat, flat.new_zeros(-len(flat) % 8)])
    words = flat.view(torch.int64)
    factors = _factors_on(words.device)
    sums = []
    for start in range(0, len(words), CHUNK * WORDS):
        part = words[start : start + CHUNK * WORDS]
        part = (part >> 31) ^ part  # so that high bits are mixed with low ones, which a product alone never does
        whole = len(part) // WORDS * WORDS
        sums.append((part[:whole].view(-1, WORDS) * factors).sum(1))
        sums.append((part[whole:] * factors[: len(part) - whole]).sum(0, keepdim=True))
    totals = torch.cat(sums).cpu().numpy().tobytes() if sums else b""
    return hashlib.blake2b(totals + str((tensor.dtype, tuple(tensor.shape))).encode(), digest_size=12).hexdigest()


def digests(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Return the digest of each tensor by its name."""
    return {name: digest(tensor) for name, tensor in tensors}


def combined(parts: Mapping[str, str]) -> str:
    """Return one digest of many."""
    return hashlib.blake2b(json.dumps(sorted(parts.items())).encode(), digest_size=12).hexdigest()


@dataclass(frozen=True, slots=True)
class Sent:
    """Digests of weights or of an adapter, as the learner has them."""

    parts: dict[str, str]
    """By name; for an adapter, its configuration too."""
    as_served: str | None
    """Of all of them in the type that is served. None if vLLM also rounds them in another way."""


def sent_weights(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype, *, quantized: bool) -> Sent:
    """Compute the digests of weights that are served in `dtype`."""
    parts: dict[str, str] = {}
    same = True
    for name, tensor in weights:
        parts[name] = digest(tensor)
        same = same and (tensor.dtype == dtype or not tensor.is_floating_point())
    return Sent(parts, combined(parts) if same and not quantized else None)


def sent_adapter(adapter: Adapter, dtype: torch.dtype) -> Sent:
    """Compute the digests of an adapter that is served in `dtype`."""
    rounded = Adapter(config=adapter.config, tensors={name: t.to(dtype) for name, t in adapter.tensors.items()})
    return Sent(adapter_digests(adapter), combined(adapter_digests(rounded)))


def adapter_digests(adapter: Adapter) -> dict[str, str]:
    """Return the digest of each tensor of an adapter, and of its configuration."""
    config = hashlib.blake2b(json.dumps(adapter.config, sort_keys=True).encode(), digest_size=12).hexdigest()
    return digests(adapter.tensors.items()) | {"adapter_config.json": config}


def differences(found: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """Return the names whose digests differ, or that only one side has."""
    return [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]


class Held:
    """What one engine or server holds, compared with what it was sent, push after push.

    It holds weights in a form of its own (joined, packed), so their digest is never that of what was sent. But other
    weights have to give another digest: if one returns that belongs to other weights, a push has not arrived.
    """

    def __init__(self) -> None:
        self.served: dict[str, str] = {}
        """What was sent, by the digest of what was then served."""

    def weights(self, sent: Sent, answers: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return the names of tensors that workers do not hold; `answers` are what `llmrl_held` returned on each."""
        different: list[str] = []
        for answer in answers:
            if answer["received"] is not None:
                different += differences(answer["received"], sent.parts)
        served = [answer["served"] for answer in answers]
        if not different and sent.as_served is not None and None not in served and self._is_stale(sent, served):
            return [*sent.parts]
        return list(dict.fromkeys(different))

    def adapter(self, sent: Sent, answers: Sequence[Mapping[str, Any]]) -> list[str]:
        """Do the same for the adapter that was loaded last."""
        adapters = [answer["adapters"] for answer in answers]
        if not all(adapters):
            return ["the adapter itself"]
        newest = [found[max(found, key=int)] for found in adapters]
        return [*sent.parts] if self._is_stale(sent, newest) else []

    def _is_stale(self, sent: Sent, served: Sequence[str]) -> bool:
        assert sent.as_served is not None
        return self.served.setdefault(combined({str(i): part for i, part in enumerate(served)}), sent.as_served) != (
            sent.as_served
        )


def _factors_on(device: torch.device) -> Tensor:
    if device not in _factors:
        numbers = np.random.Generator(np.random.Philox(key=0)).integers(-(1 << 63), 1 << 63, WORDS, dtype=np.int64) | 1
        _factors[device] = torch.from_numpy(numbers).to(device)
    return _factors[device]
