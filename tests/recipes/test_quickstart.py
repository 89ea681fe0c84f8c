"""The quickstart's task, and VAPO on its harder variant."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from llmrl.errors import UserError
from llmrl.track.files import read_jsonl

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart_under_test", RECIPES / "quickstart.py")
    assert spec is not None and spec.loader is not None
    sys.modules["quickstart_under_test"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_additions_by_hand(recipe: ModuleType) -> None:
    assert recipe.prompt(7, 35) == "Compute 07+35\n"
    assert recipe.completion(7, 35, scratchpad=True) == "<think>7+5+0=12,0+3+1=4</think>\\boxed{42}"
    assert recipe.prompt(985, 76, 3) == "Compute 985+076\n"
    shown = recipe.completion(985, 76, scratchpad=True, digits=3)
    assert shown == "<think>5+6+0=11,8+7+1=16,9+0+1=10</think>\\boxed{1061}"
    assert recipe.completion(985, 76, scratchpad=False, digits=3) == "<think></think>\\boxed{1061}"


@pytest.mark.parametrize(("digits", "count"), [(2, 10_000), (3, 16_000)])
def test_no_addition_lies_on_both_sides(recipe: ModuleType, digits: int, count: int) -> None:
    sides = [recipe.pairs(held_out=held_out, digits=digits) for held_out in (False, True)]
    assert sum(map(len, sides)) == count
    assert not set(sides[0]) & set(sides[1])
    assert max(max(pair) for side in sides for pair in side) > 10**digits * 0.98
    assert sides == [recipe.pairs(held_out=held_out, digits=digits) for held_out in (False, True)]


def test_one_digit_is_refused(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["quickstart", "--config", str(RECIPES / "quickstart.yaml"), "--digits", "1"])
    with pytest.raises(UserError, match="digits is 1"):
        recipe.main()


@pytest.mark.slow
def test_vapo_from_a_short_warm_start(
    recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = {"warm_start.min_steps": 10, "warm_start.max_steps": 20, "train.max_steps": 4, "algo.warmup.steps": 2}
    options = [text for name, value in short.items() for text in (f"--{name}", str(value))]
    config = str(RECIPES / "quickstart_vapo.yaml")
    given = ["quickstart", "--config", config, "--train.output_dir", str(tmp_path / "run"), *options]
    monkeypatch.setattr(sys, "argv", given)
    monkeypatch.chdir(RECIPES.parent)
    recipe.main()
    assert "value pre-training stops at algo.warmup.steps after 2 steps" in capsys.readouterr().out
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["value/warmup_steps"] for row in rows] == [1, 2, 2, 2]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["before"]["samples"][0][0].count("+") == 1 and len(summary["before"]["samples"][0][0]) == 16
