"""Environments: what the policy talks to during a rollout. They exchange messages, never tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from llmrl.types import Message, Task


@dataclass(kw_only=True, slots=True)
class Reply:
    """An environment's answer to an assistant message."""

    messages: list[Message] = field(default_factory=list)
    """What the policy sees next (tool results, user messages); empty when done."""
    done: bool
    rewards: dict[str, float] = field(default_factory=dict)
    """Reward parts that the environment itself gives, logged as `env/NAME` with weight 1."""


class Env(Protocol):
    """One instance serves one rollout: `start`, then `step` until done, then `close`, also after an error."""

    async def start(self) -> list[Message]:
        """Return the first messages that the policy sees."""
        ...

    async def step(self, message: Message) -> Reply:
        """Answer the policy's message."""
        ...

    async def close(self) -> None:
        """Release the resources of the rollout."""
        ...


EnvFactory = Callable[[Task], Env]


class SingleTurnEnv:
    """An environment of one question and one answer."""

    def __init__(self, task: Task) -> None:
        self.task = task

    async def start(self) -> list[Message]:
        return self.task.messages

    async def step(self, message: Message) -> Reply:
        return Reply(done=True)

    async def close(self) -> None:
        pass
