"""Options of IRCoCo's evaluator: which prefixes it learns from, and the model it starts from."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from annotated_types import Ge

from llmrl.option import KIND, Count, NotNegative, Positive, option

# --- the prefixes that it learns from ---


@option
class FilePrefixes:
    """Prompts with their answers, cut anywhere; labeled by how well the model's greedy next tokens match the true ones
    (the paper).
    """

    kind: Literal["files"] = "files"
    num_next_tokens: Count = 10
    """Tokens that are compared."""
    min_prefix_length: Count = 10
    """Shortest prefix (tokens)."""
    max_prefix_length: Count = 256
    """Longest prefix (tokens)."""


@option
class SamplePrefixes:
    """Beginnings of completions that the model drew; labeled by how well the whole matches the answer. So the evaluator
    also sees mistakes, and where completions end.
    """

    kind: Literal["samples"] = "samples"


PrefixesConfig = FilePrefixes | SamplePrefixes
Prefixes = Annotated[PrefixesConfig, KIND]


# --- its weights before it is fitted ---


@option
class RandomStart:
    """Random weights (the paper)."""

    kind: Literal["random"] = "random"
    hidden_size: Count = 256
    """Width; a multiple of twice `num_heads`."""
    num_layers: Count = 4
    """Depth."""
    num_heads: Count = 4
    """Attention heads."""


@option
class PolicyStart:
    """The model's own weights, with a new output."""

    kind: Literal["policy"] = "policy"


StartConfig = RandomStart | PolicyStart
Start = Annotated[StartConfig, KIND]


@option
class PrefixEvaluatorConfig:
    """A regressor from a prefix to how well the model will complete it."""

    prefixes: Prefixes = field(default_factory=FilePrefixes)
    """What it learns from."""
    quality: Literal["edit_similarity", "bleu"] = "edit_similarity"
    """What it predicts, from 0 to 1: edit similarity of the texts, or smoothed BLEU of the tokens."""
    num_examples: Annotated[int, Ge(20)] = 20_000
    """Prefixes of files, or completions with all their prefixes. A tenth is held out."""
    start: Start = field(default_factory=RandomStart)
    """Its weights before it is fitted."""
    num_epochs: Positive = 5.0
    """Passes over the examples."""
    batch_size: Count = 32
    """Examples of an optimizer step."""
    learning_rate: Positive = 3e-4
    """Peak learning rate; it falls linearly to 0."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay."""

    def findings(self) -> list[str]:
        """Return what no single option can see, one line each, with the fix."""
        prefixes, start, found = self.prefixes, self.start, []
        if isinstance(start, RandomStart) and start.hidden_size % (2 * start.num_heads):
            found.append(
                f"evaluator.start.hidden_size {start.hidden_size} is not a multiple of twice evaluator.start.num_heads "
                f"{start.num_heads}: change either"
            )
        if isinstance(prefixes, FilePrefixes) and prefixes.max_prefix_length < prefixes.min_prefix_length:
            found.append(
                f"evaluator.prefixes.max_prefix_length {prefixes.max_prefix_length} is below min_prefix_length "
                f"{prefixes.min_prefix_length}: raise it, or lower that"
            )
        return found
