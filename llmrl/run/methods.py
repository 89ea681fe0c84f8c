"""The parts of a run that depend on the algorithm's kind: which policy, which collector, what rows must carry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmrl.config import Config
    from llmrl.data.chat import Chat
    from llmrl.engines.base import Engine
    from llmrl.model.critic import Critic
    from llmrl.model.policy import Policy
    from llmrl.rollout.collector import Collector
    from llmrl.types import Task
    from llmrl.verify.rubric import Rubric


def check_stored(config: Config, tasks: list[Task]) -> None:
    """What algorithms on stored programs need of rows and of the model's folder.

    Raises:
        UserError: it is not there.
    """
    if config.bcoder is not None:
        from llmrl.methods.bcoder.policy import with_saved
        from llmrl.methods.bcoder.source import check_rows

        check_rows(tasks, config.bcoder)
        config.bcoder = with_saved(config.bcoder, config.model.path)


def make_policy(config: Config, model: Any, critic: Critic | None, *, keep_reference: bool) -> Policy:
    """The model with what the algorithm needs around it."""
    if config.bcoder is not None:
        from llmrl.methods.bcoder.policy import QPolicy

        chat = {"prompt_format": config.data.prompt_format, "chat_template": config.data.chat_template}
        return QPolicy(model, config.bcoder, base_model=config.model.path, chat=chat)
    from llmrl.model.policy import Policy

    return Policy(model, temperature=config.rollout.temperature, keep_reference=keep_reference, critic=critic)


def make_collector(config: Config, engine: Engine, chat: Chat, rubric: Rubric) -> Collector:
    """What draws and scores rollouts, or takes them from stored rows."""
    if config.bcoder is not None:
        from llmrl.methods.bcoder.source import StoredCollector

        return StoredCollector(engine, chat, rubric, config.rollout, seed=config.train.seed, bcoder=config.bcoder)
    from llmrl.rollout.collector import Collector

    return Collector(engine, chat, rubric, config.rollout, seed=config.train.seed)
