"""Every file in rewards/ keeps the contract: its examples hold, it is deterministic, and no completion breaks it."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import Any

import pytest

from llmrl.types import RolloutGroup, Score
from llmrl.verify.contract import ExampleResult, examples_of, gold_and_nothing, run_examples
from llmrl.verify.rows import row_to_rollout
from llmrl.verify.rubric import Part, Rubric
from llmrl.verify.spec import load_file, resolve, shipped_folder, shipped_names


def specs() -> list[str]:
    """Return `file.py:function` of everything in rewards/ that has examples."""
    found = []
    for name in shipped_names():
        module = load_file(shipped_folder() / f"{name}.py")
        functions = list(module.EXAMPLES) if isinstance(module.EXAMPLES, dict) else [name]
        found += [f"rewards/{name}.py:{function}" for function in functions]
    return found


SPECS = specs()
HOSTILE = [
    "",
    " ",
    "\x00",
    "\ud800\udfff",
    "NaN",
    "\\boxed{",
    "<think>" * 1000,
    "\u202e\u0000\uffff",
    "{" * 100_000,
    "0" * 10_000_000,
]


def test_there_are_rewards() -> None:
    assert {"math_answer", "format_tags", "length"} <= set(shipped_names())
    assert (shipped_folder() / "math_answer.py").is_file()


@pytest.mark.parametrize("spec", SPECS)
def test_examples_hold_and_repeat(spec: str) -> None:
    first, second = (asyncio.run(run_examples(spec)) for _ in range(2))
    failed = [(v.row, v.expected, v.score) for v in first if not v.passed]
    assert not failed
    assert [v.score.reward for v in first] == [v.score.reward for v in second]


@pytest.mark.parametrize("spec", SPECS)
def test_examples_show_more_than_one_outcome(spec: str) -> None:
    examples = examples_of(Rubric([spec]))
    assert len(examples) >= 4
    assert len({example["reward"] for example in examples}) >= 2


@pytest.mark.parametrize("spec", SPECS)
def test_gold_is_paid_and_saying_nothing_is_not(spec: str) -> None:
    assert asyncio.run(gold_and_nothing(spec)) == []


@pytest.mark.parametrize("spec", SPECS)
def test_no_completion_breaks_it(spec: str) -> None:
    """For any completion the verdict costs little and is a number or an abstention, never an error."""
    rubric = Rubric([Part(fn=spec)])
    row = {key: value for key, value in examples_of(rubric)[0].items() if key != "reward"}

    async def main() -> list[tuple[Score | None, float]]:
        found = []
        try:
            for text in HOSTILE:
                rollout = row_to_rollout(row | {"completion": text}, name="hostile")
                started = time.process_time()
                await rubric.score_group(RolloutGroup(task=rollout.task, rollouts=[rollout]))
                found.append((rollout.score, time.process_time() - started))
        finally:
            await rubric.close()
        return found

    for text, (score, seconds) in zip(HOSTILE, asyncio.run(main()), strict=True):
        assert score is not None
        assert score.error is None, (ascii(text[:20]), score.error)
        assert seconds < 10, (ascii(text[:20]), seconds)


@pytest.mark.parametrize("spec", SPECS)
def test_its_check_accepts_every_row_that_it_can_score(spec: str) -> None:
    for example in examples_of(Rubric([spec])):
        rubric = Rubric([spec])
        found = rubric.findings(row_to_rollout(example, name="example").task)
        assert not found or example["reward"] is None, (example, found)


@pytest.mark.parametrize("spec", SPECS)
def test_functions_are_documented(spec: str) -> None:
    function = resolve(spec)
    assert function.__doc__


def test_a_verdict_fails_on_any_difference() -> None:
    verdict = ExampleResult(row={}, expected=1.0, score=Score(reward=1.0 + 1e-9))
    assert verdict.passed
    for expected, score in (
        (1.0, Score(reward=0.99)),
        (1.0, Score(reward=None)),
        (None, Score(reward=0.0)),
        (None, Score(reward=None, error="x")),
    ):
        changed: Any = dataclasses.replace(verdict, expected=expected, score=score)
        assert not changed.passed
