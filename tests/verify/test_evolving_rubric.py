"""Evolving rubrics: those without spread rest, the k with the most stay, and a resumed run has the same ones."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from llmrl import Trainer
from llmrl.track.files import read_jsonl
from llmrl.types import RolloutGroup
from llmrl.verify.judge.evolving import MAX_INACTIVE, RubricBook, new_rubrics, reward_of
from llmrl.verify.judge.judge import OfflineJudge
from llmrl.verify.rubric import Part, Rubric
from tests.verify.rollouts import group, rollout

SPEC = "rewards/evolving_rubric.py:evolving_rubric"


def test_rubrics_without_spread_rest_and_the_k_with_the_most_stay() -> None:
    book = RubricBook()
    event = book.update(
        "t",
        {
            "all alike": (1.0, [1.0, 1.0, 1.0, 1.0]),
            "tells little": (1.0, [1.0, 1.0, 1.0, 0.5]),
            "tells most": (1.0, [1.0, 0.0, 1.0, 0.0]),
            "a fault": (-1.0, [0.0, 0.0, 1.0, 0.0]),
        },
        max_active=2,
    )
    assert book.of("t").active == {"tells most": 1.0, "a fault": -1.0}
    assert list(book.of("t").active) == ["tells most", "a fault"]
    assert book.of("t").inactive == {"all alike": 1.0, "tells little": 1.0}
    assert (event.added, set(event.rested)) == (["tells most", "a fault"], {"all alike", "tells little"})
    assert event.spread == {"all alike": 0.0, "tells little": 0.216506, "tells most": 0.5, "a fault": 0.433013}


def test_an_active_rubric_rests_once_it_tells_nothing_and_other_tasks_keep_theirs() -> None:
    book = RubricBook()
    for task in ("t", "u"):
        book.update(task, {"names the Inn": (1.0, [1.0, 0.0])}, max_active=5)
    book.update("t", {"names the Inn": (1.0, [1.0, 1.0])}, max_active=5)
    assert book.of("t").active == {} and book.of("t").inactive == {"names the Inn": 1.0}
    assert book.of("u").active == {"names the Inn": 1.0}
    # It is not scored while it rests, and what is not scored stays as it is.
    book.update("u", {"other": (1.0, [1.0, 0.5])}, max_active=5)
    assert set(book.of("u").active) == {"names the Inn", "other"}


def test_resting_rubrics_are_forgotten_at_last() -> None:
    book = RubricBook()
    for i in range(MAX_INACTIVE + 10):
        book.update("t", {f"rubric {i}": (1.0, [1.0, 1.0])}, max_active=5)
    assert len(book.of("t").inactive) == MAX_INACTIVE and "rubric 9" not in book.of("t").inactive


def test_the_state_is_json_and_comes_back() -> None:
    book, other = RubricBook(), RubricBook()
    book.update("t", {"a": (1.0, [1.0, 0.0]), "b": (-1.0, [1.0, 1.0])}, max_active=5)
    other.load_state_dict(json.loads(json.dumps(book.state_dict())))
    assert other == book


def test_rewards_are_weighted_means_and_faults_take_away() -> None:
    assert reward_of({"a": 1.0, "b": 0.5}, {"a": 1.0, "b": 1.0}) == 0.75
    assert reward_of({"a": 1.0, "f": 1.0}, {"a": 1.0, "f": -1.0}) == 0.0
    assert reward_of({"a": 1.0, "b": 1.0, "f": 0.5}, {"a": 1.0, "b": 1.0, "f": -1.0}) == 0.75
    assert reward_of({"a": 0.0, "f": 1.0}, {"a": 1.0, "f": -1.0}) == 0.0
    assert reward_of({"f": 0.5}, {"f": -1.0}) == 0.5


def test_new_rubrics_are_read_line_by_line_and_known_ones_skipped() -> None:
    text = "Here:\n+ Names the Inn river\n- Mentions the Rhine\n+ names the INN river!\n+ Known already.\n+ short\n"
    text += "+ One too many here"
    assert new_rubrics(text, ["known already"], most=2) == {"Names the Inn river": 1.0, "Mentions the Rhine": -1.0}


# --- the reward -------------------------------------------------------------------------------------------------------


def judge(question: str, case: dict[str, str]) -> dict[str, Any]:
    if question == "write_rubrics":
        assert "Names Vienna" in case["known_rubrics"]
        return {"reason": "", "rubrics": "+ Names the tributary Inn\n- Mentions the word Rhine"}
    lines = [line.split(": ", 1) for line in case["rubrics"].splitlines()]
    return {name: 2 * (text.split()[-1] in case["answer"]) for name, text in lines}


def answers(*texts: str) -> RolloutGroup:
    return group(
        *(rollout(text, i, rubrics=["Names Vienna"], judge=OfflineJudge(judge)) for i, text in enumerate(texts))
    )


def scored(rubric: Rubric, rollouts: RolloutGroup) -> list[float | None]:
    asyncio.run(rubric.score_group(rollouts))
    return [r.score.reward if r.score else None for r in rollouts.rollouts]


def test_new_rubrics_count_at_once_and_the_telling_ones_stay() -> None:
    rubric = Rubric([Part(fn=SPEC)])
    first = answers("Vienna and Inn", "Vienna", "Rhine", "Vienna and Inn and Rhine")
    assert scored(rubric, first) == [1.0, 0.5, 0.0, 0.5]
    assert rubric.state_dict() == {"evolving_rubric": {}}  # scoring changes nothing: evaluations score too
    (event,) = rubric.commit([first])
    assert event["reward"] == "evolving_rubric" and event["task"] == "t"
    assert event["active"] == ["Names the tributary Inn", "Mentions the word Rhine"]
    assert scored(rubric, answers("Vienna", "Vienna and Inn")) == [0.5, 1.0]


def test_state_moves_to_another_run_and_does_not_leak_into_one() -> None:
    first, second = Rubric([Part(fn=SPEC)]), Rubric([Part(fn=SPEC)])
    rollouts = answers("Vienna and Inn", "Rhine")
    scored(first, rollouts)
    first.commit([rollouts])
    assert second.state_dict() == {"evolving_rubric": {}}
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict() != {"evolving_rubric": {}}


# --- a run ------------------------------------------------------------------------------------------------------------

ROWS = [{"prompt": f"Write about {word}", "rubrics": ["Has a letter e"]} for word in ("seas", "hills", "towns")]


def run_judge(question: str, case: dict[str, str]) -> dict[str, Any]:
    if question == "write_rubrics":
        letter = chr(ord("a") + sum(map(ord, case["answer_1"])) % 26)
        return {"reason": "", "rubrics": f"+ Has a letter {letter}\n- Has the sign {letter.upper()}"}
    lines = [line.split(": ", 1) for line in case["rubrics"].splitlines()]
    return {name: min(2, case["answer"].count(text.split()[-1])) for name, text in lines}


def train(folder: Path, steps: int, resume: str | None = None) -> None:
    settings = {
        "train.output_dir": str(folder),
        "train.max_steps": steps,
        "train.learning_rate": 1e-3,
        "train.save_steps": 2,
        "rollout.num_prompts": 3,
        "rollout.num_generations": 4,
        "rollout.max_completion_length": 16,
        "track.console": "quiet",
    } | ({"train.resume_from_checkpoint": resume} if resume else {})
    part = Part(fn=SPEC, args={"judge": OfflineJudge(run_judge), "max_active": 2})
    Trainer(settings, model="tiny:qwen2", reward=part, train_dataset=ROWS).train()


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_same_rubrics(tmp_path: Path) -> None:
    train(tmp_path / "whole", 4)
    train(tmp_path / "parts", 2)
    train(tmp_path / "parts", 4, resume="last")
    whole, parts = (read_jsonl(tmp_path / name / "ledger.jsonl") for name in ("whole", "parts"))
    events = [row for row in whole if row["event"] == "reward_state"]
    assert len(events) == 4 * 3 and {row["reward"] for row in events} == {"evolving_rubric"}
    assert [row for row in parts if row["event"] == "reward_state"] == events
    states = [
        json.loads(next((tmp_path / name / "checkpoints").glob("step-*4/state.json")).read_text())["source"]
        for name in ("whole", "parts")
    ]
    assert states[0] == states[1] and states[0]["evolving_rubric"]
