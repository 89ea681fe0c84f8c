"""A local model proposes exploits with the `hf` engine, and the same seed gives the same attack."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from llmrl.cli import run
from llmrl.run.attacker import ModelProposer
from llmrl.tiny import build_tiny_model, byte_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    build_tiny_model("qwen2", vocab_size=259, eos_token_id=257, pad_token_id=256).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_model_replies_and_the_seed_decides_what(model: Path) -> None:
    requests = ["Write an answer.", "Write an answer.", "Write another answer. " * 1000]
    first, again = (asyncio.run(ModelProposer(str(model), seed=1)(requests)) for _ in range(2))
    assert len(first) == 3 and first == again and first[0] != first[1]


def test_the_command_attacks_with_a_model(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.py").write_text(
        "def odd(completion, answer):\n"
        "    return float(completion == answer or (len(completion) > 2 and completion.isascii() is False))\n"
    )
    rows = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in (1, 2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "--red-team",
        "odd.py",
        "--input",
        "rows.jsonl",
        "--model",
        str(model),
        "--rounds",
        "1",
        "--output",
        "o.json",
    ]
    code = run(["verify", *words])
    printed = capsys.readouterr()
    assert "red team: round 1 of 1: best reward" in printed.err
    assert code == 1 and json.loads((tmp_path / "o.json").read_text())["num_attempts"] > 200
