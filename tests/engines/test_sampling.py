"""Sampling of tokens from logits: distribution, support, log-probabilities, and independence of the batch."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from llmrl.engines.sampling import (
    ONE_LEVEL_VOCABULARY,
    SamplingRows,
    check_sampling,
    sample_tokens,
    uniform_stream,
)
from llmrl.errors import UserError
from llmrl.types import Sampling

SEED = int(os.environ.get("LLMRL_TEST_SEED", "0"))
VOCABULARIES = [7, ONE_LEVEL_VOCABULARY, ONE_LEVEL_VOCABULARY + 1, 4099, 32000]


def settings(count: int, **kwargs) -> SamplingRows:
    return SamplingRows.build([Sampling(max_tokens=1, **kwargs)] * count)


def chi_square_bound(degrees: int) -> float:
    """A value that a chi-square with `degrees` degrees of freedom exceeds with probability 1e-6 (Wilson-Hilferty)."""
    return degrees * (1 - 2 / (9 * degrees) + 4.75 * (2 / (9 * degrees)) ** 0.5) ** 3


def test_a_stream_belongs_to_its_seed_and_shorter_ones_are_its_prefix():
    stream = uniform_stream(SEED, 64)
    assert np.array_equal(stream[:10], uniform_stream(SEED, 10))
    assert not np.array_equal(stream, uniform_stream(SEED + 1, 64))
    assert ((stream >= 0) & (stream < 1)).all()
    assert len(uniform_stream(-3, 5)) == 5


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_tokens_follow_the_inverse_cumulative_distribution(vocabulary):
    generator = torch.Generator().manual_seed(SEED)
    logits = 3 * torch.randn(1, vocabulary, generator=generator)
    uniforms = torch.rand(2000, generator=generator, dtype=torch.float64)
    tokens, logprobs, usable = sample_tokens(logits.expand(2000, -1), uniforms, settings(2000))
    probabilities = logits[0].double().softmax(0)
    cumulative = probabilities.cumsum(0)
    assert usable.all()
    # The drawn token's slice of the cumulative distribution holds the uniform number, to float32 rounding.
    assert (uniforms <= cumulative[tokens] + 1e-6).all()
    assert (uniforms >= cumulative[tokens] - probabilities[tokens] - 1e-6).all()
    assert torch.allclose(logprobs, logits[0].log_softmax(0)[tokens], atol=2e-6)


def test_frequencies_match_softmax():
    generator = torch.Generator().manual_seed(SEED)
    logits = torch.randn(1, 11, generator=generator)
    count = 20000
    uniforms = torch.from_numpy(np.array([uniform_stream(SEED * count + i, 1)[0] for i in range(count)]))
    tokens, _, _ = sample_tokens(logits.expand(count, -1), uniforms, settings(count))
    expected = logits[0].double().softmax(0) * count
    observed = torch.bincount(tokens, minlength=11)
    assert ((observed - expected) ** 2 / expected).sum() < chi_square_bound(10)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_a_token_of_probability_zero_is_never_drawn_not_even_at_the_edges(vocabulary):
    logits = torch.full((1, vocabulary), -torch.inf)
    allowed = torch.tensor([1, vocabulary // 2, vocabulary - 2])
    logits[0, allowed] = torch.tensor([0.0, 1.0, -20.0])
    edges = [0.0, np.nextafter(0.0, 1.0), 0.5, np.nextafter(1.0, 0.0)]
    tokens, logprobs, usable = sample_tokens(
        logits.expand(4, -1), torch.tensor(edges, dtype=torch.float64), settings(4)
    )
    assert usable.all() and logprobs.isfinite().all()
    assert tokens[0] == 1 and tokens[-1] == vocabulary - 2
    assert set(tokens.tolist()) <= set(allowed.tolist())


def test_the_last_uniform_number_reaches_a_token_where_block_sums_and_their_parts_round_apart():
    generator = torch.Generator().manual_seed(SEED)
    top = torch.full((64,), float(np.nextafter(1.0, 0.0)), dtype=torch.float64)
    logits = 5 * torch.randn(64, 4099, generator=generator)
    logits[:, 4000:] = -torch.inf
    tokens, logprobs, _ = sample_tokens(logits, top, settings(64))
    assert (tokens < 4000).all() and logprobs.isfinite().all()


def test_greedy_takes_the_argmax_and_reports_temperature_one():
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(SEED))
    tokens, logprobs, _ = sample_tokens(logits, torch.full((5,), 0.9, dtype=torch.float64), settings(5, temperature=0))
    assert torch.equal(tokens, logits.argmax(1))
    assert torch.allclose(logprobs, logits.log_softmax(1).amax(1), atol=1e-6)


@pytest.mark.parametrize("vocabulary", [50, 4099])
@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.6), (8, 0.7), (1, 0.01)])
def test_top_k_and_top_p_keep_the_support_and_renormalize(vocabulary, top_k, top_p):
    generator = torch.Generator().manual_seed(SEED)
    logits = 2 * torch.randn(1, vocabulary, generator=generator)
    uniforms = torch.rand(400, generator=generator, dtype=torch.float64)
    rows = settings(400, temperature=0.7, top_k=top_k, top_p=top_p)
    tokens, logprobs, _ = sample_tokens(logits.expand(400, -1), uniforms, rows)

    scaled = logits[0].double() / 0.7
    order = scaled.argsort(descending=True)[: top_k or vocabulary].tolist()
    probabilities = scaled[order].softmax(0)
    kept, mass = [], 0.0
    for token, probability in zip(order, probabilities.tolist(), strict=True):
        if mass >= top_p:
            break
        kept.append(token)
        mass += probability
    assert set(tokens.tolist()) <= set(kept)
    reference = torch.full((vocabulary,), -torch.inf, dtype=torch.float64)
    reference[kept] = scaled[kept].log_softmax(0)
    assert torch.allclose(logprobs.double(), reference[tokens], atol=1e-5)


def test_rows_with_different_settings_share_a_batch():
    generator = torch.Generator().manual_seed(SEED)
    logits = torch.randn(4, 200, generator=generator)
    uniforms = torch.rand(4, generator=generator, dtype=torch.float64)
    samplings = [
        Sampling(max_tokens=1),
        Sampling(max_tokens=1, temperature=0),
        Sampling(max_tokens=1, temperature=0.3),
        Sampling(max_tokens=1, top_k=3),
    ]
    together = sample_tokens(logits, uniforms, SamplingRows.build(samplings))
    for i, sampling in enumerate(samplings):
        alone = sample_tokens(logits[i : i + 1], uniforms[i : i + 1], SamplingRows.build([sampling]))
        assert torch.equal(together[0][i : i + 1], alone[0])
        assert torch.allclose(together[1][i : i + 1], alone[1], atol=1e-6)


def test_a_tiny_temperature_does_not_overflow():
    logits = torch.tensor([[100.0, 99.0, -100.0]])
    tokens, logprobs, usable = sample_tokens(
        logits, torch.tensor([0.999], dtype=torch.float64), settings(1, temperature=1e-38)
    )
    assert usable.all() and tokens.item() == 0 and logprobs.item() == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("vocabulary", [9, 5000])
def test_broken_logits_are_marked_and_do_not_touch_other_rows(bad, vocabulary):
    logits = torch.zeros(3, vocabulary)
    logits[1, 4] = bad
    uniforms = torch.full((3,), 0.5, dtype=torch.float64)
    tokens, _, usable = sample_tokens(logits, uniforms, settings(3))
    assert usable.tolist() == [True, False, True]
    assert tokens[0] == tokens[2] == vocabulary // 2
    assert not sample_tokens(torch.full((1, vocabulary), -torch.inf), uniforms[:1], settings(1))[2].any()


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": -1}, {"max_tokens": 0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        check_sampling(Sampling(**({"max_tokens": 1} | wrong)))
