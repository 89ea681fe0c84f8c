"""Where rows come from: a hub dataset, a local file or folder, a Python file, or objects in memory.

Local files are read without guessing types, caching or network access, so an answer "007" stays "007". A row is a
dictionary; where a single row cannot be read, a `BadRow` stands in its place, so that all of them are reported at once.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import glob
import gzip
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from llmrl.data.program import find_program, run_program
from llmrl.data.report import BadRow
from llmrl.errors import UserError

if TYPE_CHECKING:
    from llmrl.data.options import RowsConfig

MAX_ROWS_WITHOUT_LENGTH = 1_000_000
"""A generator with more rows than this, where all of them are needed, is taken to be endless."""

Row = dict[str, Any]
Located = tuple[str, Row | BadRow]
"""Where a row comes from, for error messages ("train.jsonl, line 3"), and the row, or why it could not be read."""


@dataclass(frozen=True)
class OpenRows:
    """Rows that can be read once."""

    rows: Iterator[Located]
    name: str
    """Short name of the dataset."""
    streams: bool
    """They may be endless, so no more are read than the run needs."""


def open_rows(config: RowsConfig, *, needed: int | None = None) -> OpenRows:
    """Open the rows that `config.path` names.

    Args:
        config: which rows; no more than `config.limit` are read.
        needed: rows that a run can use; what streams is read no further, unless `config.limit` says otherwise.

    Raises:
        UserError: nothing is readable there.
    """
    rows, name, endless = _open(config)
    return _bounded(rows, name, config, needed, endless=endless)


def rows_in_memory(data: Any, config: RowsConfig, name: str, *, needed: int | None = None) -> OpenRows:
    """Open rows from objects: a datasets.Dataset, DatasetDict or IterableDataset, a table of pandas or polars, a
    mapping of columns, or any iterable of dictionaries.

    Args:
        data: the object.
        config: `split` chooses among those of a DatasetDict; `limit` bounds the rows.
        name: what messages call it.
        needed: as in `open_rows`.

    Raises:
        UserError: it is none of these, or has several splits and not the wanted one.
    """
    if isinstance(data, Mapping):
        data = _columns_or_split(data, config)
    if hasattr(data, "columns") and not hasattr(data, "features"):  # a table; a datasets.Dataset yields its rows itself
        data = data.to_dicts() if hasattr(data, "to_dicts") else data.to_dict("records")
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise UserError(f"{name}: a {type(data).__name__} holds no rows; give a datasets.Dataset or a list of rows")
    rows = ((place, row if isinstance(row, BadRow) else _without_arrays(row)) for place, row in _numbered(name, data))
    return _bounded(rows, name, config, needed, endless=not hasattr(data, "__len__"))


def is_splits(data: Any) -> bool:
    """Return whether an object is several datasets by name, as a DatasetDict is."""
    return isinstance(data, Mapping) and bool(data) and all(hasattr(value, "features") for value in data.values())


def _without_arrays(row: Row) -> Row:
    """Return a row whose values are plain: tables of pandas hold arrays where files hold lists, and numpy's numbers."""
    return {
        name: value.tolist() if hasattr(value, "tolist") else list(value) if isinstance(value, tuple) else value
        for name, value in row.items()
    }


def _columns_or_split(data: Mapping[str, Any], config: RowsConfig) -> Any:
    """Return the rows of a mapping: the wanted split of a DatasetDict, or its columns turned into rows."""
    if is_splits(data):
        if config.split not in data:
            splits = ", ".join(map(repr, data))
            raise UserError(
                f"the dataset has the splits {splits}: give one of them, such as datasets[{next(iter(data))!r}]"
            )
        return data[config.split]
    lengths = {name: len(v) for name, v in data.items() if hasattr(v, "__len__") and not isinstance(v, str | Mapping)}
    if len(lengths) < len(data) or len(set(lengths.values())) > 1:
        raise UserError(f"a mapping of columns needs lists of one length, found {lengths or ', '.join(map(str, data))}")
    return [dict(zip(data, values, strict=True)) for values in zip(*data.values(), strict=True)]


def _bounded(rows: Iterator[Located], name: str, config: RowsConfig, needed: int | None, *, endless: bool) -> OpenRows:
    streams = endless and config.limit is None and needed is not None
    if endless and config.limit is None and needed is None:
        rows = _with_an_end(rows, name)
    return OpenRows(itertools.islice(rows, needed if streams else config.limit), name, streams)


def _with_an_end(rows: Iterator[Located], name: str) -> Iterator[Located]:
    for count, row in enumerate(rows):
        if count == MAX_ROWS_WITHOUT_LENGTH:
            raise UserError(f"{name}: {count:,} rows and no end; set a limit (data.limit, eval.data.limit)")
        yield row


# --- files, folders, the hub ------------------------------------------------------------------------------------------


def _open(config: RowsConfig) -> tuple[Iterator[Located], str, bool]:
    """Return the rows, the dataset's short name, and whether the rows may be endless."""
    path = Path(config.path)
    if (program := find_program(config.path)) is not None:
        made = run_program(program, config.split)
        return _numbered(config.path, made), program.stem, not hasattr(made, "__len__")
    if not path.exists() and glob.has_magic(config.path):
        files = sorted(map(Path, glob.glob(config.path, recursive=True)))
        if not files:
            raise UserError(f"data.path {config.path}: no file matches")
        every = (_open_file(file, config) for file in files)
        return itertools.chain.from_iterable(every), Path(config.path.partition("*")[0]).name or "rows", config.stream
    if path.is_file():
        return _open_file(path, config), path.name.removesuffix(".gz").rpartition(".")[0], config.stream
    if not path.exists() and _looks_local(config.path):
        raise UserError(f"data.path {config.path}: no such file or folder{_near(path)}")
    name = path.resolve().name if path.exists() else config.path.rsplit("/", 1)[-1].partition(":")[0]
    if file := _split_file(path, config.split):
        return READERS[file.suffix](file), name, config.stream
    dataset = _open_saved(path, config) if _is_saved(path) else _open_through_datasets(path, config)
    return _numbered(config.path, dataset), name, config.stream


def _open_file(path: Path, config: RowsConfig) -> Iterator[Located]:
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix not in READERS:
        raise UserError(f"data.path {config.path}: cannot read {path.suffix or 'this kind of'} files; {_KINDS}")
    _refuse_split(config)
    return READERS[suffix](path)


def _refuse_split(config: RowsConfig) -> None:
    """Raise UserError where `split` is set but would not be read: a single table has no splits."""
    if config.split != "train":
        raise UserError(
            f"data.split is {config.split!r}, but data.path {config.path} is a single table without splits: "
            "remove data.split"
        )


def _split_file(folder: Path, split: str) -> Path | None:
    """Find the file of `folder` that is named after the split, such as `gsm8k/train.jsonl`."""
    return next((file for suffix in READERS if (file := folder / f"{split}{suffix}").is_file()), None)


def _looks_local(path: str) -> bool:
    """Whether `path` cannot be a hub id: `name`, `owner/name` or `owner/name:configuration`, without a file suffix."""
    if Path(path).suffix.lower() in (*READERS, ".py", ".gz"):
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


def _open_saved(path: Path, config: RowsConfig) -> Any:
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(str(path))
    if not isinstance(dataset, DatasetDict):
        _refuse_split(config)
        return dataset
    if config.split not in dataset:
        raise UserError(f"data.split {config.split!r}: {config.path} has {', '.join(map(repr, dataset))}")
    return dataset[config.split]


def _open_through_datasets(path: Path, config: RowsConfig) -> Any:
    """Open a local folder of data files, or a hub dataset."""
    from datasets import load_dataset

    local = path.exists()
    hub_id, _, configuration = config.path.partition(":")
    streaming: Any = {"streaming": True} if config.stream else {}
    try:
        if local:
            return load_dataset(str(path), split=config.split, **streaming)
        return load_dataset(hub_id, configuration or None, split=config.split, **streaming)
    except Exception as error:  # many unrelated types, about the request or about the connection
        cause = f"{type(error).__name__}: {error}"
        if local:
            raise UserError(f"data.path {config.path}: cannot read this folder as a dataset. {cause}") from error
        raise UserError(
            f"data.path {config.path}: there is no such local file or folder{_near(path)}, and it could not be loaded "
            f"from the hub either (not reachable, no such dataset, or a wrong configuration or data.split). {cause}"
        ) from error


def _read_json_lines(path: Path) -> Iterator[Located]:
    first = True
    with _text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                problem = getattr(error, "msg", "nested too deeply")
                bad = BadRow(place, f"not valid JSON ({problem}); each line must be one JSON object")
                if first:  # the whole file is probably something else
                    raise bad from None
                yield place, bad
            else:
                yield place, _object(place, row)
            first = False


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
    yield from _numbered(str(path), rows)


def _read_csv(path: Path) -> Iterator[Located]:
    csv.field_size_limit(2**31 - 1)  # the default limit is 128 KiB, and columns of unit tests are larger
    with _text(path, newline="") as file:
        reader = csv.DictReader(file, strict=True, delimiter="\t" if ".tsv" in path.suffixes else ",")
        try:
            for row in reader:
                place = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    count = len(reader.fieldnames or [])
                    yield place, BadRow(place, f"the row does not have {count} fields, as the header does")
                else:
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


READERS = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
_KINDS = (
    "use .json, .jsonl, .csv, .tsv (each also with .gz), .parquet, a .py file with a function rows(split), or a folder "
    "written by datasets.save_to_disk"
)


def _numbered(name: str, rows: Iterable[Any]) -> Iterator[Located]:
    for i, row in enumerate(rows):
        place = f"{name}, row {i} (counting from 0)"
        yield place, _object(place, row)


@contextlib.contextmanager
def _text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Open a UTF-8 text file, with or without a byte order mark; raise UserError at bytes that are not UTF-8."""
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8-sig", newline=newline) as file:
            yield cast("TextIO", file)
    except (OSError, EOFError) as error:  # gzip raises EOFError where a file is cut off
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); convert the file to UTF-8") from None


def _object(place: str, value: Any) -> Row | BadRow:
    if not isinstance(value, Mapping):
        return BadRow(place, f"a row must be a JSON object with named columns, not {type(value).__name__}")
    return dict(value)
