"""Groups as a preference dataset gives them, for the tests of the DPO family."""

from __future__ import annotations

from llmrl.types import Message, Rollout, RolloutGroup, Score, Task, Turn


def dataset_group(
    name: str, prompt_ids: list[int], completions: list[list[int]], rewards: list[float | None]
) -> RolloutGroup:
    """A group whose rollouts have these tokens and rewards."""
    task = Task(id=name, messages=[Message(role="user", content=name)])
    rollouts = []
    for index, (ids, reward) in enumerate(zip(completions, rewards, strict=True)):
        turn = Turn(
            prompt_ids=list(prompt_ids),
            completion_ids=list(ids),
            rollout_logprobs=[0.0] * len(ids),
            finish="stop",
            policy_version=(0, 0),
            message=Message(role="assistant", content=str(ids)),
        )
        rollouts.append(Rollout(task=task, index=index, turns=[turn], score=Score(reward=reward)))
    return RolloutGroup(task=task, rollouts=rollouts)
