"""Rows to tasks: a hub dataset, a local file or folder, or rows in memory in; a list of `Task` out.

Errors in the data are raised here, before any model loads, and name the file and line.
"""

from __future__ import annotations

import math
import re
from typing import Any

from llmrl.data.columns import ABSENT, choose, names, pick
from llmrl.data.ids import new_id
from llmrl.data.messages import (
    SYSTEM_COLUMNS,
    as_messages,
    check_ignored,
    conversation,
    joined,
    lost_columns,
    template_options_of,
    tools_of,
)
from llmrl.data.options import DataConfig, SourceConfig, TaskRows
from llmrl.data.report import BadRow, RowReport
from llmrl.data.rows import OpenRows, Row, open_rows, rows_in_memory
from llmrl.errors import UserError
from llmrl.types import Message, Task

PROMPT_COLUMNS = ("messages", "prompt", "question", "problem", "text", "instruction", "query", "conversations")
ANSWER_COLUMNS = (
    "answer",
    "solution",
    "target",
    "ground_truth",
    "golden_answers",
    "answers",
    "reward_model.ground_truth",
)
NO_ANSWER = "none"
"""Value of `data.answer_column` where rewards need no answer."""
SOURCE_COLUMNS = ("data_source", "dataset", "source")
"""Columns that say where a row comes from, in datasets that are mixtures themselves."""


def load_tasks(config: TaskRows, report: RowReport | None = None, *, needed: int | None = None) -> list[Task]:
    """Read the dataset, or the sources, that `config` names.

    Args:
        config: which rows, and how they become tasks.
        report: collects the rows that cannot be used; without it, they are an error here.
        needed: rows that a run can use; what streams is read no further.

    Returns:
        One task per row, in the order of the rows. An id depends on the dataset's short name and the row's prompt and
        answer only, so it is the same on every machine.

    Raises:
        UserError: nothing at `path` is readable, there are no rows, or a column is missing; without `report`, also if a
            row cannot become a task.
    """
    tasks: list[Task] = []
    ids: dict[str, int] = {}
    for source in (config.sources if isinstance(config, DataConfig) else None) or [config]:
        tasks += _collected(open_rows(source, needed=needed), source, report, ids)
    return tasks


def tasks_from_rows(
    rows: Any,
    config: TaskRows,
    name: str,
    report: RowReport | None = None,
    *,
    needed: int | None = None,
) -> list[Task]:
    """Make tasks from rows that are already in memory; otherwise as `load_tasks`.

    Args:
        rows: what `llmrl.data.rows.rows_in_memory` takes.
        config: how rows become tasks; `path` is not read.
        name: short dataset name, the first part of every task's id and the file in error messages.
        report: as in `load_tasks`.
        needed: as in `load_tasks`.
    """
    return _collected(rows_in_memory(rows, config, name, needed=needed), config, report, {})


def _collected(opened: OpenRows, config: TaskRows, report: RowReport | None, ids: dict[str, int]) -> list[Task]:
    found = RowReport() if report is None else report
    before = found.num_rows
    tasks = _build(opened, config, found, ids)
    if found.num_rows == before:
        raise UserError(f"data.path {config.path}: there are no rows in {opened.name}")
    if report is None or not tasks:
        found.settle(len(tasks))
    return tasks


# --- rows to tasks ----------------------------------------------------------------------------------------------------


def _build(opened: OpenRows, config: TaskRows, report: RowReport, ids: dict[str, int]) -> list[Task]:
    """Return the tasks of all rows that can be used; the others are noted in `report`."""
    reader: _Reader | None = None
    tasks: list[Task] = []
    report.streams |= opened.streams
    for place, row in opened.rows:
        report.num_rows += 1
        try:
            if isinstance(row, BadRow):
                raise row
            reader = reader or _Reader(config, opened.name, ids, place, row)
            task = reader.task(row, place)
        except BadRow as error:
            report.refuse(place, error, row)
        else:
            report.places[task.id] = place
            tasks.append(task)
    return tasks


class _Reader:
    """Makes tasks of the rows of one dataset. Its first row decides which columns are read.

    Raises:
        UserError: a column is missing, or the template cannot be filled.
    """

    def __init__(self, config: TaskRows, name: str, ids: dict[str, int], place: str, first: Row) -> None:
        self.config, self.ids = config, ids
        self.short_name = re.sub(r"[^\w.-]+", "_", name)
        self.source = config.name or self.short_name if isinstance(config, SourceConfig) else None
        self.prompt_column = choose("data.prompt_column", config.prompt_column, PROMPT_COLUMNS, place, first)
        self.answer_column = self._answer_column(place, first)
        self.pattern = _pattern(config.answer_pattern, self.answer_column)
        check_ignored(config.ignore_columns, place, first)
        if config.prompt_template is not None:
            _check_template(config.prompt_template, self.answer_column, place, first)

    def _answer_column(self, place: str, first: Row) -> str | None:
        chosen = self.config.answer_column
        if chosen == NO_ANSWER:
            return None
        if chosen is None:  # rewards that need an answer say so, in the check of every row
            return next((column for column in ANSWER_COLUMNS if pick(first, column) is not ABSENT), None)
        return choose("data.answer_column", chosen, (), place, first)

    def task(self, row: Row, place: str) -> Task:
        """Return the task of a row.

        Raises:
            BadRow: it cannot become one.
        """
        ignored = self.config.ignore_columns
        if reason := lost_columns(row, ignored):
            raise BadRow(place, reason)
        prompt = self._prompt(row, place)
        answer = None if self.answer_column is None else _answer(row, self.answer_column, self.pattern, place)
        return Task(
            id=new_id(self.short_name, prompt, answer, self.ids, place),
            messages=self._messages(prompt, row, place),
            answer=answer,
            meta=row,
            tools=tools_of(row, place, ignored),
            template_options=template_options_of(row, place, ignored),
            source=self._source(row),
        )

    def _source(self, row: Row) -> str:
        """Return the name of the configured source, or what the row says about where it comes from."""
        if self.source is not None:
            return self.source
        return next((row[column] for column in SOURCE_COLUMNS if isinstance(row.get(column), str)), self.short_name)

    def _prompt(self, row: Row, place: str) -> str | list[Message]:
        column = self.prompt_column
        prompt = as_messages(pick(row, column))
        if isinstance(prompt, str):
            more = row.get("input") if column == "instruction" else None  # Alpaca
            if isinstance(more, str) and more.strip() and "input" not in self.config.ignore_columns:
                prompt = f"{prompt}\n{more}"
            if not prompt.strip():
                raise BadRow(place, f"column {column}: the prompt is empty")
            return prompt
        if not isinstance(prompt, list):
            found = f"nothing (the columns are {names(row)})" if prompt is ABSENT else type(prompt).__name__
            raise BadRow(place, f"column {column}: a prompt must be text or a list of messages, found {found}")
        messages = conversation(prompt, f"{place}, column {column}")
        while len(messages) > 1 and self.config.final_assistant == "drop" and messages[-1].get("role") == "assistant":
            messages.pop()
        if messages[-1].get("role") == "assistant":
            raise BadRow(
                place,
                f"column {column}: a prompt must not end with an assistant message, which the policy writes: remove "
                "it, or set data.final_assistant drop",
            )
        return messages

    def _messages(self, prompt: str | list[Message], row: Row, place: str) -> list[Message]:
        template = self.config.prompt_template
        if isinstance(prompt, list):
            if template is not None:
                raise BadRow(place, "data.prompt_template wraps text, but this prompt is a list of messages")
            messages = prompt
        elif template is None:
            messages = [Message(role="user", content=prompt)]
        else:
            messages = [Message(role="user", content=_fill(template, prompt, row, place))]
        system = self._system(row, place)
        if system is None:
            return messages
        if messages[0].get("role") == "system":
            if joined(messages[0].get("content")) == system:
                return messages
            raise BadRow(
                place, "the prompt already has a system message; remove data.system_prompt, or the column with another"
            )
        return [Message(role="system", content=system), *messages]

    def _system(self, row: Row, place: str) -> str | None:
        """Return the system message from `data.system_prompt` or from a column of that name."""
        given = self.config.system_prompt
        columns = [c for c in SYSTEM_COLUMNS if c not in self.config.ignore_columns and c not in self._read()]
        column = next((c for c in columns if isinstance(row.get(c), str) and row[c].strip()), None)
        if column is None:
            return given
        if given is not None and given != row[column]:
            raise BadRow(
                place,
                f"column {column}: the row has a system message, and data.system_prompt gives another: remove that, or "
                f"set data.ignore_columns [{column}]",
            )
        return row[column]

    def _read(self) -> set[str | None]:
        """Return the columns that are read as something else."""
        filled = {match[1] for match in _FIELD.finditer(self.config.prompt_template or "")}
        return {self.prompt_column, self.answer_column, *filled}


def _pattern(text: str | None, answer_column: str | None) -> re.Pattern[str] | None:
    if text is None:
        return None
    if answer_column is None:
        raise UserError("data.answer_pattern is set, but there is no answer: set data.answer_column")
    try:
        return re.compile(text)
    except re.error as error:
        raise UserError(f"data.answer_pattern {text!r} is not a regular expression: {error}") from None


def _answer(row: Row, column: str, pattern: re.Pattern[str] | None, place: str) -> Any:
    answer = pick(row, column)
    empty = answer is ABSENT or answer is None or (isinstance(answer, float) and math.isnan(answer))
    empty |= isinstance(answer, str) and not answer.strip()
    empty |= isinstance(answer, list | tuple | dict) and not answer
    if empty:
        found = "nothing" if answer is ABSENT else repr(answer)
        raise BadRow(
            place,
            f"column {column}: the row has no answer (found {found}); remove the row, or set data.answer_column to "
            f"`{NO_ANSWER}` where rewards need no answer",
        )
    if pattern is None:
        return answer
    matches = list(pattern.finditer(str(answer)))
    if not matches:
        raise BadRow(
            place, f"column {column}: data.answer_pattern {pattern.pattern!r} matches nothing in {_short(answer)}"
        )
    return matches[-1][1 if pattern.groups else 0]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:38]}...{text[-38:]}"


_FIELD = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}")
"""`{name}` is a field, `{{` and `}}` are literal braces; any other brace is kept, as in `\\boxed{}`."""


def _check_template(template: str, answer_column: str | None, place: str, row: Row) -> None:
    fields = [match[1] for match in _FIELD.finditer(template) if match[1]]
    for field in fields:
        literal = f"write {{{{{field}}}}} for literal braces"
        if field == answer_column:
            raise UserError(f"data.prompt_template: {{{field}}} would show the hidden answer to the policy; {literal}")
        if field != "prompt" and field not in row:
            raise UserError(
                f"data.prompt_template: no column {field!r} in {place} (the columns are {names(row)}); {literal}"
            )
    if not fields:
        raise UserError("data.prompt_template has no {prompt}, so every prompt would be the same: add it")


def _fill(template: str, prompt: str, row: Row, place: str) -> str:
    def text(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        value = prompt if match[1] == "prompt" else row.get(match[1])
        if value is None:
            raise BadRow(place, f"column {match[1]}: the value is empty, but data.prompt_template names it")
        return "\n".join(map(str, value)) if isinstance(value, list) else str(value)

    return _FIELD.sub(text, template)
