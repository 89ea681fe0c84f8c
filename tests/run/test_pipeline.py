"""Working ahead: who waits for whom, how old rollouts get, and that no task is lost or trained twice."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from llmrl import Trainer
from llmrl.data.sampler import TaskSampler
from llmrl.engines.base import FakeEngine
from llmrl.errors import RunFailed, UserError
from llmrl.rollout.staleness import staleness
from llmrl.run.ledger import Ledger, audit
from llmrl.run.pipeline import RolloutQueue
from llmrl.track.files import read_jsonl
from llmrl.types import Receipt, Rollout, RolloutGroup, Task, Turn
from tests.run.test_trainer import ROWS, letters, numbers, settings

pytestmark = pytest.mark.slow

ALONE = SimpleNamespace(rank=0, world=1, gather_objects=list)
PROMPTS = 4


class Clockwork:
    """A queue over groups that finish when they are told to (or after some seconds), and the policy's version."""

    def __init__(self, *, max_staleness: int, max_steps: int = 100, ledger: Ledger | None = None, **more: Any) -> None:
        self.version, self.begun, self.events = 0, [], {}
        self.seconds = more.pop("seconds", None)
        options: dict[str, Any] = {"num_prompts": PROMPTS, "parallel": ALONE} | more
        self.queue = RolloutQueue(
            TaskSampler([Task(id=str(i), messages=[]) for i in range(200)], seed=0, shuffle=False),
            self.collect,
            max_staleness=max_staleness,
            max_steps=max_steps,
            ledger=ledger,
            **options,
        )

    async def collect(self, task: Task, position: int) -> RolloutGroup:
        begun_with = self.version
        self.begun.append(position)
        if self.seconds is not None:
            await asyncio.sleep(self.seconds(position))
        else:
            await self.events.setdefault(position, asyncio.Event()).wait()
        turn = Turn(
            prompt_ids=[1],
            completion_ids=[2],
            rollout_logprobs=[-1.0],
            finish="stop",
            policy_version=(begun_with, self.version),
            message={},
        )
        return RolloutGroup(task=task, rollouts=[Rollout(task=task, index=0, turns=[turn])], position=position)

    def finish(self, *positions: int) -> None:
        for position in positions:
            self.events.setdefault(position, asyncio.Event()).set()

    async def take(self, step: int, count: int = PROMPTS) -> list[int]:
        groups = await self.queue.take(count, step=step, version=self.version)
        return [group.position for group in groups]

    async def waits(self, step: int) -> bool:
        """Whether a batch is not ready, although everybody had a turn."""
        task = asyncio.ensure_future(self.take(step))
        await asyncio.wait([task], timeout=0.05)
        if task.done():
            return False
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return True


def test_strictly_on_policy_holds_nothing_between_batches() -> None:
    async def run() -> None:
        clockwork = Clockwork(max_staleness=0)
        for step in range(3):
            first = PROMPTS * step
            clockwork.finish(*range(first, first + PROMPTS))
            assert await clockwork.take(step + 1) == list(range(first, first + PROMPTS))
            assert clockwork.begun == list(range(first + PROMPTS))
            assert clockwork.queue.state_dict() == {"under_way": []}
            clockwork.version += 1

    asyncio.run(run())


def test_one_batch_ahead_in_task_order() -> None:
    async def run() -> None:
        clockwork = Clockwork(max_staleness=1)
        clockwork.finish(0, 1, 3, 4, 5, 6, 7)
        assert await clockwork.waits(1), "task 2 is not done, and with a staleness of 1 nothing may overtake it"
        clockwork.finish(2)
        assert await clockwork.take(1) == [0, 1, 2, 3]
        assert clockwork.begun == list(range(8)), "the next batch is under way while this one is trained on"
        clockwork.version += 1
        assert await clockwork.take(2) == [4, 5, 6, 7]
        await asyncio.sleep(0)
        assert clockwork.begun == list(range(12))
        await clockwork.queue.close()

    asyncio.run(run())


def test_the_window_lets_some_overtake_a_straggler_and_then_waits() -> None:
    async def run() -> None:
        clockwork = Clockwork(max_staleness=2, num_prompts=6)  # two may overtake
        assert clockwork.queue.window == 3
        assert clockwork.queue.ahead == 2 * 6 - 2
        clockwork.finish(*range(1, 16))
        with pytest.raises(TimeoutError):  # 0 is a straggler: of 1, 2, 3 ... only 1 and 2 may go before it
            await asyncio.wait_for(clockwork.take(1, 6), 0.05)
        clockwork = Clockwork(max_staleness=2, num_prompts=6)
        clockwork.finish(0, 1, 2, 3, 5, 6, 8)
        assert await clockwork.take(1, 6) == [0, 1, 2, 3, 5, 6], "4 was overtaken by two"
        clockwork.version += 1
        clockwork.finish(*range(7, 22))
        with pytest.raises(TimeoutError):  # 7 would be the third
            await asyncio.wait_for(clockwork.take(2, 6), 0.05)
        clockwork.finish(4)
        assert await clockwork.take(2, 6) == [4, 7, 8, 9, 10, 11]
        await clockwork.queue.close()

    asyncio.run(run())


@pytest.mark.parametrize("extra", [False, True], ids=["whole batches", "dynamic sampling"])
@pytest.mark.parametrize("max_staleness", [0, 1, 2, 3])
def test_nobody_is_lost_or_older_than_allowed(max_staleness: int, extra: bool, tmp_path: Path, seed: int) -> None:
    """Random latencies, some of them several updates long, against what the queue promises."""
    random = np.random.default_rng([seed, max_staleness])
    latency = random.exponential(0.002, 400) + (random.random(400) < 0.1) * 0.02
    num_steps, ledger = 12, Ledger(tmp_path / "ledger.jsonl")

    async def run() -> tuple[list[int], int]:
        clockwork = Clockwork(
            max_staleness=max_staleness,
            max_steps=num_steps,
            ledger=ledger,
            num_prompts=5,
            seconds=lambda p: float(latency[p]),
        )
        ages, seen, late = [], [], 0
        for step in range(1, num_steps + 1):
            groups = await clockwork.queue.take(5, step=step, version=clockwork.version)
            if extra and random.random() < 0.5:
                groups += await clockwork.queue.take(int(random.integers(1, 5)), step=step, version=clockwork.version)
            ledger.trained(step, groups)
            for group in groups:
                seen.append(group.position)
                late = max(late, sum(p > group.position for p in seen[:-1] if p not in {g.position for g in groups}))
            ages += staleness(groups, clockwork.version)
            await asyncio.sleep(0.003)
            clockwork.version += 1
        assert clockwork.queue.entries == []
        assert late < clockwork.queue.window
        return ages, clockwork.queue.window

    ages, _ = asyncio.run(run())
    assert max(ages) == max_staleness if max_staleness < 2 else 1 <= max(ages) <= max_staleness
    ledger.file.sync()
    found = audit(tmp_path / "ledger.jsonl")
    assert found["exact"], found
    assert found["trained"] >= 5 * num_steps


def test_a_group_that_fails_stops_the_step_and_the_others() -> None:
    async def run() -> None:
        clockwork = Clockwork(max_staleness=1)
        collect = clockwork.collect

        async def broken(task: Task, position: int) -> RolloutGroup:
            if position == 6:
                raise RunFailed("the engine failed")
            return await collect(task, position)

        clockwork.queue.collect = broken
        with pytest.raises(RunFailed, match="the engine failed"):
            await asyncio.wait_for(clockwork.take(1), 5)
        await clockwork.queue.close()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())


def test_an_engine_that_serves_old_weights_is_found_out() -> None:
    async def run() -> None:
        clockwork = Clockwork(max_staleness=1)
        clockwork.finish(*range(100))
        await clockwork.take(1)
        await asyncio.sleep(0)  # the second batch begins and ends with version 0
        clockwork.version = 2
        with pytest.raises(RunFailed, match="2 versions ago"):
            await clockwork.take(2)
        await clockwork.queue.close()

    asyncio.run(run())


def test_what_is_under_way_is_begun_again_after_a_resume() -> None:
    async def run() -> None:
        clockwork = Clockwork(max_staleness=2, num_prompts=6)
        clockwork.finish(0, 1, 2, 3, 5, 6)
        await clockwork.take(1, 6)
        state, sampler = clockwork.queue.state_dict(), clockwork.queue.sampler.state_dict()
        await clockwork.queue.close()
        resumed = Clockwork(max_staleness=2, num_prompts=6)
        resumed.queue.sampler.load_state_dict(sampler)
        resumed.queue.load_state_dict(state, {str(i): Task(id=str(i), messages=[]) for i in range(200)})
        resumed.version = 1
        resumed.finish(*range(100))
        assert await resumed.take(2, 6) == [4, 7, 8, 9, 10, 11]
        assert resumed.begun == [4, *range(7, 22)]
        assert state["under_way"][0] == [4, "4"]
        await resumed.queue.close()

    asyncio.run(run())


@pytest.mark.parametrize(("max_staleness", "num_prompts"), [(0, 4), (1, 4), (0, 3)])
def test_a_resume_that_works_less_ahead_keeps_to_its_own_limit(max_staleness: int, num_prompts: int) -> None:
    """What the checkpoint left under way is begun no earlier than the new options allow, and nothing is lost."""

    async def run() -> None:
        clockwork = Clockwork(max_staleness=3, seconds=lambda position: 0)
        await clockwork.take(1)
        state, sampler = clockwork.queue.state_dict(), clockwork.queue.sampler.state_dict()
        await clockwork.queue.close()
        assert len(state["under_way"]) > 2 * PROMPTS
        resumed = Clockwork(max_staleness=max_staleness, num_prompts=num_prompts, seconds=lambda position: 0)
        resumed.queue.sampler.load_state_dict(sampler)
        resumed.queue.load_state_dict(state, {str(i): Task(id=str(i), messages=[]) for i in range(200)})
        taken = []
        for step in range(2, 8):
            resumed.version = step - 1
            taken += await resumed.take(step, num_prompts)
            assert len(resumed.begun) <= len(taken) + max_staleness * num_prompts
        assert taken == list(range(PROMPTS, PROMPTS + 6 * num_prompts))
        await resumed.queue.close()

    asyncio.run(run())


def test_processes_take_the_same_groups() -> None:
    """Three queues that see only their own share: each hands over the next tasks in order."""

    async def run() -> None:
        several = []
        for rank in range(3):
            processes = SimpleNamespace(
                rank=rank, world=3, gather_objects=list, device=torch.device("cpu")
            )  # they tell each other nothing
            clockwork = Clockwork(max_staleness=2, parallel=processes)
            clockwork.finish(*range(100))
            several.append(clockwork)
        for step in range(1, 4):
            found = [await clockwork.take(step) for clockwork in several]
            assert sorted(p for positions in found for p in positions) == list(range(4 * step - 4, 4 * step))
        begun = Counter(p for clockwork in several for p in clockwork.begun)
        assert set(begun.values()) == {1}
        for clockwork in several:
            assert clockwork.queue.window == 1
            await clockwork.queue.close()

    asyncio.run(run())


# --- whole runs ---


class Stop(Exception):
    """A run that is killed."""


def fake_run(folder: Path, *, seconds: float = 0.0, **more: Any) -> Trainer:
    """A Trainer over a scripted engine with set latencies."""
    run = Trainer(settings(folder, **more), model="tiny:qwen2", reward=letters, train_dataset=ROWS)

    def script(prompt_ids: list[int], sampling: Any) -> list[int]:
        return np.random.default_rng(sampling.seed).integers(97, 123, 4).tolist()

    engine = FakeEngine(script, latency=lambda _, sampling: seconds * (1 + sampling.seed % 7) / 4)

    async def push(version: int) -> Receipt:
        await engine.load_weights(lambda: [], version=version)
        return Receipt(version=version, max_gap=0.0, change=0.0, seconds=0.0)

    source: Any = run.source
    source.engine, source.push = engine, push
    return run


@pytest.mark.parametrize("max_staleness", [1, 2])
def test_killed_and_resumed_every_task_is_trained_once(max_staleness: int, tmp_path: Path) -> None:
    more = {"rollout__max_staleness": max_staleness, "train__max_steps": 7, "seconds": 0.004}
    run = fake_run(tmp_path, **more)
    update, calls = run.learner.update, []

    def killed(*arguments: Any) -> dict[str, float]:
        calls.append(arguments)
        if len(calls) == 4:
            raise Stop
        return update(*arguments)

    run.learner.update = killed  # type: ignore[method-assign]
    with pytest.raises(Stop):
        run.train()
    before = audit(tmp_path / "ledger.jsonl")
    assert before["trained"] == 12
    assert len(before["lost"]) > 4, "the step that was killed, and the tasks under way behind it"
    fake_run(tmp_path, train__resume_from_checkpoint="last", **more).train()
    found = audit(tmp_path / "ledger.jsonl")
    assert found == {"issued": 28, "trained": 28, "lost": [], "doubled": [], "exact": True}
    rollouts = [(row["step"], row["task"], row["index"]) for row in read_jsonl(tmp_path / "rollouts.jsonl")]
    assert len(rollouts) == len(set(rollouts)) == 28 * 4
    ages = [row["rollout/staleness/max"] for row in numbers(tmp_path)]
    assert len(ages) == 7
    assert ages[2] == 0, "resumed after step 2: what was under way was drawn again"
    assert max(ages) <= max_staleness
    assert ages[-1] >= 1


def test_with_dynamic_sampling_and_evaluation(tmp_path: Path) -> None:
    more = {"rollout__max_staleness": 1, "algo__dynamic_sampling": True, "eval__steps": 2}
    run = Trainer(
        settings(tmp_path / "run", **more),
        model="tiny:qwen2",
        reward=lambda completion: float(len(completion) > 8),
        train_dataset=ROWS,
        eval_dataset=ROWS[:4],
    )
    metrics = run.train()
    assert audit(tmp_path / "run" / "ledger.jsonl")["exact"]
    assert metrics["rollout/staleness/max"] == 1
    assert "eval/pass@1" in metrics
    assert metrics["loss/sampler_weight"] > 0
    assert metrics["kl/mismatch/ess"] > 0.5


def test_with_a_critic(tmp_path: Path) -> None:
    """PPO: the critic learns from stale rollouts too, and the policy's loss is weighted."""
    more = {"rollout__max_staleness": 1, "algo__name": "ppo"}
    Trainer(settings(tmp_path, **more), model="tiny:qwen2", reward=letters, train_dataset=ROWS).train()
    metrics = numbers(tmp_path)
    assert [row["rollout/staleness/max"] for row in metrics] == [0, 1, 1, 1]
    assert all(row["loss/sampler_weight"] > 0 and row["value/grad_norm"] > 0 for row in metrics)
    assert any(row["loss/sampler_weight"] != metrics[0]["loss/sampler_weight"] for row in metrics)
    assert audit(tmp_path / "ledger.jsonl")["exact"]


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_rollouts_go_on_while_the_learner_updates(max_staleness: int, tmp_path: Path) -> None:
    """With overlap the next batch is generated during the update (here it waits for one to begin); without, never."""
    run = fake_run(tmp_path, rollout__max_staleness=max_staleness, train__max_steps=5, train__save_steps=0)
    engine: Any = run.source.engine  # pyright: ignore
    generate, updating, batch = engine.generate, threading.Event(), 4 * 4
    begun, finished, during = [], [], []

    async def wait_for_an_update(*arguments: Any, **options: Any) -> Any:
        begun.append(arguments)
        while max_staleness and len(begun) > batch and not updating.is_set():
            await asyncio.sleep(0.001)
        completion = await generate(*arguments, **options)
        finished.append(updating.is_set())
        return completion

    def update(*_: Any) -> dict[str, float]:
        before, last = sum(finished), len(during) == 4
        updating.set()
        if max_staleness and not last:
            while sum(finished) < before + batch:  # hangs, and so fails, where nothing runs beside the learner
                time.sleep(0.001)
        updating.clear()
        during.append(sum(finished) - before)
        return {}

    engine.generate, run.learner.update = wait_for_an_update, update  # type: ignore[method-assign]
    run.train()
    assert during == [batch * max_staleness] * 4 + [0]


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rollout.max_staleness is -1"):
        Trainer(settings(tmp_path, rollout__max_staleness=-1), model="tiny:qwen2", reward=letters, train_dataset=ROWS)


def test_the_loop_goes_on_while_processes_wait_for_each_other() -> None:
    turns = 0
    waiting = threading.Event()

    def gather_objects(items: list[Any]) -> list[Any]:
        """Return when the loop of this process has turned often meanwhile: in the loop itself it would never return."""
        waiting.set()
        before = turns
        while turns < before + 20:
            time.sleep(0.001)
        return items

    async def beat() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async def main() -> None:
        heart = asyncio.create_task(beat())
        processes = SimpleNamespace(rank=0, world=2, gather_objects=gather_objects, device=torch.device("cpu"))
        clockwork = Clockwork(max_staleness=0, parallel=processes, seconds=lambda position: 0)
        taken = await clockwork.queue.take(PROMPTS, step=1, version=0)
        assert waiting.is_set() and len(taken) == PROMPTS // 2
        heart.cancel()

    asyncio.run(main())
