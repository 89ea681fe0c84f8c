"""Every recipe parses, and runs for a few steps with its tiny configuration, on rows with real column names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmrl.config import load_config
from llmrl.track.files import read_jsonl
from llmrl.train.ledger import audit

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = REPOSITORY / "recipes"


@pytest.mark.parametrize(
    "file", sorted([*RECIPES.glob("grpo*.yaml"), *RECIPES.glob("ppo*.yaml")]), ids=lambda file: file.stem
)
def test_configuration_is_valid(file: Path) -> None:
    config = load_config(["--config", str(file)])
    assert config.train.output_dir == f"runs/{file.stem}"


def gsm8k_rows(folder: Path) -> Path:
    """Questions in the form of GSM8K."""
    real = REPOSITORY.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
    if real.is_file():
        return real
    file = folder / "train.jsonl"
    row = {"question": "Ann has {} apples and buys 3 more. How many?", "answer": "{} + 3 = <<{}+3={}>>\n#### {}"}
    lines = [
        json.dumps({"question": row["question"].format(i), "answer": row["answer"].format(i, i, i + 3, i + 3)})
        for i in range(64)
    ]
    file.write_text("\n".join(lines))
    return file


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "size"), [("grpo", 16), ("ppo", 8)])
def test_gsm8k_rows_and_a_continuation(recipe: str, size: int, tmp_path: Path) -> None:
    run, config = tmp_path / "run", f"recipes/{recipe}_gsm8k_tiny.yaml"
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/one_process.yaml"),
        *(f"recipes/{recipe}.py", "--config", config, "--data.path", str(gsm8k_rows(tmp_path))),
        *("--train.output_dir", str(run)),
    ]
    for steps, more in ((2, []), (3, ["--train.resume_from_checkpoint", "last"])):
        found = subprocess.run(
            [*command, "--train.max_steps", str(steps), *more],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert found.returncode == 0, found.stdout + found.stderr
    assert [row["step"] for row in read_jsonl(run / "metrics.jsonl")] == [1, 2, 3]
    assert len(read_jsonl(run / "rollouts.jsonl")) == 3 * size
    assert audit(run / "ledger.jsonl")["exact"]
    assert {"config.yaml", "env.json", "checkpoints", "model"} <= {path.name for path in run.iterdir()}
    assert (run / "model" / "adapter_model.safetensors").is_file()
