"""Digests of tensors: what was sent, what arrived, and what is served, compared without moving it. Needs no vLLM."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    as_served: dict[str, str] | None
    """The same in the form that is served. None for weights that vLLM also rounds in another way."""


def sent_weights(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype, *, quantized: bool) -> Sent:
    """Compute the digests of weights that are served in `dtype`."""
    parts: dict[str, str] = {}
    same = True
    for name, tensor in weights:
        parts[name] = digest(tensor)
        same = same and (tensor.dtype == dtype or not tensor.is_floating_point())
    return Sent(parts, parts if same and not quantized else None)


def loaded_digest(tensor: Tensor, dtype: torch.dtype) -> str:
    """Return the digest of a tensor of the base as it is used in `dtype`, whatever type its file has."""
    return digest(tensor.to(dtype) if tensor.is_floating_point() else tensor)


def sent_base(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> dict[str, str]:
    """Return the `loaded_digest` of each tensor that `dtype` does not hold more exactly than the learner does."""
    return {
        name: loaded_digest(tensor, dtype)
        for name, tensor in weights
        if not tensor.is_floating_point() or tensor.dtype.itemsize >= dtype.itemsize
    }


def sent_adapter(adapter: Adapter, dtype: torch.dtype) -> Sent:
    """Compute the digests of an adapter that is served in `dtype`.

    vLLM holds lora_A as it is and lora_B times the scaling, without "base_model.model." and ".weight" in their names.
    """
    rank, alpha = adapter.config["r"], adapter.config["lora_alpha"]
    scaling = alpha / (math.sqrt(rank) if adapter.config.get("use_rslora") else rank)
    held: dict[str, str] = {}
    for name, tensor in adapter.tensors.items():
        rounded = tensor.to(dtype)
        if ".lora_B." in name and scaling != 1:
            rounded = rounded * scaling
        held[name.removeprefix("base_model.model.").removesuffix(".weight")] = digest(rounded)
    return Sent(adapter_digests(adapter), held)


def adapter_digests(adapter: Adapter) -> dict[str, str]:
    """Return the digest of each tensor of an adapter, and of its configuration."""
    config = hashlib.blake2b(json.dumps(adapter.config, sort_keys=True).encode(), digest_size=12).hexdigest()
    return digests(adapter.tensors.items()) | {"adapter_config.json": config}


def differences(found: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """Return the names whose digests differ, or that only one side has."""
    return [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]


class Held:
    """What one engine or server holds, compared with what it was sent, push after push.

    Tensors that it held as they were sent must be held so again. Others it has joined, divided or transformed, and
    their digests are never those of what was sent; but where that has changed, what holds it must have changed too, and
    a digest that belongs to earlier weights must not return. Adapters and the base under them are compared directly.
    """

    def __init__(self) -> None:
        self.alike: set[str] = set()
        """Names of tensors that were once held as they were sent."""
        self.served: dict[str, str] = {}
        """What was sent, by the digest of what was then served."""
        self.before: list[tuple[Mapping[str, str], Mapping[str, str]]] = []
        """What was sent last and what each worker then held, by name."""

    def weights(self, sent: Sent, answers: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return the names of tensors that workers do not hold; `answers` are what `llmrl_held` returned on each."""
        different: list[str] = []
        for answer in answers:
            if answer["received"] is not None:
                different += differences(answer["received"], sent.parts)
            different += answer["outdated"]
        parts = [answer["served"] for answer in answers]
        if not different and sent.as_served is not None and None not in parts:
            different = self._unlike(sent.as_served, answers)
            if not different and self._is_stale(combined(sent.as_served), parts):
                different = [*sent.parts]
        return list(dict.fromkeys(different))

    def _unlike(self, sent: Mapping[str, str], answers: Sequence[Mapping[str, Any]]) -> list[str]:
        different: list[str] = []
        for i, answer in enumerate(answers):
            held: Mapping[str, str] = answer["served"]
            alike = {name for name, part in sent.items() if held.get(name) == part}
            different += [name for name in sent if name in self.alike and name in held and name not in alike]
            self.alike |= alike
            sent_before, held_before = self.before[i] if i < len(self.before) else ({}, {})
            changed = [name for name, part in sent.items() if sent_before.get(name, part) != part]
            kept = {name for name, part in held.items() if held_before.get(name) == part}
            different += [name for name in changed if not kept.isdisjoint(_holders(name, answer["joined"]))]
        self.before = [(sent, answer["served"]) for answer in answers]
        return different

    def adapter(self, sent: Sent, answers: Sequence[Mapping[str, Any]]) -> list[str]:
        """Do the same for the adapter that was loaded last."""
        assert sent.as_served is not None
        different: list[str] = []
        for answer in answers:
            if not answer["adapters"]:
                return ["the adapter itself"]
            held: dict[str, str] = answer["adapters"][max(answer["adapters"], key=int)]
            found, wanted = _without_experts(held), _without_experts(sent.as_served)
            if found.keys().isdisjoint(wanted):  # an architecture whose modules vLLM calls otherwise
                different += wanted if sorted(found.values()) != sorted(wanted.values()) else []
            else:
                different += differences(found, wanted)
        newest = [answer["adapters"][max(answer["adapters"], key=int)] for answer in answers]
        if not different and self._is_stale(combined(sent.parts), newest):
            different = [*sent.parts]
        return list(dict.fromkeys(different))

    def base(self, sent: Mapping[str, str], answers: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return the names of base weights that were loaded from other numbers than the learner's."""
        different = [
            name
            for answer in answers
            for name, part in (answer["base"] or {}).items()
            if sent.get(name, part) != part  # files may hold more than the model has
        ]
        return list(dict.fromkeys(different))

    def _is_stale(self, sent: str, served: Sequence[Mapping[str, str]]) -> bool:
        key = combined({str(i): combined(part) for i, part in enumerate(served)})
        return self.served.setdefault(key, sent) != sent


def _without_experts(parts: Mapping[str, str]) -> dict[str, str]:
    """Leave out experts, which vLLM joins in a way of its own."""
    return {name: part for name, part in parts.items() if "experts" not in name.split(".")}


def _holders(name: str, joined: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield the names that a worker may hold a tensor under: its own, or that of what it is a part of."""
    yield name
    pieces = name.split(".")
    for whole, parts in joined.items():
        if len(pieces) > 1 and pieces[-2] in parts:
            yield ".".join([*pieces[:-2], whole, pieces[-1]])


def _factors_on(device: torch.device) -> Tensor:
    if device not in _factors:
        numbers = np.random.Generator(np.random.Philox(key=0)).integers(-(1 << 63), 1 << 63, WORDS, dtype=np.int64) | 1
        _factors[device] = torch.from_numpy(numbers).to(device)
    return _factors[device]
