"""Every recipe parses, and runs for a few steps with its tiny configuration, on rows with real column names."""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmrl.config import Config, load_config, parse, save_config
from llmrl.run.ledger import audit
from llmrl.track.files import read_jsonl
from llmrl.verify.spec import load_file

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = REPOSITORY / "recipes"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY)}
"""A script's own folder is on its path, not this checkout: another one may be installed."""

KINDS = ("grpo", "ppo", "dpo", "kto", "online_dpo")
RUNS = sorted(f for kind in (*KINDS, "smollm2") for f in RECIPES.glob(f"{kind}*.yaml"))


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.stem)
def test_configuration_is_valid(file: Path) -> None:
    config = load_config(["--config", str(file)])
    assert config.train.output_dir == f"runs/{file.stem}"


def own_class(recipe: str, name: str) -> type:
    return getattr(load_file(RECIPES / recipe), name)


@pytest.mark.parametrize(
    ("recipe", "name", "pattern"),
    [
        ("quickstart.py", "QuickstartConfig", "quickstart*.yaml"),
        ("bcoder.py", "BCoderRun", "bcoder_*.yaml"),
        ("ircoco/train.py", "IRCoCoRun", "ircoco_*.yaml"),
        ("reward_model.py", "RewardModelConfig", "reward_model_*.yaml"),
    ],
)
def test_configuration_of_a_recipe_with_its_own_options_is_read_back(
    recipe: str, name: str, pattern: str, tmp_path: Path
) -> None:
    files = sorted(RECIPES.glob(pattern))
    assert files
    for file in files:
        config: Any = parse(["--config", str(file)], config_class=own_class(recipe, name))
        folder = config.train.output_dir if isinstance(config, Config) else config.output_dir
        assert folder == f"runs/{file.stem}"
        save_config(config, tmp_path / file.name)
        assert parse(["--config", str(tmp_path / file.name)], config_class=own_class(recipe, name)) == config


def test_what_held_out_tasks_share_with_the_others_is_merged() -> None:
    config: Any = parse(
        ["--config", str(RECIPES / "ircoco_py150.yaml")], config_class=own_class("ircoco/train.py", "IRCoCoRun")
    )
    assert config.held_out == replace(config.data, split="train[9000:]") != config.data


def test_the_five_names_are_one_program() -> None:
    main = load_file(RECIPES / "train.py").main
    assert all(load_file(RECIPES / f"{kind}.py").main is main for kind in KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["train", *KINDS, "bcoder", "quickstart", "ircoco/train", "reward_model"])
def test_every_recipe_explains_itself(recipe: str) -> None:
    shown = start(recipe, "--help")
    assert "usage:" in shown and "--config FILE.yaml" in shown


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
