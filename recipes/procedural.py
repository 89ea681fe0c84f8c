"""Tasks of reasoning-gym as rows for the reward `reasoning_gym` (`pip install "llmrl[tasks]"`).

    llmrl train RECIPE --data.path recipes/procedural.py

Copy this file and change TASKS: each entry is a generator of reasoning-gym with its options.
"""

from __future__ import annotations

from typing import Any

from llmrl.errors import UserError
from llmrl.verify.checks.procedural import make_rows

TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 4},
    "basic_arithmetic": {"min_terms": 2, "max_terms": 3},
    "spell_backward": {"max_word_len": 8},
    "number_sorting": {"max_numbers": 6},
    "letter_counting": {},
}
SIZES = {"train": 2_000, "test": 100}
"""Rows per generator."""
FORM = "\n\nGive the final answer as <answer>...</answer>."


def rows(split: str) -> list[dict[str, Any]]:
    """Return the tasks of a split, `train` or `test`; no question is in both."""
    if split not in SIZES:
        raise UserError(f"data.split {split!r}: there are {' and '.join(SIZES)}")
    test = make_rows(TASKS, size=SIZES["test"], seed=2)
    chosen = test
    if split == "train":
        held_out = {row["question"] for row in test}
        chosen = [row for row in make_rows(TASKS, size=SIZES["train"], seed=1) if row["question"] not in held_out]
    return [{**row, "prompt": row["question"] + FORM} for row in chosen]
