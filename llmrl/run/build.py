"""Arguments -> the parts of a run, in the order in which mistakes are cheapest: all checks before a model loads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrl.config import Config, RunConfig, to_dict
from llmrl.config.describe import describe
from llmrl.errors import UserError
from llmrl.model.parallel import Parallel, make_parallel
from llmrl.run.engines import start_engine
from llmrl.run.given import Given, resolve_config
from llmrl.run.methods import Method, method_of
from llmrl.types import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmrl.algo.base import Algorithm
    from llmrl.data.sampler import TaskSampler
    from llmrl.model.policy import Policy
    from llmrl.rollout.source import Feed, Source
    from llmrl.run.ledger import Ledger
    from llmrl.track.console import Console
    from llmrl.track.health import Health
    from llmrl.track.record import Record
    from llmrl.train.learner import Learner


@dataclass(kw_only=True)
class Parts:
    """What a run consists of."""

    config: RunConfig
    method: Method
    parallel: Parallel
    console: Console
    tokenizer: PreTrainedTokenizerBase
    sampler: TaskSampler
    tasks: dict[str, Task]
    """What the sampler draws from, by id."""
    eval_tasks: list[Task]
    policy: Policy
    learner: Learner
    source: Source
    algorithm: Algorithm
    health: Health
    record: Record | None
    """On the main process only, as is the ledger."""
    ledger: Ledger | None


def build(args: RunConfig | dict[str, Any] | None, given: Given) -> Parts:
    """Build all parts of a run.

    Raises:
        UserError: the arguments or the data are wrong.
    """
    config = resolve_config(args, given)
    method = method_of(config.algo)
    feed = method.feed(config, given)

    from llmrl.model.load import load_generation_config, load_tokenizer
    from llmrl.track.console import Console
    from llmrl.track.health import Health
    from llmrl.train.learner import Learner

    quieten_libraries()
    parallel = make_parallel(
        seed=config.train.seed, output_dir=config.train.output_dir, report_to=config.track.report_to
    )
    if config.rollout.num_prompts < parallel.world:
        raise UserError(f"rollout.num_prompts {config.rollout.num_prompts} is less than the {parallel.world} processes")
    loaded: PreTrainedModel | None = None if isinstance(given.model, str) else given.model
    tokenizer = given.processing_class
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(config.model)
    generation = load_generation_config(config.model) if loaded is None else loaded.generation_config
    notes, sampler = feed.encode(tokenizer, generation), feed.sampler(config.rollout.num_prompts)
    resume = check_output_dir(config, parallel)

    console = Console(config.track.console, enabled=parallel.is_main)
    for note in notes + describe(config):
        console.say(note)
    parallel.barrier()
    algorithm = method.algorithm(config, feed.rewards)
    policy = _policy(config, method, given, loaded, tokenizer, parallel, keep_reference=_keeps(algorithm, feed))
    critic = config.critic if isinstance(config, Config) else None
    rate = critic.learning_rate if critic is not None else None
    learner = Learner(policy, config.train, parallel, critic_learning_rate=rate)
    source = feed.source(lambda: _start_engine(config, policy, parallel, console))
    record, ledger = _files(config, parallel, resume=resume)
    console.say(_summary(config, policy, learner, parallel))
    return Parts(
        config=config,
        method=method,
        parallel=parallel,
        console=console,
        tokenizer=tokenizer,
        sampler=sampler,
        tasks={task.id: task for task in feed.tasks},
        eval_tasks=feed.eval_tasks,
        policy=policy,
        learner=learner,
        source=source,
        algorithm=algorithm,
        health=Health(on_policy=algorithm.steps_per_batch == 1 and source.max_staleness is not None),
        record=record,
        ledger=ledger,
    )


def quieten_libraries() -> None:
    """Leave the console to the run: no progress bars or notes of transformers; its warnings and errors stay.

    Someone who sets TRANSFORMERS_VERBOSITY wants to see what it prints.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_warning()


def check_output_dir(config: RunConfig, parallel: Parallel) -> bool:
    """Refuse to write over another run. Returns whether this one is resumed."""
    folder = Path(config.train.output_dir)
    if config.train.resume_from_checkpoint:
        from llmrl.run.checkpoint import find_checkpoint

        find_checkpoint(folder, config.train.resume_from_checkpoint)
        return True
    metrics = folder / "metrics.jsonl"
    if parallel.is_main and metrics.is_file() and metrics.stat().st_size:
        raise UserError(
            f"train.output_dir {folder} already holds a run: choose another folder, or continue it with "
            "--train.resume_from_checkpoint last"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"train.output_dir {folder} cannot be created: {error}") from error
    return False


def _keeps(algorithm: Algorithm, feed: Feed) -> bool:
    """Whether a reference model is kept."""
    return algorithm.needs.reference and not feed.has_reference


def _policy(
    config: RunConfig,
    method: Method,
    given: Given,
    loaded: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    parallel: Parallel,
    *,
    keep_reference: bool,
) -> Policy:
    """The model, whole or with adapters, its critic and reference."""
    from llmrl.model.critic import build_critic
    from llmrl.model.load import add_lora, load_model

    model = load_model(config.model, tokenizer, seed=config.train.seed) if loaded is None else loaded
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.to(parallel.device)  # pyright: ignore[reportArgumentType]
    critic = None
    if isinstance(config, Config) and config.critic is not None:
        critic = build_critic(config.critic, config.model, model, tokenizer, seed=config.train.seed)
    adapters = given.peft_config or config.model.lora
    adapted = model if adapters is None else add_lora(model, adapters, seed=config.train.seed)
    return method.policy(config, adapted.to(parallel.device), critic, keep_reference=keep_reference)


def _start_engine(config: RunConfig, policy: Policy, parallel: Parallel, console: Console) -> Any:
    assert isinstance(config, Config), "a kind of run without an engine asked for one"
    folder = Path(config.train.output_dir) / "servers"
    return start_engine(config.model, config.rollout, policy, parallel, log_dir=folder, say=console.say)


def _files(config: RunConfig, parallel: Parallel, *, resume: bool) -> tuple[Record | None, Ledger | None]:
    """The run's files, on the main process; and its trackers."""
    from llmrl.run.ledger import Ledger
    from llmrl.track.record import Record, environment, flatten

    record = ledger = None
    folder, plain = Path(config.train.output_dir), to_dict(config)
    if parallel.is_main:
        found = environment(device=str(parallel.device), num_processes=parallel.world, distributed_type=parallel.kind)
        record = Record(config.track, folder, plain, environment=found, log=parallel.log, resume=resume)
        ledger = Ledger(folder / "ledger.jsonl")
    if config.track.report_to:
        parallel.start_trackers(config.track.project, flatten(plain))
    return record, ledger


def _summary(config: RunConfig, policy: Policy, learner: Learner, parallel: Parallel) -> str:
    """A line for the user: what is trained, on what, and where the run is."""
    trained = sum(p.numel() for p in learner.parameters)
    total = sum(p.numel() for _, p in policy.named_parameters())
    return (
        f"{type(policy.causal_lm).__name__}: {trained:,} of {total:,} parameters trained, "
        f"{parallel.world} process(es) on {parallel.device.type}, run directory {config.train.output_dir}"
    )
