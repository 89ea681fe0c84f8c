"""Hidden states -> log-probabilities and entropies of given tokens, without ever holding all logits.

The output head is the largest matrix product of small models and its [tokens, V] result the largest tensor. Here it is
computed for trained positions only, a few rows at a time, and once more in the backward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int
    from torch import Tensor

MAX_LOGITS = 2**24
"""Logits held at once (64 MiB in float32); at least 16 rows whatever the vocabulary."""


def token_logprobs(
    hidden: Float[Tensor, "M H"],
    weight: Float[Tensor, "V H"],
    targets: Int[Tensor, " M"],
    *,
    temperature: float = 1.0,
    bias: Float[Tensor, " V"] | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"]]:
    """Log-probability of `targets` and entropy of the whole distribution, in float32, both differentiable.

        logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap) / temperature

    Args:
        hidden: hidden state (after the final norm) of the position that predicts each target.
        weight: the output head.
        targets: token ids.
        temperature: the one the tokens were sampled at.
        bias: of the output head, where it has one.
        softcap: Gemma-2 style bound on the logits.
        scale: constant factor some architectures put on their logits.

    Returns:
        (log-probabilities, entropies in nats).
    """
    hidden = _rounded(hidden)
    constants = (temperature, softcap, scale)
    with torch.autocast(hidden.device.type, enabled=False):
        return _Head.apply(hidden, weight, bias, targets, constants, None)[:2]  # pyright: ignore


def token_logprobs_and_kl(
    hidden: Float[Tensor, "M H"],
    weight: Float[Tensor, "V H"],
    targets: Int[Tensor, " M"],
    reference: tuple[Float[Tensor, "M R"], Float[Tensor, "V R"], Float[Tensor, " V"] | None],
    *,
    temperature: float = 1.0,
    bias: Float[Tensor, " V"] | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"], Float[Tensor, " M"]]:
    """What `token_logprobs` gives, and KL(policy || reference) of each whole distribution (nats), differentiable too.

    `reference` is the other model's hidden states, output head and its bias, which get no gradient; the other arguments
    are those of `token_logprobs` and hold for both models.
    """
    other_hidden, other_weight, other_bias = reference
    reference = (_rounded(other_hidden).detach(), other_weight.detach(), other_bias)
    hidden, constants = _rounded(hidden), (temperature, softcap, scale)
    with torch.autocast(hidden.device.type, enabled=False):
        return _Head.apply(hidden, weight, bias, targets, constants, reference)  # pyright: ignore[reportReturnType]


@torch.no_grad()
def token_collisions(
    hidden: Float[Tensor, "M H"],
    weight: Float[Tensor, "V H"],
    *,
    temperature: float = 1.0,
    bias: Float[Tensor, " V"] | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Float[Tensor, " M"]:
    """sum_v p(v)^2 of each next-token distribution, without gradient. The arguments are those of `token_logprobs`."""
    hidden = _rounded(hidden)
    collisions = hidden.new_empty(len(hidden), dtype=torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in _chunks(len(hidden), len(weight)):
            logits, _ = _logits(hidden[rows], weight, bias, (temperature, softcap, scale))
            collisions[rows] = logits.softmax(dim=1).square_().sum(dim=1)
    return collisions


@torch.no_grad()
def restricted_probabilities(
    hidden: Float[Tensor, "M H"],
    weight: Float[Tensor, "V H"],
    logprobs: Float[Tensor, " M"],
    vocabulary: Int[Tensor, " W"],
    columns: Int[Tensor, " M"],
    *,
    temperature: float = 1.0,
    bias: Float[Tensor, " V"] | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Float[Tensor, "M W"]:
    """Probabilities of the tokens in `vocabulary` alone, without gradient and without the logits of the others.

    p(v) = p(y) exp(z(v) - z(y)): the log-probability of the target y stands for the sum over the whole vocabulary.

    `logprobs` are those of each row's target, which is at `columns` of `vocabulary`; the other arguments are those of
    `token_logprobs`.
    """
    hidden = _rounded(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if bias is None else bias[vocabulary]
        logits, _ = _logits(hidden, weight[vocabulary], bias, (temperature, softcap, scale))
        return logits.add_((logprobs - logits.gather(1, columns[:, None])[:, 0])[:, None]).exp_()


def _rounded(hidden: Tensor) -> Tensor:
    """Hidden states in autocast's type: the backward pass computes logits again, outside autocast, from these."""
    device = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden


@torch.no_grad()
def greedy_tokens(
    hidden: Float[Tensor, "M H"],
    weight: Float[Tensor, "V H"],
    *,
    temperature: float = 1.0,
    bias: Float[Tensor, " V"] | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Int[Tensor, " M"]:
    """The most probable next token; the arguments are those of `token_logprobs`."""
    hidden = _rounded(hidden)
    tokens = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in _chunks(len(hidden), len(weight)):
            tokens[rows] = _logits(hidden[rows], weight, bias, (temperature, softcap, scale))[0].argmax(1)
    return tokens


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        constants: tuple[float, float | None, float],
        reference: tuple[Tensor, Tensor, Tensor | None] | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        logprobs = hidden.new_empty(len(hidden), dtype=torch.float32)
        entropies, normalisers = torch.empty_like(logprobs), torch.empty_like(logprobs)
        divergences = None if reference is None else torch.empty_like(logprobs)
        for rows in _chunks(len(hidden), len(weight)):
            logits, _ = _logits(hidden[rows], weight, bias, constants)
            highest = logits.amax(dim=1, keepdim=True)
            unnormalised = (logits - highest).exp_()
            total = unnormalised.sum(dim=1)
            normaliser = highest[:, 0] + total.log()
            normalisers[rows] = normaliser
            logprobs[rows] = logits.gather(1, targets[rows, None])[:, 0] - normaliser
            entropies[rows] = normaliser - torch.linalg.vecdot(unnormalised, logits) / total
            if reference is not None and divergences is not None:
                other = _reference_logprobs(reference, rows, constants)
                divergences[rows] = -entropies[rows] - torch.linalg.vecdot(unnormalised, other) / total
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers, entropies, divergences, *(reference or ()))
        ctx.constants = constants
        ctx.set_materialize_grads(False)  # so that an entropy nobody differentiates costs nothing
        return logprobs, entropies, divergences

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalisers, entropies, divergences, *reference = ctx.saved_tensors
        grad_logprobs = torch.zeros_like(normalisers) if grads[0] is None else grads[0]
        grad_entropies, grad_divergences = grads[1:]
        temperature, _, scale = ctx.constants
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        for rows in _chunks(len(hidden), len(weight)):
            logits, slope = _logits(hidden[rows], weight, bias, ctx.constants)
            log_p = logits.sub_(normalisers[rows, None])
            grad = log_p.exp()
            factor = grad_logprobs[rows, None]
            if grad_divergences is not None:  # dKL / d logit = p * (log p - log q - KL)
                gap = log_p - _reference_logprobs(reference, rows, ctx.constants)
                factor = gap.sub_(divergences[rows, None]).mul_(-grad_divergences[rows, None]).add_(factor)
            if grad_entropies is not None:  # dH / d logit = -p * (log p + H)
                factor = log_p.add_(entropies[rows, None]).mul_(grad_entropies[rows, None]).add_(factor)
            grad.mul_(factor).neg_()
            grad.scatter_add_(1, targets[rows, None], grad_logprobs[rows, None])
            grad.mul_(scale / temperature)
            if slope is not None:
                grad.mul_(slope)
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight.to(hidden.dtype), out=grad_hidden[rows])
            if grad_weight is not None:
                if hidden.dtype == torch.float32:
                    grad_weight.addmm_(grad.T, hidden[rows])
                else:
                    grad_weight += (grad.T @ hidden[rows]).float()
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _reference_logprobs(
    reference: Sequence[Tensor | None], rows: slice, constants: tuple[float, float | None, float]
) -> Tensor:
    """Log-probabilities of the whole vocabulary for a few rows: (hidden states, head, bias) of the other model."""
    hidden, weight, bias = reference
    assert hidden is not None and weight is not None
    logits, _ = _logits(hidden[rows], weight, bias, constants)
    return logits.sub_(logits.logsumexp(dim=1, keepdim=True))


def _chunks(num_rows: int, vocabulary: int) -> list[slice]:
    size = max(16, MAX_LOGITS // vocabulary)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, constants: tuple[float, float | None, float]
) -> tuple[Tensor, Tensor | None]:
    """Float32 logits of a few rows, divided by the temperature, and the derivative of the soft cap."""
    temperature, softcap, scale = constants
    logits = (hidden @ weight.to(hidden.dtype).T).float()
    if bias is not None:
        logits += bias.float()
    if softcap is None:
        return logits.mul_(scale / temperature), None
    bounded = logits.mul_(scale / softcap).tanh_()
    return bounded * (softcap / temperature), 1 - bounded.square()
