"""No reward can hold a run: every kind of call ends at its time limit, and sys.exit in one is that sample's error."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmrl.errors import UserError
from llmrl.types import Rollout
from llmrl.verify import limits
from llmrl.verify.reward import group_reward
from llmrl.verify.rubric import LIMIT_S, POOL_LIMIT_S, Part, Rubric
from tests.verify.rollouts import group, rollout, score_together

LONG_S = 600
"""Far longer than the tests wait: a call that is not ended would make them hang."""


def loop(completion: str) -> float:
    while completion == "hang":
        pass
    return 1.0


def sleep(completion: str) -> float:
    time.sleep(LONG_S if completion == "hang" else 0)
    return 1.0


def backtrack(completion: str) -> float:
    return 1.0 if completion != "hang" else float(bool(re.match(r"(a+)+$", "a" * 60 + "b")))


def catches_errors(completion: str) -> float:
    while completion == "hang":
        with contextlib.suppress(Exception):
            time.sleep(LONG_S)
    return 1.0


async def waits(completion: str) -> float:
    if completion == "hang":
        await asyncio.Event().wait()
    return 1.0


async def blocks_the_event_loop(completion: str) -> float:
    await asyncio.sleep(0)
    return sleep(completion)


async def ignores_cancellation(completion: str) -> float:
    while completion == "hang":
        # Not everything: when it is collected where no loop runs, `sleep` raises at once, and it would spin for ever.
        with contextlib.suppress(asyncio.CancelledError, GeneratorExit):
            await asyncio.sleep(LONG_S)
    return 1.0


async def hangs_below(completion: str) -> float:
    return (await asyncio.gather(waits(completion), waits("fine")))[0]


ONE_BY_ONE = [loop, sleep, backtrack, catches_errors, waits, blocks_the_event_loop, ignores_cancellation, hangs_below]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the one that refuses to end
@pytest.mark.parametrize("function", ONE_BY_ONE)
def test_a_call_that_hangs_is_its_samples_error(
    function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(limits, "GRACE_S", 0.0)
    rollouts = [rollout(text, i) for i, text in enumerate(("fine", "hang", "fine"))]
    with caplog.at_level(logging.WARNING):
        score_together([Part(fn=function, time_limit_s=0.3)], rollouts)
    scores = [r.score for r in rollouts if r.score is not None]
    assert [score.reward for score in scores] == [1.0, None, 1.0]
    wanted = f"reward {function.__name__}: timed out after 0.3 s (time_limit_s)"
    assert (scores[1].error or "").startswith(wanted)
    assert wanted in caplog.text


def test_the_error_says_where_it_was_waiting() -> None:
    sample = rollout("hang")
    score_together([Part(fn=sleep, time_limit_s=0.2)], [sample])
    assert sample.score is not None and "time.sleep(LONG_S" in (sample.score.error or "")


@group_reward
def group_sleeps(rollouts: list[Rollout]) -> list[float]:
    time.sleep(LONG_S)
    return [1.0] * len(rollouts)


@group_reward
async def group_waits(rollouts: list[Rollout]) -> list[float]:
    await asyncio.Event().wait()
    return [1.0] * len(rollouts)


def trl_sleeps(completions: list[Any], **columns: Any) -> list[float]:
    time.sleep(LONG_S)
    return [1.0] * len(completions)


async def trl_waits(completions: list[Any], **columns: Any) -> list[float]:
    await asyncio.Event().wait()
    return [1.0] * len(completions)


@pytest.mark.parametrize("function", [group_sleeps, group_waits, trl_sleeps, trl_waits])
def test_a_group_call_that_hangs_is_the_error_of_the_group(function: Callable[..., Any]) -> None:
    rollouts = [rollout("a", 0), rollout("b", 1)]
    score_together([Part(fn=function, time_limit_s=0.2)], rollouts)
    for one in rollouts:
        assert one.score is not None and one.score.reward is None
        assert f"reward {function.__name__}: timed out after 0.2 s" in (one.score.error or "")


@pytest.mark.parametrize("function", [sleep, waits])
def test_the_limit_holds_where_the_event_loop_runs_in_another_thread(function: Callable[..., Any]) -> None:
    rollouts = [rollout(text, i) for i, text in enumerate(("fine", "hang", "fine"))]
    thread = threading.Thread(target=score_together, args=([Part(fn=function, time_limit_s=0.2)], rollouts))
    thread.start()
    thread.join(LONG_S)
    assert [r.score.reward for r in rollouts if r.score] == [1.0, None, 1.0]


def test_calls_in_another_thread_take_turns() -> None:
    open_now, most = [0], [0]

    def careful(completion: str) -> float:
        open_now[0] += 1
        most[0] = max(most[0], open_now[0])
        time.sleep(0.01)
        open_now[0] -= 1
        return 1.0

    rollouts = [rollout("a", i) for i in range(8)]
    thread = threading.Thread(target=score_together, args=([Part(fn=careful)], rollouts))
    thread.start()
    thread.join()
    assert [r.score.reward for r in rollouts if r.score] == [1.0] * 8 and most == [1]


class Panic(BaseException):
    """What extensions written in Rust raise when they panic is no Exception either."""


def exits(completion: str) -> float:
    if completion == "exit":
        raise SystemExit(3)
    if completion == "panic":
        raise Panic("index out of bounds")
    return 1.0


async def exits_later(completion: str) -> float:
    await asyncio.sleep(0)
    return exits(completion)


async def cancels_itself(completion: str) -> float:
    if completion != "fine":
        raise asyncio.CancelledError
    return 1.0


@pytest.mark.parametrize("function", [exits, exits_later])
def test_what_is_no_exception_is_the_samples_error_too(function: Callable[..., Any]) -> None:
    rollouts = [rollout(text, i) for i, text in enumerate(("fine", "exit", "panic"))]
    score_together([Part(fn=function)], rollouts)
    assert [r.score.reward for r in rollouts if r.score] == [1.0, None, None]
    errors = [r.score.error or "" for r in rollouts if r.score]
    assert errors[1].startswith(f"reward {function.__name__}: it ended with sys.exit(3)")
    assert errors[2].startswith("Panic: index out of bounds")


def test_a_reward_that_cancels_itself_is_an_error_and_does_not_end_the_run() -> None:
    rollouts = [rollout("fine", 0), rollout("stop", 1)]
    score_together([Part(fn=cancels_itself)], rollouts)
    assert rollouts[0].score is not None and rollouts[0].score.reward == 1.0
    assert rollouts[1].score is not None and "CancelledError" in (rollouts[1].score.error or "")


def test_an_interruption_by_the_user_ends_scoring() -> None:
    def interrupted(completion: str) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_together([Part(fn=interrupted)], [rollout()])


def test_cancelling_the_scoring_cancels_the_reward() -> None:
    ended = []

    async def patient(completion: str) -> float:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)
        return 1.0

    async def main() -> None:
        rubric = Rubric([Part(fn=patient)])
        task = asyncio.create_task(rubric.score_group(group(rollout())))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert ended == [True]


def test_a_reward_says_how_long_it_needs(tmp_path: Path) -> None:
    file = tmp_path / "slow.py"
    file.write_text(
        "POOL = True\ndef seconds_needed(total=30, **_): return total + 5\ndef slow(completion, total=30): return 1\n"
    )
    spec = f"{file}:slow"
    rubric = Rubric([Part(fn=spec), Part(fn=spec, args={"total": 95.0}), Part(fn=spec, time_limit_s=35.0)])
    assert [rubric.time_limit(reward) for reward in rubric.rewards.values()] == [700.0, 2000.0, 35.0]
    with pytest.raises(UserError, match=r"time_limit_s 34 is less than the 35 seconds .* raise time_limit_s"):
        Rubric([Part(fn=spec, time_limit_s=34.0)])


def test_the_default_limit_is_short_in_the_pool_and_patient_elsewhere() -> None:
    rubric = Rubric([Part(fn=waits), Part(fn="math_answer"), Part(fn=loop, time_limit_s=7.0)])
    assert [rubric.time_limit(reward) for reward in rubric.rewards.values()] == [LIMIT_S, POOL_LIMIT_S, 7.0]
