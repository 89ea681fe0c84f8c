"""Kinds of run, in one table: the options of an algorithm -> where groups come from, which policy, which algorithm.

Whatever differs between kinds of run stands in a row here; the loop, the learner and the queue do not know it.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llmrl.algo.policy_gradient.algorithm import GRPO
from llmrl.algo.policy_gradient.options import PolicyGradient
from llmrl.algo.ppo import options as ppo
from llmrl.algo.ppo.algorithm import PPO
from llmrl.algo.preference import options as preference
from llmrl.algo.preference.dpo import DPO
from llmrl.algo.preference.kto import KTO
from llmrl.config import Config
from llmrl.methods.bcoder.algorithm import BCoder
from llmrl.methods.bcoder.options import BCoderOptions
from llmrl.methods.bcoder.policy import QPolicy, check_start
from llmrl.methods.bcoder.rerank import Ranker
from llmrl.methods.bcoder.source import ProgramFeed
from llmrl.model.policy import Policy
from llmrl.rollout.preferences import PreferenceFeed
from llmrl.rollout.tasks import TaskFeed
from llmrl.run.given import GIVEN_DATASET, Given
from llmrl.types import Task

if TYPE_CHECKING:
    from llmrl.algo.base import Algorithm
    from llmrl.config import AlgoOptions, RunConfig
    from llmrl.data.options import DataConfig, RowsConfig
    from llmrl.data.preferences import PreferenceRow
    from llmrl.model.critic import Critic
    from llmrl.rollout.source import Feed
    from llmrl.train.learner import Learner
    from llmrl.types import RolloutGroup
    from llmrl.verify.rubric import Rubric


class Evaluated(Protocol):
    """What evaluation needs of the `Trainer`; see there."""

    config: RunConfig
    eval_tasks: list[Task]
    algorithm: Algorithm
    learner: Learner
    policy_version: int

    async def collect(self, tasks: Sequence[Task], **options: Any) -> list[RolloutGroup]:
        """Groups of held-out tasks."""
        ...

    async def evaluate(
        self, tasks: Sequence[Task], *, num_generations: int = 1, temperature: float = 0.0
    ) -> tuple[dict[str, float], list[RolloutGroup]]:
        """Pass rates of held-out tasks, and the rollouts behind them."""
        ...


@dataclass(frozen=True, kw_only=True)
class Method:
    """One kind of run."""

    feed: Callable[[Any, Given], Feed]
    """Read the data of a configuration, before a model loads."""
    policy: Callable[..., Policy]
    """Put what is trained around the language model: (config, model, critic, keep_reference=...)."""
    algorithm: Callable[[Any, dict[str, float]], Algorithm]
    """(config, weight of each reward by name) -> what turns groups into a gradient."""
    evaluate: Callable[[Evaluated], Awaitable[dict[str, float]]]
    """Metrics of the held-out tasks, with keys eval/..."""


# --- data -------------------------------------------------------------------------------------------------------------


def task_feed(config: Config, given: Given) -> TaskFeed:
    """Tasks to sample for."""
    return TaskFeed(*_task_parts(config, given), **_task_options(config))


def program_feed(config: Config, given: Given) -> ProgramFeed:
    """Tasks with stored programs."""
    assert isinstance(config.algo, BCoderOptions)
    check_start(config.algo, config.model.path)
    return ProgramFeed(*_task_parts(config, given), options=config.algo, **_task_options(config))


def preference_feed(config: RunConfig, given: Given) -> PreferenceFeed:
    """Rows of preferences."""
    assert isinstance(config.algo, preference.DPO | preference.KTO)
    wanted = given.eval_dataset is not None or config.eval.data is not None
    return PreferenceFeed(
        _rows(given.train_dataset, config.data),
        _rows(given.eval_dataset, config.eval.data or config.data) if wanted else [],
        data=config.data,
        options=config.algo,
        folder=Path(config.train.output_dir),
        seed=config.train.seed,
    )


def _task_parts(config: Config, given: Given) -> tuple[list[Task], list[Task], Rubric]:
    wanted = given.eval_dataset is not None or config.eval.data is not None
    tasks = _tasks(given.train_dataset, config.data)
    eval_tasks = _tasks(given.eval_dataset, config.eval.data or config.data) if wanted else []
    return tasks, eval_tasks, _rubric(config, given.reward)


def _task_options(config: Config) -> dict[str, Any]:
    return {"data": config.data, "rollout": config.rollout, "verify": config.verify, "seed": config.train.seed}


def _tasks(dataset: Any, options: DataConfig) -> list[Task]:
    from llmrl.data.tasks import load_tasks, tasks_from_rows

    if dataset is None or isinstance(dataset, str):
        return load_tasks(options)
    if isinstance(dataset, list) and dataset and isinstance(dataset[0], Task):
        return dataset
    return tasks_from_rows(dataset, options, GIVEN_DATASET)


def _rows(dataset: Any, options: RowsConfig) -> list[PreferenceRow]:
    from llmrl.data.preferences import load_preferences, preferences_from_rows

    if dataset is None or isinstance(dataset, str):
        return load_preferences(options)
    return preferences_from_rows(dataset, options, GIVEN_DATASET)


def _rubric(config: Config, reward: Any) -> Rubric:
    from llmrl.verify.rubric import Rubric

    rewards = list(reward) if isinstance(reward, Sequence) and not isinstance(reward, str) else [reward]
    if reward is not None and not all(isinstance(r, str) for r in rewards):
        return Rubric(rewards)
    return Rubric.from_config(
        config.rewards,
        config.verify,
        num_processes=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        conversational=config.data.prompt_format == "chat",
    )


# --- policies ---------------------------------------------------------------------------------------------------------


def sampled_policy(config: Config, model: Any, critic: Critic | None, *, keep_reference: bool) -> Policy:
    """A policy that samples, at the temperature of its rollouts."""
    return Policy(model, temperature=config.rollout.temperature, keep_reference=keep_reference, critic=critic)


def offline_policy(config: RunConfig, model: Any, critic: Critic | None, *, keep_reference: bool) -> Policy:
    """A policy that reads its completions from a dataset."""
    return Policy(model, temperature=1.0, keep_reference=keep_reference, critic=critic)


def q_policy(config: Config, model: Any, critic: Critic | None, *, keep_reference: bool) -> Policy:
    """B-Coder's Q function."""
    assert isinstance(config.algo, BCoderOptions)
    chat = {"prompt_format": config.data.prompt_format, "chat_template": config.data.chat_template}
    return QPolicy(model, config.algo, base_model=config.model.path, chat=chat)


# --- evaluation -------------------------------------------------------------------------------------------------------


async def held_out_rates(trainer: Evaluated) -> dict[str, float]:
    """Pass rates on the held-out tasks."""
    assert isinstance(trainer.config, Config), "nothing is sampled in this kind of run"
    options = trainer.config.eval
    rates, _ = await trainer.evaluate(
        trainer.eval_tasks, num_generations=options.num_generations, temperature=options.temperature
    )
    return {key.replace("reward/", "eval/"): value for key, value in rates.items()}


async def held_out_preferences(trainer: Evaluated) -> dict[str, float]:
    """Loss, accuracy and margin of the implicit reward on the held-out preferences."""
    groups = await trainer.collect(trainer.eval_tasks)
    batch = trainer.algorithm.prepare(groups, policy_version=trainer.policy_version)
    found = trainer.learner.measure(batch, trainer.algorithm)
    return {f"eval/{key.removeprefix('preference/').replace('loss/total', 'loss')}": v for key, v in found.items()}


# --- the table --------------------------------------------------------------------------------------------------------


def _limit(config: Config) -> int:
    return config.rollout.max_completion_length


SAMPLED: dict[str, Any] = {"feed": task_feed, "policy": sampled_policy, "evaluate": held_out_rates}
OFFLINE: dict[str, Any] = {"feed": preference_feed, "policy": offline_policy, "evaluate": held_out_preferences}
METHODS: dict[type, Method] = {
    PolicyGradient: Method(
        algorithm=lambda c, rewards: GRPO(c.algo, max_completion_length=_limit(c), rewards=rewards), **SAMPLED
    ),
    ppo.PPO: Method(
        algorithm=lambda c, rewards: PPO(c.algo, max_completion_length=_limit(c), rewards=rewards), **SAMPLED
    ),
    preference.OnlineDPO: Method(algorithm=lambda c, _: DPO(c.algo), **SAMPLED),
    preference.OnlineKTO: Method(algorithm=lambda c, _: KTO(c.algo), **SAMPLED),
    preference.DPO: Method(algorithm=lambda c, _: DPO(c.algo), **OFFLINE),
    preference.KTO: Method(algorithm=lambda c, _: KTO(c.algo), **OFFLINE),
    BCoderOptions: Method(
        feed=program_feed,
        policy=q_policy,
        algorithm=lambda c, _: BCoder(c.algo, max_completion_length=_limit(c)),
        evaluate=held_out_rates,
    ),
}
"""By the class of `config.algo`."""


RANKERS = {"bcoder": Ranker}
"""By the `--rerank` of `llmrl eval`."""


def method_of(algo: AlgoOptions) -> Method:
    """The kind of run that these options are for."""
    return METHODS[type(algo)]


def make_algorithm(config: RunConfig, rewards: dict[str, float] | None = None) -> Algorithm:
    """The algorithm of a configuration; `rewards` are the weights by name."""
    return method_of(config.algo).algorithm(config, rewards or {})
