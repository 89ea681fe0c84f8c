"""Positions that depend on what else is in a batch: how long sequences may be so that theirs do not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SHORTEN = "lower rollout.max_completion_length and data.max_prompt_length until both fit"


def longest_exact(config: PretrainedConfig) -> int | None:
    """Return the number of tokens up to which a sequence's rotary positions depend on that sequence alone, or None.

    transformers chooses the frequencies of LongRoPE and of dynamic NTK scaling by the largest position in the batch, so
    beyond this length a long sequence changes the log-probabilities of short ones beside it, and keys that are cached
    stop fitting those that follow.
    """
    text: Any = config.get_text_config()
    parameters: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
    kinds = [parameters, *(each for each in parameters.values() if isinstance(each, dict))]
    limits = []
    for kind in kinds:
        original = kind.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", 0)
        if kind.get("rope_type") == "longrope":
            limits.append(original or text.max_position_embeddings)
        elif kind.get("rope_type") == "dynamic":
            limits.append(text.max_position_embeddings)
    return min(limits, default=None)
