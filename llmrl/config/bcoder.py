"""What B-Coder reads: its two stages, its Q function, and the mix of programs it learns from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class BCoderConfig:
    """Value-based training on stored programs with outcomes (`algo.name bcoder`).

    Rows carry `samples`, as `llmrl eval --save_samples` writes them, and a right program. An option that the stage does
    not read stays None, and giving it is an error.
    """

    stage: Literal["value", "policy"] = "value"
    """`value`: learn V of the model as it is. `policy`: learn Q, starting from the model/ folder of the first stage."""
    alpha: float = 1.0
    """Temperature: A = alpha (l - max l)."""
    gamma: float = 0.999
    """Discount per token."""
    real_frac: float = 0.5
    """Share of right programs (column `solution_column`) in a batch; the others are samples."""
    solution_column: str = "solution"
    """Column with a right program. Rows need none where `real_frac` is 0."""
    softabs_const: float | None = None
    """Constant of the SOFTABS that keeps V below the largest reward. Default: -ln 2, which lets V reach it; the paper
    prints +ln 2, with which it cannot exceed -0.386."""
    value_hidden_size: int | None = None
    """value: width of the value head's hidden layer (default: the model's)."""
    q_coef: float | None = None
    """policy: weight of the Bellman error (default 1)."""
    adv_coef: float | None = None
    """policy: weight of |A| of right programs, summed over their tokens (default 0.1)."""
    ce_coef: float | None = None
    """policy: weight of the cross-entropy of right programs, summed over their tokens (default 0.5)."""
