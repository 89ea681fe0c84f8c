"""Limits on gaps: numbers by hand, and how often chance alone would refuse."""

from __future__ import annotations

import os

import numpy as np
import pytest

from llmrl.noise import FLOOR_HIGH, FLOOR_MEAN, Gap, Limit

SEED = int(os.environ.get("LLMRL_TEST_SEED", "0"))


def test_a_gap_is_described_by_its_mean_its_quantile_and_its_largest() -> None:
    found, expected = -np.arange(11.0), np.zeros(11)
    assert Gap.between(found, expected) == Gap(mean=5.0, high=9.0, largest=10.0)
    assert Gap.between(np.zeros(0), np.zeros(0)) == Gap(0.0, 0.0, 0.0)


@pytest.mark.parametrize("found", [np.array([0.0, np.nan]), np.array([0.0, -np.inf]), np.zeros(3)])
def test_what_cannot_be_compared_is_infinitely_far(found: np.ndarray) -> None:
    gap = Gap.between(found, np.zeros(2))
    assert gap.mean == np.inf
    assert not Limit(1e9, 1e9).explains(gap)


def test_without_rounding_hardly_anything_is_explained() -> None:
    limit = Limit.of(np.zeros(100))
    assert limit == Limit(FLOOR_MEAN, FLOOR_HIGH)
    assert limit.explains(Gap(2e-5, 2e-4, 1e-3)) and not limit.explains(Gap(1e-4, 0.0, 0.0))


def test_equal_errors_leave_nothing_to_chance() -> None:
    limit = Limit.of(np.full(100, 0.1))
    assert limit.mean == pytest.approx(0.2 + FLOOR_MEAN)
    assert limit.high == pytest.approx(0.2 + FLOOR_HIGH)


@pytest.mark.parametrize("flips", [0.0, 0.02], ids=["rounding", "with other experts for some tokens"])
def test_errors_of_the_same_kind_are_explained_and_eight_times_as_large_ones_are_not(flips: float) -> None:
    """Absolute values of normal numbers; a share of the tokens moves by up to a nat, as in a mixture of experts."""
    random = np.random.default_rng(SEED)

    def errors() -> np.ndarray:
        rare = (random.random(200) < flips) * random.exponential(0.5, 200)
        return np.abs(random.standard_normal(200)) * 0.03 + rare

    def refused() -> bool:
        """Whether errors of the same kind are refused, even after they have been measured again with more draws."""
        gap = Gap.between(errors(), np.zeros(200))
        limits = (Limit.of(np.sqrt(np.mean([errors() ** 2 for _ in range(draws)], axis=0))) for draws in (2, 9))
        return not any(limit.explains(gap) for limit in limits)

    assert sum(refused() for _ in range(2000)) == 0
    larger = [Limit.of(errors()).explains(Gap.between(8 * errors(), np.zeros(200))) for _ in range(200)]
    assert sum(larger) == 0
