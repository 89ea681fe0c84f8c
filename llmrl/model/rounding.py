"""Rounding errors of a model, measured on itself: the same computation in its own type and in a wider one.

Also the text they are measured on: tokens that the model itself draws. On random tokens log-probabilities are around
-15, and errors several times those of the text that a run consists of.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import nn

from llmrl.model.modes import evaluating

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformers import PreTrainedModel

    from llmrl.model.policy import Policy

NUM_PROMPTS, NUM_COMPLETIONS = 2, 4
PROMPT_LENGTH, COMPLETION_LENGTH = 8, 24
"""Tokens. There are `NUM_COMPLETIONS` completions of each prompt, so that layouts with shared prefixes can be tried."""
QUANTIZED = 2.0**-4
"""Largest relative error of rounding to 3 bits behind the point, as 8-bit floating-point numbers have."""


def likely_sequences(policy: Policy) -> list[list[int]]:
    """Return sequences that the policy draws at temperature 1, the same in every run with the same weights.

    There are `NUM_COMPLETIONS` of each prompt. They are drawn once per policy, and kept while it trains.
    """
    if policy.likely is None:
        generator = torch.Generator().manual_seed(0)
        longest = getattr(policy.text_config, "max_position_embeddings", None) or PROMPT_LENGTH + COMPLETION_LENGTH
        ids = torch.randint(policy.vocab_size, (NUM_PROMPTS, 1), generator=generator)
        with evaluating(policy.module), policy.computing():
            ids = draw(policy.causal_lm, ids, min(PROMPT_LENGTH, longest // 2), generator)
            ids = ids.repeat_interleave(NUM_COMPLETIONS, 0)
            ids = draw(policy.causal_lm, ids, min(PROMPT_LENGTH + COMPLETION_LENGTH, longest - 1), generator)
        policy.likely = ids.tolist()
    return policy.likely


@torch.no_grad()
def draw(
    model: PreTrainedModel, ids: Int[Tensor, "B T"], length: int, generator: torch.Generator
) -> Int[Tensor, "B L"]:
    """Extend rows of tokens to `length`, with tokens drawn from the model at temperature 1."""
    called: Any = model
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    while ids.shape[1] < length:
        logits = called(input_ids=ids.to(model.device), use_cache=False, **last).logits[:, -1].float().cpu()
        # NaN is for the comparisons to report, not for the drawing to stumble over.
        probabilities = logits.nan_to_num(nan=0.0).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    return ids


class Typed(Protocol):
    """What computes in a type that can be chosen: a `PolicyModule`, a `Critic`."""

    dtype: torch.dtype


@torch.no_grad()
def rounding_errors(
    owner: Typed,
    model: nn.Module,
    compute: Callable[[], Tensor],
    *,
    dtype: torch.dtype | None = None,
    relative: float | None = None,
    draws: int = 1,
) -> Float[np.ndarray, " n"]:
    """Measure by how much rounding can move what two right computations give, for each of the n numbers.

    One of the two is `compute` as it is. The other is an engine's, which rounds as `dtype` does.

    Args:
        owner: decides in which type `compute` computes.
        model: whose layers it runs.
        compute: gives n numbers, the same every time.
        dtype: type of the other computation. Default: the owner's.
        relative: largest relative error of one rounding in the other computation, if it is not that of its type.
        draws: how often to round differently. Further draws find what a single one missed by chance, such as a token
            that goes to other experts.

    Returns:
        For each number the root mean square of the difference that rounding makes between the two computations.
    """
    other = owner.dtype if dtype is None else dtype
    coarse = max(owner.dtype, other, key=lambda kind: torch.finfo(kind).eps)
    errors: list[Tensor] = []
    try:
        with computing_in(owner, wider(coarse)):
            truth = compute().double()
        with computing_in(owner, coarse):
            errors.append((compute().double() - truth).abs())
    except (RuntimeError, TypeError, NotImplementedError):
        truth, coarse = compute().double(), owner.dtype  # not every device has room for every type, or the type at all
    step = torch.finfo(max(coarse, other, key=lambda kind: torch.finfo(kind).eps)).eps / 2
    for seed in range(draws):
        with computing_in(owner, coarse), _shaken(model, relative or step, seed):
            errors.append((compute().double() - truth).abs())
    # Errors of two computations are independent, so their squares add up.
    sides = 2 if owner.dtype.itemsize == other.itemsize and relative is None else 1
    return torch.stack(errors).square().mean(0).mul(sides).sqrt().cpu().numpy()


def wider(dtype: torch.dtype) -> torch.dtype:
    """Return a type whose rounding is nothing beside that of `dtype`."""
    return torch.float32 if dtype.itemsize == 2 else torch.float64


@contextlib.contextmanager
def computing_in(owner: Typed, dtype: torch.dtype) -> Generator[None]:
    """Let its owner compute in another type inside the block."""
    before, owner.dtype = owner.dtype, dtype
    try:
        yield
    finally:
        owner.dtype = before


@contextlib.contextmanager
def _shaken(model: nn.Module, relative: float, seed: int) -> Generator[None]:
    """Multiply what every block gives by numbers between 1 - relative and 1 + relative, as other rounding would."""
    generators: dict[torch.device, torch.Generator] = {}

    def shake(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if not isinstance(hidden, torch.Tensor):
            return output
        if hidden.device not in generators:
            generators[hidden.device] = torch.Generator(hidden.device).manual_seed(seed)
        numbers = torch.rand(
            hidden.shape, generator=generators[hidden.device], device=hidden.device, dtype=torch.float32
        )
        moved = (hidden * (1 + relative * (2 * numbers - 1))).to(hidden.dtype)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    hooks = [block.register_forward_hook(shake) for block in _blocks(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the decoder's blocks: the longest list of modules, by parameters."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    sizes = [sum(parameter.numel() for parameter in found.parameters()) for found in lists]
    return list(lists[int(np.argmax(sizes))]) if lists else []
