"""Rows to tasks: a hub dataset, a local file or folder, or any iterable of rows in; a list of `Task` out.

Local files are read without guessing types, caching or network access, so an answer "007" stays "007". Errors in the
data are raised here, before any model loads, and name the file and line.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from llmrl.data.program import find_program, run_program
from llmrl.errors import UserError
from llmrl.types import Message, Task

if TYPE_CHECKING:
    from datasets import Dataset

    from llmrl.data.options import DataConfig, RowsConfig

PROMPT_COLUMNS = ("messages", "prompt", "question", "problem", "text")
ANSWER_COLUMNS = ("answer", "solution", "target")
NO_ANSWER = "none"
"""Value of `data.answer_column` where rewards need no answer."""

Row = dict[str, Any]
Located = tuple[str, Row]
"""Where a row comes from, for error messages ("train.jsonl, line 3"), and the row."""


def load_tasks(config: DataConfig) -> list[Task]:
    """Read the dataset that `config` names.

    Args:
        config: which rows, and how they become tasks.

    Returns:
        One task per row, in the order of the rows. An id depends on the dataset's short name and the row's prompt and
        answer only, so it is the same on every machine.

    Raises:
        UserError: nothing at `path` is readable, there are no rows, a column is missing, or a row cannot become a task.
    """
    rows, name = open_rows(config)
    return _build(rows, config, name)


def tasks_from_rows(rows: Iterable[Row] | Dataset, config: DataConfig, name: str) -> list[Task]:
    """Make tasks from rows that are already in memory; otherwise as `load_tasks`.

    Args:
        rows: dictionaries, or a `datasets.Dataset`.
        config: how rows become tasks; `path` and `split` are not read.
        name: short dataset name, the first part of every task's id and the file in error messages.
    """
    return _build(_numbered(name, map(dict, rows)), config, name)


# --- where rows come from ---------------------------------------------------------------------------------------------


def open_rows(config: RowsConfig) -> tuple[Iterator[Located], str]:
    """Open the rows that `config.path` names. Returns them and the dataset's short name."""
    path = Path(config.path)
    if (program := find_program(config.path)) is not None:
        return _numbered(config.path, run_program(program, config.split)), program.stem
    if path.is_file():
        return _open_file(path, config), path.stem
    if not path.exists() and _looks_local(config.path):
        raise UserError(f"data.path {config.path}: no such file or folder{_near(path)}")
    name = path.resolve().name if path.exists() else config.path.rsplit("/", 1)[-1].partition(":")[0]
    if file := _split_file(path, config.split):
        return _READERS[file.suffix](file), name
    dataset = _open_saved(path, config) if _is_saved(path) else _open_through_datasets(path, config)
    return _numbered(config.path, dataset), name


def _open_file(path: Path, config: RowsConfig) -> Iterator[Located]:
    if path.suffix.lower() not in _READERS:
        raise UserError(f"data.path {config.path}: cannot read {path.suffix or 'this kind of'} files; {_KINDS}")
    _refuse_split(config)
    return _READERS[path.suffix.lower()](path)


def _refuse_split(config: RowsConfig) -> None:
    """Raise UserError where `split` is set but would not be read: a single table has no splits."""
    if config.split != "train":
        raise UserError(
            f"data.split is {config.split!r}, but data.path {config.path} is a single table without splits: "
            "remove data.split"
        )


def _split_file(folder: Path, split: str) -> Path | None:
    """Find the file of `folder` that is named after the split, such as `gsm8k/train.jsonl`."""
    return next((file for suffix in _READERS if (file := folder / f"{split}{suffix}").is_file()), None)


def _looks_local(path: str) -> bool:
    """Whether `path` cannot be a hub id: `name`, `owner/name` or `owner/name:configuration`, without a file suffix."""
    if Path(path).suffix.lower() in (*_READERS, ".py"):
        return True
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?", path) is None


def _near(path: Path) -> str:
    """Return a hint: the names in the same folder that resemble that of `path`."""
    if not path.parent.is_dir():
        return f" (there is no folder {path.parent} either)"
    close = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(str(path.parent / name) for name in close)}?" if close else ""


def _is_saved(path: Path) -> bool:
    """Whether `path` was written by `save_to_disk`, of a Dataset or a DatasetDict."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _open_saved(path: Path, config: RowsConfig) -> Dataset:
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(str(path))
    if not isinstance(dataset, DatasetDict):
        _refuse_split(config)
        return dataset
    if config.split not in dataset:
        raise UserError(f"data.split {config.split!r}: {config.path} has {', '.join(map(repr, dataset))}")
    return dataset[config.split]


def _open_through_datasets(path: Path, config: RowsConfig) -> Dataset:
    """Open a local folder of data files, or a hub dataset."""
    from datasets import load_dataset

    local = path.exists()
    hub_id, _, configuration = config.path.partition(":")
    try:
        if local:
            return load_dataset(str(path), split=config.split)
        return load_dataset(hub_id, configuration or None, split=config.split)
    except Exception as error:  # many unrelated types, about the request or about the connection
        cause = f"{type(error).__name__}: {error}"
        if local:
            raise UserError(f"data.path {config.path}: cannot read this folder as a dataset. {cause}") from error
        raise UserError(
            f"data.path {config.path}: there is no such local file or folder{_near(path)}, and it could not be loaded "
            f"from the hub either (not reachable, no such dataset, or a wrong configuration or data.split). {cause}"
        ) from error


def _read_json_lines(path: Path) -> Iterator[Located]:
    with _text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{place}: not valid JSON ({error.msg}); each line must be one JSON object") from None
            yield place, _object(place, row)


def _read_json(path: Path) -> Iterator[Located]:
    """Read one array of objects, or one object per line, as many files named .json have it."""
    with _text(path) as file:
        first = next((line for line in file if line.strip()), "")
    if not first.lstrip().startswith("["):
        yield from _read_json_lines(path)
        return
    with _text(path) as file:
        try:
            rows = json.load(file)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
    yield from ((place, _object(place, row)) for place, row in _numbered(str(path), rows))


def _read_csv(path: Path) -> Iterator[Located]:
    csv.field_size_limit(2**31 - 1)  # the default limit is 128 KiB, and columns of unit tests are larger
    with _text(path, newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                place = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    count = len(reader.fieldnames or [])
                    raise UserError(f"{place}: the row does not have {count} fields, as the header does")
                yield place, row
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.reader.line_num}: not valid CSV ({error})") from None


def _read_parquet(path: Path) -> Iterator[Located]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a readable Parquet file ({error})") from None
    yield from _numbered(str(path), itertools.chain.from_iterable(batch.to_pylist() for batch in batches))


_READERS = {".jsonl": _read_json_lines, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
_KINDS = (
    "use .json, .jsonl, .csv, .parquet, a .py file with a function rows(split), or a folder written by "
    "datasets.save_to_disk"
)


def _numbered(name: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{name}, row {i} (counting from 0)", row) for i, row in enumerate(rows))


@contextlib.contextmanager
def _text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Open a UTF-8 text file, with or without a byte order mark; raise UserError at bytes that are not UTF-8."""
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); convert the file to UTF-8") from None


def _object(place: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{place}: a row must be a JSON object with named columns, not {type(value).__name__}")
    return value


# --- rows to tasks ----------------------------------------------------------------------------------------------------


def _build(rows: Iterator[Located], config: DataConfig, name: str) -> list[Task]:
    rows = itertools.islice(rows, config.limit)
    first = next(rows, None)
    if first is None:
        raise UserError(f"data.path {config.path}: there are no rows in {name}")
    prompt_column = _choose("prompt_column", config.prompt_column, PROMPT_COLUMNS, first)
    answer_column = None
    if config.answer_column != NO_ANSWER:
        answer_column = _choose("answer_column", config.answer_column, ANSWER_COLUMNS, first)
    if config.prompt_template is not None:
        _check_template(config.prompt_template, answer_column, first)
    short_name = re.sub(r"[^\w.-]+", "_", name)
    ids: dict[str, int] = {}
    tasks = []
    for place, row in itertools.chain([first], rows):
        prompt = _prompt(row, prompt_column, place)
        answer = None if answer_column is None else _answer(row, answer_column, place)
        tasks.append(
            Task(
                id=new_id(short_name, prompt, answer, ids, place),
                messages=_messages(prompt, row, config, place),
                answer=answer,
                meta=row,
            )
        )
    return tasks


def _choose(field: str, chosen: str | None, defaults: tuple[str, ...], first: Located) -> str:
    """Return the configured column, or the first of the defaults that the first row has."""
    place, row = first
    columns = f"the columns are {', '.join(map(str, row)) or '(none)'}"
    none_hint = f", or `{NO_ANSWER}` where rewards need no answer" if field == "answer_column" else ""
    if chosen is None:
        found = next((column for column in defaults if column in row), None)
        if found is None:
            raise UserError(f"{place}: no column named {' / '.join(defaults)}; set data.{field}{none_hint} ({columns})")
        return found
    if chosen not in row:
        close = difflib.get_close_matches(chosen, [str(column) for column in row], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"{place}: data.{field} names {chosen!r}, but there is no such column{hint} ({columns})")
    return chosen


def _prompt(row: Row, column: str, place: str) -> str | list[Message]:
    prompt = row.get(column)
    if isinstance(prompt, str):
        if not prompt.strip():
            raise UserError(f"{place}, column {column}: the prompt is empty")
        return prompt
    if not isinstance(prompt, list):
        found = type(prompt).__name__ if column in row else f"nothing (the columns are {', '.join(map(str, row))})"
        raise UserError(f"{place}, column {column}: a prompt must be text or a list of messages, found {found}")
    messages = conversation(prompt, f"{place}, column {column}")
    if messages[-1].get("role") == "assistant":
        raise UserError(
            f"{place}, column {column}: a prompt must not end with an assistant message, which the policy writes: "
            "remove it"
        )
    return messages


def conversation(prompt: list[Any], place: str) -> list[Message]:
    """Check a list of messages, and drop keys without a value: tables add a key to all rows when one row has it."""
    if not prompt:
        raise UserError(f"{place}: the list of messages is empty")
    messages: list[Message] = []
    for i, message in enumerate(prompt):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            found = f"keys {', '.join(map(str, message))}" if isinstance(message, dict) else type(message).__name__
            raise UserError(f"{place}, message {i}: a message needs `role` (text) and `content`, found {found}")
        kept: Any = {key: value for key, value in message.items() if value is not None or key == "content"}
        if not isinstance(kept["content"], str | list) and not kept.get("tool_calls"):
            raise UserError(
                f"{place}, message {i}: `content` must be text or a list of parts, found {kept['content']!r}"
            )
        messages.append(kept)
    return messages


def _answer(row: Row, column: str, place: str) -> Any:
    answer = row.get(column)
    empty = answer is None or (isinstance(answer, float) and math.isnan(answer))
    empty |= isinstance(answer, str) and not answer.strip()
    empty |= isinstance(answer, list | tuple | dict) and not answer
    if empty:
        found = repr(answer) if column in row else "nothing"
        raise UserError(
            f"{place}, column {column}: the row has no answer (found {found}); remove the row, or set "
            f"data.answer_column to `{NO_ANSWER}` where rewards need no answer"
        )
    return answer


_FIELD = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}")
"""`{name}` is a field, `{{` and `}}` are literal braces; any other brace is kept, as in `\\boxed{}`."""


def _messages(prompt: str | list[Message], row: Row, config: DataConfig, place: str) -> list[Message]:
    if isinstance(prompt, list):
        if config.prompt_template is not None:
            raise UserError(f"{place}: data.prompt_template wraps text, but this prompt is a list of messages")
        messages = prompt
    elif config.prompt_template is None:
        messages = [Message(role="user", content=prompt)]
    else:
        messages = [Message(role="user", content=_fill(config.prompt_template, prompt, row, place))]
    if config.system_prompt is None:
        return messages
    if messages[0].get("role") == "system":
        raise UserError(f"{place}: the prompt already has a system message; remove data.system_prompt")
    return [Message(role="system", content=config.system_prompt), *messages]


def _check_template(template: str, answer_column: str | None, first: Located) -> None:
    place, row = first
    fields = [match[1] for match in _FIELD.finditer(template) if match[1]]
    for field in fields:
        literal = f"write {{{{{field}}}}} for literal braces"
        if field == answer_column:
            raise UserError(f"data.prompt_template: {{{field}}} would show the hidden answer to the policy; {literal}")
        if field != "prompt" and field not in row:
            raise UserError(
                f"data.prompt_template: no column {field!r} in {place} (the columns are {', '.join(map(str, row))}); "
                f"{literal}"
            )
    if not fields:
        raise UserError("data.prompt_template has no {prompt}, so every prompt would be the same: add it")


def _fill(template: str, prompt: str, row: Row, place: str) -> str:
    def text(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        value = prompt if match[1] == "prompt" else row.get(match[1])
        if value is None:
            raise UserError(f"{place}, column {match[1]}: the value is empty, but data.prompt_template names it")
        return "\n".join(map(str, value)) if isinstance(value, list) else str(value)

    return _FIELD.sub(text, template)


# --- ids --------------------------------------------------------------------------------------------------------------


def new_id(name: str, prompt: Any, answer: Any, taken: dict[str, int], place: str) -> str:
    """Return `name`-`hash` of (prompt, answer), or of (prompt, answer, k) for the k-th repetition of a row.

    Ids never change: the ledgers and checkpoints of earlier runs hold them.

    Args:
        name: short name of the dataset.
        prompt: the row's, text or messages.
        answer: the row's, any plain value.
        taken: ids so far, and how often each was repeated; updated.
        place: where the row comes from, for errors.
    """
    first = task_id = f"{name}-{_digest([prompt, answer], place)}"
    while task_id in taken:
        taken[first] += 1
        task_id = f"{name}-{_digest([prompt, answer, taken[first]], place)}"
    taken[task_id] = 0
    return task_id


def _digest(content: Any, place: str) -> str:
    """Return the first 12 hex digits of SHA-256 over canonical JSON, the same on every machine and Python version."""
    try:
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), default=_plain)
    except TypeError as error:
        raise UserError(
            f"{place}: prompt and answer must be plain values such as text, numbers, lists ({error})"
        ) from None
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def _plain(value: Any) -> Any:
    """Convert values of tables that JSON does not know: numpy numbers and arrays, dates, bytes."""
    for method in ("tolist", "isoformat", "hex"):
        if hasattr(value, method):
            return getattr(value, method)()
    raise TypeError(f"found {type(value).__name__}")
