"""Stored programs as groups of rollouts. An engine starts only if there are held-out tasks to sample for.

Rows have `samples`, as `llmrl eval --save_samples` writes them, and a column with a right program.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llmrl.data.checks import RowCheck
from llmrl.errors import UserError
from llmrl.methods.bcoder.bellman import MAX_REWARD
from llmrl.rollout.collector import Collector, request_seed
from llmrl.rollout.source import Source, StartEngine
from llmrl.rollout.tasks import TaskFeed, TaskSet
from llmrl.types import Rollout, RolloutGroup, Score, Status, Task, Turn

if TYPE_CHECKING:
    from llmrl.data.chat import Chat
    from llmrl.methods.bcoder.options import BCoderOptions
    from llmrl.train.learner import Learner
    from llmrl.types import Receipt


class ProgramFeed(TaskFeed):
    """Tasks with stored programs.

    Args:
        parts, names: as for `TaskFeed`.
        options: B-Coder's options.

    Raises:
        UserError: a row has no samples, or unusable ones.
    """

    def __init__(self, *parts: Any, options: BCoderOptions, **names: Any) -> None:
        super().__init__(*parts, **names)
        self.options = options

    def columns(self, tasks: TaskSet) -> RowCheck:
        """Return what looks at the columns of a row: of held-out tasks the rewards alone, whose programs are new."""
        return super().columns(tasks) if tasks is self.held_out else check_row

    def source(self, start_engine: StartEngine) -> Source:
        """Return the stored programs; if there are held-out tasks, start the engine that samples for them."""
        live = self.collector(start_engine) if self.eval_tasks else None
        return StoredPrograms(
            self.chat, self.options, num_generations=self.rollout.num_generations, seed=self.seed, live=live
        )


class StoredPrograms(Source):
    """Draw each task's programs from its row; a share `real_frac` of the group is the row's right program.

    Args:
        chat: renders prompts and encodes programs.
        options: B-Coder's options.
        num_generations: programs of each task.
        seed: seed of the run.
        live: samples for held-out tasks; None if there are none.
    """

    def __init__(
        self, chat: Chat, options: BCoderOptions, *, num_generations: int, seed: int, live: Collector | None = None
    ) -> None:
        self.chat, self.options, self.num_generations, self.seed = chat, options, num_generations, seed
        self.live = live
        self.accuracy = live.accuracy if live is not None else ""
        self.version, self.served = 0, -1

    async def collect(
        self, tasks: list[Task], positions: list[int], *, salt: str = "train", **options: Any
    ) -> list[RolloutGroup]:
        """Return G programs of each task: right ones, then samples, without replacement while there are enough.

        For uses other than training, the policy samples with its current weights.
        """
        if salt == "train":
            return [self.group(task, position) for task, position in zip(tasks, positions, strict=True)]
        if self.live is None:
            raise UserError("nothing can be sampled: this run has no held-out tasks, hence no engine; set eval.data")
        if self.served != self.version:  # training samples nothing, so weights are pushed only when they are needed
            await self.live.serve(self.version)
            self.served = self.version
        return await self.live.collect(tasks, positions, salt=salt, **options)

    async def open(self, learner: Learner) -> list[str]:
        """Start the verifiers, if there are held-out tasks to score."""
        return await self.live.open(learner) if self.live is not None else []

    async def rest(self) -> None:
        """Lend the device memory of the engine, if there is one, to the learner."""
        if self.live is not None:
            await self.live.rest()

    async def serve(self, version: int) -> Receipt | None:
        """Note the version; `collect` pushes it before it samples."""
        self.version = version
        return None

    async def close(self) -> None:
        """End the engine, if there is one."""
        if self.live is not None:
            await self.live.close()

    def group(self, task: Task, position: int) -> RolloutGroup:
        """Return the programs of `task` at `position` of the run."""
        size = self.num_generations
        num_real = round(self.options.real_frac * size)
        random = np.random.Generator(np.random.Philox(key=request_seed(self.seed, "stored", position, 0)))
        samples, num_drawn = _samples(task), size - num_real
        if num_drawn and not samples:
            raise UserError(f"task {task.id}: `samples` is empty; leave the row out, or set algo.real_frac 1")
        chosen: list[int] = []
        while len(chosen) < num_drawn:
            chosen += random.permutation(len(samples)).tolist()
        prompt_ids = self.chat.render_task(task)
        rollouts = [self._real(task, index, prompt_ids) for index in range(num_real)]
        rollouts += [self._sampled(task, num_real + i, prompt_ids, k) for i, k in enumerate(chosen[:num_drawn])]
        return RolloutGroup(task=task, rollouts=rollouts, position=position)

    def _real(self, task: Task, index: int, prompt_ids: list[int]) -> Rollout:
        column = self.options.solution_column
        solution = task.meta.get(column)
        if not isinstance(solution, str) or not solution:
            raise UserError(
                f"task {task.id}: no right program in column {column!r} (algo.solution_column); its columns are "
                f"{', '.join(task.meta)}. Without any, set algo.real_frac 0"
            )
        completion_ids = [*self.chat.encode(solution), self.chat.stop_token_ids[0]]
        score = Score(reward=MAX_REWARD, parts={"stored": 1.0}, info={"real": True})
        return self._rollout(task, index, prompt_ids, completion_ids, score, finish="stop")

    def _sampled(self, task: Task, index: int, prompt_ids: list[int], which: int) -> Rollout:
        sample = _samples(task)[which]
        reward = float(sample["reward"])
        score = Score(reward=reward, parts={"stored": reward}, info={"real": False})
        ids, finish = sample.get("completion_ids"), sample.get("finish", "stop")
        if not ids:
            ids = [*self.chat.encode(sample["completion"]), self.chat.stop_token_ids[0]]
        return self._rollout(task, index, prompt_ids, list(ids), score, finish=finish)

    def _rollout(self, task: Task, index: int, prompt_ids: list[int], ids: list[int], score: Score, finish) -> Rollout:
        turn = Turn(
            prompt_ids=prompt_ids,
            completion_ids=ids,
            rollout_logprobs=[0.0] * len(ids),
            finish=finish,
            policy_version=(0, 0),
            message=self.chat.parse(ids),
        )
        status = Status.TRUNCATED_LENGTH if finish == "length" else Status.COMPLETED
        return Rollout(task=task, index=index, turns=[turn], status=status, score=score)


def _samples(task: Task) -> list[dict[str, Any]]:
    """Return the scored samples of a task."""
    return [sample for sample in task.meta["samples"] if sample.get("reward") is not None]


def check_row(task: Task) -> list[str]:
    """Return what is wrong with the samples of a row: none at all, or one without text or with an unusable reward."""
    samples = task.meta.get("samples")
    if not isinstance(samples, list):
        return [
            "no column `samples`; algo.name bcoder trains on stored programs: make them with `llmrl eval "
            "--save_samples FILE.jsonl`, and give that file as data.path"
        ]
    for sample in samples:
        if not isinstance(sample, dict) or "completion" not in sample or "reward" not in sample:
            return ["each of its samples needs `completion` and `reward`"]
        if sample["reward"] is not None and sample["reward"] > MAX_REWARD:
            return [
                f"a sample has reward {sample['reward']}, above B-Coder's largest value {MAX_REWARD}: score with "
                "rewards/unit_tests.py:unit_tests and its argument `outcome: bcoder`"
            ]
    return []
