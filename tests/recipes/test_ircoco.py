"""The IRCoCo recipe: all its parts at a small scale, and what it refuses before anything is loaded."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmrl.algo.policy_gradient.options import (
    Cispo,
    Clip,
    Gmpo,
    Group,
    KlInLoss,
    NoBaseline,
    OptimalToken,
    TokenRewards,
)
from llmrl.algo.ppo.options import PPO
from llmrl.config import parse, preset
from llmrl.track.files import read_jsonl
from llmrl.verify.spec import load_file

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = load_file(REPOSITORY / "recipes" / "ircoco" / "train.py")
NAMES = {"edit_similarity", "exact_match", "sampled_edit_similarity", "sampled_exact_match"}


def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "recipes/ircoco/train.py", "--config", "recipes/ircoco_tiny.yaml", *arguments]
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
        (["--algo.baseline", "none"], "does not pay single tokens"),
        (["--algo.name", "ppo", "--algo.use_token_rewards", "false"], "does not pay single tokens"),
        (["--algo.use_token_rewards", "false"], "algo.use_token_rewards"),
        (["--model.path", "m"], "give both model.path and data.path"),
        (["--model.path", "m", "--data.path", "d"], "held_out is not given"),
        (["--rewards", "[{fn: length}]"], "rewards is given"),
        (["--boundary", "word"], "boundary"),
        (["--evaluator.prefixes.num_next_tokens", "5"], "evaluator.prefixes.num_next_tokens: not read"),
        (["--evaluator.prefixes", "files", "--evaluator.prefixes.max_prefix_length", "5"], "below min_prefix_length"),
        (["--terminal", "[grpo, nothing]"], "nothing"),
        (["--terminal", "[dpo]"], "terminal: dpo is not one of"),
    ],
)
def test_contradictions_are_reported_first(arguments: list[str], message: str, tmp_path: Path) -> None:
    found = start("--train.output_dir", str(tmp_path / "run"), *arguments)
    assert found.returncode == 2, found.stdout + found.stderr
    assert message in found.stderr
    assert not (tmp_path / "run").exists()


def test_the_runs_that_are_planned(tmp_path: Path) -> None:
    arguments = ["--config", str(REPOSITORY / "recipes" / "ircoco_py150.yaml"), "--terminal", "[ircoco, grpo]"]
    config = parse([*arguments, "--train.output_dir", str(tmp_path)], config_class=RECIPE.IRCoCoRun)
    assert not RECIPE.check_arguments(config)
    dense, terminal, grpo = RECIPE.plan(config, tmp_path).values()
    assert [run.algo.baseline for run in (dense, terminal, grpo)] == [TokenRewards(gamma=0.0), NoBaseline(), Group()]
    assert {str(run.rewards) for run in (dense, terminal, grpo)} == {str(dense.rewards)}
    assert dense.rewards[0].args == {"evaluator": str(tmp_path / "evaluator"), "boundary": "token", "pay_stop": False}
    assert dense.train.resume_from_checkpoint is None
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "metrics.jsonl").write_text("")
    again, *others = RECIPE.plan(config, tmp_path).values()
    assert again.train.resume_from_checkpoint == "last", "an interrupted run is resumed"
    assert all(run.train.resume_from_checkpoint is None for run in others)


def test_what_is_given_for_the_dense_run_holds_at_the_end_too() -> None:
    given = preset("ircoco", kl={"beta": 0.02}, loss={"epsilon": 0.3}, num_iterations=2, baseline={"gamma": 0.5})
    own, grpo, dapo, gmpo = (RECIPE.terminal(given, name) for name in ("ircoco", "grpo", "dapo", "gmpo"))
    assert {algo.kl for algo in (own, grpo, dapo, gmpo)} == {KlInLoss(beta=0.02)}
    assert {algo.num_iterations for algo in (own, grpo, dapo, gmpo)} == {2}
    assert own.loss == grpo.loss == Clip(epsilon=0.3) and own.baseline == NoBaseline()
    assert dapo.loss == Clip(epsilon=0.3, epsilon_high=0.28, dual_clip=10.0), "what is not given is the preset's"
    assert gmpo.loss == Gmpo(epsilon=0.3) and gmpo.num_mini_batches == preset("gmpo").num_mini_batches
    assert RECIPE.terminal(preset("ircoco", loss="cispo"), "dapo").loss == Cispo()
    assert RECIPE.terminal(preset("grpo", baseline="token_rewards"), "optimal_token").baseline == OptimalToken()
    critic = RECIPE.terminal(preset("ppo", value={"lam": 0.9}, loss={"epsilon": 0.3}), "vapo")
    assert isinstance(critic, PPO) and not critic.use_token_rewards
    assert (critic.value.lam, critic.value.length_alpha) == (0.9, 0.05)
    assert critic.loss == Clip(epsilon=0.3, epsilon_high=0.28)
    assert RECIPE.terminal(given, "ppo").kl == KlInLoss(beta=0.02)


@pytest.mark.slow
def test_it_is_one_process(tmp_path: Path) -> None:
    found = start("--train.output_dir", str(tmp_path / "run"), WORLD_SIZE="2")
    assert found.returncode == 2 and "runs in one process" in found.stderr
