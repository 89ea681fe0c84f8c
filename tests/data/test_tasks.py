"""Rows to tasks: every kind of source gives the same tasks, and errors name the place of the row."""

from __future__ import annotations

import csv
import datetime
import decimal
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from pydantic import ValidationError

from llmrl.data.options import DataConfig
from llmrl.data.tasks import load_tasks, tasks_from_rows
from llmrl.errors import UserError
from llmrl.types import Task

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="the real data sets are not beside this checkout (../shared/data)"
)

ROWS = [
    {"question": f"What is {i} + 1?", "answer": f"so it is\n#### 00{i + 1}", "date": "2020-01-01"} for i in range(5)
]
FIRST_ID = "train-" + hashlib.sha256(b'["What is 0 + 1?","so it is\\n#### 001"]').hexdigest()[:12]


def config(path: Path | str = "rows", **fields: Any) -> DataConfig:
    return DataConfig(path=str(path), **fields)


def load(rows: list[dict[str, Any]], **fields: Any) -> list[Task]:
    return tasks_from_rows(rows, config(**fields), "rows")


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(file: Path, rows: list[dict[str, Any]]) -> None:
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Any]] = {
    "train.jsonl": write_lines,
    "train.json": lambda file, rows: file.write_text(json.dumps(rows, indent=1)),
    "train.csv": write_csv,
    "train.parquet": lambda file, rows: Dataset.from_list(rows).to_parquet(str(file)),
    "train": lambda folder, rows: Dataset.from_list(rows).save_to_disk(str(folder)),
}


# --- sources ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_every_local_kind_gives_the_same_tasks(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name, ROWS)
    tasks = load_tasks(config(tmp_path / name))
    assert tasks == tasks_from_rows(ROWS, config(), "train")
    assert tasks == tasks_from_rows(Dataset.from_list(ROWS), config(), "train")
    assert tasks[0] == Task(
        id=FIRST_ID,
        messages=[{"role": "user", "content": "What is 0 + 1?"}],
        answer="so it is\n#### 001",
        meta={"question": "What is 0 + 1?", "answer": "so it is\n#### 001", "date": "2020-01-01"},
        source="train",
    )
    assert load_tasks(config(tmp_path / name, limit=2)) == tasks[:2]
    assert load_tasks(config(tmp_path / name, limit=99)) == tasks


def test_no_type_is_guessed(tmp_path: Path) -> None:
    row = {"text": "When?", "answer": "2020-01-01"}
    write_lines(
        tmp_path / "a.jsonl",
        [row, {"text": "Why?", "answer": 7}, {"text": "Who?", "answer": ["x"], "more": {"k": None}}],
    )
    write_csv(tmp_path / "a.csv", [row, {"text": "Why?", "answer": "007"}, {"text": "Who?", "answer": "NA"}])
    assert [task.answer for task in load_tasks(config(tmp_path / "a.jsonl"))] == ["2020-01-01", 7, ["x"]]
    assert load_tasks(config(tmp_path / "a.jsonl"))[2].meta["more"] == {"k": None}
    assert [task.answer for task in load_tasks(config(tmp_path / "a.csv"))] == ["2020-01-01", "007", "NA"]


def test_json_lines_under_the_name_json_blank_lines_and_byte_order_mark(tmp_path: Path) -> None:
    text = "\ufeff\n" + "\n\n".join(json.dumps(row) for row in ROWS) + "\n \n"
    for name in ("train.json", "train.jsonl"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert load_tasks(config(tmp_path / name)) == tasks_from_rows(ROWS, config(), "train")


def test_csv_with_long_fields_and_line_breaks(tmp_path: Path) -> None:
    rows = [{"prompt": 'a "quoted",\nsecond line', "answer": "x" * 200_000}, {"prompt": "b", "answer": "1"}]
    write_csv(tmp_path / "a.csv", rows)
    assert [task.meta for task in load_tasks(config(tmp_path / "a.csv"))] == rows


def test_folders_and_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "train.jsonl", ROWS)
    write_lines(tmp_path / "test.jsonl", ROWS[3:])
    assert load_tasks(config(tmp_path)) == tasks_from_rows(ROWS, config(), tmp_path.name)
    assert load_tasks(config(tmp_path, split="test")) == tasks_from_rows(ROWS[3:], config(), tmp_path.name)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    sliced = load_tasks(config(tmp_path, split="train[:2]"))
    assert [task.id for task in sliced] == [task.id for task in load_tasks(config(tmp_path))[:2]]
    with pytest.raises(UserError, match=r"cannot read this folder.*validation"):
        load_tasks(config(tmp_path, split="validation"))


def test_saved_splits(tmp_path: Path) -> None:
    saved = {"train": Dataset.from_list(ROWS), "held": Dataset.from_list(ROWS[:1])}
    DatasetDict(saved).save_to_disk(str(tmp_path / "sums"))
    assert load_tasks(config(tmp_path / "sums", split="held")) == tasks_from_rows(ROWS[:1], config(), "sums")
    with pytest.raises(UserError, match=r"data.split 'test'.*'train', 'held'"):
        load_tasks(config(tmp_path / "sums", split="test"))


def test_local_files_need_neither_network_nor_home(tmp_path: Path) -> None:
    for name, write in WRITERS.items():
        write(tmp_path / name, ROWS)
    code = f"""
import socket, sys
def refuse(*args, **kwargs): raise SystemExit("network was used")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
from llmrl.data.options import DataConfig
from llmrl.data.tasks import load_tasks
for name in {list(WRITERS)!r}:
    print(load_tasks(DataConfig(path={str(tmp_path)!r} + "/" + name))[0].id)
    if name == "train.csv": assert "datasets" not in sys.modules
"""
    home = tmp_path / "home"
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    environment = kept | {"HOME": str(home), "PYTHONHASHSEED": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.stdout.split() == [FIRST_ID] * len(WRITERS), result.stderr
    assert not home.exists()


def test_hub_that_cannot_be_reached_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"owner/sums: there is no such local file .* from the hub either.*ConnectionError"
    ):
        load_tasks(config("owner/sums"))


def test_hub_dataset_is_loaded_with_name_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: Any, **kwargs: Any) -> Dataset:
        asked.append((args, kwargs))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    tasks = load_tasks(config("openai/gsm8k:main", split="test[:5]"))
    assert asked == [(("openai/gsm8k", "main"), {"split": "test[:5]"})]
    assert tasks == tasks_from_rows(ROWS, config(), "gsm8k")


def test_missing_files_are_named_with_their_neighbours(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(UserError, match=r"trian\.jsonl: no such file or folder; did you mean .*train\.jsonl\?"):
        load_tasks(config(tmp_path / "trian.jsonl"))
    with pytest.raises(UserError, match=r"there is no folder .*/absent either"):
        load_tasks(config(tmp_path / "absent" / "train.jsonl"))
    with pytest.raises(UserError, match="no such file or folder"):
        load_tasks(config("train-that-is-absent.parquet"))
    (tmp_path / "train.xlsx").touch()
    with pytest.raises(UserError, match=r"cannot read .xlsx files; use .json"):
        load_tasks(config(tmp_path / "train.xlsx"))


def test_a_split_that_a_single_table_would_ignore_is_refused(tmp_path: Path) -> None:
    for name in ("train.jsonl", "train"):
        WRITERS[name](tmp_path / name, ROWS)
        with pytest.raises(UserError, match=r"data\.split is .* is a single table"):
            load_tasks(config(tmp_path / name, split="test"))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b'{"text": "q", "answer": 1}\n\n{"text":\n', r"a\.jsonl, line 3: not valid JSON"),
        ("a.jsonl", b'{"text": "q", "answer": 1}\n[1]\n', r"a\.jsonl, line 2: a row must be a JSON object .* not list"),
        (
            "a.jsonl",
            b'{"text": "q", "answer": 1}\n{"text": "r", "answer": null}',
            r"a\.jsonl, line 2, column answer: .* None",
        ),
        ("a.jsonl", b"", r"there are no rows in a$"),
        ("a.json", b"[]", r"there are no rows in a$"),
        ("a.json", b'[{"text": "q",\n "answer": 1},\n oops]', r"a\.json, line 3: not valid JSON"),
        ("a.json", b'[{"text": "q", "answer": 1}, 5]', r"a\.json, row 1 \(counting from 0\): a row must be .* not int"),
        ("a.json", b'{\n "data": []\n}', r"a\.json, line 1: not valid JSON .*one JSON object"),
        ("a.json", b'{"text": "\xff"}', r"a\.json: not UTF-8 text"),
        ("a.csv", b'text,answer\nq,1\n"r\ns",\n', r"a\.csv, line 4, column answer: the row has no answer"),
        ("a.csv", b"text,answer\nq,1\nr\n", r"a\.csv, line 3: the row does not have 2 fields"),
        ("a.csv", b"text,answer\nq,1,2\n", r"a\.csv, line 2: the row does not have 2 fields"),
        ("a.csv", b'text,answer\nq,"1', r"a\.csv, line 2: not valid CSV"),
        ("a.csv", b"text,answer\n", r"there are no rows in a$"),
        ("a.parquet", b"PAR0", r"a\.parquet: not a readable Parquet file"),
    ],
)
def test_unreadable_content_is_reported_with_its_place(
    name: str, content: bytes, expected: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=expected):
        load_tasks(config(tmp_path / name))


def test_bad_lines_after_the_limit_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "q", "answer": 1}\noops\n')
    assert len(load_tasks(config(tmp_path / "a.jsonl", limit=1))) == 1
    with pytest.raises(ValidationError, match=r"limit\n.*greater than or equal to 1"):
        config(tmp_path / "a.jsonl", limit=0)


# --- columns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "prompt"),
    [("text problem", "problem"), ("problem question prompt", "prompt"), ("text", "text"), ("x question", "question")],
)
@pytest.mark.parametrize(
    ("answers", "answer"), [("target solution", "solution"), ("solution answer", "answer"), ("target", "target")]
)
def test_default_columns(columns: str, prompt: str, answers: str, answer: str) -> None:
    row = {column: f"the {column}" for column in f"{columns} {answers}".split()}
    (task,) = load([row])
    assert task.messages == [{"role": "user", "content": f"the {prompt}"}]
    assert task.answer == f"the {answer}"
    assert task.meta == row


def test_chosen_columns() -> None:
    row = {"question": "q", "answer": "a", "hint": "h", "label": 0}
    (task,) = load([row], prompt_column="hint", answer_column="label")
    assert (task.messages[0]["content"], task.answer, task.meta) == ("h", 0, row)
    (task,) = load([row], answer_column="none")
    assert task.answer is None
    assert task.meta == row


def test_missing_columns_are_listed() -> None:
    row = {"question": "q", "gold": "a"}
    assert load([row])[0].answer is None, "a reward that needs an answer says so, in the check of every row"
    with pytest.raises(
        UserError, match=r"row 0.*no column named messages / prompt.*data.prompt_column \(the columns are q, a\)"
    ):
        load([{"q": "x", "a": "y"}])
    with pytest.raises(UserError, match=r"data.prompt_column names 'questoin', .*; did you mean 'question'\?"):
        load([row], prompt_column="questoin", answer_column="none")
    with pytest.raises(UserError, match=r"data.answer_column names 'golden', .*; did you mean 'gold'\?"):
        load([row], answer_column="golden")
    with pytest.raises(UserError, match=r"row 1.*column question: .*found nothing \(the columns are gold\)"):
        load([row, {"gold": "b"}], answer_column="gold")


@pytest.mark.parametrize("answer", [None, "", "  \n", float("nan"), [], {}])
def test_rows_without_an_answer_are_refused(answer: Any) -> None:
    rows = [{"question": "q", "answer": "a"}, {"question": "r", "answer": answer}]
    with pytest.raises(
        UserError, match=r"rows, row 1 \(counting from 0\), column answer: the row has no answer.*`none`"
    ):
        load(rows)
    assert len(load(rows, answer_column="none")) == 2


@pytest.mark.parametrize("answer", [0, 0.0, False, "0", [0], {"k": None}])
def test_answers_that_only_look_empty_are_kept(answer: Any) -> None:
    assert load([{"question": "q", "answer": answer}])[0].answer == answer


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (5, "text or a list of messages, found int"),
        (None, "found NoneType"),
        (" ", "the prompt is empty"),
        ([], "the list of messages is empty"),
        (["Hi"], "message 0: a message needs `role`.*found str"),
        ([{"from": "human", "text": "Hi"}], "message 0: .*found keys role, text"),
        ([{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], "message 0: a part of type 'image'"),
        ([{"role": "user", "content": None}], "message 0: `content` must be text"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "must not end with an assistant"),
    ],
)
def test_prompts_that_cannot_be_shown_are_refused(prompt: Any, expected: str) -> None:
    with pytest.raises(UserError, match=rf"row 0 .*column prompt.*{expected}"):
        load([{"prompt": prompt, "answer": 1}])


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_conversations_are_kept_but_for_keys_without_a_value() -> None:
    call = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": call},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
    ]
    padded = [{"tool_calls": None, "tool_call_id": None} | message for message in messages]
    plain, from_table = load([{"messages": messages, "answer": 1}]), load([{"messages": padded, "answer": 1}])
    assert plain[0].messages == from_table[0].messages == messages
    assert plain[0].id == from_table[0].id
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert load([{"prompt": parts, "answer": 1}])[0].messages == parts


def test_system_prompt_comes_first_and_only_once() -> None:
    system = {"role": "system", "content": "Sum."}
    user = {"role": "user", "content": "Hi"}
    assert load([{"prompt": "Hi", "answer": 1}], system_prompt="Sum.")[0].messages == [system, user]
    assert load([{"prompt": [user], "answer": 1}], system_prompt="Sum.")[0].messages == [system, user]
    assert load([{"prompt": [system, user], "answer": 1}])[0].messages == [system, user]
    assert load([{"prompt": [system, user], "answer": 1}], system_prompt="Sum.")[0].messages == [system, user]
    with pytest.raises(UserError, match=r"row 0.*already has a system message; remove data.system_prompt"):
        load([{"prompt": [system, user], "answer": 1}], system_prompt="Add.")


def test_template_fields_and_literal_braces() -> None:
    row = {"question": "1+1?", "answer": "2", "level": 3, "tests": ["assert a", "assert b"]}
    template = "{prompt} {question} L{level} \\boxed{} \\boxed{{x}} {{{level}}} {not a field}\n{tests}"
    (task,) = load([row], prompt_template=template)
    expected = "1+1? 1+1? L3 \\boxed{} \\boxed{x} {3} {not a field}\nassert a\nassert b"
    assert task.messages[0]["content"] == expected
    assert (
        load([{"prompt": "{level}{{", "answer": 1, "level": 9}], prompt_template="<{prompt}>")[0].messages[0]["content"]
        == "<{level}{{>"
    )


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{prompt} {levle}", r"no column 'levle' in rows, row 0 .*question, answer, level\); write \{\{levle\}\} for"),
        ("{prompt} {answer}", r"\{answer\} would show the hidden answer"),
        ("{prompt} {level}", r"row 1 .*, column level: the value is empty, but data.prompt_template names it"),
        ("Think. {{prompt}}", r"data.prompt_template has no \{prompt\}"),
    ],
)
def test_templates_that_cannot_be_filled_are_refused(template: str, expected: str) -> None:
    rows = [{"question": "q", "answer": "a", "level": 1}, {"question": "r", "answer": "b", "level": None}]
    with pytest.raises(UserError, match=expected):
        load(rows, prompt_template=template)


def test_template_does_not_wrap_conversations() -> None:
    row = {"prompt": [{"role": "user", "content": "Hi"}], "answer": 1}
    with pytest.raises(UserError, match=r"row 0 .*prompt_template wraps text"):
        load([row], prompt_template="{prompt}!")


# --- ids --------------------------------------------------------------------------------------------------------------


def test_ids_never_change() -> None:
    """The ledgers and checkpoints of earlier runs hold ids: another rule would break resuming them."""
    rows = [
        {"prompt": "2 + 2 = ?", "answer": "4"},
        {"prompt": "2 + 2 = ?", "answer": "4"},
        {"prompt": "2 + 2 = ?", "answer": 4},
        {"prompt": [{"role": "user", "content": "h\u00e9"}], "answer": [1.5, None]},
    ]
    contents = [
        b'["2 + 2 = ?","4"]',
        b'["2 + 2 = ?","4",1]',
        b'["2 + 2 = ?",4]',
        b'[[{"content":"h\\u00e9","role":"user"}],[1.5,null]]',
    ]
    assert [task.id for task in load(rows)] == [f"rows-{hashlib.sha256(c).hexdigest()[:12]}" for c in contents]
    assert load(rows)[0].id == "rows-a646c536a948"


def test_ids_depend_on_prompt_and_answer_alone() -> None:
    row = {"question": "q", "answer": "a", "level": 1}
    (plain,) = load([row])
    assert load([row | {"level": 2}], system_prompt="s", prompt_template="{prompt}!")[0].id == plain.id
    assert load([row | {"answer": "b"}])[0].id != plain.id
    assert load([row | {"question": "r"}])[0].id != plain.id
    assert tasks_from_rows([row], config(), "my data/x").pop().id.startswith("my_data_x-")


def test_repeated_rows_get_different_ids_that_do_not_depend_on_other_rows() -> None:
    row, other = {"question": "q", "answer": "a"}, {"question": "r", "answer": "a"}
    first = [task.id for task in load([row] * 300)]
    assert len(set(first)) == 300
    mixed = [task.id for task in load([row, other, row, other, row])]
    assert [mixed[0], mixed[2], mixed[4]] == first[:3]


def test_answers_of_tables_have_ids_and_others_are_refused() -> None:
    values = [np.int64(4), np.array([1, 2]), datetime.date(2020, 1, 1), b"\x01"]
    same = [4, [1, 2], "2020-01-01", "01"]
    for value, plain in zip(values, same, strict=True):
        assert load([{"question": "q", "answer": value}])[0].id == load([{"question": "q", "answer": plain}])[0].id
    for value in (decimal.Decimal(1), {1, 2}, object()):
        with pytest.raises(UserError, match=r"row 0 .*must be plain values.*" + type(value).__name__):
            load([{"question": "q", "answer": value}])


def test_rows_may_be_any_iterable_and_are_not_changed() -> None:
    rows = [{"question": "q", "answer": "a"}, {"question": "r", "answer": "b"}]
    assert tasks_from_rows(iter(rows), config(), "rows") == load(rows)
    load(rows)[0].meta["extra"] = 1
    assert rows[0] == {"question": "q", "answer": "a"}
    with pytest.raises(UserError, match="no rows in rows"):
        tasks_from_rows(iter([]), config(), "rows")


# --- real data --------------------------------------------------------------------------------------------------------


@needs_data
def test_gsm8k() -> None:
    tasks = load_tasks(config(DATA / "gsm8k"))
    assert len(tasks) == len({task.id for task in tasks}) == 7473
    assert tasks[0].messages[0]["content"].startswith("Natalia sold clips")
    assert tasks[0].answer.endswith("#### 72")
    assert all(task.meta == {"question": task.messages[0]["content"], "answer": task.answer} for task in tasks)
    held_out = load_tasks(config(DATA / "gsm8k", split="test"))
    assert len(held_out) == 1319
    assert not {task.id for task in tasks} & {task.id for task in held_out}


@needs_data
def test_math() -> None:
    tasks = load_tasks(config(DATA / "math" / "math500.jsonl", prompt_template="{prompt}\nAnswer in \\boxed{}."))
    assert len(tasks) == 500
    assert tasks[0].answer == "\\left( 3, \\frac{\\pi}{2} \\right)"
    assert tasks[0].meta["level"] == 2
    assert tasks[0].messages[0]["content"] == tasks[0].meta["problem"] + "\nAnswer in \\boxed{}."
    solutions = load_tasks(config(DATA / "math" / "math500.jsonl", answer_column="solution"))
    assert solutions[0].answer == tasks[0].meta["solution"]


@needs_data
def test_code() -> None:
    tasks = load_tasks(config(DATA / "code" / "HumanEval.jsonl", answer_column="none"))
    assert len(tasks) == 164
    assert tasks[0].messages[0]["content"].startswith("from typing import List")
    assert tasks[0].meta["entry_point"] == "has_close_elements"
    template = "{prompt}\nYour code must pass:\n{test_list}"
    tasks = load_tasks(config(DATA / "code" / "mbpp_first600.jsonl", answer_column="none", prompt_template=template))
    assert len(tasks) == 600
    assert tasks[0].messages[0]["content"].endswith("\n".join(tasks[0].meta["test_list"]))
    tasks = load_tasks(config(DATA / "code" / "apps_sample_2.jsonl", answer_column="none"))
    assert tasks[0].meta["input_output"]["outputs"] == ["1\n6\n-1\n"]
    assert load_tasks(config(DATA / "code" / "HumanEval.jsonl"))[0].answer is None


@needs_data
def test_question_answering_and_wrong_formats() -> None:
    tasks = load_tasks(config(DATA / "qa" / "nq_open_1500.jsonl", answer_column="golden_answers"))
    assert tasks[0].answer == ["Wilhelm Conrad R\u00f6ntgen"]
    tasks = load_tasks(config(DATA / "preference" / "dpo_en_demo.jsonl"))
    assert {message["role"] for task in tasks for message in task.messages} == {"system", "user", "assistant"}
