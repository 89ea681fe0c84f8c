"""The collector with a scripted engine: whole rollouts, overlap, errors, seeds."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from llmrl.engines.base import FakeEngine
from llmrl.errors import RunFailed
from llmrl.rollout.collector import Collector, gather_or_cancel, request_seed
from llmrl.rollout.env import Reply
from llmrl.rollout.options import RolloutConfig
from llmrl.types import Completion, Message, Rollout, RolloutGroup, Sampling, Score, Status, Task

STOP = 2


class StubChat:
    """Token ids are code points; a conversation is its contents joined."""

    stop_token_ids = (STOP,)

    def render(self, messages: list[Message], tools: list[Any] | None = None, **_: Any) -> list[int]:
        return [ord(character) for message in messages for character in message["content"]]

    def render_task(self, task: Task) -> list[int]:
        return self.render(task.messages)

    def parse(self, completion_ids: list[int]) -> Message:
        return {"role": "assistant", "content": "".join(chr(i) for i in completion_ids if i != STOP)}

    def prefilled(self, messages: list[Message], **_: Any) -> str:
        return "<think>"


class StubRubric:
    """Gives reward 1 to completions that contain an x, and records the order of scoring."""

    accuracy_name = "x"

    def __init__(self, events: list[str] | None = None) -> None:
        self.events = [] if events is None else events

    async def score(self, rollout: Rollout) -> None:
        self.events.append(f"score {rollout.task.id}/{rollout.index}")
        await asyncio.sleep(0)
        rollout.score = Score(reward=float("x" in rollout.completion))

    async def score_group(self, group: RolloutGroup) -> None:
        self.events.append(f"group {group.task.id}")


def tasks(*texts: str) -> list[Task]:
    return [Task(id=text, messages=[{"role": "user", "content": text}]) for text in texts]


def collector(engine: Any, rubric: Any = None, **options: Any) -> Collector:
    config = RolloutConfig(num_generations=options.pop("num_generations", 2), max_completion_length=4, temperature=0.7)
    return Collector(engine, StubChat(), rubric or StubRubric(), config, seed=options.pop("seed", 0), **options)  # pyright: ignore


def collect(engine: Any, *texts: str, rubric: Any = None, positions: list[int] | None = None, **options: Any) -> Any:
    calls = {key: options.pop(key) for key in ("salt",) if key in options}
    built = collector(engine, rubric, **options)
    return asyncio.run(built.collect(tasks(*texts), positions or list(range(len(texts))), **calls))


def by_turn(replies: dict[str, list[list[int]]]) -> FakeEngine:
    """Returns each prompt's completions in the order of the calls."""
    waiting = {prompt: iter(rows) for prompt, rows in replies.items()}
    return FakeEngine(lambda prompt_ids, sampling: next(waiting["".join(map(chr, prompt_ids))]))


def plain(rollout: Rollout) -> tuple[Any, ...]:
    (turn,) = rollout.turns
    reward = rollout.score.reward if rollout.score else None
    return (rollout.index, turn.prompt_ids, turn.completion_ids, turn.finish, rollout.status, reward)


def test_whole_rollouts() -> None:
    x, y = ord("x"), ord("y")
    engine = by_turn({"ab": [[x, STOP], [y, y, y, y, y]], "c": [[STOP], []]})
    engine.version = 3
    first, second = collect(engine, "ab", "c")
    assert [first.task.id, second.task.id] == ["ab", "c"]
    assert [plain(rollout) for rollout in first.rollouts] == [
        (0, [97, 98], [x, STOP], "stop", Status.COMPLETED, 1.0),
        (1, [97, 98], [y, y, y, y], "length", Status.TRUNCATED_LENGTH, 0.0),
    ]
    assert [plain(rollout) for rollout in second.rollouts] == [
        (0, [99], [STOP], "stop", Status.COMPLETED, 0.0),
        (1, [99], [], "length", Status.TRUNCATED_LENGTH, 0.0),
    ]
    turn = first.rollouts[0].turns[0]
    assert turn.rollout_logprobs == [-1.0, -1.0]
    assert turn.policy_version == (3, 3)
    assert turn.message == {"role": "assistant", "content": "x"}
    assert turn.seconds["generate"] >= 0
    assert turn.prefilled == first.rollouts[0].prefilled == "<think>"
    assert first.rollouts[0].messages == [{"role": "user", "content": "ab"}, turn.message]
    assert [session for _, _, session in engine.calls] == ["ab/0", "ab/1", "c/0", "c/1"]
    assert all((s.max_tokens, s.temperature, s.top_p, s.top_k) == (4, 0.7, 1.0, 0) for _, s, _ in engine.calls)
    assert all(s.stop_token_ids == (STOP,) for _, s, _ in engine.calls)


def test_arguments_of_one_call() -> None:
    engine = FakeEngine(lambda prompt_ids, sampling: [STOP])
    built = collector(engine)
    (group,) = asyncio.run(built.collect(tasks("a"), [0], num_generations=5, temperature=0.0, salt="eval"))
    assert [rollout.index for rollout in group.rollouts] == [0, 1, 2, 3, 4]
    assert {sampling.temperature for _, sampling, _ in engine.calls} == {0.0}


def test_scoring_overlaps_generation() -> None:
    """Each completion ends only after an earlier one was scored, so without overlap none would ever end."""
    events: list[str] = []
    released_by = {"b/0": "score a/0", "a/1": "score b/0", "b/1": "group a"}

    class Waiting(FakeEngine):
        async def generate(self, prompt_ids: list[int], sampling: Sampling, *, session: str) -> Completion:
            while session in released_by and released_by[session] not in events:
                await asyncio.sleep(0.001)
            events.append(f"generated {session}")
            return await super().generate(prompt_ids, sampling, session=session)

    built = collector(Waiting(lambda prompt_ids, sampling: [STOP]), StubRubric(events))
    asyncio.run(built.collect(tasks("a", "b"), [0, 1]))
    assert events == [
        "generated a/0", "score a/0",
        "generated b/0", "score b/0",
        "generated a/1", "score a/1", "group a",
        "generated b/1", "score b/1", "group b",
    ]  # fmt: skip


class FailingEnv:
    """Fails at the step that its task names, and records that it was closed."""

    closed: list[str] = []

    def __init__(self, task: Task) -> None:
        self.task = task
        self.fail("init")

    def fail(self, where: str) -> None:
        if self.task.id == where:
            raise ConnectionError(f"{where} failed")

    async def start(self) -> list[Message]:
        self.fail("start")
        return [{"role": "user", "content": "?"}]

    async def step(self, message: Message) -> Reply:
        self.fail("step")
        return Reply(done=self.task.id != "goes on", rewards={"touched": 0.5})

    async def close(self) -> None:
        self.closed.append(self.task.id)
        self.fail("close")


def test_an_environments_errors_are_statuses_of_its_rollouts() -> None:
    FailingEnv.closed = []
    engine, rubric = FakeEngine(lambda prompt_ids, sampling: [120, STOP]), StubRubric()
    names = ["init", "start", "step", "close", "goes on", "fine"]
    groups = collect(engine, *names, rubric=rubric, env_factory=FailingEnv, num_generations=1)
    found = {group.task.id: group.rollouts[0] for group in groups}
    for name in ("init", "start", "step", "close"):
        assert found[name].status is Status.ERROR_ENV
        assert f"ConnectionError: {name} failed" in found[name].error
        assert found[name].score is None
    assert found["goes on"].status is Status.ERROR_ENV
    assert "asks for another turn" in found["goes on"].error
    assert found["fine"].status is Status.COMPLETED
    assert found["fine"].error is None
    assert found["fine"].env_rewards == {"touched": 0.5}
    assert found["fine"].turns[0].prompt_ids == [ord("?")], "the environment's messages, not the task's"
    assert sorted(FailingEnv.closed) == sorted(set(names) - {"init"})
    assert rubric.events.count("score fine/0") == 1
    assert [event for event in rubric.events if event.startswith("score")] == ["score fine/0"]


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), RunFailed("the server is gone")])
def test_an_engines_error_ends_the_step_and_cancels_the_rest(error: Exception) -> None:
    begun: list[str] = []
    cancelled: list[str] = []

    class Dying(FakeEngine):
        async def generate(self, prompt_ids: list[int], sampling: Sampling, *, session: str) -> Completion:
            begun.append(session)
            try:
                while session != "b/1" or len(begun) < 4:
                    await asyncio.sleep(0)
            except asyncio.CancelledError:
                cancelled.append(session)
                raise
            raise error

    FailingEnv.closed = []
    with pytest.raises(RunFailed, match=str(error)) as caught:
        collect(Dying(lambda prompt_ids, sampling: []), "a", "b", env_factory=FailingEnv)
    assert caught.value is error or caught.value.__cause__ is error
    assert sorted(cancelled) == ["a/0", "a/1", "b/0"]
    assert sorted(FailingEnv.closed) == ["a", "a", "b", "b"], "environments are closed also after an error"


def test_a_completion_the_engine_gave_up_on_is_not_scored() -> None:
    class Aborting(FakeEngine):
        async def generate(self, prompt_ids: list[int], sampling: Sampling, *, session: str) -> Completion:
            completion = await super().generate(prompt_ids, sampling, session=session)
            if session == "a/1":
                completion.finish = "abort"
            return completion

    rubric = StubRubric()
    (group,) = collect(Aborting(lambda prompt_ids, sampling: [120, STOP]), "a", rubric=rubric)
    assert [rollout.status for rollout in group.rollouts] == [Status.COMPLETED, Status.ERROR_ENGINE]
    assert group.rollouts[1].score is None
    assert group.rollouts[1].error
    assert rubric.events == ["score a/0", "group a"]


def test_a_failing_rubric_ends_the_step() -> None:
    class Broken(StubRubric):
        async def score(self, rollout: Rollout) -> None:
            raise RunFailed("too many errors")

    with pytest.raises(RunFailed, match="too many errors"):
        collect(FakeEngine(lambda prompt_ids, sampling: [STOP]), "a", rubric=Broken())


def test_seeds_differ_by_everything_and_are_the_same_on_every_machine() -> None:
    assert request_seed(0, "train", 0, 0) == 6578950792936650312
    seeds = {
        request_seed(run, salt, position, index)
        for run in range(3)
        for salt in ("train", "eval")
        for position in (0, 1, 11, 12)
        for index in (0, 1, 2, 12)
    }
    assert len(seeds) == 3 * 2 * 4 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_rollouts_seed_depends_only_on_its_place_in_the_run() -> None:
    def seeds(*texts: str, positions: list[int], **options: Any) -> dict[str, int]:
        engine = FakeEngine(lambda prompt_ids, sampling: [STOP])
        collect(engine, *texts, positions=positions, **options)
        return {session: sampling.seed for _, sampling, session in engine.calls}

    together, alone = seeds("a", "b", positions=[7, 8]), seeds("b", positions=[8])
    assert together["b/0"] == alone["b/0"]
    assert together["b/1"] == alone["b/1"]
    assert len(set(together.values())) == 4
    again, evaluated = seeds("b", positions=[9]), seeds("b", positions=[8], salt="eval")
    other_run = seeds("b", positions=[8], seed=1)
    assert len({alone["b/0"], again["b/0"], evaluated["b/0"], other_run["b/0"]}) == 4


def test_gather_or_cancel_keeps_the_order_and_waits_for_what_it_cancels() -> None:
    cleaned: list[str] = []

    async def value(number: int, delay: float) -> int:
        await asyncio.sleep(delay)
        return number

    async def slow_to_stop() -> None:
        try:
            await asyncio.sleep(30)
        finally:
            await asyncio.sleep(0.02)
            cleaned.append("done")

    async def fail() -> None:
        await asyncio.sleep(0.01)
        raise KeyError("first")

    async def scenario() -> None:
        assert await gather_or_cancel([value(1, 0.02), value(2, 0.0)]) == [1, 2]
        with pytest.raises(KeyError, match="first"):
            await gather_or_cancel([slow_to_stop(), fail()])
        assert cleaned == ["done"]

    asyncio.run(scenario())
