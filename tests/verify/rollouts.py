"""Rollouts and groups for the tests of rewards."""

from __future__ import annotations

import asyncio
from typing import Any

from llmrl.types import Rollout, RolloutGroup, Task, Turn
from llmrl.verify.rubric import Part, Rubric


def rollout(completion: str = "text", index: int = 0, *, num_tokens: int = 3, **meta: Any) -> Rollout:
    turn = Turn(
        prompt_ids=[1, 2],
        completion_ids=list(range(num_tokens)),
        rollout_logprobs=[0.0] * num_tokens,
        finish="stop",
        policy_version=(0, 0),
        message={"role": "assistant", "content": completion},
    )
    task = Task(id="t", messages=[{"role": "user", "content": "q"}], answer=meta.get("answer"), meta=meta)
    return Rollout(task=task, index=index, turns=[turn])


def score_together(parts: list[Part], rollouts: list[Rollout]) -> None:
    """Score rollouts as one group with a rubric of these parts."""
    rubric = Rubric(parts)

    async def main() -> None:
        try:
            await rubric.score_group(group(*rollouts))
        finally:
            await rubric.close()

    asyncio.run(main())


def group(*rollouts: Rollout) -> RolloutGroup:
    return RolloutGroup(task=rollouts[0].task, rollouts=list(rollouts))
