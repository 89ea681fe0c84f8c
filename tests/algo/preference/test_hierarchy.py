"""HERON's comparator on handmade cases: margins, ties, unknown parts, cyclic preferences."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrl.algo.preference.hierarchy import HierarchicalPreference, net_wins
from llmrl.algo.preference.options import Level
from llmrl.errors import UserError

VALUES = st.lists(
    st.fixed_dictionaries({name: st.none() | st.floats(-5, 5) for name in ("right", "quality", "length")}),
    max_size=6,
)


def by_value(*levels: tuple[str, float], lower: tuple[str, ...] = ()) -> HierarchicalPreference:
    return HierarchicalPreference(
        [Level(part=part, margin=m, margin_in="value", lower_is_better=part in lower) for part, m in levels]
    )


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ({"right": 1.0, "length": 900.0}, {"right": 0.0, "length": 10.0}, 1),  # the first level decides
        ({"right": 1.0, "length": 900.0}, {"right": 1.0, "length": 10.0}, -1),  # a tie there: the shorter one
        ({"right": 1.0, "length": 60.0}, {"right": 1.0, "length": 10.0}, 0),  # both within their margins
        ({"right": 1.0, "length": 61.0}, {"right": 1.0, "length": 10.0}, -1),  # just beyond
        ({"right": None, "length": 10.0}, {"right": 1.0, "length": 900.0}, 0),  # unknown: nothing below it may decide
        ({"length": 10.0}, {"right": 1.0, "length": 900.0}, 0),
    ],
)
def test_levels_margins_ties_and_unknown_parts(a: dict, b: dict, expected: int) -> None:
    heron = by_value(("right", 0.0), ("length", 50.0), lower=("length",))
    margins = heron.margins([a, b])
    assert margins == [0.0, 50.0]
    assert heron.compare(a, b, margins) == expected
    assert heron.compare(b, a, margins) == -expected


def test_margins_in_standard_deviations_are_taken_over_all_items() -> None:
    heron = HierarchicalPreference([Level(part="q", margin=0.5), Level(part="r")])
    items = [{"q": 0.0}, {"q": 2.0}, {"q": 4.0}, {"q": None}]
    assert heron.margins(items) == [pytest.approx(1.0), 0.0]  # deviation 2
    assert heron.margins([{"q": 3.0}]) == [0.0, 0.0]


def test_preferences_may_be_cyclic() -> None:
    """a beats b and b beats c by the second level, c beats a by the first, whose margin each single step is within."""
    heron = by_value(("quality", 1.0), ("length", 0.0), lower=("length",))
    items = [{"quality": 0.0, "length": 1.0}, {"quality": 0.8, "length": 2.0}, {"quality": 1.6, "length": 3.0}]
    assert heron.pairs(items) == [(0, 1), (2, 0), (1, 2)]
    assert heron.ranks(items) == [0.0, 0.0, 0.0]


def test_ranks() -> None:
    heron = by_value(("right", 0.0), ("length", 0.0), lower=("length",))
    items = [{"right": r, "length": n} for r, n in ((0.0, 5.0), (1.0, 9.0), (1.0, 5.0), (1.0, 9.0))]
    assert heron.pairs(items) == [(1, 0), (2, 0), (3, 0), (2, 1), (2, 3)]
    assert heron.ranks(items) == [-1.0, pytest.approx(0.0), 1.0, pytest.approx(0.0)]
    assert heron.ranks([{"right": 1.0, "length": 1.0}]) == [0.0]
    assert net_wins([(0, 1)], 3) == [0.5, -0.5, 0.0]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(items=VALUES)
def test_no_pair_is_decided_both_ways_and_ranks_sum_to_zero(items: list[dict[str, float | None]]) -> None:
    heron = HierarchicalPreference(
        [{"part": "right"}, {"part": "quality", "margin": 0.5}, {"part": "length", "lower_is_better": True}]
    )
    pairs = heron.pairs(items)
    assert len({frozenset(pair) for pair in pairs}) == len(pairs)
    assert sum(heron.ranks(items)) == pytest.approx(0.0, abs=1e-9)


def test_without_margins_one_level_sorts() -> None:
    values = [3.0, 1.0, 2.0]
    ranks = HierarchicalPreference([{"part": "x"}]).ranks([{"x": value} for value in values])
    assert ranks == [1.0, -1.0, 0.0]


@pytest.mark.parametrize(
    "levels", [[], [{"part": "x", "margin": -1.0}], [{"part": "x", "weight": 2}], [{"margin": 1.0}]], ids=str
)
def test_wrong_levels_are_refused(levels: list) -> None:
    with pytest.raises(UserError):
        HierarchicalPreference(levels)
