"""Preference rows: TRL's forms and tokens, ShareGPT's form, cutting, and refusals."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from llmrl.data.chat import Chat
from llmrl.data.options import PreferenceRows
from llmrl.data.preferences import PreferenceRow, encode_preferences, load_preferences, mismatch, preferences_from_rows
from llmrl.errors import UserError
from llmrl.rollout.preferences import PreferenceSource
from llmrl.tiny import byte_tokenizer
from llmrl.types import ModelLimits


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


PLAIN = [
    {"prompt": "The sky is", "chosen": " blue.", "rejected": " green, I think."},
    {"prompt": "Two and two:", "chosen": "four<|eos|>", "rejected": ""},
]
MESSAGES = [
    {"prompt": [user("Sky?")], "chosen": [assistant("Blue.")], "rejected": [assistant("Green.")]},
    {
        "prompt": [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello"), user("Sum of 2 and 2?")],
        "chosen": [assistant("4")],
        "rejected": [assistant("Let me think."), user("Well?"), assistant("5")],
    },
]
IMPLICIT = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in MESSAGES]
IMPLICIT_TEXT = [{"chosen": "The sky is blue.", "rejected": "The sky is green."}]
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|eos|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
)
"""Its generation prompt differs from how it begins an answer that is already in the conversation."""


def encoded(rows: list[dict[str, Any]], *, max_length: int | None = None, template: str | None = None) -> Any:
    tokenizer = byte_tokenizer()
    if template:
        tokenizer.chat_template = template
    found = preferences_from_rows(rows, PreferenceRows(), "rows")
    chat = Chat(tokenizer, prompt_format="chat" if found[0].is_conversational else "text")
    return (*encode_preferences(found, chat, max_length=max_length), tokenizer)


@pytest.fixture(scope="module")
def trl_trainers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from datasets import Dataset
    from trl import DPOTrainer, KTOTrainer

    from tests.oracle.test_trl_dpo import DPOConfig, KTOConfig, arguments, tiny

    found = []
    for trainer, config, row in (
        (DPOTrainer, DPOConfig, {"prompt": "a", "chosen": "b", "rejected": "c"}),
        (KTOTrainer, KTOConfig, {"prompt": "a", "completion": "b", "label": True}),
    ):
        found.append(
            trainer(
                model=tiny(0),
                ref_model=tiny(1),
                args=arguments(config, tmp_path_factory.mktemp("out")),
                train_dataset=Dataset.from_list([row] * 5),
                processing_class=byte_tokenizer(),
            )
        )
    return found


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["own template", "a generation prompt of its own"])
@pytest.mark.parametrize("rows", [PLAIN, MESSAGES, IMPLICIT, IMPLICIT_TEXT], ids=["text", "messages", "implicit", "t"])
def test_the_tokens_are_those_of_trl(trl_trainers: Any, rows: list, template: str | None) -> None:
    from datasets import Dataset

    ours, _, tokenizer = encoded(rows, template=template)
    trainer = trl_trainers[0]
    theirs = trainer._prepare_dataset(Dataset.from_list(rows), tokenizer, trainer.args, "train")
    assert [(r.prompt_ids, *r.completion_ids) for r in ours] == [
        (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in theirs
    ]


def test_single_completions_have_the_tokens_of_trl(trl_trainers: Any) -> None:
    from datasets import Dataset

    rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i == 0} for i, r in enumerate(MESSAGES)]
    ours, _, tokenizer = encoded(rows)
    trainer = trl_trainers[1]
    theirs = trainer._prepare_dataset(Dataset.from_list(rows), tokenizer, trainer.args, "train")
    assert [(r.prompt_ids, r.completion_ids[0], r.rewards) for r in ours] == [
        (row["prompt_ids"], row["completion_ids"], [float(row["label"])]) for row in theirs
    ]


def test_sequences_are_cut_and_rows_without_room_left_out() -> None:
    rows = [
        {"prompt": "123456", "chosen": "ab", "rejected": "cdefgh"},
        {"prompt": "1234567890", "chosen": "ab", "rejected": "cd"},
        {"prompt": "1", "chosen": "the same", "rejected": "the same"},
        {"prompt": "1", "chosen": "123456789 alike", "rejected": "123456789 until here"},
    ]
    kept, notes, _ = encoded(rows, max_length=10)
    assert [row.prompt for row in kept] == ["123456"]
    assert kept[0].completion_ids == [[97, 98, 257], [99, 100, 101, 102]]
    assert notes == [
        "1 of 4 rows left out: no room for a completion within algo.max_length 10 tokens",
        "2 of 4 rows left out: chosen and rejected are the same tokens (up to algo.max_length)",
    ]


def test_where_sequences_are_cut() -> None:
    kept, notes, _ = encoded([{"prompt": "1234", "chosen": "abcdef", "rejected": "xy"}], max_length=7)
    assert bytes(kept[0].prompt_ids) == b"1234"
    assert [len(ids) for ids in kept[0].completion_ids] == [3, 3]
    assert bytes(kept[0].completion_ids[0]) == b"abc"
    assert kept[0].completion_ids[1][-1] == 257, "the end of the text is a token of its own"
    assert notes == []


def test_a_prompt_that_is_rendered_differently_is_reported() -> None:
    _, notes, _ = encoded(MESSAGES, template=TEMPLATE)
    assert notes == [
        "2 of 2 rows lose the end of their prompt: the tokenizer or template renders it differently before a completion"
    ]


def test_sharegpt_rows_are_messages(shared_data: Path) -> None:
    rows = load_preferences(PreferenceRows(path=str(shared_data / "preference" / "dpo_en_demo.jsonl"), limit=50))
    raw = [json.loads(line) for line in (shared_data / "preference" / "dpo_en_demo.jsonl").open()][:50]
    assert len({row.task.id for row in rows}) == 50
    for row, given in zip(rows, raw, strict=True):
        assert [m["role"] for m in row.prompt][-1] == "user"  # pyright: ignore
        assert row.completions[0] == [assistant(given["chosen"]["value"])]
        assert row.completions[1] == [assistant(given["rejected"]["value"])]
        assert row.prompt[-1]["content"] == given["conversations"][-1]["value"]  # pyright: ignore


def test_groups() -> None:
    rows, _, _ = encoded(MESSAGES)
    collector = PreferenceSource(rows)
    groups = asyncio.run(collector.collect([row.task for row in rows[::-1]], [0, 1]))
    assert [group.task.id for group in groups] == [row.task.id for row in rows[::-1]]
    assert [r.score.reward for r in groups[0].rollouts if r.score] == [1.0, 0.0]
    assert groups[0].rollouts[1].messages == [*MESSAGES[1]["prompt"], *MESSAGES[1]["rejected"]]


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([], "there are no rows"),
        ([{"question": "a", "answer": "b"}], "the columns are question, answer"),
        ([{"prompt": "a", "completion": "b"}], "the columns are prompt, completion"),
        ([{"prompt": "a", "completion": "b", "label": "good"}], "column label: must be true or false, found 'good'"),
        ([{"prompt": "a", "chosen": "b", "rejected": [assistant("c")]}], "must both be text, or both lists"),
        ([{"prompt": [user("a")], "chosen": "b", "rejected": "c"}], "must all be text, or all lists"),
        ([{"prompt": "a", "chosen": None, "rejected": "c"}], "column chosen: must be text or a list"),
        ([{"prompt": "", "chosen": "b", "rejected": "c"}], "is empty"),
        ([{"chosen": "b", "rejected": "c"}], "do not begin with the same text"),
        ([{"prompt": [{"content": "a"}], "chosen": [assistant("b")], "rejected": [assistant("c")]}], "needs `role`"),
        ([*PLAIN, {"prompt": "a", "completion": "b", "label": True}], "column chosen: must be text or a list"),
        ([*PLAIN, *MESSAGES], "text and messages cannot be mixed"),
        (
            [{"conversations": [{"from": "x", "value": "y"}], "chosen": {}, "rejected": {}}],
            "column chosen: must be text or a list",
        ),
    ],
)
def test_what_is_refused(rows: list, text: str) -> None:
    with pytest.raises(UserError) as caught:
        preferences_from_rows(rows, PreferenceRows(), "mine")
    assert text in str(caught.value)
    if rows:
        assert "mine, row" in str(caught.value)


def test_errors_name_the_line_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(PLAIN[0]) + "\n" + json.dumps({"prompt": "a", "chosen": 1, "rejected": "c"}) + "\n")
    with pytest.raises(UserError, match=r"pairs.jsonl, line 2, column chosen: must be text"):
        load_preferences(PreferenceRows(path=str(file)))


def test_a_row_without_room_is_left_out_however_long_it_is() -> None:
    rows = preferences_from_rows([PLAIN[0], PLAIN[0] | {"prompt": "x" * 500}], PreferenceRows(), "mine")
    chat, limits = Chat(byte_tokenizer(), prompt_format="text"), ModelLimits(context=100)
    kept, (note,) = encode_preferences(rows, chat, max_length=90, limits=limits)
    assert kept == rows[:1] and note.startswith("1 of 2 rows left out: no room")
    with pytest.raises(UserError, match="the row has 5.. tokens, and the model 100 positions"):
        encode_preferences(rows, chat, max_length=None, limits=limits)


def of_prompts(prompts: list[int], *, completions: int = 1) -> list[PreferenceRow]:
    rows = [{"prompt": "q", "completion": "c", "label": True}] * len(prompts)
    found = preferences_from_rows(rows, PreferenceRows(path="rows"), "rows")
    for i, (row, prompt) in enumerate(zip(found, prompts, strict=True)):
        row.prompt_ids, row.completions = [prompt] * 3, ["c"] * completions
        row.completion_ids = [[100 + i, 7, 7, 7, k] for k in range(completions)]
    return found


@pytest.mark.parametrize("prompts", [[0, 1], [0, 0, 1, 1], [0, 1, 0, 2, 0, 3], list(range(9)), [0, 0, 0, 1, 2, 2, 3]])
def test_every_row_gets_the_completion_of_one_other_row_with_another_prompt(prompts: list[int]) -> None:
    rows = of_prompts(prompts)
    mismatch(rows, max_length=8)
    given = [row.mismatched_ids[0][0] - 100 for row in rows]
    assert sorted(given) == list(range(len(rows))), "each completion is used once"
    assert all(prompts[i] != prompts[k] for i, k in enumerate(given))
    again = of_prompts(prompts)
    mismatch(again, max_length=8)
    assert [row.mismatched_ids for row in again] == [row.mismatched_ids for row in rows]


def test_mismatched_completions_where_prompts_repeat_and_rows_differ_in_size() -> None:
    rows = of_prompts([0, 0, 0], completions=2)
    mismatch(rows, max_length=5)
    assert [len(row.mismatched_ids) for row in rows] == [2, 2, 2]
    assert all(ids[0] - 100 != i and len(ids) == 2 for i, row in enumerate(rows) for ids in row.mismatched_ids)
    (alone,) = of_prompts([0])
    mismatch([alone], max_length=5)
    assert alone.mismatched_ids == []
    different = [*of_prompts([0], completions=2), *of_prompts([1])]
    mismatch(different, max_length=8)
    assert [len(row.mismatched_ids) for row in different] == [2, 1]
