"""docs/verifiers.md is correct: its commands run, its recipes and snippets load, its tables are complete."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from llmrl.config import RewardConfig, VerifyConfig
from llmrl.verify.checks.answers import NORMALIZERS
from llmrl.verify.command import run
from llmrl.verify.judge.judge import JudgeConfig, OfflineJudge, get_judge
from llmrl.verify.rubric import Rubric
from llmrl.verify.translation.compare import config_from
from rewards import citation_rubric

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "verifiers.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def commands(language: str) -> list[list[str]]:
    return [shlex.split(line) for block in blocks(language) for line in block.splitlines()]


def table(heading: str) -> list[list[str]]:
    """Return the cells of the first table whose header begins with `heading`."""
    lines = TEXT[TEXT.index(f"| {heading} |") :].split("\n\n", 1)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def named(rows: list[list[str]]) -> list[str]:
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row[0])]


@pytest.mark.parametrize("command", [c for c in commands("bash") if c[0] == "llmrl"], ids=lambda c: c[3])
def test_self_tests_run(command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert command[1] == "verify" and run(command[2:]) == 0


@pytest.mark.parametrize("command", [c for c in commands("bash") if c[0] != "llmrl"], ids=lambda c: c[0])
def test_servers_start_and_answer(command: list[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command[command.index("--port") + 1] = port
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, "PYTHONPATH": ""}, stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        with socket.socket() as probe:
            while probe.connect_ex(("127.0.0.1", int(port))) != 0:
                assert process.poll() is None and time.monotonic() < deadline, f"{command} does not listen"
                time.sleep(0.1)
        if command[0] == "scripts/serve_rubric":
            (payload,) = blocks("json")
            reply = httpx.post(f"http://127.0.0.1:{port}/evaluate", json=json.loads(payload), timeout=60).json()
            assert set(reply) == {"reward", "outcome_reward", "rubric_reward", "rubric_scores", "info"}
            assert reply["reward"] == 1.0
        else:
            samples = [{"src": "a", "mt": "the town", "ref": "the town"}]
            reply = httpx.post(f"http://127.0.0.1:{port}/score", json={"samples": samples}, timeout=60).json()
            assert reply == {"metric": "chrf", "scores": [pytest.approx(1.0)]}
    finally:
        process.terminate()
        process.wait(10)


def test_options_of_the_metric_server_in_its_own_environment() -> None:
    shown = subprocess.run(
        [sys.executable, "scripts/serve_translation_metric", "--help"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    options = [word for command in commands("console") for word in command if word.startswith("--")]
    assert options == ["--model", "--port"] and all(option in shown for option in options)


def test_every_recipe_makes_a_rubric_and_every_judge_can_be_made() -> None:
    recipes = [yaml.safe_load(block) for block in blocks("yaml")]
    assert len(recipes) == 6
    for recipe in recipes:
        assert Rubric.from_config([RewardConfig(**reward) for reward in recipe["rewards"]], VerifyConfig()).names
        for reward in recipe["rewards"]:
            if "judge" in reward["args"]:
                assert get_judge(reward["args"]["judge"])
            config_from(reward["args"].get("options", {}))
    (braces,) = re.findall(r"--judge '(\{.*?\})'", TEXT)
    assert get_judge(yaml.safe_load(braces))


def test_the_reward_with_a_judge_of_its_own_runs() -> None:
    (block,) = blocks("python")
    names: dict[str, Any] = {}
    exec(block, names)
    judge = OfflineJudge(lambda name, case: {"reason": "", "polite": "please" in case["response"]})
    assert [asyncio.run(names["polite_judge"](text, judge=judge)) for text in ("Sit, please.", "Sit!")] == [1.0, 0.0]


def test_the_table_of_judge_fields_is_complete_and_right() -> None:
    defaults = {f.name: f.default for f in dataclasses.fields(JudgeConfig)}
    documented: dict[str, str] = {}
    for names, values, _ in table("field"):
        in_row = re.findall(r"`([^`]+)`", names)
        values = values.split(", ") if ", " in values else [values] * len(in_row)
        documented |= dict(zip(in_row, values, strict=True))
    required = {name: documented.pop(name) for name in ("base_url", "model")}
    assert required == {"base_url": "required", "model": "required"} and documented.pop("extra_body") == "{}"
    known = {None: "none", True: "true", 0.0: "0", 120.0: "120", 600.0: "600"}
    assert documented == {
        name: known.get(default, str(default))
        for name, default in defaults.items()
        if name not in required and name != "extra_body"
    }


def test_the_table_of_citation_options_is_right() -> None:
    single = inspect.signature(citation_rubric.citation_rubric).parameters
    group = inspect.signature(citation_rubric.score_group).parameters
    options = named(table("option"))
    assert set(options) | {"judge"} == {name for name, p in single.items() if p.kind is p.KEYWORD_ONLY}
    for name, default, _ in ((row[0].strip("`"), row[1].strip("`"), row[2]) for row in table("option")):
        value = group[name].default if name in group else single[name].default
        assert default == {None: "none", True: "true", False: "false"}.get(value, str(value)), name


def test_the_tables_of_measures_and_normalizers_are_complete() -> None:
    assert named(table("`normalizer`")) == list(NORMALIZERS)
    assert named(table("mode")) == ["compare", "grade", "light", "metric"]
    assert named(table("`measure` | answer")) == [
        "iou",
        "map",
        "map50",
        "od_length",
    ]


def test_links_lead_somewhere() -> None:
    headings = {line.lstrip("# ").lower().replace(" ", "-") for line in TEXT.splitlines() if line.startswith("#")}
    for target in re.findall(r"\]\(([a-z_#.-]+)\)", TEXT):
        file, _, anchor = target.partition("#")
        assert (ROOT / "docs" / file).is_file() if file else anchor in headings, target
