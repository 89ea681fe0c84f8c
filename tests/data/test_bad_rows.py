"""Rows that cannot be used are found before a model loads, told together, and left out only where that is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmrl import Trainer
from llmrl.data.report import DROPPED, RowReport, by_reason
from llmrl.errors import UserError
from llmrl.tiny import BYTE_CHAT_TEMPLATE, build_tiny_model, byte_tokenizer


def wants_tests(completion: str, tests: str) -> float:
    return float(len(completion))


def right(completion: str, answer: str) -> float:
    return float(completion == answer)


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "train.output_dir": str(folder / "run"),
        "train.max_steps": 1,
        "train.save_steps": 0,
        "rollout.num_prompts": 2,
        "rollout.num_generations": 2,
        "rollout.max_completion_length": 4,
        "track.console": "quiet",
    } | more


def rows(count: int = 6) -> list[dict[str, Any]]:
    return [{"question": f"{i}+{i}?", "answer": str(2 * i), "tests": "x"} for i in range(count)]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of 128 positions whose template refuses a role and leaves out another."""
    folder = tmp_path_factory.mktemp("small")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'critic' %}{{ raise_exception('no critic') }}{% endif %}"
        "{% if m['role'] in ('user', 'system', 'assistant') %}<|im_start|>{{ m['content'] }}<|eos|>{% endif %}"
        "{% endfor %}<|im_start|>"
    )
    tokenizer.save_pretrained(folder)
    build_tiny_model(
        "qwen2", vocab_size=259, eos_token_id=257, pad_token_id=256, max_position_embeddings=128
    ).save_pretrained(folder)
    return str(folder)


def refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Any, **more: Any) -> str:
    monkeypatch.setattr("llmrl.model.load.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    options: dict[str, Any] = {"model": more.pop("model", "tiny:qwen2"), "reward": more.pop("reward", right)}
    with pytest.raises(UserError) as caught:
        Trainer(settings(tmp_path, **more), **options, train_dataset=data)
    return str(caught.value)


def test_findings_of_every_kind_come_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: str) -> None:
    data = rows(9)
    data[1]["question"] = "  "
    data[2]["answer"] = None
    del data[3]["tests"], data[5]["tests"]
    data[4]["question"] = [{"role": "critic", "content": "Well?"}]
    data[6]["question"] = [{"role": "user", "content": "Hi"}, {"role": "judge", "content": "The rule is this."}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {}}}]}
    data[8]["question"] = [call, {"role": "user", "content": "Rain?"}]
    data[7]["question"] = "y" * 300
    text = refusal(tmp_path, monkeypatch, data, model=small, reward=[right, wants_tests])
    head, *lines = text.splitlines()
    assert head == "8 of 9 rows cannot be used; or leave such rows out with data.on_bad_row drop:"
    assert lines[0].startswith("  - 2 rows: reward wants_tests: its parameter 'tests' cannot be filled")
    assert lines[1] == "    (dataset, row 3 (counting from 0), row 5 (counting from 0))"
    for part in (
        "column question: the prompt is empty",
        "column answer: the row has no answer (found None)",
        "the chat template fails on messages with the roles critic: no critic",
        "message 1: the chat template does not show it (role 'judge')",
        "message 0: the chat template does not show its call of the tool 'weather'",
        "with rollout.max_completion_length 4 it does not fit the 128 positions of the model",
    ):
        assert part in text, part
    assert not (tmp_path / "run").exists()


def test_they_are_left_out_and_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = rows()
    data[0]["question"], data[4]["answer"] = "", None
    more = {"data.on_bad_row": "drop", "track.console": "plain"}
    trainer = Trainer(settings(tmp_path, **more), model="tiny:qwen2", reward=right, train_dataset=data)
    assert [task.answer for task in trainer.tasks.values()] == ["2", "4", "6", "10"]
    kept = [json.loads(line) for line in (tmp_path / "run" / DROPPED).read_text().splitlines()]
    assert [(line["where"], line["row"]) for line in kept] == [
        ("dataset, row 0 (counting from 0)", data[0]),
        ("dataset, row 4 (counting from 0)", data[4]),
    ]
    assert "the prompt is empty" in kept[0]["reason"]
    said = capsys.readouterr().out
    assert "2 of 6 rows left out: 1 x column question: the prompt is empty; 1 x column answer" in said
    assert f"rows that were left out are in {tmp_path / 'run' / DROPPED}" in said
    for row in data:
        row["question"] = ""
    with pytest.raises(UserError, match="drop leaves out every row"):
        Trainer(settings(tmp_path, **more), model="tiny:qwen2", reward=right, train_dataset=data)


def test_what_is_wrong_with_all_rows_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = [{"question": row["question"]} for row in rows()]
    text = refusal(tmp_path, monkeypatch, data)
    assert text.startswith("dataset, row 0 (counting from 0): reward right: its parameter 'answer' cannot be filled")
    assert "Name the column that has it in data.answer_column" in text
    assert text.endswith("(so it is with all 6 rows)")


def test_evaluation_rows_are_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: str) -> None:
    file = tmp_path / "eval.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows(1), {"question": "y" * 300, "answer": "1"}]))
    evaluation = {"eval.data.path": str(file), "eval.steps": 1}
    text = refusal(tmp_path, monkeypatch, rows(), model=small, **evaluation)
    assert text.startswith(f"{file}, line 2: the prompt has 30")
    evaluation["eval.data.max_prompt_length"] = 100
    monkeypatch.undo()
    trainer = Trainer(settings(tmp_path, **evaluation), model=small, reward=right, train_dataset=rows())
    assert len(trainer.eval_tasks) == 1


def test_bad_lines_of_a_file_are_rows_like_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    good = "".join(json.dumps(row) + "\n" for row in rows())
    file.write_text(good + "{oops\n" + "[1]\n")
    text = refusal(tmp_path, monkeypatch, str(file))
    assert "2 of 8 rows cannot be used" in text
    assert "line 7" in text and "not valid JSON" in text and "line 8" in text and "must be a JSON object" in text
    monkeypatch.undo()
    trainer = Trainer(
        settings(tmp_path, **{"data.on_bad_row": "drop"}), model="tiny:qwen2", reward=right, train_dataset=str(file)
    )
    assert len(trainer.tasks) == 6


def test_tokens_beyond_the_embedding_are_found_in_any_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "model")
    build_tiny_model("qwen2", vocab_size=259, eos_token_id=257, pad_token_id=256).save_pretrained(tmp_path / "model")
    data = rows()
    data[4]["question"] = "what is <new>?"
    text = refusal(tmp_path, monkeypatch, data, model=str(tmp_path / "model"))
    assert text.startswith("dataset, row 4 (counting from 0): the data has tokens that the model has no embeddings for")
    assert "'<new>'" in text


def test_preference_rows_are_checked_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: str) -> None:
    monkeypatch.setattr("llmrl.model.load.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    data: list[dict[str, Any]] = [
        {
            "prompt": [{"role": "user", "content": f"q{i}"}],
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for i in range(5)
    ]
    data[1]["chosen"] = None
    data[2]["prompt"] = [{"role": "critic", "content": "Well?"}]
    data[3]["rejected"] = [{"role": "assistant", "content": "y" * 300}]
    options = {"train.output_dir": str(tmp_path / "run"), "train.max_steps": 1, "rollout.num_prompts": 2}
    with pytest.raises(UserError) as caught:
        Trainer(options, model=small, train_dataset=data, algorithm="dpo")
    text = str(caught.value)
    assert text.startswith("3 of 5 rows cannot be used")
    for part in ("column chosen: must be text or a list", "no critic", "and the model 128 positions"):
        assert part in text


def test_reasons_that_differ_in_numbers_are_one_kind() -> None:
    report = RowReport(num_rows=5)
    for i in range(4):
        report.add(f"row {i}", f"the prompt has {i} tokens of 'x{i}'")
    report.add("row 9", "the prompt is empty")
    assert [len(group) for group in by_reason(report.found)] == [4, 1]
    assert "(row 0, row 1, row 2 and 1 more)" in report.text()
    with pytest.raises(UserError, match="5 of 5 rows cannot be used:"):
        report.settle(0)


def test_a_template_of_the_run_decides_what_is_shown(tmp_path: Path, small: str) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(BYTE_CHAT_TEMPLATE)
    data = [{"prompt": [{"role": "judge", "content": f"rule {i}"}], "answer": "1"} for i in range(3)]
    Trainer(settings(tmp_path, **{"data.chat_template": str(file)}), model=small, reward=right, train_dataset=data)
