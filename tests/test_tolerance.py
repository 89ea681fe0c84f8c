"""The tolerances, which decide when a run stops."""

from __future__ import annotations

import pytest

from llmrl.tolerance import forward_gap, same_weights_gap, served_gap


def test_the_tolerance_grows_with_the_rounding_of_the_type() -> None:
    assert [forward_gap(dtype) for dtype in ("float32", "bfloat16")] == [1e-3, 0.15]
    for gap in (served_gap, same_weights_gap):
        assert [gap(dtype) for dtype in ("float32", "float16", "bfloat16")] == [1e-3, 0.05, 0.15]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_quantized_weights_may_differ_more(dtype: str) -> None:
    assert served_gap(dtype, quantized=True) == 1.0


def test_a_type_the_trainer_does_not_compute_in_has_no_tolerance() -> None:
    with pytest.raises(KeyError):
        forward_gap("float16")
