"""The clipped surrogate on both sides of both bounds: values, gradients, masks."""

from __future__ import annotations

import math

import torch

from llmrl.algo.ops.losses import clip_masks, clipped_surrogate, token_ratio

BOUNDS = {"epsilon": 0.2, "epsilon_high": 0.28}
RATIO = [0.5, 0.8, 1.0, 1.28, 1.5, 0.5, 0.8, 1.0, 1.28, 1.5]
ADVANTAGE = [2.0] * 5 + [-2.0] * 5
# -min(ratio * A, clip(ratio, 0.8, 1.28) * A)
LOSS = [-1.0, -1.6, -2.0, -2.56, -2.56, 1.6, 1.6, 2.0, 2.56, 3.0]
# The gradient of the unclipped branch is -A. It is zero only where the token has moved far enough in A's direction.
SLOPE = [-2.0, -2.0, -2.0, -2.0, 0.0, 0.0, 2.0, 2.0, 2.0, 2.0]


def test_values_and_gradients_on_both_sides() -> None:
    ratio = torch.tensor(RATIO, dtype=torch.float64, requires_grad=True)
    losses = clipped_surrogate(ratio, torch.tensor(ADVANTAGE, dtype=torch.float64), **BOUNDS)
    torch.testing.assert_close(losses.detach(), torch.tensor(LOSS, dtype=torch.float64), rtol=0, atol=1e-12)
    losses.sum().backward()
    torch.testing.assert_close(ratio.grad, torch.tensor(SLOPE, dtype=torch.float64), rtol=0, atol=1e-12)


def test_masks_are_where_the_gradient_is_zero() -> None:
    low, high = clip_masks(torch.tensor(RATIO), torch.tensor(ADVANTAGE), **BOUNDS)
    assert low.tolist() == [False] * 5 + [True] + [False] * 4
    assert high.tolist() == [False] * 4 + [True] + [False] * 5
    assert (low | high).tolist() == [slope == 0 for slope in SLOPE]


def test_zero_advantage_has_no_gradient_and_does_not_count_as_clipped() -> None:
    ratio = torch.tensor([0.5, 1.0, 1.5], requires_grad=True)
    clipped_surrogate(ratio, torch.zeros(3), **BOUNDS).sum().backward()
    assert ratio.grad is not None
    assert ratio.grad.tolist() == [0.0, 0.0, 0.0]
    low, high = clip_masks(ratio.detach(), torch.zeros(3), **BOUNDS)
    assert not low.any()
    assert not high.any()


def test_finite_differences_through_the_ratio(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    old_logprobs = -torch.rand(200, generator=generator, dtype=torch.float64) * 5
    logprobs = old_logprobs + torch.randn(200, generator=generator, dtype=torch.float64) * 0.4
    advantages = torch.randn(200, generator=generator, dtype=torch.float64)
    ratio = (logprobs - old_logprobs).exp()
    smooth = ((ratio - 0.8).abs() > 1e-3) & ((ratio - 1.28).abs() > 1e-3)  # a finite difference across a kink is wrong
    logprobs, old_logprobs, advantages = logprobs[smooth], old_logprobs[smooth], advantages[smooth]

    def loss(x: torch.Tensor) -> torch.Tensor:
        return clipped_surrogate(token_ratio(x, old_logprobs), advantages, **BOUNDS)

    assert torch.autograd.gradcheck(loss, logprobs.requires_grad_())
    (gradient,) = torch.autograd.grad(loss(logprobs).sum(), logprobs)
    moves = gradient != 0
    assert moves.any()
    assert (~moves).any()
    assert torch.equal(torch.sign(-gradient[moves]), torch.sign(advantages[moves])), "descent must follow the advantage"


def test_ratio_constants_and_bounds() -> None:
    logprobs = torch.tensor([-1.0, -1.0 + math.log(3), -1.0, -500.0, 0.0])
    old_logprobs = torch.tensor([-1.0, -1.0, -1.0 + math.log(2), 0.0, -500.0])
    expected = torch.tensor([1.0, 3.0, 0.5, math.exp(-20), math.exp(20)])
    torch.testing.assert_close(token_ratio(logprobs, old_logprobs), expected, rtol=1e-6, atol=0)
