"""What a failing reward looks like to the user: the error itself first, then their own frames alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from llmrl.types import Score
from llmrl.verify.reward import group_reward
from llmrl.verify.rubric import Rubric
from tests.verify.rollouts import group, rollout

NOISE = ("llmrl_plugin", "plugin.py", "rubric.py", "worker.py", "asyncio/", "no running event loop", "During handling")
FILE = """\
import json
from llmrl.verify.reward import group_reward
from llmrl.verify.checks.boxes import gold_box
def deep(text): raise ValueError("my bug")
def sync(completion): return deep(completion)
async def waits(completion): return deep(completion)
def trl(completions, **kwargs): return [deep(c) for c in completions]
@group_reward
async def whole(rollouts): return [deep(r.completion) for r in rollouts]
def library(completion): return json.loads("{")
def ours(completion): return len(gold_box(object()).missing)
def chained(completion):
    try:
        deep(completion)
    except ValueError as error:
        raise KeyError("outer") from error
def bare(completion): assert False
class Own(Exception):
    def __str__(self): raise RuntimeError("no text")
def without_text(completion): raise Own()
def missing(completion): import no_such_neighbor
class Thing:
    def __call__(self, completion): raise TimeoutError()
"""


def error_of(reward: Any) -> str:
    """Return the error of one rollout, scored inside an except block as `Trainer.train` does."""

    async def main() -> Score | None:
        rubric = Rubric([reward])
        try:
            found = rollout("x")
            await rubric.score_group(group(found))
            return found.score
        finally:
            await rubric.close()

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        score = asyncio.run(main())
    assert score is not None
    assert score.error is not None
    return score.error


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize(
    ("name", "headline"),
    [
        ("sync", "ValueError: my bug ({file}, line 4, in deep)"),
        ("waits", "ValueError: my bug ({file}, line 4, in deep)"),
        ("trl", "ValueError: my bug ({file}, line 4, in deep)"),
        ("whole", "ValueError: my bug ({file}, line 4, in deep)"),
        ("library", "JSONDecodeError: Expecting property name enclosed in double quotes"),
        ("chained", "KeyError: 'outer' ({file}, line 16, in chained)"),
        ("bare", "AssertionError ({file}, line 17, in bare)"),
        ("Thing()", "TimeoutError ({file}, line 23, in __call__)"),
        ("without_text", "Own ({file}, line 20, in without_text)"),
        ("missing", "ModuleNotFoundError: No module named 'no_such_neighbor' ({file}, line 21, in missing)"),
    ],
)
def test_the_first_line_is_the_users_error(tmp_path: Path, name: str, headline: str, pool: bool) -> None:
    if pool and name in ("trl", "whole", "Thing()"):
        pytest.skip("runs in this process")
    file = tmp_path / f"mine_{pool}.py"
    file.write_text(FILE + ("POOL = True\n" if pool else ""))
    text = error_of(f"{file}:{name}")
    lines = text.splitlines()
    assert lines[0].startswith(headline.format(file=file)), text
    if name == "library":
        assert lines[0].endswith(f"({file}, line 10, in library)"), "the deepest place in the reward's own file"
    assert str(file) in text.split("Traceback", 1)[1].splitlines()[1], "the first frame is the reward's own"
    assert not [noise for noise in NOISE if noise in text], text
    assert ("direct cause" in text) == (name == "chained")


def test_an_error_about_the_value_has_no_traceback() -> None:
    assert error_of(lambda completion: "good") == (
        "reward lambda returned 'good' of type str; it must return a number, a bool, None (could not judge) or a Score"
    )

    @group_reward
    def short(rollouts: list[Any]) -> list[float]:
        return []

    assert error_of(short) == "reward short returned 0 values for 1 rollouts"


def test_a_single_error_of_a_task_group_is_the_error() -> None:
    async def parallel(completion: str) -> float:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fails())
        return 1.0

    async def fails() -> None:
        raise ValueError("inside")

    text = error_of(parallel)
    assert text.startswith("ValueError: inside (")
    assert "in fails)" in text.splitlines()[0]
