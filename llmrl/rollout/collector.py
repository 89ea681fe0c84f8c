"""Stages 2 and 3 together: tasks -> scored groups of rollouts.

Finished rollouts are scored while others still generate.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
import traceback
from typing import TYPE_CHECKING

from llmrl.errors import LlmrlError, RunFailed
from llmrl.rollout.env import Env, EnvFactory, SingleTurnEnv
from llmrl.types import Completion, Rollout, RolloutGroup, Sampling, Status, Task, Turn

if TYPE_CHECKING:
    from llmrl.config import RolloutConfig
    from llmrl.data.chat import Chat
    from llmrl.engines.base import Engine
    from llmrl.verify.rubric import Rubric


class Collector:
    """Drives all rollouts of a step at once.

    What goes wrong inside one rollout (its environment, its verifier) is a status or an error on that rollout. What
    goes wrong with the engine or the arguments ends the step, since it would happen to every rollout.
    """

    def __init__(
        self,
        engine: Engine,
        chat: Chat,
        rubric: Rubric,
        config: RolloutConfig,
        *,
        seed: int,
        env_factory: EnvFactory = SingleTurnEnv,
    ) -> None:
        self.engine, self.chat, self.rubric, self.config = engine, chat, rubric, config
        self.seed, self.env_factory = seed, env_factory

    async def collect(
        self,
        tasks: list[Task],
        positions: list[int],
        *,
        num_generations: int | None = None,
        temperature: float | None = None,
        salt: str = "train",
    ) -> list[RolloutGroup]:
        """G scored rollouts of each task, in the order of `tasks`.

        Args:
            tasks: the work of this process.
            positions: each task's place in the run's sequence; with the run's seed it fixes the random numbers of its
                rollouts, whatever process runs them and whatever else is in the batch.
            num_generations: G, if not the configured one.
            temperature: if not the configured one; 0 is greedy.
            salt: keeps the random numbers of different uses (training, evaluation) apart.
        """
        num_generations = num_generations or self.config.num_generations
        temperature = self.config.temperature if temperature is None else temperature

        async def collect_group(task: Task, position: int) -> RolloutGroup:
            prompt_ids = self.chat.render(task.messages)
            runs = [
                self._run(task, index, prompt_ids, request_seed(self.seed, salt, position, index), temperature)
                for index in range(num_generations)
            ]
            group = RolloutGroup(task=task, rollouts=list(await gather_or_cancel(runs)), position=position)
            await self.rubric.score_group(group)
            return group

        return list(await gather_or_cancel([collect_group(t, p) for t, p in zip(tasks, positions, strict=True)]))

    async def _run(self, task: Task, index: int, prompt_ids: list[int], seed: int, temperature: float) -> Rollout:
        """One rollout, scored; `prompt_ids` are the task's own messages, rendered once for the group."""
        rollout = Rollout(task=task, index=index)
        try:
            env = self.env_factory(task)
            try:
                await self._play(rollout, env, prompt_ids, seed, temperature)
            finally:
                await env.close()
        except LlmrlError:
            raise
        except Exception:
            rollout.status, rollout.error = Status.ERROR_ENV, traceback.format_exc()
        if not rollout.status.is_error:
            await self.rubric.score(rollout)
        return rollout

    async def _play(self, rollout: Rollout, env: Env, prompt_ids: list[int], seed: int, temperature: float) -> None:
        messages = await env.start()
        if messages is not rollout.task.messages:
            prompt_ids = self.chat.render(messages)
        start = time.perf_counter()
        sampling = Sampling(
            max_tokens=self.config.max_completion_length,
            temperature=temperature,
            top_p=self.config.top_p,
            top_k=self.config.top_k,
            stop_token_ids=self.chat.stop_token_ids,
            seed=seed,
        )
        completion = await self._generate(prompt_ids, sampling, f"{rollout.task.id}/{rollout.index}")
        if completion.finish == "abort":
            rollout.status, rollout.error = Status.ERROR_ENGINE, "the engine gave up on this completion"
            return
        turn = Turn(
            prompt_ids=prompt_ids,
            completion_ids=completion.token_ids,
            rollout_logprobs=completion.logprobs,
            finish=completion.finish,
            policy_version=completion.policy_version,
            version_spans=completion.version_spans,
            message=self.chat.parse(completion.token_ids),
            seconds={"generate": time.perf_counter() - start},
        )
        rollout.turns.append(turn)
        if completion.finish == "length":
            rollout.status = Status.TRUNCATED_LENGTH
        reply = await env.step(turn.message)
        turn.replies = reply.messages
        rollout.env_rewards |= reply.rewards
        if not reply.done:
            raise RuntimeError(f"{type(env).__name__} asks for another turn; this collector plays single turns")

    async def _generate(self, prompt_ids: list[int], sampling: Sampling, session: str) -> Completion:
        """One completion; whatever the engine raises ends the step."""
        try:
            return await self.engine.generate(prompt_ids, sampling, session=session)
        except LlmrlError:
            raise
        except Exception as error:
            raise RunFailed(f"the engine failed:\n{traceback.format_exc()}") from error


def request_seed(run_seed: int, salt: str, position: int, index: int) -> int:
    """Seed of one rollout: the same on every machine, different for every (run, use, task position, index)."""
    digest = hashlib.blake2b(f"{run_seed}/{salt}/{position}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


async def gather_or_cancel(coroutines):
    """Like asyncio.gather, but the first failure cancels the rest and waits for them before it is raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
