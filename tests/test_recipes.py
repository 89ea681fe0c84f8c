"""Every recipe parses, and runs for a few steps with its tiny configuration, on rows with real column names."""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmrl.config import load_config
from llmrl.run.ledger import audit
from llmrl.track.files import read_jsonl

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = REPOSITORY / "recipes"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY)}
"""A script's own folder is on its path, not this checkout: another one may be installed."""

RUNS = sorted(f for kind in ("grpo", "ppo", "dpo", "kto", "online_dpo") for f in RECIPES.glob(f"{kind}*.yaml"))


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.stem)
def test_configuration_is_valid(file: Path) -> None:
    config = load_config(["--config", str(file)])
    assert config.train.output_dir == f"runs/{file.stem}"


def gsm8k_rows(folder: Path) -> Path:
    """Return a file of questions in the format of GSM8K."""
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
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
        )
        assert found.returncode == 0, found.stdout + found.stderr
    assert [row["step"] for row in read_jsonl(run / "metrics.jsonl")] == [1, 2, 3]
    assert len(read_jsonl(run / "rollouts.jsonl")) == 3 * size
    assert audit(run / "ledger.jsonl")["exact"]
    assert {"config.yaml", "env.json", "checkpoints", "model"} <= {path.name for path in run.iterdir()}
    assert (run / "model" / "adapter_model.safetensors").is_file()


def preference_rows(folder: Path) -> Path:
    """Write pairs in TRL's conversational format."""
    file = folder / "pairs.jsonl"
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {i} and one?"}],
            "chosen": [{"role": "assistant", "content": f"It is {i + 1}."}],
            "rejected": [{"role": "assistant", "content": "No idea" + "!" * (i % 5)}],
        }
        for i in range(32)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def start(recipe: str, *arguments: str) -> str:
    """Run a recipe in a fresh process and return its output."""
    found = subprocess.run(
        [sys.executable, f"recipes/{recipe}.py", *arguments],
        cwd=REPOSITORY,
        env=ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "name"), [("dpo", "dpo_ultrafeedback_tiny"), ("kto", "kto_mix_14k_tiny")])
def test_preference_recipes(recipe: str, name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(
        recipe, "--config", f"recipes/{name}.yaml", "--data.path", str(preference_rows(tmp_path)),
        "--train.output_dir", str(run), "--train.max_steps", "2",
    )  # fmt: skip
    rows = read_jsonl(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and rows[1]["policy/grad_norm"] > 0
    assert audit(run / "ledger.jsonl")["exact"]


@pytest.mark.slow
def test_online_dpo_a_reward_model_of_its_rollouts_and_that_as_a_reward(tmp_path: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "rm"
    start(
        "online_dpo", "--config", "recipes/online_dpo_gsm8k_tiny.yaml", "--data.path", str(gsm8k_rows(tmp_path)),
        "--train.output_dir", str(run), "--train.max_steps", "2",
    )  # fmt: skip
    assert len(read_jsonl(run / "rollouts.jsonl")) == 2 * 16
    hierarchy = [{"part": "math_answer"}, {"part": "soft_overlong", "margin": 0.01, "margin_in": "value"}]
    output = start(
        "reward_model", "--config", "recipes/reward_model_ultrafeedback_tiny.yaml", "--max_steps", "2",
        "--data.path", str(run / "rollouts.jsonl"), "--hierarchy", json.dumps(hierarchy),
        "--max_length", "1200", "--output_dir", str(folder),
    )  # fmt: skip
    report = json.loads(output.strip().splitlines()[-1])
    assert report["pairs"] > 4
    from llmrl.verify.models.classifier import get_reward_model

    model = get_reward_model(str(folder), device="cpu", max_length=64)
    found = asyncio.run(model([[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]))
    assert len(found) == 1 and math.isfinite(found[0])
