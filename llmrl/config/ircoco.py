"""The options of IRCoCo's evaluator: which prefixes it learns from, and how large it is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from llmrl.errors import UserError

READ_WITH_FILES: dict[str, Any] = {"num_next_tokens": 10, "min_prefix_length": 10, "max_prefix_length": 256}
"""Options that `prefixes files` alone reads, and their defaults."""


@dataclass
class PrefixEvaluatorConfig:
    """A regressor from a prefix to how well the model will complete it. Sizes are the paper's."""

    prefixes: Literal["files", "samples"] = "files"
    """`files` (the paper): prompts with their answers, cut anywhere; how well the model's next tokens match the true
    ones. `samples`: prompts with the beginning of a completion by the model, which it then finishes greedily; how well
    the whole completion matches the answer. So the evaluator also sees what follows a mistake."""
    quality: Literal["edit_similarity", "bleu"] = "edit_similarity"
    """What it predicts, from 0 to 1: edit similarity of the texts, or smoothed BLEU of the tokens."""
    num_prefixes: int = 20_000
    num_next_tokens: int | None = None
    """files: tokens that are compared (default 10)."""
    min_prefix_length: int | None = None
    """files: tokens (default 10)."""
    max_prefix_length: int | None = None
    """files: tokens (default 256)."""
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_epochs: float = 5.0
    batch_size: int = 32
    learning_rate: float = 3e-4
    """At its peak; it falls in a straight line to 0."""
    weight_decay: float = 0.01


def resolve_evaluator(config: PrefixEvaluatorConfig) -> PrefixEvaluatorConfig:
    """Fill what is read and was left out.

    Raises:
        UserError: with all findings, each with its fix.
    """
    files = config.prefixes == "files"
    given = [name for name in READ_WITH_FILES if getattr(config, name) is not None]
    findings = [f"evaluator.{name} is only read with evaluator.prefixes files: leave it out" for name in given] * (
        not files
    )
    row = {name: value for name, value in READ_WITH_FILES.items() if files and name not in given}
    c: Any = dataclasses.replace(config, **row)
    positive = [
        field.name for field in dataclasses.fields(c) if field.name not in ("prefixes", "quality", "weight_decay")
    ]
    findings += [
        f"evaluator.{name} is {value}: must be above 0"
        for name in positive
        if (value := getattr(c, name)) is not None and value <= 0
    ]
    pairs = [
        (c.weight_decay < 0, f"evaluator.weight_decay is {c.weight_decay}: must not be negative"),
        (c.num_prefixes < 20, f"evaluator.num_prefixes is {c.num_prefixes}: a tenth is held out, so at least 20"),
        (
            c.num_heads > 0 and c.hidden_size % (2 * c.num_heads) != 0,
            f"evaluator.hidden_size {c.hidden_size} is no multiple of twice evaluator.num_heads {c.num_heads}",
        ),
        (
            files and c.max_prefix_length < c.min_prefix_length,
            f"evaluator.max_prefix_length {c.max_prefix_length} is below min_prefix_length {c.min_prefix_length}",
        ),
    ]
    findings += [text for wrong, text in pairs if wrong]
    if findings:
        raise UserError("configuration:\n" + "\n".join(f"  - {line}" for line in findings))
    return c
