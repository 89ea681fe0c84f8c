"""Short sums for recipes/smollm2_sums.yaml, made by reasoning-gym (`pip install "llmrl[tasks]"`).

    llmrl train smollm2_sums

Every question is on one side of the split: what is held out is never trained on.
"""

from __future__ import annotations

import hashlib
from typing import Any

from llmrl.errors import UserError

TASK = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
"""Options of reasoning-gym's `chain_sum`: two numbers of one digit, added or subtracted."""
SPLITS = ("train", "test")


def rows(split: str) -> list[dict[str, Any]]:
    """Return the questions of a split, `train` or `test`, all different."""
    if split not in SPLITS:
        raise UserError(f"data.split {split!r}: there are {' and '.join(SPLITS)}")
    try:
        import reasoning_gym  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise UserError(f"recipes/smollm2_sums.py: {error}; pip install 'llmrl[tasks]'") from error
    made = reasoning_gym.create_dataset("chain_sum", size=5_000, seed=1, **TASK)
    found = {row["question"]: row["answer"] for row in map(made.__getitem__, range(len(made)))}
    mine = [question for question in found if is_held_out(question) == (split == "test")]
    return [{"question": question, "answer": found[question]} for question in mine]


def is_held_out(question: str) -> bool:
    """Return whether a question is in the test split: a quarter of all, chosen by their text."""
    return hashlib.sha256(question.encode()).digest()[0] < 64
