"""The feed of runs that sample: tasks, and the rubric that scores their rollouts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from llmrl.data.chat import Chat, filter_long
from llmrl.data.sampler import TaskSampler
from llmrl.rollout.collector import Collector
from llmrl.rollout.source import Feed, Source, StartEngine

if TYPE_CHECKING:
    from llmrl.data.options import DataConfig
    from llmrl.rollout.options import SamplingConfig
    from llmrl.types import Task
    from llmrl.verify.options import VerifyConfig
    from llmrl.verify.rubric import Rubric


class TaskFeed(Feed):
    """Tasks for an engine.

    Args:
        tasks: the tasks to sample for.
        eval_tasks: held-out tasks.
        rubric: scores rollouts.
        data: how prompts are rendered and ordered.
        rollout: how completions are drawn.
        verify: how many rollouts may go without a score.
        seed: seed of the run.

    Raises:
        UserError: a reward wants an argument that the tasks cannot fill.
    """

    def __init__(
        self,
        tasks: list[Task],
        eval_tasks: list[Task],
        rubric: Rubric,
        *,
        data: DataConfig,
        rollout: SamplingConfig,
        verify: VerifyConfig,
        seed: int,
    ) -> None:
        self.tasks, self.eval_tasks, self.rubric = tasks, eval_tasks, rubric
        self.data, self.rollout, self.verify, self.seed = data, rollout, verify, seed
        self.rewards = {name: part.weight for name, part in rubric.parts.items()}
        rubric.check(tasks[0])

    def encode(self, tokenizer: Any, generation: Any) -> list[str]:
        """Make the renderer of prompts, and leave out tasks whose prompts are too long."""
        self.chat = Chat(
            tokenizer,
            prompt_format=self.data.prompt_format,
            chat_template=self.data.chat_template,
            generation_config=generation,
        )
        self.chat.render(self.tasks[0].messages)  # a template that fails must fail here, not in the first step
        notes = [f"{len(self.tasks)} tasks from {self.data.path}"]
        self.tasks, dropped = filter_long(self.tasks, self.chat, self.data.max_prompt_length)
        if self.data.max_prompt_length is not None:
            notes.append(f"{dropped} tasks left out: prompt longer than data.max_prompt_length tokens")
        return notes

    def known_ids(self) -> Iterable[list[int]]:
        """Yield the token ids of every prompt."""
        return (self.chat.render(task.messages) for task in (*self.tasks, *self.eval_tasks))

    def sampler(self, num_prompts: int) -> TaskSampler:
        """Return the order of the tasks: a new one each epoch, unless `data.shuffle` is false."""
        sampler = TaskSampler(self.tasks, seed=self.seed, shuffle=self.data.shuffle)
        sampler.check(num_prompts)
        return sampler

    def source(self, start_engine: StartEngine) -> Source:
        """Return the live source."""
        return self.collector(start_engine)

    def collector(self, start_engine: StartEngine) -> Collector:
        """Start the engine and return its collector."""
        engine, push = start_engine()
        return Collector(engine, self.chat, self.rubric, self.rollout, seed=self.seed, verify=self.verify, push=push)
