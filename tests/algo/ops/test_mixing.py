"""C-GRPO's mixing of outcome and rubric rewards against values worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrl.algo.ops.mixing import mix_rewards
from llmrl.errors import UserError


@pytest.mark.parametrize(
    ("outcomes", "rubrics", "options", "expected"),
    [
        # The paper's figure: (1, .375), (1, .625), (0, .125) -> (1-a) + .6 a, 1, 0.
        ([1, 1, 0], [0.375, 0.625, 0.125], {}, [0.7 + 0.3 * 0.6, 1.0, 0.0]),
        # The largest rubric reward is a wrong rollout's.
        ([1, 0], [0.25, 0.5], {}, [0.85, 0.0]),
        ([1, 0], [0.25, 0.5], {"rubric_norm": "group_max_correct"}, [1.0, 0.0]),
        ([1, 0], [0.25, 0.5], {"rubric_norm": "none"}, [0.775, 0.0]),
        ([1, 1], [0, 0], {}, [0.7, 0.7]),
        ([0, 0], [0.5, 0.2], {}, [0.0, 0.0]),
        ([0, 0], [0.5, 0.2], {"rubric_norm": "group_max_correct"}, [0.0, 0.0]),
        ([1, 0, 0], [0.2, 0.4, 0.1], {"rubric_for": "wrong"}, [1.0, 0.3, 0.075]),
        ([1, 0, 0], [0.2, 0.4, 0.1], {"rubric_for": "all"}, [0.85, 0.3, 0.075]),
        ([1, 0], [0.5, 1.0], {"alpha": 0}, [1.0, 0.0]),
        ([1, 0], [0.5, 1.0], {"alpha": 1}, [0.5, 0.0]),
        # Abstentions: of the outcome; of a rubric that counts; of rubrics that do not count.
        ([None, 1], [1.0, 0.5], {}, [None, 0.85]),
        ([1, 1], [None, 0.5], {}, [None, 1.0]),
        ([0, 1], [None, 0.5], {}, [0.0, 1.0]),
        ([1, 0], [None, 0.5], {"rubric_for": "wrong"}, [1.0, 0.3]),
        ([1, 0], [None, None], {"alpha": 0}, [1.0, 0.0]),
        ([1, 0], [None, None], {}, [None, 0.0]),
        ([], [], {}, []),
    ],
)
def test_mix_rewards(outcomes: list, rubrics: list, options: dict[str, Any], expected: list) -> None:
    assert mix_rewards(outcomes, rubrics, **options) == pytest.approx(expected)


maybe = st.one_of(st.none(), st.floats(0, 1))


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 1.0, None]), maybe), max_size=8),
    st.floats(0, 1),
    st.sampled_from(["correct", "wrong", "all"]),
    st.sampled_from(["group_max", "none"]),
)
def test_mixed_rewards_stay_in_range_and_never_pay_a_wrong_answer(
    group: list, alpha: float, who: str, norm: str
) -> None:
    outcomes, rubrics = [o for o, _ in group], [r for _, r in group]
    mixed = mix_rewards(outcomes, rubrics, alpha=alpha, rubric_for=who, rubric_norm=norm)  # type: ignore[arg-type]
    for outcome, reward in zip(outcomes, mixed, strict=True):
        assert reward is None or -1e-12 <= reward <= 1 + 1e-12
        assert outcome is not None or reward is None
        if who == "correct" and outcome == 0:
            assert reward == 0
        if who == "correct" and outcome == 1 and reward is not None:
            assert reward >= 1 - alpha - 1e-12


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 1.5},
        {"rubric_norm": "max"},
        {"rubric_for": "both"},
        {"rubric_for": "all", "rubric_norm": "group_max_correct"},
    ],
)
def test_contradicting_mixing_options_are_errors(options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        mix_rewards([1.0], [1.0], **options)
