"""The IRCoCo recipe: all its parts at a small scale, and what it refuses before anything is loaded."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmrl.config import parse
from llmrl.track.files import read_jsonl
from llmrl.verify.spec import load_file

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = {"edit_similarity", "exact_match", "sampled_edit_similarity", "sampled_exact_match"}


def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "recipes/ircoco.py", "--config", "recipes/ircoco_tiny.yaml", *arguments]
    given = os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment
    return subprocess.run(command, cwd=REPOSITORY, env=given, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--algo.name", "ppo", "--critic.kind", "shared", "--boundary", "line"]])
def test_all_parts_and_a_continuation(more: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    little = ["--train.output_dir", str(run), "--track.console", "quiet", "--rollout.num_prompts", "4"]
    little += ["--made_up.num_tasks", "16", "--made_up.num_held_out", "4", "--made_up.num_examples", "64"]
    little += ["--made_up.max_steps", "4", "--evaluator.num_examples", "40", "--evaluator.num_epochs", "1"]
    for _ in range(2):  # the second time everything is there
        found = start(*little, "--train.max_steps", "2", "--terminal", "[grpo]", *more)
        assert found.returncode == 0, found.stdout + found.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert {"before", "dense", "terminal grpo"} <= set(summary) and set(summary["dense"]) == NAMES
    assert (run / "evaluator" / "model.safetensors").is_file()
    metrics, rollouts = (read_jsonl(run / "dense" / f"{name}.jsonl") for name in ("metrics", "rollouts"))
    assert len(metrics) == 2
    assert math.isfinite(metrics[-1]["reward/ircoco/evaluator/correlation"])
    paid = [row["advantage"] for row in rollouts]
    assert any(isinstance(tokens, list) and len(set(tokens)) > 1 for tokens in paid)
    assert all(not isinstance(row["advantage"], list) for row in read_jsonl(run / "terminal_grpo" / "rollouts.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--algo.name", "grpo"], "does not pay single tokens"),
        (["--algo.use_token_rewards", "false"], "does not pay single tokens"),
        (["--model.path", "m"], "give both model.path and data.path"),
        (["--model.path", "m", "--data.path", "d"], "held_out is not given"),
        (["--rewards", "[{fn: length}]"], "rewards is given"),
        (["--boundary", "word"], "boundary"),
        (["--evaluator.num_next_tokens", "5"], "only read with evaluator.prefixes files"),
        (["--terminal", "[grpo, nothing]"], "nothing"),
    ],
)
def test_contradictions_are_reported_first(arguments: list[str], message: str, tmp_path: Path) -> None:
    found = start("--train.output_dir", str(tmp_path / "run"), *arguments)
    assert found.returncode == 2, found.stdout + found.stderr
    assert message in found.stderr
    assert not (tmp_path / "run").exists()


def test_the_runs_that_are_planned(tmp_path: Path) -> None:
    recipe = load_file(REPOSITORY / "recipes" / "ircoco.py")
    arguments = ["--config", str(REPOSITORY / "recipes" / "ircoco_py150.yaml"), "--terminal", "[ircoco, grpo]"]
    config = parse([*arguments, "--train.output_dir", str(tmp_path)], config_class=recipe.IRCoCoRun)
    assert not recipe.check(config)
    dense, terminal, grpo = recipe.plan(config, tmp_path).values()
    assert [run.algo.use_token_rewards for run in (dense, terminal, grpo)] == [None, False, None]
    assert {str(run.rewards) for run in (dense, terminal, grpo)} == {str(dense.rewards)}
    assert dense.rewards[0].args == {"evaluator": str(tmp_path / "evaluator"), "boundary": "token", "pay_stop": False}
    assert dense.train.resume_from_checkpoint is None
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "metrics.jsonl").write_text("")
    again, *others = recipe.plan(config, tmp_path).values()
    assert again.train.resume_from_checkpoint == "last", "an interrupted run is resumed"
    assert all(run.train.resume_from_checkpoint is None for run in others)


@pytest.mark.slow
def test_it_is_one_process(tmp_path: Path) -> None:
    found = start("--train.output_dir", str(tmp_path / "run"), WORLD_SIZE="2")
    assert found.returncode == 2 and "runs in one process" in found.stderr
