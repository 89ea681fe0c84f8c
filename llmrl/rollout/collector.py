"""Stages 2 and 3: tasks -> scored groups of rollouts. Finished rollouts are scored while others still generate."""

from __future__ import annotations

import asyncio
import hashlib
import time
import traceback
from collections.abc import Coroutine, Iterable
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar

from llmrl.errors import LlmrlError, RunFailed
from llmrl.rollout.env import Env, EnvFactory, SingleTurnEnv
from llmrl.rollout.options import RolloutConfig
from llmrl.rollout.source import Source
from llmrl.rollout.staleness import staleness_metrics
from llmrl.track.metrics import rollout_metrics, source_metrics
from llmrl.types import Completion, Rollout, RolloutGroup, Sampling, Status, Task, Turn
from llmrl.verify.budget import check_scores
from llmrl.verify.failure import describe
from llmrl.verify.options import VerifyConfig

if TYPE_CHECKING:
    from llmrl.data.chat import Chat
    from llmrl.engines.base import Engine
    from llmrl.rollout.options import SamplingConfig
    from llmrl.rollout.source import Push
    from llmrl.train.learner import Learner
    from llmrl.types import Receipt
    from llmrl.verify.rubric import Rubric

T = TypeVar("T")


class Collector(Source):
    """The live source: an engine samples, environments answer, a rubric scores. All rollouts of a step run at once.

    A failure inside one rollout (of its environment or its verifier) becomes a status or an error of that rollout. A
    failure of the engine or of the arguments ends the step, because it would happen to every rollout.

    Args:
        engine: samples completions.
        chat: renders prompts.
        rubric: scores rollouts.
        options: how completions are drawn, and in training how stale they may be.
        seed: seed of the run.
        verify: how many rollouts may go without a score.
        push: makes the engine serve the learner's weights.
        env_factory: makes the environment of a task.
    """

    def __init__(
        self,
        engine: Engine,
        chat: Chat,
        rubric: Rubric,
        options: SamplingConfig,
        *,
        seed: int,
        verify: VerifyConfig | None = None,
        push: Push | None = None,
        env_factory: EnvFactory = SingleTurnEnv,
    ) -> None:
        self.engine, self.chat, self.rubric, self.options = engine, chat, rubric, options
        self.seed, self.verify, self.push = seed, verify or VerifyConfig(), push
        self.env_factory = env_factory
        self.accuracy = rubric.accuracy_name or ""
        self.max_staleness = options.max_staleness if isinstance(options, RolloutConfig) else 0

    async def open(self, learner: Learner) -> list[str]:
        """Start the processes of the verifiers."""
        await self.rubric.warm()
        return []

    def begin_step(self, step: int, *, max_steps: int, epoch: float) -> None:
        """Pass the position in the run to TRL reward functions."""
        state = self.rubric.trainer_state
        state.global_step, state.max_steps, state.epoch = step, max_steps, epoch

    def check(self, groups: list[RolloutGroup], *, what: str = "rollouts of this step") -> None:
        """Raise RunFailed if too many rollouts have no score."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        check_scores(rollouts, self.verify, what=what)

    def take_reported(self) -> dict[str, float]:
        """Return the means of what rewards reported."""
        reported, self.rubric.metrics = self.rubric.metrics, {}
        return {name: fmean(values) for name, values in reported.items()}

    def metrics(self, groups: list[RolloutGroup], version: int) -> dict[str, float]:
        """Return rewards, pass rates, lengths, and the age of the rollouts."""
        found = rollout_metrics(groups, accuracy=self.accuracy)
        found |= source_metrics(groups)
        return found | self.rubric.take_metrics() | staleness_metrics(groups, version)

    def commit(self, groups: list[RolloutGroup]) -> list[dict[str, Any]]:
        """Let rewards with a state learn from the groups of a step."""
        return self.rubric.commit(groups)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the rewards."""
        return self.rubric.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self.rubric.load_state_dict(state)

    async def rest(self) -> None:
        """Lend the engine's device memory to the learner."""
        await self.engine.sleep()

    async def serve(self, version: int) -> Receipt | None:
        """Push the weights and return the engine's proof."""
        return None if self.push is None else await self.push(version)

    async def close(self) -> None:
        """End the engine and the processes of the verifiers."""
        await self.engine.close()
        await self.rubric.close()

    async def collect(
        self,
        tasks: list[Task],
        positions: list[int],
        *,
        num_generations: int | None = None,
        temperature: float | None = None,
        salt: str = "train",
    ) -> list[RolloutGroup]:
        """Sample and score G rollouts of each task; see `Source.collect`."""
        num_generations = num_generations or self.options.num_generations
        temperature = self.options.temperature if temperature is None else temperature

        async def collect_group(task: Task, position: int) -> RolloutGroup:
            prompt_ids = self.chat.render_task(task)
            runs = [
                self._run(task, index, prompt_ids, request_seed(self.seed, salt, position, index), temperature)
                for index in range(num_generations)
            ]
            group = RolloutGroup(task=task, rollouts=await gather_or_cancel(runs), position=position)
            await self.rubric.score_group(group)
            return group

        return await gather_or_cancel([collect_group(t, p) for t, p in zip(tasks, positions, strict=True)])

    async def _run(self, task: Task, index: int, prompt_ids: list[int], seed: int, temperature: float) -> Rollout:
        """Return one scored rollout. `prompt_ids` are the task's messages, rendered once for the whole group."""
        rollout = Rollout(task=task, index=index)
        try:
            env = self.env_factory(task)
            try:
                await self._play(rollout, env, prompt_ids, seed, temperature)
            finally:
                await env.close()
        except LlmrlError:
            raise
        except Exception as error:
            rollout.status, rollout.error = Status.ERROR_ENV, describe(error)
        if not rollout.status.is_error:
            await self.rubric.score(rollout)
        return rollout

    async def _play(self, rollout: Rollout, env: Env, prompt_ids: list[int], seed: int, temperature: float) -> None:
        messages = await env.start()
        if messages is not rollout.task.messages:
            prompt_ids = self.chat.render(messages, rollout.task.tools, **rollout.task.template_options)
        start = time.perf_counter()
        sampling = Sampling(
            max_tokens=self.options.max_completion_length,
            temperature=temperature,
            top_p=self.options.top_p,
            top_k=self.options.top_k,
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
            prefilled=self.chat.prefilled(messages, **rollout.task.template_options),
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
        """Return one completion; turn whatever the engine raises into the end of the step."""
        try:
            return await self.engine.generate(prompt_ids, sampling, session=session)
        except LlmrlError:
            raise
        except Exception as error:
            raise RunFailed(f"the engine failed:\n{traceback.format_exc()}") from error


def request_seed(run_seed: int, salt: str, position: int, index: int) -> int:
    """Return the seed of one rollout, a hash of (run, use, task position, index): the same on every machine."""
    digest = hashlib.blake2b(f"{run_seed}/{salt}/{position}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


async def gather_or_cancel(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run coroutines concurrently like asyncio.gather. Before a failure is raised, cancel the rest and wait for it."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
