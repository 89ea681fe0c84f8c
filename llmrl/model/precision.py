"""Precision: trained parameters are held in float32, and a model computes in `model.dtype` by casting them.

AdamW needs float32: at a learning rate of 1e-6 a step is smaller than half the distance between two bfloat16 numbers,
so that most weights would never move, and its second moment could not fall. So trained parameters, their gradients
and the optimizer's state are float32. In `compute_in` a model sees casts of them, and computes exactly what the same
model held in that type computes: the same operations on the same numbers as in an engine or in a frozen copy.
Gradients come out in the narrow type and are added up in float32, once per micro-batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmrl.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Place = tuple[nn.Module, str, Any]
"""A module, the name of one of its parameters, and what stands there instead."""


def compute_type(model: nn.Module, name: str, parameter: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the type in which a model that computes in `dtype` uses one of its parameters.

    It is that of the model as transformers loads it: a few architectures keep some parameters in float32, and what is
    not a floating-point number (quantized weights) stays as it is.
    """
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    if not parameter.is_floating_point() or any(part in name for part in kept):
        return parameter.dtype
    return dtype


def own_type(model: nn.Module) -> torch.dtype:
    """Return the type that a loaded model computes in: bfloat16 if any of its parameters has it, else float32.

    Raises:
        UserError: it has floating-point parameters of another type.
    """
    found = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if others := found - {torch.float32, torch.bfloat16}:
        name = str(others.pop()).removeprefix("torch.")
        raise UserError(
            f"the model given has parameters of type {name}, which training does not support: load it with "
            "dtype=torch.bfloat16 or torch.float32"
        )
    return torch.bfloat16 if torch.bfloat16 in found else torch.float32


@torch.no_grad()
def hold(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold a model's trained parameters in float32 and the frozen ones in the type that they are used in.

    Parameters stay the same objects, so what shares them goes on doing so.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            wanted = torch.float32 if parameter.requires_grad else compute_type(model, name, parameter, dtype)
            parameter.data = parameter.data.to(wanted)


@torch.no_grad()
def exact_positions(model: Any) -> None:
    """Compute the frequencies of rotary positions again where `model.to(torch.bfloat16)` rounded them.

    transformers holds these buffers in float32 in every model that it loads, and so do engines. They are not saved.
    """
    for module in model.modules():
        rounded = [name for name in module._non_persistent_buffers_set if module._buffers[name] is not None]
        rounded = [name for name in rounded if module._buffers[name].dtype == torch.bfloat16]
        if rounded and not [*module.parameters()]:
            for name in rounded:
                module._buffers[name] = module._buffers[name].float()
            model._init_weights(module)


class _Casts:
    """Puts casts in the place of parameters inside a `with` block, as often as wanted."""

    def __init__(self, places: list[Place]) -> None:
        self.places = places
        self.held: list[Any] = []

    def __enter__(self) -> None:
        self.held = [module._parameters[name] for module, name, _ in self.places]
        for module, name, cast in self.places:
            module._parameters[name] = cast

    def __exit__(self, *exception: object) -> None:
        for (module, name, _), parameter in zip(self.places, self.held, strict=True):
            module._buffers.pop(name, None)  # where an adapter of a single parameter (peft) has left the cast
            module._parameters[name] = parameter


_current: ContextVar[_Casts | None] = ContextVar("_current", default=None)


@contextlib.contextmanager
def compute_in(dtype: torch.dtype, model: nn.Module) -> Iterator[None]:
    """Let `model` compute in `dtype` inside the block. Gradients reach the parameters themselves, in their own type."""
    casts: dict[int, Tensor] = {}
    places: list[Place] = []
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            wanted = compute_type(model, f"{prefix}.{name}", parameter, dtype)
            if parameter.dtype != wanted:
                if id(parameter) not in casts:
                    casts[id(parameter)] = parameter.to(wanted)
                places.append((module, name, casts[id(parameter)]))
    if not places:
        yield
        return
    swap = _Casts(places)
    token = _current.set(swap)
    try:
        with swap:
            yield
    finally:
        _current.reset(token)


def recompute_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a checkpointed layer's two forward passes: the second one sees the casts of the first.

    It is the `context_fn` of `torch.utils.checkpoint`. The second pass comes after `compute_in` has ended.
    """
    return contextlib.nullcontext(), _current.get() or contextlib.nullcontext()


def checkpoint_gradients(model: Any) -> None:
    """Recompute activations in the backward pass of a transformers model, in the type of the forward pass."""
    options = {"use_reentrant": False, "context_fn": recompute_contexts}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
