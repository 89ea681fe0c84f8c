"""The B-Coder recipe: all four steps at a small scale, and what it refuses before anything is made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmrl.config import parse
from llmrl.errors import UserError
from llmrl.methods.bcoder.options import PolicyStage, ValueStage
from llmrl.track.files import read_jsonl
from llmrl.verify.spec import load_file

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = load_file(REPOSITORY / "recipes" / "bcoder.py")


@pytest.mark.slow
def test_the_four_steps(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "recipes/bcoder.py", "--config", "recipes/bcoder_tiny.yaml"]
    command += ["--train.output_dir", str(run), "--track.console", "quiet", "--num_samples", "4"]
    command += ["--made_up.num_tasks", "16", "--made_up.num_held_out", "4", "--made_up.num_examples", "64"]
    command += ["--made_up.max_steps", "4", "--value.max_steps", "2", "--policy.max_steps", "2"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    for _ in range(2):  # the second time everything is there
        found = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout + found.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert summary["num_tasks"] == 4 and summary["num_samples"] == 4
    assert set(summary["ranked"]) >= {"mean log-probability", "bcoder"}
    assert len(read_jsonl(run / "policy" / "metrics.jsonl")) == 2
    assert (run / "policy" / "model" / "bcoder" / "heads.safetensors").is_file()


def parsed(*arguments: str) -> Any:
    return parse(
        ["--config", str(REPOSITORY / "recipes" / "bcoder_tiny.yaml"), *arguments], config_class=RECIPE.BCoderRun
    )


def test_each_stage_has_its_own_options() -> None:
    config = parsed("--value.stage.hidden_size", "8", "--policy.stage.q_coef", "2", "--policy.max_steps", "7")
    RECIPE.check_arguments(config)
    assert config.value.stage == ValueStage(hidden_size=8) and config.value.max_steps == 300
    assert config.policy.stage == PolicyStage(q_coef=2.0) and config.policy.max_steps == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--algo.name", "grpo"], "algo.name is grpo"),
        (["--algo.stage", "policy"], "algo.stage is given, but this recipe runs both stages"),
        (["--value.stage.q_coef", "2"], "value.stage.q_coef"),
        (["--value.stage", "policy"], "value.stage.kind 'policy': not one of value"),
        (["--model.path", "m"], "give both model.path and data.path"),
        (["--model.path", "m", "--data.path", "d"], "held_out is not given"),
    ],
)
def test_contradictory_options_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        RECIPE.check_arguments(parsed(*arguments))
    assert message in str(error.value)
