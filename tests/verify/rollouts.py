"""Rollouts and groups for the tests of rewards."""

from __future__ import annotations

from typing import Any

from llmrl.types import Rollout, RolloutGroup, Task, Turn


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


def group(*rollouts: Rollout) -> RolloutGroup:
    return RolloutGroup(task=rollouts[0].task, rollouts=list(rollouts))
