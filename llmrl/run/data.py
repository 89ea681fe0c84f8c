"""Read, render and check the data of a run: the part of its start that needs no model. `--dry_run` does it alone."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from llmrl.config import Config, RunConfig
from llmrl.run.given import Given, resolve_config
from llmrl.run.methods import METHODS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmrl.rollout.source import Feed


def quieten_libraries() -> None:
    """Silence the progress bars and notes of transformers; its warnings and errors stay.

    TRANSFORMERS_VERBOSITY, if set, decides instead.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_warning()


def encode(feed: Feed, config: RunConfig, given: Given) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """Render and check every row. Returns the tokenizer, with the run's chat template, and lines to show.

    Raises:
        UserError: there is no tokenizer, or rows cannot be used.
    """
    from llmrl.data.chat import with_template
    from llmrl.model.load import load_generation_config, load_tokenizer, model_limits

    loaded: Any = None if isinstance(given.model, str) else given.model
    tokenizer = given.processing_class
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(config.model)
    generation = load_generation_config(config.model) if loaded is None else loaded.generation_config
    tokenizer = with_template(tokenizer, config.data.chat_template)
    limits = model_limits(config.model, loaded, longest=_longest(config))
    return tokenizer, feed.encode(tokenizer, generation, limits)


def _longest(config: RunConfig) -> int | None:
    """Return the longest sequence that the engine is told to serve, if there is one and it says so."""
    vllm = config.rollout.vllm if isinstance(config, Config) else None
    return None if vllm is None else vllm.max_model_len


def dry_run(config: RunConfig) -> str:
    """Do what a run does before it loads a model, and return what it found, with the first row as the model sees it.

    Raises:
        UserError: the configuration or the data are wrong.
    """
    from llmrl.config.describe import describe

    quieten_libraries()
    given = Given()
    config = resolve_config(config, given).config
    feed = METHODS[type(config.algo)].feed(config, given)
    _, notes = encode(feed, config, given)
    feed.sampler(config.rollout.num_prompts)
    counts = f"{len(feed.tasks)} rows to train on, {len(feed.eval_tasks)} to evaluate on"
    lines = [*notes, *describe(config), f"{counts}. The first one, as the model sees it:", "", feed.preview(), ""]
    return "\n".join([*lines, "dry run: no model was loaded and nothing was written"])
