"""Hidden states -> log-probabilities and entropies of given tokens, without ever holding all logits.

The output head is the largest matrix product of small models and its [tokens, V] result the largest tensor. Here it is
computed for trained positions only, a few rows at a time, and once more in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int
    from torch import Tensor

MAX_LOGITS = 2**24
"""Logits held at once (64 MiB in float32). A chunk has at least 16 rows, however large the vocabulary is."""


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

    @property
    def constants(self) -> Constants:
        """Everything but the tensors."""
        return Constants(self.temperature, self.softcap, self.scale)


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
    hidden = _rounded(hidden)
    collisions = hidden.new_empty(len(hidden), dtype=torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in _chunks(len(hidden), len(head.weight)):
            logits, _ = _logits(hidden[rows], head.weight, head.bias, head.constants)
            collisions[rows] = logits.softmax(dim=1).square_().sum(dim=1)
    return collisions


@torch.no_grad()
def greedy_tokens(hidden: Float[Tensor, "M H"], head: Head) -> Int[Tensor, " M"]:
    """Return the most probable next token after each hidden state."""
    hidden = _rounded(hidden)
    tokens = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in _chunks(len(hidden), len(head.weight)):
            tokens[rows] = _logits(hidden[rows], head.weight, head.bias, head.constants)[0].argmax(1)
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
    hidden = _rounded(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if head.bias is None else head.bias[vocabulary]
        logits, _ = _logits(hidden, head.weight[vocabulary], bias, head.constants)
        return logits.add_((logprobs - logits.gather(1, columns[:, None])[:, 0])[:, None]).exp_()


def _apply(
    hidden: Tensor, head: Head, targets: Tensor, reference: ReferenceHead | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    hidden, other = _rounded(hidden), None
    if reference is not None:
        theirs = reference.head
        other = (_rounded(reference.hidden).detach(), theirs.weight.detach(), theirs.bias, theirs.constants)
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
        reference: tuple[Tensor, Tensor, Tensor | None, Constants] | None,
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
                other = _reference_logprobs(reference[:3], rows, reference[3])
                divergences[rows] = -entropies[rows] - torch.linalg.vecdot(unnormalised, other) / total
        tensors = () if reference is None else reference[:3]
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers, entropies, divergences, *tensors)
        ctx.constants, ctx.reference_constants = constants, None if reference is None else reference[3]
        ctx.set_materialize_grads(False)  # an entropy that nobody differentiates then costs nothing
        return logprobs, entropies, divergences

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalisers, entropies, divergences, *reference = ctx.saved_tensors
        grad_logprobs = torch.zeros_like(normalisers) if grads[0] is None else grads[0]
        grad_entropies, grad_divergences = grads[1:]
        temperature, scale = ctx.constants.temperature, ctx.constants.scale
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
                gap = log_p - _reference_logprobs(reference, rows, ctx.reference_constants)
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


def _reference_logprobs(reference: Sequence[Tensor | None], rows: slice, constants: Constants) -> Tensor:
    """Compute log-probabilities of the whole vocabulary for a few rows of (hidden states, weight, bias)."""
    hidden, weight, bias = reference
    assert hidden is not None and weight is not None
    logits, _ = _logits(hidden[rows], weight, bias, constants)
    return logits.sub_(logits.logsumexp(dim=1, keepdim=True))


def _chunks(num_rows: int, vocabulary: int) -> list[slice]:
    size = max(16, MAX_LOGITS // vocabulary)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, constants: Constants) -> tuple[Tensor, Tensor | None]:
    """Compute float32 logits of a few rows, divided by the temperature, and the derivative of the soft cap."""
    temperature, softcap, scale = constants
    logits = (hidden @ weight.to(hidden.dtype).T).float()
    if bias is not None:
        logits += bias.float()
    if softcap is None:
        return logits.mul_(scale / temperature), None
    bounded = logits.mul_(scale / softcap).tanh_()
    return bounded * (softcap / temperature), 1 - bounded.square()
