"""Options of datasets."""

from __future__ import annotations

from typing import Literal

from llmrl.option import MISSING, Count, Place, option


@option
class RowsConfig:
    """Where rows come from."""

    path: Place = MISSING
    """A hub id, with the dataset's configuration after a colon where it has several (`openai/gsm8k:main`); or a local
    .json / .jsonl / .csv / .parquet file, a folder of such files, one written by `datasets.save_to_disk`, or a .py file
    with a function `rows(split)` that returns rows."""
    split: str = "train"
    """Split of a hub dataset or a folder; a folder's split is its file of that name."""
    chat_template: Place | None = None
    """A Jinja file to use instead of the tokenizer's own chat template."""
    limit: Count | None = None
    """Use only the first `limit` rows."""
    shuffle: bool = True
    """A fresh seeded order each epoch."""


@option
class DataConfig(RowsConfig):
    """Where tasks come from. Rows become tasks: a prompt the policy sees, an answer it does not."""

    prompt_column: str | None = None
    """Column with the prompt (text or messages). Default: the first of messages, prompt, question, problem, text."""
    answer_column: str | None = None
    """Column with the hidden answer. Default: the first of answer, solution, target. `none` where rewards need none."""
    system_prompt: str | None = None
    """Message put before every prompt, with the role `system`."""
    prompt_template: str | None = None
    """Wraps a text prompt; `{prompt}` stands for it, any other `{column}` for that column, `{{...}}` for braces."""
    prompt_format: Literal["chat", "text"] = "chat"
    """`chat` renders messages with the tokenizer's chat template; `text` gives the prompt to the model as it is."""
    max_prompt_length: Count | None = None
    """Leave out tasks with longer prompts (tokens) at start-up; their number is logged."""
