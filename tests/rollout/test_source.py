"""The defaults of a source, and the feeds that become one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from llmrl.algo.preference.options import DPO, KTO
from llmrl.config import DataConfig, PreferenceData, RolloutConfig, VerifyConfig
from llmrl.data.preferences import preferences_from_rows
from llmrl.data.tasks import tasks_from_rows
from llmrl.engines.base import FakeEngine
from llmrl.errors import UserError
from llmrl.rollout.collector import Collector
from llmrl.rollout.preferences import PreferenceFeed
from llmrl.rollout.source import Source
from llmrl.rollout.tasks import TaskFeed, TaskSet
from llmrl.tiny import byte_tokenizer
from llmrl.types import ModelLimits, Rollout, RolloutGroup, Score, Task, Turn
from llmrl.verify.rubric import Rubric

TASK = Task(id="t", messages=[])


def rollout(index: int, length: int) -> Rollout:
    turn = Turn(
        prompt_ids=[1],
        completion_ids=[2] * length,
        rollout_logprobs=[0.0] * length,
        finish="stop",
        policy_version=(0, 0),
        message={"role": "assistant", "content": ""},
    )
    return Rollout(task=TASK, index=index, turns=[turn], score=Score(reward=0.5))


def test_a_source_without_an_engine_measures_lengths_alone() -> None:
    groups = [RolloutGroup(task=TASK, rollouts=[rollout(0, 2), rollout(1, 7)])]
    assert Source().metrics(groups, 3) == {
        "rollout/length/mean": 4.5, "rollout/length/max": 7.0, "rollout/num_tokens": 9.0,
    }  # fmt: skip
    assert set(Source().metrics([], 0).values()) == {0.0}


def test_a_source_without_an_engine_serves_nothing() -> None:
    async def scenario() -> None:
        source = Source()
        assert await source.open(None) == []  # type: ignore[arg-type]
        source.begin_step(0, max_steps=1, epoch=0.0)
        source.check([RolloutGroup(task=TASK, rollouts=[Rollout(task=TASK, index=0)])])
        await source.rest()
        assert await source.serve(1) is None
        await source.close()
        await source.close()

    asyncio.run(scenario())


def no_engine() -> Any:
    raise AssertionError("nothing samples")


def pairs(number: int) -> list[dict[str, Any]]:
    return [{"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(number)]


def preference_feed(folder: Path, rows: list[dict[str, Any]], options: DPO | KTO) -> PreferenceFeed:
    data = PreferenceData(path="rows")
    found = preferences_from_rows(rows, data, "rows")
    return PreferenceFeed(found[:-1], found[-1:], data=data, options=options, folder=folder, seed=0)


def test_preferences_become_groups_with_positions_and_start_no_engine(tmp_path: Path) -> None:
    feed = preference_feed(tmp_path, pairs(5), DPO())
    feed.encode(byte_tokenizer(), None, ModelLimits())
    assert (len(feed.tasks), len(feed.eval_tasks), feed.rewards, feed.has_reference) == (4, 1, {}, False)
    source = feed.source(no_engine)
    tasks = feed.sampler(3).next(3) + feed.eval_tasks
    groups = asyncio.run(source.collect(tasks, [7, 8, 9, 0]))
    assert [group.task.id for group in groups] == [task.id for task in tasks]
    assert [group.position for group in groups] == [7, 8, 9, 0]
    for group in groups:
        assert [r.score.reward for r in group.rollouts if r.score] == [1.0, 0.0]
        assert group.rollouts[1].completion == "no"
    assert source.max_staleness is None
    with pytest.raises(UserError, match="num_prompts"):
        feed.sampler(5)


def test_rows_of_single_completions_are_refused_by_a_loss_of_pairs(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": f"c{i}", "label": bool(i)} for i in range(2)]
    assert preference_feed(tmp_path, rows, KTO()).rewards == {}
    with pytest.raises(UserError, match="algo.name dpo compares pairs: use algo.name kto"):
        preference_feed(tmp_path, rows, DPO())


def task_feed(prompts: list[str], **data: Any) -> TaskFeed:
    options = DataConfig(path="tasks", prompt_format="text", **data)
    tasks = tasks_from_rows([{"prompt": prompt, "answer": "x"} for prompt in prompts], options, "tasks")
    rubric = Rubric([lambda completion: 1.0])
    rollouts = RolloutConfig(num_generations=2, max_completion_length=4, max_staleness=1)
    return TaskFeed(
        TaskSet(tasks, options),
        TaskSet(tasks[:1]),
        rubric,
        data=options,
        rollout=rollouts,
        verify=VerifyConfig(),
        seed=0,
    )


def test_tasks_that_are_too_long_are_left_out_and_counted() -> None:
    feed = task_feed(["short", "x" * 50, "also"], max_prompt_length=20)
    notes = feed.encode(byte_tokenizer(), None, ModelLimits())
    assert [task.messages[0]["content"] for task in feed.tasks] == ["short", "also"]
    assert notes == ["2 tasks from tasks", "1 rows left out: prompt longer than 20 tokens"]
    assert list(feed.rewards.values()) == [1.0]
    with pytest.raises(UserError, match="num_prompts"):
        feed.sampler(3)


def test_the_live_source_has_the_engine_and_its_push() -> None:
    served: list[int] = []
    engine = FakeEngine(lambda prompt_ids, sampling: [65, sampling.stop_token_ids[0]])

    async def push(version: int) -> Any:
        served.append(version)

    feed = task_feed(["a", "b"])
    feed.encode(byte_tokenizer(), None, ModelLimits())
    source = feed.source(lambda: (engine, push))
    assert isinstance(source, Collector)
    assert source.max_staleness == 1

    async def scenario() -> list[RolloutGroup]:
        try:
            await source.open(None)  # type: ignore[arg-type]
            await source.serve(3)
            return await source.collect(feed.tasks, [0, 1])
        finally:
            await source.close()

    groups = asyncio.run(scenario())
    assert served == [3]
    assert [r.completion for group in groups for r in group.rollouts] == ["A"] * 4
    assert [r.score.reward for group in groups for r in group.rollouts if r.score] == [1.0] * 4
