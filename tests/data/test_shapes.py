"""Public datasets as small local files: each loads with at most one option, or one line says what is missing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from llmrl.data.chat import Chat
from llmrl.data.options import DataConfig, PreferenceData
from llmrl.data.preferences import encode_preferences, load_preferences, preferences_from_rows
from llmrl.data.tasks import load_tasks
from llmrl.errors import UserError
from llmrl.tiny import byte_tokenizer


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


WEATHER = {"name": "weather", "description": "Today's", "parameters": {"city": {"type": "str"}}}
FUNCTION = {"type": "function", "function": WEATHER}
TASKS: dict[str, tuple[dict[str, Any], dict[str, Any], Any, Any]] = {
    "gsm8k": ({"question": "1+1?", "answer": "so\n#### 2"}, {"answer_pattern": "#### (.+)"}, [user("1+1?")], "2"),
    "openai_tools": (
        {"messages": [{"role": "system", "content": "Help."}, user("Rain?")], "tools": json.dumps([FUNCTION])},
        {},
        [{"role": "system", "content": "Help."}, user("Rain?")],
        None,
    ),
    "sharegpt": (
        {
            "system": "Be kind.",
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Basel"}}'},
                {"from": "observation", "value": "rain"},
                {"from": "gpt", "value": "It rains."},
            ],
        },
        {"final_assistant": "drop"},
        [
            {"role": "system", "content": "Be kind."},
            user("Hi"),
            assistant("Hello"),
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Basel"}}}],
            },
            {"role": "tool", "content": "rain"},
        ],
        None,
    ),
    "verl": (
        {
            "data_source": "openai/gsm8k",
            "prompt": [user("1+1?")],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "2"},
            "extra_info": {"index": 0},
        },
        {},
        [user("1+1?")],
        "2",
    ),
    "codeforces": (
        {
            "id": "1/A",
            "prompt": "Write a program.",
            "language": "python",
            "official_tests": [{"input": "1", "output": "2"}],
        },
        {},
        [user("Write a program.")],
        None,
    ),
    "kodcode": (
        {"question_id": "x", "question": "Write f.", "solution": "def f(): ...", "test": "from solution import f"},
        {},
        [user("Write f.")],
        "def f(): ...",
    ),
    "nq": (
        {"id": "0", "question": "Who?", "golden_answers": ["Ada", "Lovelace"]},
        {},
        [user("Who?")],
        ["Ada", "Lovelace"],
    ),
    "deepdive": ({"question": "Which year?", "answer": "1843"}, {}, [user("Which year?")], "1843"),
    "xlam": (
        {
            "id": 0,
            "query": "Rain in Basel?",
            "answers": '[{"name": "weather", "arguments": {"city": "Basel"}}]',
            "tools": json.dumps([WEATHER]),
        },
        {},
        [user("Rain in Basel?")],
        '[{"name": "weather", "arguments": {"city": "Basel"}}]',
    ),
    "conversations_as_text": ({"messages": json.dumps([user("Hi")]), "answer": "x"}, {}, [user("Hi")], "x"),
    "a_single_message": ({"prompt": user("Hi"), "answer": "x"}, {}, [user("Hi")], "x"),
    "text_in_brackets": ({"prompt": '[{"a": 1}] is JSON?', "answer": "x"}, {}, [user('[{"a": 1}] is JSON?')], "x"),
    "alpaca": (
        {"instruction": "Translate.", "input": "Baum", "output": "tree"},
        {"answer_column": "output"},
        [user("Translate.\nBaum")],
        "tree",
    ),
}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_task_rows(name: str, kind: str, tmp_path: Path) -> None:
    row, options, messages, answer = TASKS[name]
    file = tmp_path / f"{name}.{kind}"
    if kind == "jsonl":
        file.write_text(json.dumps(row) + "\n")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), file)
    (task,) = load_tasks(DataConfig(path=str(file), **options))
    assert task.messages == messages
    assert task.answer == answer
    assert task.tools == ([FUNCTION] if "tools" in row else None)
    assert task.source == row.get("data_source", name)


CONVERSATIONS = {"chosen": [user("Sky?"), assistant("Blue.")], "rejected": [user("Sky?"), assistant("Green.")]}
SYSTEM = {"role": "system", "content": "Be brief."}
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any], Any, Any]] = {
    "ultrafeedback_binarized": (
        {"prompt": "Sky?", "prompt_id": "x", **CONVERSATIONS, "messages": CONVERSATIONS["chosen"], "score_chosen": 8.0},
        {},
        [user("Sky?")],
        [assistant("Blue.")],
    ),
    "tulu-3": ({"source": "y", "prompt": "Sky? ", **CONVERSATIONS}, {}, [user("Sky?")], [assistant("Blue.")]),
    "prompt and whole conversations": (
        {"prompt": [user("Sky?")], **CONVERSATIONS},
        {},
        [user("Sky?")],
        [assistant("Blue.")],
    ),
    "without a prompt": (CONVERSATIONS, {}, [user("Sky?")], [assistant("Blue.")]),
    "a system message in the conversations": (
        {"prompt": "Sky?", **{name: [SYSTEM, *texts] for name, texts in CONVERSATIONS.items()}},
        {},
        [SYSTEM, user("Sky?")],
        [assistant("Blue.")],
    ),
    "orca": (
        {"system": "", "question": "Sky?", "chosen": "Blue.", "rejected": "Green."},
        {},
        "Sky?",
        "Blue.",
    ),
    "thoughts that begin alike": (
        {"question": "Sky?", "chosen": "<think>so</think>Blue.", "rejected": "<think>no</think>Green."},
        {},
        "Sky?",
        "<think>so</think>Blue.",
    ),
    "text that repeats its prompt": (
        {"prompt": "Human: Sky?\nMe:", "chosen": "Human: Sky?\nMe: Blue.", "rejected": "Human: Sky?\nMe: Green."},
        {},
        "Human: Sky?\nMe:",
        " Blue.",
    ),
    "other names, nested": (
        {"item": {"q": "Sky?"}, "good": "Blue.", "bad": "Green."},
        {"prompt_column": "item.q", "chosen_column": "good", "rejected_column": "bad"},
        "Sky?",
        "Blue.",
    ),
    "llama-factory": (
        {
            "conversations": [{"from": "human", "value": "Sky?"}],
            "chosen": {"from": "gpt", "value": "Blue."},
            "rejected": {"from": "gpt", "value": "Green."},
        },
        {},
        [user("Sky?")],
        [assistant("Blue.")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_preference_rows(name: str, tmp_path: Path) -> None:
    row, options, prompt, chosen = PAIRS[name]
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(row) + "\n")
    (found,) = load_preferences(PreferenceData(path=str(file), **options))
    assert _stripped(found.prompt) == _stripped(prompt)
    assert found.completions[0] == chosen
    assert json.dumps(found.completions[1]) == json.dumps(chosen).replace("Blue", "Green").replace("so<", "no<")


def _stripped(prompt: Any) -> Any:
    return prompt if isinstance(prompt, str) else [m | {"content": m["content"].strip()} for m in prompt]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"image": "a.png", "question": "Where?", "answer": "x"}, r"column image: .*ignore_columns \[image\]"),
        ({"messages": [user("<image>Who?")], "images": ["a.jpg"]}, r"column images: the model would not see it"),
        ({"messages": [user([{"type": "image", "image": "a"}, {"type": "text", "text": "Who?"}])]}, "type 'image'"),
        ({"instruction": "Go on.", "history": [["a", "b"]], "output": "c"}, "column history: "),
        ({"messages": [user("Hi"), assistant("Yo")]}, "set data.final_assistant drop"),
        ({"query": "Rain?", "tools": "weather, time"}, r"column tools: not valid JSON .*ignore_columns \[tools\]"),
        ({"query": "Rain?", "tools": ["weather"]}, "column tools: not valid JSON"),
        ({"query": "Rain?", "chat_template_kwargs": "[1]"}, "column chat_template_kwargs: must be a mapping"),
        ({"prompt": [SYSTEM, user("Hi")], "system": "Be long."}, "already has a system message"),
        ({"statement": "Prove it."}, r"no column named messages / prompt.*set data.prompt_column"),
    ],
)
def test_what_would_be_lost_is_refused_in_a_line(row: dict[str, Any], text: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=text) as caught:
        load_tasks(DataConfig(path=str(file)))
    assert "\n" not in str(caught.value)


def test_columns_that_are_to_be_ignored_shape_nothing(tmp_path: Path) -> None:
    row = {"question": "Who?", "images": ["a.jpg"], "tools": "hammer", "system": "linux", "history": [1], "answer": "x"}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    (task,) = load_tasks(DataConfig(path=str(file), ignore_columns=["images", "tools", "system", "history"]))
    assert (task.messages, task.tools, task.meta) == ([user("Who?")], None, row)


def test_a_misspelt_column_to_ignore_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "a", "answer": "1"}\n')
    with pytest.raises(UserError, match=r"data.ignore_columns names 'tols', but .*did you mean 'tools'\?"):
        load_tasks(DataConfig(path=str(file), ignore_columns=["tols"]))
    assert load_tasks(DataConfig(path=str(file), ignore_columns=["images"]))


def test_an_answer_pattern_that_finds_nothing_is_a_bad_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "a", "answer": "#### 1"}\n{"question": "b", "answer": "two"}\n')
    with pytest.raises(UserError, match=r"line 2, column answer: data.answer_pattern .* matches nothing in 'two'"):
        load_tasks(DataConfig(path=str(file), answer_pattern=r"#### (\d+)"))
    for pattern, text in (("(", "is not a regular expression"), ("x", "matches nothing")):
        with pytest.raises(UserError, match=text):
            load_tasks(DataConfig(path=str(file), answer_pattern=pattern))


def test_nested_columns_in_lists_and_in_json_text(tmp_path: Path) -> None:
    row = {"q.x": "dotted", "extra": json.dumps({"items": [{"q": "deep"}]}), "answer": "1"}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    for column, prompt in (("q.x", "dotted"), ("extra.items.0.q", "deep")):
        (task,) = load_tasks(DataConfig(path=str(file), prompt_column=column))
        assert task.messages == [user(prompt)]
    with pytest.raises(UserError, match=r"names 'extra.item.0', but there is no such column"):
        load_tasks(DataConfig(path=str(file), prompt_column="extra.item.0"))


TOOLS_TEMPLATE = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|eos|>{% endfor %}"
    "{% if enable_thinking is defined and enable_thinking is false %}<nothink>{% endif %}"
)


def test_tools_and_template_variables_are_in_the_prompt() -> None:
    from llmrl.data.prompts import PromptCheck
    from llmrl.data.tasks import tasks_from_rows
    from llmrl.types import ModelLimits

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TOOLS_TEMPLATE
    chat = Chat(tokenizer)
    rows = [
        {"query": "Rain?", "tools": [WEATHER], "chat_template_kwargs": {"enable_thinking": False}},
        {"query": "Rain?", "tools": None, "chat_template_kwargs": {"enable_thinking": None}},
    ]
    first, second = tasks_from_rows(rows, DataConfig(), "rows")
    assert chat.tokenizer.decode(chat.render_task(first)) == (
        f"TOOLS {json.dumps([FUNCTION])}\nuser: Rain?<|eos|><nothink>"
    )
    assert chat.tokenizer.decode(chat.render_task(second)) == "user: Rain?<|eos|>"
    everywhere = Chat(tokenizer, template_options={"enable_thinking": False})
    assert everywhere.tokenizer.decode(everywhere.render_task(second)) == "user: Rain?<|eos|><nothink>"
    with pytest.raises(UserError, match="chat_template_kwargs enable_thinkng: the template has no variable"):
        Chat(tokenizer, template_options={"enable_thinkng": False})
    plain = PromptCheck(Chat(byte_tokenizer()), ModelLimits(), max_completion_length=1)
    assert "does not show tools" in str(plain.check([first])[0].problem)
    (only,) = tasks_from_rows([{"query": "a", "chat_template_kwargs": {"x": 1}}], DataConfig(), "rows")
    assert "has no variable x" in str(plain.check([only])[0].problem)


def test_content_parts_are_joined_for_templates_of_text() -> None:
    parts = [user([{"type": "text", "text": "Sky"}, {"type": "text", "text": " today?"}])]
    chat = Chat(byte_tokenizer())
    assert chat.render(parts) == chat.render([user("Sky today?")])
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endif %}<|eos|>{% endfor %}"
    )
    assert Chat(tokenizer).tokenizer.decode(Chat(tokenizer).render(parts)) == "Sky today?<|eos|>"


def test_labels_of_a_table_of_text(tmp_path: Path) -> None:
    file = tmp_path / "kto.csv"
    file.write_text("prompt,completion,label\na,b,True\na,c,0\n")
    assert [row.rewards for row in load_preferences(PreferenceData(path=str(file)))] == [[1.0], [0.0]]
    file.write_text("prompt,completion,label\na,b,good\n")
    with pytest.raises(UserError, match="column label: must be true or false, found 'good'"):
        load_preferences(PreferenceData(path=str(file)))


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.tsv", "rows.csv.gz"])
def test_compressed_and_tabbed_files(name: str, tmp_path: Path) -> None:
    text = '{"question": "a, b", "answer": "1"}\n' if "jsonl" in name else "question\tanswer\na, b\t1\n"
    text = 'question,answer\n"a, b",1\n' if name == "rows.csv.gz" else text
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    for path in (tmp_path / name, tmp_path / "r*"):
        (task,) = load_tasks(DataConfig(path=str(path)))
        assert (task.messages, task.answer, task.id[:5]) == (
            [user("a, b")],
            "1",
            "rows-" if path.name == name else "r-" + task.id[2:5],
        )
    with pytest.raises(UserError, match=r"x\*: no file matches"):
        load_tasks(DataConfig(path=str(tmp_path / "x*")))


def test_preference_tools_need_messages_and_a_template() -> None:
    row = {"prompt": "Rain?", "chosen": "a", "rejected": "b", "tools": [WEATHER]}
    rows = preferences_from_rows([row], PreferenceData(), "rows")
    with pytest.raises(UserError, match="cannot show tools"):
        encode_preferences(rows, Chat(byte_tokenizer(), prompt_format="text"), max_length=None)
