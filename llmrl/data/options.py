"""Options of datasets."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

from llmrl.data.report import OnBadRow
from llmrl.option import MISSING, Count, Place, Positive, option


@option
class RowsConfig:
    """Where rows come from, and which columns they have."""

    path: Place = MISSING
    """A hub id, with the dataset's configuration after a colon where it has several (`openai/gsm8k:main`); or a local
    .json / .jsonl / .csv / .tsv / .parquet file (also with .gz), several by a pattern (`rows/*.jsonl`), a folder of
    such files, one written by `datasets.save_to_disk`, or a .py file with a function `rows(split)` that returns rows.
    """
    split: str = "train"
    """Split of a hub dataset or a folder; a folder's split is its file of that name."""
    stream: bool = False
    """Read row by row, no further than the run needs; of a hub dataset no more is downloaded."""
    limit: Count | None = None
    """Use only the first `limit` rows."""
    prompt_column: str | None = None
    """Column with the prompt (text or messages). Default: the first of messages, prompt, question, problem, text,
    instruction, query, conversations. Here and in the other columns, a dot leads into a nested one (`extra.question`).
    """
    ignore_columns: list[str] = field(default_factory=list)
    """Columns that must not shape the prompt, though they usually do: tools, chat_template_kwargs, system, images ...
    Rewards still get them."""


@option
class TaskRows(RowsConfig):
    """Rows that become tasks: a prompt that the policy sees, an answer that it does not."""

    answer_column: str | None = None
    """Column with the hidden answer. Default: the first of answer, solution, target, ground_truth, golden_answers,
    answers, reward_model.ground_truth. `none` where rewards need none."""
    answer_pattern: str | None = None
    """Regular expression that finds the answer in its column: the first group, or the whole match, of its last match.
    `#### (.+)` takes the number out of a solution of GSM8K."""
    system_prompt: str | None = None
    """Message put before every prompt, with the role `system`."""
    prompt_template: str | None = None
    """Wraps a text prompt; `{prompt}` stands for it, any other `{column}` for that column, `{{...}}` for braces."""
    final_assistant: Literal["error", "drop"] = "error"
    """What to do with the assistant's messages at the end of a prompt, which the policy is to write: refuse the row, or
    leave them out (datasets of finished conversations)."""
    max_prompt_length: Count | None = None
    """Leave out tasks with longer prompts (tokens) at start-up; their number is logged."""


@option
class PreferenceRows(RowsConfig):
    """Rows with preferences: pairs of completions, or single ones with a label."""

    chosen_column: str = "chosen"
    """Column with the preferred completion."""
    rejected_column: str = "rejected"
    """Column with the other one."""
    completion_column: str = "completion"
    """Column with the completion, where rows hold single ones with a label."""
    label_column: str = "label"
    """Column that says whether a single completion is desirable."""


@option
class Presentation:
    """How the rows of a run, for training and evaluation, are checked, rendered and ordered."""

    on_bad_row: OnBadRow = "error"
    """What to do with rows that cannot be used: report them all and stop, or leave them out; they are then written to
    dropped_rows.jsonl in the run's folder."""
    chat_template: Place | None = None
    """A Jinja file to use instead of the tokenizer's own chat template."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template, such as `{enable_thinking: false}`. A column of this name has precedence."""
    shuffle: bool = True
    """A fresh seeded order each epoch."""


@option
class SourceConfig(TaskRows):
    """One of several sources of tasks."""

    name: str | None = None
    """What metrics and the `sources` of rewards call it. Default: the file's or the dataset's name."""
    weight: Positive = 1.0
    """Share of the tasks of a run that come from this source, relative to the other weights."""


@option
class DataConfig(Presentation, TaskRows):
    """Where tasks come from."""

    prompt_format: Literal["chat", "text"] = "chat"
    """`chat` renders messages with the tokenizer's chat template; `text` gives the prompt to the model as it is."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Several sources in place of `path`, mixed by weight; each says for itself how its rows are read."""


@option
class PreferenceData(Presentation, PreferenceRows):
    """Where preferences come from."""
