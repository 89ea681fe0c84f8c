"""`train.resume_from_checkpoint` takes true and false as transformers does."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrl.config import from_dotted, load_config

NEEDED = ["--model.path", "tiny:qwen2", "--data.path", "x.jsonl", "--rewards", "[{fn: math_answer}]"]


@pytest.mark.parametrize(
    ("value", "meant"),
    [("true", "last"), ("True", "last"), ("false", None), ("null", None), ("last", "last"), ("runs/a", "runs/a")],
)
def test_on_the_command_line_and_in_a_file(value: str, meant: str | None, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"train: {{resume_from_checkpoint: {value}}}\n")
    typed = load_config([*NEEDED, "--train.resume_from_checkpoint", value])
    assert [
        typed.train.resume_from_checkpoint,
        load_config(["--config", str(file), *NEEDED]).train.resume_from_checkpoint,
    ] == [
        meant,
        meant,
    ]


@pytest.mark.parametrize(("value", "meant"), [(True, "last"), (False, None), (None, None), ("last", "last")])
def test_in_python(value: object, meant: str | None) -> None:
    assert from_dotted({"train.resume_from_checkpoint": value}).train.resume_from_checkpoint == meant
