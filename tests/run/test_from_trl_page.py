"""docs/from_trl.md: its script runs with TRL as it is, and here with the two lines changed; its table is complete."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmrl.run.from_trl.tables import POLICY_GRADIENT, ROWS, SAME, SAMPLED
from llmrl.tiny import build_tiny_model, byte_tokenizer
from tests.run.test_trainer import numbers

PAGE = Path(__file__).parents[2] / "docs" / "from_trl.md"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tokenizer = byte_tokenizer()
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    folder = tmp_path / "tiny"
    build_tiny_model("qwen2", vocab_size=len(tokenizer), **tokens).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def script(*, ours: bool, model: Path, output: Path) -> str:
    """Return the page's script: here with the two lines changed, and for a CPU with a tiny model."""
    text = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    diff = re.search(r"```diff\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert text is not None and diff is not None
    found, lines = text[1], diff[1].splitlines()
    assert [line[0] for line in lines] == ["-", "+", "-", "+"]
    for old, new in zip(lines[::2], lines[1::2], strict=True) if ours else ():
        assert found.count(f"{old[1:]}\n") == 1
        found = found.replace(f"{old[1:]}\n", f"{new[1:]}\n")
    smaller = {
        '"Qwen/Qwen2.5-0.5B-Instruct"': repr(str(model)),
        "max_completion_length=256": "max_completion_length=8, bf16=False, use_cpu=True, report_to='none'",
        "max_steps=100": "max_steps=2",
        "eval_steps=20": "eval_steps=1",
        '"runs/gsm8k"': repr(str(output)),
        '"my-model"': repr(str(output.with_name("my-model"))),
        "select(range(64))": "select(range(2))",
    }
    for old, new in smaller.items():
        assert old in found
        found = found.replace(old, new)
    return found


def run(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    import datasets

    rows = [{"question": f"{i} + {i}?", "answer": f"adding\n#### {2 * i}"} for i in range(12)]
    splits = {name: datasets.Dataset.from_list(rows) for name in ("train", "test")}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(splits))
    monkeypatch.setattr(sys, "argv", ["script"])
    file = folder / "script.py"
    file.write_text(text)
    return runpy.run_path(str(file))


def test_the_script_runs_with_two_lines_changed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "run"
    run(script(ours=True, model=model, output=output), tmp_path, monkeypatch)
    assert ["eval/reward" in row for row in numbers(output)] == [True, True]
    config = yaml.safe_load((output / "config.yaml").read_text())
    assert [(reward["fn"], reward["weight"]) for reward in config["rewards"]] == [("correct", 1.0), ("short", 0.2)]
    assert config["rollout"]["num_prompts"] == 4 and config["algo"]["aggregation"] == "dapo"
    assert config["model"]["peft"]["r"] == 16
    assert (tmp_path / "my-model" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_script_runs_with_trl_as_it_is(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(script(ours=False, model=model, output=tmp_path / "run"), tmp_path, monkeypatch)
    assert found["trainer"].state.global_step == 2
    assert (tmp_path / "my-model" / "adapter_model.safetensors").is_file()


def test_every_field_that_means_the_same_is_in_the_table() -> None:
    page = PAGE.read_text()
    missing = [
        f"| `{name}` | `{option}`"
        for name, option in (SAME | SAMPLED | POLICY_GRADIENT | ROWS).items()
        if f"| `{name}` | `{option}`" not in page
    ]
    assert not missing
