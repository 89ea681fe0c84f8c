"""The feed of runs that sample: tasks, and the rubric that scores their rollouts."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrl.data.chat import Chat
from llmrl.data.checks import Checks, RowCheck
from llmrl.data.mixture import make_sampler
from llmrl.data.prompts import Prompt, PromptCheck, beyond_embedding
from llmrl.data.report import Finding, RowReport
from llmrl.errors import UserError
from llmrl.rollout.collector import Collector
from llmrl.rollout.source import Feed, Source, StartEngine

if TYPE_CHECKING:
    from llmrl.data.options import DataConfig, TaskRows
    from llmrl.data.sampler import Sampler
    from llmrl.rollout.options import SamplingConfig
    from llmrl.types import ModelLimits, Task
    from llmrl.verify.options import VerifyConfig
    from llmrl.verify.rubric import Rubric


class TaskSet:
    """The tasks of one dataset, and what is known about its rows.

    Args:
        tasks: one per row that could be read.
        options: how the rows were read; None if they came as tasks.
        report: which rows could not be read.
    """

    def __init__(self, tasks: list[Task], options: TaskRows | None = None, report: RowReport | None = None) -> None:
        self.tasks, self.options = tasks, options
        self.report = report if report is not None else RowReport(num_rows=len(tasks))
        self.prompts: list[Prompt] = []
        """What is known about the prompt of each task, after `check`."""

    @property
    def longest(self) -> int | None:
        """`max_prompt_length`."""
        return None if self.options is None else self.options.max_prompt_length

    def check(self, checks: Checks) -> list[str]:
        """Check every row, and keep the tasks that can be used. Returns lines to show.

        Raises:
            UserError: rows cannot be used and must not be left out, or all prompts are too long.
        """
        kept = checks.run(self.tasks, self.report)
        notes = self.report.settle(len(kept))
        short = [pair for pair in kept if self.longest is None or pair[1].length <= self.longest]
        if kept and not short:
            raise UserError(
                f"data.max_prompt_length {self.longest} leaves out all {len(kept)} tasks: the shortest prompt has "
                f"{min(prompt.length for _, prompt in kept)} tokens; raise the limit"
            )
        self.tasks, self.prompts = [task for task, _ in short], [prompt for _, prompt in short]
        if num_long := len(kept) - len(short):
            notes.append(f"{num_long} {self.report.what} left out: prompt longer than {self.longest} tokens")
        return notes


class TaskFeed(Feed):
    """Tasks for an engine.

    Args:
        train: the tasks to sample for.
        held_out: the tasks to evaluate on; empty if there is no evaluation.
        rubric: scores rollouts.
        data: how prompts are rendered and ordered.
        rollout: how completions are drawn.
        verify: how many rollouts may go without a score.
        seed: seed of the run.
    """

    def __init__(
        self,
        train: TaskSet,
        held_out: TaskSet,
        rubric: Rubric,
        *,
        data: DataConfig,
        rollout: SamplingConfig,
        verify: VerifyConfig,
        seed: int,
    ) -> None:
        self.train, self.held_out, self.rubric = train, held_out, rubric
        self.data, self.rollout, self.verify, self.seed = data, rollout, verify, seed
        self.rewards = {name: part.weight for name, part in rubric.parts.items()}

    @property
    def tasks(self) -> list[Task]:
        """What the sampler draws from."""
        return self.train.tasks

    @property
    def streams(self) -> bool:
        return self.train.report.streams

    @property
    def longest(self) -> int | None:
        prompts = [*self.train.prompts, *self.held_out.prompts]
        return max(prompt.length for prompt in prompts) + self.rollout.max_completion_length if prompts else None

    @property
    def eval_tasks(self) -> list[Task]:
        """Held-out tasks."""
        return self.held_out.tasks

    def encode(self, tokenizer: Any, generation: Any, limits: ModelLimits) -> list[str]:
        """Make the renderer of prompts, and check every row of both datasets."""
        self.chat = Chat(
            tokenizer,
            prompt_format=self.data.prompt_format,
            chat_template=self.data.chat_template,
            generation_config=generation,
            template_options=self.data.chat_template_kwargs,
        )
        self.rubric.check_sources({task.source for task in (*self.tasks, *self.eval_tasks)})
        notes = [n for tasks in (self.train, self.held_out) for n in tasks.check(self._checks(tasks, limits))]
        return [f"{len(self.tasks)} tasks from {_places(self.data)}", *notes]

    def _checks(self, tasks: TaskSet, limits: ModelLimits) -> Checks:
        prompts = PromptCheck(
            self.chat,
            limits,
            max_completion_length=self.rollout.max_completion_length,
            max_prompt_length=tasks.longest,
        )
        return Checks(prompts=prompts, columns=self.columns(tasks), fingerprint=code_of(self.rubric))

    def columns(self, tasks: TaskSet) -> RowCheck:
        """Return what looks at the columns of the rows of a dataset."""
        return self.rubric.findings

    def check_vocabulary(self, tokenizer: Any, vocab_size: int) -> None:
        """Refuse prompts with tokens that the loaded model has no embedding for."""
        for tasks in (self.train, self.held_out):
            for task, prompt in zip(tasks.tasks, tasks.prompts, strict=True):
                if prompt.largest_id >= vocab_size:
                    reason = beyond_embedding(tokenizer, self.chat.render_task(task), vocab_size)
                    raise UserError(f"{tasks.report.place_of(task.id)}: {reason}")

    def dropped(self) -> list[Finding]:
        """Return the rows that were left out of both datasets."""
        return [*self.train.report.found, *self.held_out.report.found]

    def preview(self) -> str:
        """Return the first prompt as the model sees it."""
        return self.chat.tokenizer.decode(self.chat.render_task(self.tasks[0]))

    def sampler(self, num_prompts: int) -> Sampler:
        """Return the order of the tasks: a new one each epoch, unless `data.shuffle` is false."""
        sampler = make_sampler(
            self.tasks,
            self.data.sources,
            seed=self.seed,
            shuffle=self.data.shuffle,
            streams=self.train.report.streams,
        )
        sampler.check(num_prompts)
        return sampler

    def source(self, start_engine: StartEngine) -> Source:
        """Return the live source."""
        return self.collector(start_engine)

    def collector(self, start_engine: StartEngine) -> Collector:
        """Start the engine and return its collector."""
        engine, push = start_engine()
        return Collector(engine, self.chat, self.rubric, self.rollout, seed=self.seed, verify=self.verify, push=push)


def _places(data: DataConfig) -> str:
    return ", ".join(source.path for source in data.sources) or data.path


def code_of(rubric: Rubric) -> str | None:
    """Return a hash of everything that decides how rewards look at rows, or None if it cannot be known.

    It covers the Python files in the folder of each reward, because rewards import their neighbors.
    """
    digest = hashlib.sha256()
    for name, reward in rubric.rewards.items():
        module = inspect.getmodule(inspect.unwrap(reward.function))
        file = Path(getattr(module, "__file__", None) or "")
        if not file.is_file():
            return None
        digest.update(f"{name} {sorted(reward.args.items(), key=str)!r}".encode())
        for neighbor in sorted(file.parent.glob("*.py")):
            digest.update(neighbor.read_bytes())
    return digest.hexdigest()
