"""How far two correct computations of the same log-probabilities may differ, in nats, by the type they compute in.

A larger gap means that one side computes something else: it holds other weights, or its masks are off by a token.
A type is named as a string such as "float32".
"""

from __future__ import annotations

_FORWARD = {"float32": 1e-3, "bfloat16": 0.15}
_SERVED = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.05}
_QUANTIZED = 1.0


def forward_gap(dtype: str) -> float:
    """Return the largest gap between two ways the trainer can run one model, such as packed and one row per sequence.

    Raises:
        KeyError: the trainer does not compute in `dtype`.
    """
    return _FORWARD[dtype]


def served_gap(dtype: str, *, quantized: bool = False) -> float:
    """Return the largest gap between the learner and an engine that serves the learner's weights.

    Args:
        dtype: the type the engine computes in.
        quantized: whether the engine also rounds the weights to fewer bits, which costs more than any `dtype` does.
    """
    return _QUANTIZED if quantized else _SERVED[dtype]


def same_weights_gap(dtype: str) -> float:
    """Return the largest gap between two engine replicas that serve the same weights."""
    return _SERVED[dtype]
