"""Hidden states -> log-probabilities and entropies of given tokens, without ever holding all logits.

The output head is the largest matrix product of small models and its [tokens, V] result the largest tensor. Here it is
computed for trained positions only, a few rows at a time, and once more in the backward pass.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

MAX_LOGITS = 2**24
"""Logits held at once on a CPU (64 MiB in float32), whose caches hold no more. A chunk has at least 16 rows, however
large the vocabulary is."""
MAX_LOGITS_GPU = 2**28
"""The same on a GPU, where each chunk reads the whole weight and adds to its whole gradient. On an H200 forward and
backward of 16,384 rows (H 896, V 151,936) take 260 ms with 2**24, 142 with 2**26, 114 with 2**28, 109 with 2**29."""
BYTES_PER_LOGIT = 16
"""What a chunk takes of a GPU's memory: two tensors in float32, one in bfloat16, and what an operation needs."""
MEMORY_SHARE = 16
"""A chunk takes at most 1 / 16 of a GPU's whole memory. What happens to be free has no say: the size of a chunk decides
the order of sums, and a run is to be repeatable."""


HEAD_DTYPE = "head_dtype"
"""Entry of a model's configuration, by vLLM's name: "float32" keeps logits in float32. It is saved with the model."""


def keep_logits_in_float32(model: Any) -> None:
    """Mark a transformers model (with or without adapters), for the policy and every engine."""
    setattr(model.config, HEAD_DTYPE, "float32")


def keeps_logits_in_float32(config: Any) -> bool:
    """Return whether the model of this configuration is marked."""
    return getattr(config, HEAD_DTYPE, None) in ("float32", torch.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """The output head of a language model: hidden state -> distribution over the next token.

    logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap) / temperature
    """

    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None = None
    softcap: float | None = None
    """Bound on the logits, as in Gemma 2; None where there is none."""
    scale: float = 1.0
    """Constant factor that some architectures put on their logits."""
    temperature: float = 1.0
    """The temperature the tokens were sampled at."""
    float32: bool = False
    """Keep the products of bfloat16 hidden states and weights in float32; else they are rounded to bfloat16."""

    @property
    def constants(self) -> Constants:
        """Everything but the tensors."""
        return Constants(self.temperature, self.softcap, self.scale, self.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceHead:
    """What the reference model sees of the same tokens. Nothing in it gets a gradient."""

    hidden: Float[Tensor, "M R"]
    """Its hidden states at the positions that predict the tokens."""
    head: Head


class Constants(NamedTuple):
    """The numbers of a `Head`. Its tensors travel apart from them, because autograd has to see them as arguments."""

    temperature: float
    softcap: float | None
    scale: float
    float32: bool


class Operands(NamedTuple):
    """What logits are computed from, in the types that are multiplied. They are made once, not for each chunk."""

    hidden: Float[Tensor, "M H"]
    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None
    constants: Constants


def token_logprobs(
    hidden: Float[Tensor, "M H"], head: Head, targets: Int[Tensor, " M"]
) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"]]:
    """Compute the log-probability of each target and the entropy of its whole distribution.

    Both are float32 and differentiable in `hidden` and in the head's tensors.

    Args:
        hidden: hidden state (after the final norm) of the position that predicts each target.
        head: the output head.
        targets: token ids.

    Returns:
        (log-probabilities, entropies in nats).
    """
    logprobs, entropies, _ = _apply(hidden, head, targets, None)
    return logprobs, entropies


def token_logprobs_and_kl(
    hidden: Float[Tensor, "M H"], head: Head, targets: Int[Tensor, " M"], reference: ReferenceHead
) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"], Float[Tensor, " M"]]:
    """Compute what `token_logprobs` gives and KL(policy || reference) of each whole distribution, in nats.

    The divergence is differentiable in the policy, as the other two are.
    """
    logprobs, entropies, divergences = _apply(hidden, head, targets, reference)
    assert divergences is not None
    return logprobs, entropies, divergences


@torch.no_grad()
def token_collisions(hidden: Float[Tensor, "M H"], head: Head) -> Float[Tensor, " M"]:
    """Compute sum_v p(v)^2 of each next-token distribution, without gradient."""
    collisions = hidden.new_empty(len(hidden), dtype=torch.float32)
    operands = _operands(_rounded(hidden), head.weight, head.bias, head.constants)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in _chunks(operands):
            collisions[rows] = _logits(operands, rows)[0].softmax(dim=1).square_().sum(dim=1)
    return collisions


@torch.no_grad()
def greedy_tokens(hidden: Float[Tensor, "M H"], head: Head) -> Int[Tensor, " M"]:
    """Return the most probable next token after each hidden state."""
    tokens = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device)
    operands = _operands(_rounded(hidden), head.weight, head.bias, head.constants)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in _chunks(operands):
            tokens[rows] = _logits(operands, rows)[0].argmax(1)
    return tokens


@torch.no_grad()
def restricted_probabilities(
    hidden: Float[Tensor, "M H"],
    head: Head,
    logprobs: Float[Tensor, " M"],
    vocabulary: Int[Tensor, " W"],
    columns: Int[Tensor, " M"],
) -> Float[Tensor, "M W"]:
    """Compute the probabilities of a few tokens, without gradient and without the logits of all others.

        p(v) = p(y) exp(z(v) - z(y))

    The known log-probability of the target y stands for the sum over the whole vocabulary.

    Args:
        hidden: as in `token_logprobs`.
        head: the output head.
        logprobs: log-probability of each row's target.
        vocabulary: the W tokens that are asked for.
        columns: the place of each row's target in `vocabulary`.
    """
    bias = None if head.bias is None else head.bias[vocabulary]
    operands = _operands(_rounded(hidden), head.weight[vocabulary], bias, head.constants)
    with torch.autocast(hidden.device.type, enabled=False):
        logits, _ = _logits(operands, slice(None))
        return logits.add_((logprobs - logits.gather(1, columns[:, None])[:, 0])[:, None]).exp_()


def float32_product(hidden: Float[Tensor, "M H"], weight: Float[Tensor, "V H"]) -> Float[Tensor, "M V"]:
    """Compute hidden @ weight.T in float32, from operands in bfloat16 too, whose products are then not rounded."""
    if hidden.dtype == torch.float32 or not _multiplies_into_float32(hidden.device.type):
        return hidden.float() @ weight.float().T
    return torch.mm(hidden, weight.to(hidden.dtype).T, out_dtype=torch.float32)


def _apply(
    hidden: Tensor, head: Head, targets: Tensor, reference: ReferenceHead | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    hidden, other = _rounded(hidden), None
    if reference is not None:
        theirs = reference.head
        other = Operands(_rounded(reference.hidden).detach(), theirs.weight.detach(), theirs.bias, theirs.constants)
    with torch.autocast(hidden.device.type, enabled=False):
        return _TokenLogprobs.apply(hidden, head.weight, head.bias, targets, head.constants, other)  # pyright: ignore


def _rounded(hidden: Tensor) -> Tensor:
    """Return hidden states in autocast's type.

    The backward pass computes the logits again, outside autocast, and has to start from the same numbers.
    """
    device = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden


class _TokenLogprobs(torch.autograd.Function):
    """Log-probabilities, entropies and divergences, a few rows at a time; logits are computed again going backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        constants: Constants,
        reference: Operands | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        logprobs = hidden.new_empty(len(hidden), dtype=torch.float32)
        entropies, normalisers = torch.empty_like(logprobs), torch.empty_like(logprobs)
        divergences = None if reference is None else torch.empty_like(logprobs)
        operands = _operands(hidden, weight, bias, constants)
        other = None if reference is None else _operands(*reference)
        for rows in _chunks(operands):
            logits, _ = _logits(operands, rows)
            highest = logits.amax(dim=1, keepdim=True)
            unnormalised = (logits - highest).exp_()
            total = unnormalised.sum(dim=1)
            normaliser = highest[:, 0] + total.log()
            normalisers[rows] = normaliser
            logprobs[rows] = logits.gather(1, targets[rows, None])[:, 0] - normaliser
            entropies[rows] = normaliser - torch.linalg.vecdot(unnormalised, logits) / total
            if other is not None and divergences is not None:
                theirs = _whole_logprobs(other, rows)
                divergences[rows] = -entropies[rows] - torch.linalg.vecdot(unnormalised, theirs) / total
        tensors = () if reference is None else reference[:3]
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers, entropies, divergences, *tensors)
        ctx.constants, ctx.reference_constants = constants, None if reference is None else reference.constants
        ctx.set_materialize_grads(False)  # an entropy that nobody differentiates then costs nothing
        return logprobs, entropies, divergences

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalisers, entropies, divergences, *reference = ctx.saved_tensors
        outer = ctx.constants.scale / ctx.constants.temperature
        grad_logprobs = (torch.zeros_like(normalisers) if grads[0] is None else grads[0] * outer)[:, None]
        grad_entropies, grad_divergences = (None if g is None else (g * outer)[:, None] for g in grads[1:])
        operands, other = _operands(hidden, weight, bias, ctx.constants), None
        if grad_divergences is not None:
            other = _operands(reference[0], reference[1], reference[2], ctx.reference_constants)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(operands.hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        for rows in _chunks(operands):
            logits, slope = _logits(operands, rows)
            log_p = logits.sub_(normalisers[rows, None])
            grad = log_p.exp()
            factor = -grad_logprobs[rows]
            if other is not None and grad_divergences is not None:  # dKL / d logit = p * (log p - log q - KL)
                gap = log_p - _whole_logprobs(other, rows)
                factor = gap.sub_(divergences[rows, None]).mul_(grad_divergences[rows]).add_(factor)
            if grad_entropies is not None:  # dH / d logit = -p * (log p + H)
                factor = log_p.add_(entropies[rows, None]).mul_(-grad_entropies[rows]).add_(factor)
            grad.mul_(factor).scatter_add_(1, targets[rows, None], grad_logprobs[rows])
            if slope is not None:
                grad.mul_(slope)
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0)
            grad = grad.to(operands.hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, operands.weight, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product(grad_weight, grad.T, operands.hidden[rows])
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _operands(hidden: Tensor, weight: Tensor, bias: Tensor | None, constants: Constants) -> Operands:
    """Bring the operands into the type that they are multiplied in."""
    if constants.float32 and not _multiplies_into_float32(hidden.device.type):
        hidden = hidden.float()
    return Operands(hidden, weight.to(hidden.dtype), None if bias is None else bias.float(), constants)


def _whole_logprobs(operands: Operands, rows: slice) -> Tensor:
    """Compute log-probabilities of the whole vocabulary for a few rows."""
    logits, _ = _logits(operands, rows)
    return logits.sub_(logits.logsumexp(dim=1, keepdim=True))


def _chunks(operands: Operands) -> list[slice]:
    num_rows, vocabulary = len(operands.hidden), len(operands.weight)
    size = max(16, max_logits(operands.hidden.device) // vocabulary)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def max_logits(device: torch.device) -> int:
    """Return how many logits are held at once on a device. It depends on nothing but the kind of device."""
    if device.type != "cuda":
        return MAX_LOGITS
    bound = torch.cuda.get_device_properties(device).total_memory // (MEMORY_SHARE * BYTES_PER_LOGIT)
    return min(MAX_LOGITS_GPU, max(MAX_LOGITS, bound))


def _logits(operands: Operands, rows: slice) -> tuple[Tensor, Tensor | None]:
    """Compute float32 logits of a few rows, divided by the temperature, and the derivative of the soft cap."""
    hidden, weight, bias, (temperature, softcap, scale, float32) = operands
    logits = float32_product(hidden[rows], weight) if float32 else (hidden[rows] @ weight.T).float()
    if bias is not None:
        logits += bias
    if softcap is None:
        return (logits if scale == temperature else logits.mul_(scale / temperature)), None
    bounded = logits.mul_(scale / softcap).tanh_()
    return bounded * (softcap / temperature), 1 - bounded.square()


def _add_product(total: Float[Tensor, "V H"], a: Float[Tensor, "V m"], b: Float[Tensor, "m H"]) -> None:
    """Add a @ b to a sum in float32, where possible without a matrix of the sum's size in between."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif _multiplies_into_float32(total.device.type):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b


@functools.cache
def _multiplies_into_float32(device_type: str) -> bool:
    """Return whether a kind of device adds products of bfloat16 matrices to a float32 one. CPUs do not, GPUs may."""
    total = torch.ones(16, 16, device=device_type)
    a = torch.ones(16, 16, device=device_type, dtype=torch.bfloat16)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
        return bool((total == 17).all()) and torch.mm(a, a, out_dtype=torch.float32).dtype == torch.float32
    except (RuntimeError, TypeError):  # no such kernel, or no such argument
        return False
