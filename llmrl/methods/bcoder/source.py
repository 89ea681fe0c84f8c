"""Programs that were sampled and scored before -> groups of rollouts, without an engine.

Rows carry `samples` (as `llmrl eval --save_samples` writes them) and a column with a right program. Evaluation still
samples from the policy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llmrl.errors import UserError
from llmrl.methods.bcoder.bellman import MAX_REWARD
from llmrl.rollout.collector import Collector, request_seed
from llmrl.types import Rollout, RolloutGroup, Score, Status, Task, Turn

if TYPE_CHECKING:
    from llmrl.config.bcoder import BCoderConfig


class StoredCollector(Collector):
    """Draws each task's programs from its row: a share `real_frac` of the group is its right program."""

    def __init__(self, *parts: Any, bcoder: BCoderConfig, **options: Any) -> None:
        super().__init__(*parts, **options)
        self.bcoder = bcoder

    async def collect(self, tasks: list[Task], positions: list[int], *, salt: str = "train", **options: Any):
        """G programs of each task: right ones first, then samples, drawn without replacement while there are enough."""
        if salt != "train":
            return await super().collect(tasks, positions, salt=salt, **options)
        return [self.group(task, position) for task, position in zip(tasks, positions, strict=True)]

    def group(self, task: Task, position: int) -> RolloutGroup:
        """The programs that `task` contributes at `position` of the run."""
        size = self.config.num_generations
        num_real = round(self.bcoder.real_frac * size)
        random = np.random.Generator(np.random.Philox(key=request_seed(self.seed, "stored", position, 0)))
        samples, num_drawn = _samples(task), size - num_real
        if num_drawn and not samples:
            raise UserError(f"task {task.id}: `samples` is empty; leave the row out, or set bcoder.real_frac 1")
        chosen: list[int] = []
        while len(chosen) < num_drawn:
            chosen += random.permutation(len(samples)).tolist()
        prompt_ids = self.chat.render(task.messages)
        rollouts = [self._real(task, index, prompt_ids) for index in range(num_real)]
        rollouts += [self._sampled(task, num_real + i, prompt_ids, k) for i, k in enumerate(chosen[:num_drawn])]
        return RolloutGroup(task=task, rollouts=rollouts)

    def _real(self, task: Task, index: int, prompt_ids: list[int]) -> Rollout:
        column = self.bcoder.solution_column
        solution = task.meta.get(column)
        if not isinstance(solution, str) or not solution:
            raise UserError(
                f"task {task.id}: no right program in column {column!r} (bcoder.solution_column); its columns are "
                f"{', '.join(task.meta)}. Without any, set bcoder.real_frac 0"
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
    """The scored samples of a task."""
    return [sample for sample in task.meta["samples"] if sample.get("reward") is not None]


def check_rows(tasks: list[Task], config: BCoderConfig) -> None:
    """Look at the rows before a model is loaded.

    Raises:
        UserError: rows without samples, samples without text or reward, or with one above R_max.
    """
    for task in tasks:
        samples = task.meta.get("samples")
        if not isinstance(samples, list):
            raise UserError(
                f"task {task.id}: no column `samples`; algo.name bcoder trains on stored programs: make them with "
                "`llmrl eval --save_samples FILE.jsonl`, and give that file as data.path"
            )
        for sample in samples:
            if not isinstance(sample, dict) or "completion" not in sample or "reward" not in sample:
                raise UserError(f"task {task.id}: each of its samples needs `completion` and `reward`")
            if sample["reward"] is not None and sample["reward"] > MAX_REWARD:
                raise UserError(
                    f"task {task.id}: a sample has reward {sample['reward']}, above B-Coder's largest value "
                    f"{MAX_REWARD}: score with rewards/unit_tests.py:unit_tests and its argument `outcome: bcoder`"
                )
