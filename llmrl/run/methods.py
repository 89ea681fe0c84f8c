"""Kinds of run, in one table: where groups come from, which policy and algorithm, and how a run is evaluated.

`METHODS`, at the end, has one row per kind. Trainer, learner, queue and health treat all kinds alike, so a new method
is a package and a row here: `methods/bcoder` is an example.
"""

from __future__ import annotations

import math
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from llmrl.algo.policy_gradient.algorithm import GRPO
from llmrl.algo.policy_gradient.options import PolicyGradient
from llmrl.algo.ppo import options as ppo
from llmrl.algo.ppo.algorithm import PPO
from llmrl.algo.preference import options as preference
from llmrl.algo.preference.dpo import DPO
from llmrl.algo.preference.kto import KTO
from llmrl.config import Config
from llmrl.data.options import PreferenceData, PreferenceRows
from llmrl.data.report import RowReport
from llmrl.data.rows import is_splits
from llmrl.data.sampler import STREAM_BLOCK
from llmrl.errors import UserError
from llmrl.methods.bcoder.algorithm import BCoder
from llmrl.methods.bcoder.options import BCoderOptions
from llmrl.methods.bcoder.policy import QPolicy, check_start
from llmrl.methods.bcoder.rerank import Ranker
from llmrl.methods.bcoder.source import ProgramFeed
from llmrl.model.logprob_head import keep_logits_in_float32
from llmrl.model.policy import Policy
from llmrl.rollout.preferences import PreferenceFeed
from llmrl.rollout.tasks import TaskFeed, TaskSet
from llmrl.run.given import Given
from llmrl.types import Task

if TYPE_CHECKING:
    from llmrl.algo.base import Algorithm
    from llmrl.config import RunConfig
    from llmrl.data.options import DataConfig, RowsConfig, TaskRows
    from llmrl.data.preferences import PreferenceRow
    from llmrl.model.critic import Critic
    from llmrl.rollout.source import Feed
    from llmrl.train.learner import Learner
    from llmrl.types import RolloutGroup
    from llmrl.verify.rubric import Rubric


F = TypeVar("F", bound=TaskFeed)

GIVEN_DATASET = "dataset"
"""What messages call a dataset that was passed to `Trainer` as an object."""


class Evaluated(Protocol):
    """The part of `Trainer` that evaluation needs. The trainer imports this module, so this one cannot import it."""

    config: RunConfig
    eval_tasks: list[Task]
    algorithm: Algorithm
    learner: Learner
    policy_version: int

    async def collect(self, tasks: Sequence[Task], **options: Any) -> list[RolloutGroup]:
        """Return the groups of held-out tasks."""
        ...

    async def evaluate(
        self, tasks: Sequence[Task], *, num_generations: int = 1, temperature: float = 0.0
    ) -> tuple[dict[str, float], list[RolloutGroup]]:
        """Return pass rates of held-out tasks, and the rollouts behind them."""
        ...


MakeAlgorithm = Callable[[Any, dict[str, float]], "Algorithm"]
"""(config, weight of each reward by name) -> what turns scored groups into a gradient."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One kind of run."""

    feed: Callable[[Any, Given], Feed]
    """(config, what was passed to `Trainer`) -> the data, before a model loads."""
    policy: Callable[..., Policy]
    """(config, language model, critic, keep_reference=...) -> the module that is trained."""
    algorithm: MakeAlgorithm
    evaluate: Callable[[Evaluated], Awaitable[dict[str, float]]]
    """(trainer) -> metrics of the held-out tasks, with keys eval/..."""


# --- data -------------------------------------------------------------------------------------------------------------


def task_feed(config: Config, given: Given) -> TaskFeed:
    """Read tasks to sample completions for."""
    return _with_tasks(TaskFeed, config, given)


def program_feed(config: Config, given: Given) -> ProgramFeed:
    """Read tasks with stored programs."""
    assert isinstance(config.algo, BCoderOptions)
    check_start(config.algo, config.model.path)
    return _with_tasks(ProgramFeed, config, given, options=config.algo)


def preference_feed(config: RunConfig, given: Given) -> PreferenceFeed:
    """Read rows of preferences."""
    assert isinstance(config.algo, preference.DPO | preference.KTO)
    assert isinstance(config.data, PreferenceData)
    reports = _reports(config.data)
    held_out = config.eval.data
    return PreferenceFeed(
        _rows(given.train_dataset, config.data, reports[0], needed=_needed(config)),
        _rows(_held_out(given.eval_dataset, held_out), held_out, reports[1])
        if isinstance(held_out, PreferenceRows)
        else [],
        reports=reports,
        data=config.data,
        options=config.algo,
        folder=Path(config.train.output_dir),
        seed=config.train.seed,
    )


def _with_tasks(feed: Callable[..., F], config: Config, given: Given, **more: Any) -> F:
    reports, held_out = _reports(config.data), config.eval.data
    return feed(
        _tasks(given.train_dataset, config.data, reports[0], needed=_needed(config)),
        _tasks(_held_out(given.eval_dataset, held_out), held_out, reports[1]) if held_out is not None else TaskSet([]),
        _rubric(config),
        data=config.data,
        rollout=config.rollout,
        verify=config.verify,
        seed=config.train.seed,
        **more,
    )


def _held_out(dataset: Any, options: RowsConfig) -> Any:
    """Return a dataset to evaluate on. Of several splits none is guessed: the usual one is that of training."""
    if is_splits(dataset) and len(dataset) > 1 and options.split == "train":
        splits = ", ".join(map(repr, dataset))
        raise UserError(f"eval_dataset has the splits {splits}: give one of them, such as datasets['test']")
    return dataset


def _reports(data: DataConfig | PreferenceData) -> tuple[RowReport, RowReport]:
    return (
        RowReport(on_bad_row=data.on_bad_row, what="rows"),
        RowReport(on_bad_row=data.on_bad_row, what="evaluation rows"),
    )


def _needed(config: RunConfig) -> int:
    """Return how many rows of a stream a run can use, in whole blocks, so that a longer run has the same and more."""
    algorithm = make_algorithm(config) if isinstance(config, Config) else None
    batches = algorithm.needs.sampling_batches if algorithm is not None else 1
    rows = config.train.max_steps * config.rollout.num_prompts * batches
    return math.ceil(rows / STREAM_BLOCK) * STREAM_BLOCK


def _tasks(dataset: Any, options: TaskRows, report: RowReport, *, needed: int | None = None) -> TaskSet:
    from llmrl.data.tasks import load_tasks, tasks_from_rows

    match dataset:
        case None | str():
            return TaskSet(load_tasks(options, report, needed=needed), options, report)
        case [Task(), *_]:
            report.num_rows = len(dataset)
            return TaskSet([*dataset], options, report)
        case _:
            return TaskSet(tasks_from_rows(dataset, options, GIVEN_DATASET, report, needed=needed), options, report)


def _rows(
    dataset: Any, options: PreferenceRows, report: RowReport, *, needed: int | None = None
) -> list[PreferenceRow]:
    from llmrl.data.preferences import load_preferences, preferences_from_rows

    if dataset is None or isinstance(dataset, str):
        return load_preferences(options, report, needed=needed)
    return preferences_from_rows(dataset, options, GIVEN_DATASET, report, needed=needed)


def _rubric(config: Config) -> Rubric:
    from llmrl.verify.rubric import Rubric

    return Rubric.from_config(
        config.rewards,
        config.verify,
        num_processes=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        conversational=config.data.prompt_format == "chat",
    )


# --- policies ---------------------------------------------------------------------------------------------------------


def language_policy(config: RunConfig, model: Any, critic: Critic | None, *, keep_reference: bool) -> Policy:
    """Return a policy whose log-probabilities have the temperature of its rollouts, if it samples any."""
    temperature = config.rollout.temperature if isinstance(config, Config) else 1.0
    if config.model.float32_head:
        keep_logits_in_float32(model)
    dtype = getattr(torch, config.model.dtype)
    return Policy(model, temperature=temperature, keep_reference=keep_reference, critic=critic, dtype=dtype)


def q_policy(config: Config, model: Any, critic: Critic | None, *, keep_reference: bool) -> Policy:
    """Return B-Coder's Q function."""
    assert isinstance(config.algo, BCoderOptions)
    chat = {"prompt_format": config.data.prompt_format, "chat_template": config.data.chat_template}
    if config.model.float32_head:
        keep_logits_in_float32(model)
    dtype = getattr(torch, config.model.dtype)
    return QPolicy(model, config.algo, base_model=config.model.path, chat=chat, dtype=dtype)


# --- evaluation -------------------------------------------------------------------------------------------------------


async def held_out_rates(trainer: Evaluated) -> dict[str, float]:
    """Return pass rates on the held-out tasks."""
    assert isinstance(trainer.config, Config), "nothing is sampled in this kind of run"
    options = trainer.config.eval
    rates, groups = await trainer.evaluate(
        trainer.eval_tasks, num_generations=options.num_generations, temperature=options.temperature
    )
    scores = [rollout.score.reward for group in groups for rollout in group.rollouts if rollout.score is not None]
    rewards = [reward for reward in scores if reward is not None]
    mean = {"eval/reward": fmean(rewards)} if rewards else {}
    return {key.replace("reward/", "eval/"): value for key, value in rates.items()} | mean


async def held_out_preferences(trainer: Evaluated) -> dict[str, float]:
    """Return loss, accuracy and margin of the implicit reward on the held-out preferences."""
    groups = await trainer.collect(trainer.eval_tasks)
    batch = trainer.algorithm.prepare(groups, policy_version=trainer.policy_version)
    found = trainer.learner.measure(batch, trainer.algorithm)
    return {f"eval/{key.removeprefix('preference/').replace('loss/total', 'loss')}": v for key, v in found.items()}


# --- the table --------------------------------------------------------------------------------------------------------


def _sampled(algorithm: MakeAlgorithm) -> Method:
    return Method(feed=task_feed, policy=language_policy, algorithm=algorithm, evaluate=held_out_rates)


def _offline(algorithm: MakeAlgorithm) -> Method:
    return Method(feed=preference_feed, policy=language_policy, algorithm=algorithm, evaluate=held_out_preferences)


def _limit(config: Config) -> int:
    return config.rollout.max_completion_length


METHODS: dict[type, Method] = {
    PolicyGradient: _sampled(lambda c, rewards: GRPO(c.algo, max_completion_length=_limit(c), rewards=rewards)),
    ppo.PPO: _sampled(lambda c, rewards: PPO(c.algo, max_completion_length=_limit(c), rewards=rewards)),
    preference.OnlineDPO: _sampled(lambda c, _: DPO(c.algo)),
    preference.OnlineKTO: _sampled(lambda c, _: KTO(c.algo)),
    preference.DPO: _offline(lambda c, _: DPO(c.algo)),
    preference.KTO: _offline(lambda c, _: KTO(c.algo)),
    BCoderOptions: Method(
        feed=program_feed,
        policy=q_policy,
        algorithm=lambda c, _: BCoder(c.algo, max_completion_length=_limit(c)),
        evaluate=held_out_rates,
    ),
}
"""The row of a configuration is that of the class of its `algo`."""

RANKERS = {"bcoder": Ranker}
"""What can rank samples, by the `--rerank` of `llmrl eval`."""


def make_algorithm(config: RunConfig, rewards: dict[str, float] | None = None) -> Algorithm:
    """Return the algorithm of a configuration; `rewards` are the weights by name."""
    return METHODS[type(config.algo)].algorithm(config, rewards or {})
