"""docs/checkers.md is correct: its commands run, its recipes load, and its tables name what there is."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest
import yaml

from llmrl.verify.command import run
from llmrl.verify.options import RewardConfig, VerifyConfig
from llmrl.verify.rubric import Rubric
from llmrl.verify.spec import resolve, shipped_names

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "checkers.md").read_text()
REWARDS = re.findall(r"^\| \[`(\w+)`\]", TEXT, re.MULTILINE)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


COMMANDS = [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]


def test_every_reward_of_the_table_is_shipped_and_has_a_command() -> None:
    assert set(REWARDS) <= set(shipped_names())
    assert [command[3] for command in COMMANDS] == REWARDS


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[3])
def test_self_tests_run(command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert command[:2] == ["llmrl", "verify"]
    assert run(command[2:]) == 0


def test_every_recipe_makes_a_rubric() -> None:
    recipes = [yaml.safe_load(block) for block in blocks("yaml")]
    assert recipes
    for recipe in recipes:
        assert Rubric.from_config([RewardConfig(**reward) for reward in recipe["rewards"]], VerifyConfig()).names


def test_every_column_of_the_table_is_a_parameter() -> None:
    for row in re.findall(r"^\| \[`\w+`\].*$", TEXT, re.MULTILINE):
        name, _, columns, _ = (cell.strip() for cell in row.strip("|").split(" | "))
        (reward,) = re.findall(r"`(\w+)`", name)
        parameters = inspect.signature(resolve(reward)).parameters
        assert set(re.findall(r"`(\w+)`", columns)) <= set(parameters), reward
