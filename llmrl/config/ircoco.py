"""The options of IRCoCo's evaluator: which prefixes it learns from, and how large it is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from llmrl.errors import UserError

FILES = {"num_next_tokens": 10, "min_prefix_length": 10, "max_prefix_length": 256}
RANDOM = {"hidden_size": 256, "num_layers": 4, "num_heads": 4}
"""Options that only `prefixes files` and `start random` read, and their defaults (the paper's)."""


@dataclass
class PrefixEvaluatorConfig:
    """A regressor from a prefix to how well the model will complete it."""

    prefixes: Literal["files", "samples"] = "files"
    """`files` (the paper): prompts with their answers, cut anywhere; how well the model's greedy next tokens match the
    true ones. `samples`: beginnings of completions that the model drew; how well the whole matches the answer. So the
    evaluator also sees mistakes, and where completions end."""
    quality: Literal["edit_similarity", "bleu"] = "edit_similarity"
    """What it predicts, from 0 to 1: edit similarity of the texts, or smoothed BLEU of the tokens."""
    num_examples: int = 20_000
    """Prefixes of files, or completions with all their prefixes."""
    num_next_tokens: int | None = None
    """files: tokens that are compared (default 10)."""
    min_prefix_length: int | None = None
    """files: tokens (default 10)."""
    max_prefix_length: int | None = None
    """files: tokens (default 256)."""
    start: Literal["random", "policy"] = "random"
    """Its weights before it is fitted: random ones (the paper), or the model's own, with a new output."""
    hidden_size: int | None = None
    """random: default 256."""
    num_layers: int | None = None
    """random: default 4."""
    num_heads: int | None = None
    """random: default 4."""
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
    findings, row = [], {}
    for option, choice, defaults in (("prefixes", "files", FILES), ("start", "random", RANDOM)):
        given = [name for name in defaults if getattr(config, name) is not None]
        if getattr(config, option) == choice:
            row |= {name: value for name, value in defaults.items() if name not in given}
        else:
            findings += [
                f"evaluator.{name} is only read with evaluator.{option} {choice}: leave it out" for name in given
            ]
    c: Any = dataclasses.replace(config, **row)
    numbers = {
        name: value for name, value in vars(c).items() if isinstance(value, (int, float)) and name != "weight_decay"
    }
    findings += [f"evaluator.{name} is {value}: must be above 0" for name, value in numbers.items() if value <= 0]
    pairs = [
        (c.weight_decay < 0, f"evaluator.weight_decay is {c.weight_decay}: must not be negative"),
        (c.num_examples < 20, f"evaluator.num_examples is {c.num_examples}: a tenth is held out, so at least 20"),
        (
            c.start == "random" and c.num_heads > 0 and c.hidden_size % (2 * c.num_heads) != 0,
            f"evaluator.hidden_size {c.hidden_size} is no multiple of twice evaluator.num_heads {c.num_heads}",
        ),
        (
            c.prefixes == "files" and c.max_prefix_length < c.min_prefix_length,
            f"evaluator.max_prefix_length {c.max_prefix_length} is below min_prefix_length {c.min_prefix_length}",
        ),
    ]
    findings += [text for wrong, text in pairs if wrong]
    if findings:
        raise UserError("configuration:\n" + "\n".join(f"  - {line}" for line in findings))
    return c
