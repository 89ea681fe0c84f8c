"""What is random in a model: dropout and its like, switched off where probabilities are computed.

Dropout would make an optimizer step see another model than the one whose probabilities it compares with: ratios would
differ from 1, and the divergence from the reference from 0, before anything has moved.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Iterator
from typing import Any

from torch import nn

RANDOM = re.compile(r"drop|jitter")
"""In the names of settings that are a probability or a strength."""


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Generator[None]:
    """Switch off inside the block what is random in training, and restore the modes of all parts afterwards."""
    before = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


@contextlib.contextmanager
def optimizing(module: nn.Module, *, dropout: bool) -> Generator[None]:
    """Prepare a module for passes with gradient inside the block.

    Args:
        module: what is trained.
        dropout: leave on what is random in training. Without it the module computes exactly what it does in evaluation;
            layers whose activations are recomputed are in training mode only where transformers asks for it.
    """
    with evaluating(module):
        if dropout:
            module.train()
            yield
            return
        hooks: list[Any] = []
        for layer in _recomputed(module):
            layer.training = True
            hooks.append(layer.register_forward_pre_hook(lambda layer, _: layer.train(False) and None))
            hooks.append(layer.register_forward_hook(_after_forward, always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _after_forward(layer: nn.Module, *_: Any) -> None:
    layer.training = True


def _recomputed(module: nn.Module) -> list[nn.Module]:
    """Return the layers whose activations are recomputed in the backward pass."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    flagged = [part for part in module.modules() if getattr(part, "gradient_checkpointing", False)]
    return [part for part in flagged if isinstance(part, GradientCheckpointingLayer)]


def random_parts(module: nn.Module) -> list[str]:
    """Return the names of settings of a model that make its training passes random, each with its value."""
    found: dict[str, float] = {}
    for part in module.modules():
        if isinstance(part, nn.Dropout) and part.p > 0:
            found["dropout"] = max(part.p, found.get("dropout", 0.0))
        if (config := getattr(part, "config", None)) is not None:
            found |= dict(_settings(config))
    return [f"{name} {value:g}" for name, value in sorted(found.items())]


def _settings(config: Any) -> Iterator[tuple[str, float]]:
    for name, value in getattr(config, "__dict__", {}).items():
        if RANDOM.search(name) and isinstance(value, float) and value > 0:
            yield name, value
