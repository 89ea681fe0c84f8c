"""The k3 estimator: constants, its expectation, its gradient."""

from __future__ import annotations

import math

import torch

from llmrl.algo.ops.kl import MAX_LOG_RATIO, k3


def test_constants() -> None:
    logprobs = torch.tensor([-1.0, -1.0, -1.0])
    ref_logprobs = torch.tensor([-1.0, -1.0 - math.log(2), -1.0 + math.log(2)])
    # d = 0, ln 2, -ln 2: exp(-d) - 1 + d
    expected = torch.tensor([0.0, 0.5 - 1 + 0.6931472, 2 - 1 - 0.6931472])
    torch.testing.assert_close(k3(logprobs, ref_logprobs), expected, rtol=0, atol=1e-6)


def test_never_negative_and_zero_only_where_equal(seed: int) -> None:
    difference = torch.randn(1000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert (k3(difference, torch.zeros_like(difference)) > 0).all()


def test_the_mean_over_the_policy_is_the_reverse_kl(seed: int) -> None:
    policy, reference = torch.randn(
        2, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).log_softmax(-1)
    expectation = (policy.exp() * k3(policy, reference)).sum()
    divergence = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close(expectation, divergence, rtol=1e-12, atol=1e-12)


def test_gradient_by_finite_differences_and_in_closed_form(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logprobs = torch.randn(20, generator=generator, dtype=torch.float64, requires_grad=True)
    ref_logprobs = torch.randn(20, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: k3(x, ref_logprobs), logprobs)
    (gradient,) = torch.autograd.grad(k3(logprobs, ref_logprobs).sum(), logprobs)
    torch.testing.assert_close(gradient, 1 - (ref_logprobs - logprobs).exp(), rtol=1e-12, atol=1e-12)
    pulls_back = torch.sign(gradient) == torch.sign(logprobs - ref_logprobs)
    assert pulls_back.all(), "descending k3 must move the policy towards the reference"


def test_extreme_differences_stay_finite() -> None:
    values = k3(torch.tensor([-100.0, 100.0]), torch.zeros(2))
    expected = torch.tensor([math.exp(MAX_LOG_RATIO) - 1 - MAX_LOG_RATIO, math.exp(-MAX_LOG_RATIO) - 1 + MAX_LOG_RATIO])
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=0)
