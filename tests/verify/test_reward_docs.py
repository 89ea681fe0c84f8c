"""docs/rewards.md is correct: its files load, its commands run, and its recipes name rewards that exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from llmrl.verify.command import run
from llmrl.verify.options import RewardConfig, VerifyConfig
from llmrl.verify.rubric import Rubric

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "rewards.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the files of the document to a folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards").mkdir()
    for block in blocks("python"):
        if block.startswith("# my_rewards/"):
            (tmp_path / block.split("\n", 1)[0].removeprefix("# ")).write_text(block)
    (tmp_path / "rows.jsonl").write_text(blocks("json")[0])
    return tmp_path


def test_every_command_runs(folder: Path) -> None:
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) >= 3
    for command in commands:
        program, name, *arguments = shlex.split(command)
        assert (program, name) == ("llmrl", "verify")
        assert run(arguments) == 0, command
    scores = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in scores] == [1.0, 0.0]


def test_every_file_and_every_recipe_makes_a_rubric(folder: Path) -> None:
    files = sorted(path.relative_to(folder).as_posix() for path in (folder / "my_rewards").glob("*.py"))
    assert Rubric(files).names == [Path(file).stem for file in files]
    recipes = [yaml.safe_load(block) for block in blocks("yaml")]
    assert len(recipes) >= 4
    for recipe in recipes:
        rubric = Rubric.from_config([RewardConfig(**reward) for reward in recipe["rewards"]], VerifyConfig())
        assert len(rubric.names) == len(recipe["rewards"])


def test_the_python_example_makes_a_rubric() -> None:
    (block,) = (block for block in blocks("python") if "rubric = Rubric(" in block)
    namespace: dict[str, Rubric] = {}
    exec(block, namespace)
    assert namespace["rubric"].names == ["math_answer", "format_tags", "soft_overlong"]
