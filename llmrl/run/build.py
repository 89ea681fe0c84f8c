"""Arguments -> the parts of a run. Cheap checks come first: whatever can be wrong is found before a model loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrl.algo.preference.options import PreferenceOptions, mixes_adapters
from llmrl.config import Config, RunConfig, to_dict
from llmrl.config.describe import describe
from llmrl.data.report import DROPPED, write_dropped
from llmrl.errors import UserError
from llmrl.model.parallel import Parallel, make_parallel
from llmrl.run.data import encode, quieten_libraries
from llmrl.run.engines import start_engine
from llmrl.run.given import Given, resolve_config
from llmrl.run.lock import lock, unlock
from llmrl.run.methods import METHODS, Method, make_algorithm
from llmrl.track.trackers import check_installed
from llmrl.types import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmrl.algo.base import Algorithm
    from llmrl.data.sampler import Sampler
    from llmrl.model.policy import Policy
    from llmrl.rollout.source import Source
    from llmrl.run.ledger import Ledger
    from llmrl.track.console import Console
    from llmrl.track.health import Health
    from llmrl.track.record import Record
    from llmrl.train.learner import Learner


@dataclass(kw_only=True)
class Parts:
    """The parts of a run."""

    config: RunConfig
    method: Method
    parallel: Parallel
    console: Console
    tokenizer: PreTrainedTokenizerBase
    sampler: Sampler
    tasks: dict[str, Task]
    """What the sampler draws from, by id."""
    eval_tasks: list[Task]
    policy: Policy
    learner: Learner
    source: Source
    algorithm: Algorithm
    health: Health
    record: Record | None
    """None except on the main process; so is the ledger."""
    ledger: Ledger | None


def build(args: Any, given: Given) -> Parts:
    """Build all parts of a run.

    Raises:
        UserError: the arguments or the data are wrong.
    """
    resolved = resolve_config(args, given)
    config = resolved.config
    check_installed(config.track.report_to)
    method = METHODS[type(config.algo)]
    feed = method.feed(config, given)

    from llmrl.model.attention import check_attention
    from llmrl.model.modes import random_parts
    from llmrl.track.console import Console
    from llmrl.track.health import Health
    from llmrl.train.learner import Learner

    quieten_libraries()
    parallel = make_parallel(seed=config.train.seed, dtype=config.model.dtype)
    if config.rollout.num_prompts < parallel.world:
        raise UserError(f"rollout.num_prompts {config.rollout.num_prompts} is less than the {parallel.world} processes")
    loaded: PreTrainedModel | None = None if isinstance(given.model, str) else given.model
    attention = config.model.attn_implementation
    if loaded is not None:
        attention = getattr(loaded.config, "_attn_implementation", None)
    check_attention(attention or "eager", config.model.dtype, parallel.device.type)
    tokenizer, notes = encode(feed, config, given)
    sampler = feed.sampler(config.rollout.num_prompts)
    config = resolved.with_rows(len(feed.tasks), streams=feed.streams)
    check_output_dir(config, parallel)
    if parallel.is_main and (dropped := feed.dropped()):
        write_dropped(Path(config.train.output_dir), dropped)
        notes.append(f"rows that were left out are in {Path(config.train.output_dir) / DROPPED}")

    console = Console(config.track.console, enabled=parallel.is_main)
    for note in resolved.notes + notes + describe(config):
        console.say(note)
    parallel.barrier()
    algorithm = make_algorithm(config, feed.rewards)
    keep = algorithm.needs.reference and not feed.has_reference
    policy = build_policy(config, given, tokenizer, parallel, keep_reference=keep)
    feed.check_vocabulary(tokenizer, policy.vocab_size)
    critic = config.critic if isinstance(config, Config) else None
    rate = critic.learning_rate if critic is not None else None
    learner = Learner(policy, config.train, parallel, critic_learning_rate=rate)
    source = feed.source(lambda: _start_engine(config, policy, parallel, console, longest=feed.longest))
    record, ledger = _files(config, parallel, console)
    console.say(_summary(config, policy, learner, parallel))
    if not config.train.dropout and (random := random_parts(policy.module)):
        console.say(f"off in optimizer steps: {', '.join(random)} (train.dropout true leaves it on)")
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


def check_output_dir(config: RunConfig, parallel: Parallel) -> None:
    """Make the run's folder and lock it; refuse to overwrite another run."""
    folder, wanted = Path(config.train.output_dir), config.train.resume_from_checkpoint
    if wanted:
        from llmrl.run.checkpoint import belongs_to, find_checkpoint

        found = find_checkpoint(folder, wanted)
        if found is None or belongs_to(found, folder):
            if parallel.is_main:
                lock(folder)
            return
    if not parallel.is_main:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder)
    except OSError as error:
        raise UserError(f"train.output_dir {folder} cannot be created: {error}") from error
    metrics = folder / "metrics.jsonl"
    if metrics.is_file() and metrics.stat().st_size:
        unlock(folder)
        raise UserError(
            f"train.output_dir {folder} already holds a run: choose another folder, or continue it with "
            "--train.resume_from_checkpoint last"
        )


def build_policy(
    config: RunConfig,
    given: Given,
    tokenizer: PreTrainedTokenizerBase,
    parallel: Parallel,
    *,
    keep_reference: bool = False,
    with_critic: bool = True,
) -> Policy:
    """Return what is trained: the model, whole or with adapters, with its critic and reference."""
    from llmrl.model.adapters import check_model
    from llmrl.model.critic import build_critic
    from llmrl.model.load import add_lora, load_model
    from llmrl.model.precision import exact_positions
    from llmrl.model.quantized import check_device, check_quantized, to_device

    # transformers annotates the methods of a model incompletely
    fresh = given.peft_config or config.model.fresh_adapters
    loaded: Any = None if isinstance(given.model, str) else given.model
    model: Any = loaded
    if loaded is None:
        check_device(config.model, parallel.device)
        model = load_model(
            config.model, tokenizer, seed=config.train.seed, trained=fresh is None, device=parallel.device
        )
    else:
        exact_positions(model)
    check_model(model)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    to_device(model, parallel.device)
    critic = None
    if isinstance(config, Config) and config.critic is not None and with_critic:
        critic = build_critic(config.critic, config.model, model, tokenizer, seed=config.train.seed)
    if fresh is not None and not hasattr(model, "disable_adapter"):
        model = add_lora(model, fresh, seed=config.train.seed)
    elif fresh is not None and loaded is not None:
        raise UserError(
            f"the model has an adapter already, and {'peft_config' if given.peft_config else 'model.lora'} describes "
            "another: leave that out, or give model.merge_and_unload()"
        )
    check_quantized(model)
    method = METHODS[type(config.algo)]
    policy = method.policy(config, to_device(model, parallel.device), critic, keep_reference=keep_reference)
    policy.base_is_saved &= config.model.adapter != "merge"
    _check_trained(config, policy)
    return policy


def _check_trained(config: RunConfig, policy: Policy) -> None:
    """Check that there is something to train, and that the reference can follow it as asked."""
    if not policy.parameters_to_train()[0]:
        raise UserError("no parameter of the model is trained: requires_grad is off for all of them; switch it on")
    moving = config.algo.reference if isinstance(config.algo, PreferenceOptions) else None
    if moving is not None and policy.has_adapters and moving.alpha != 1:
        raise UserError(mixes_adapters(moving.alpha))


def _start_engine(
    config: RunConfig, policy: Policy, parallel: Parallel, console: Console, *, longest: int | None
) -> Any:
    assert isinstance(config, Config), "a kind of run without an engine asked for one"
    folder = Path(config.train.output_dir) / "servers"
    rollout = config.rollout
    return start_engine(config.model, rollout, policy, parallel, log_dir=folder, longest=longest, say=console.say)


def _files(config: RunConfig, parallel: Parallel, console: Console) -> tuple[Record | None, Ledger | None]:
    """Open the run's files, on the main process."""
    from llmrl.run.ledger import Ledger
    from llmrl.track.record import Record
    from llmrl.track.trackers import Trackers

    if not parallel.is_main:
        return None, None
    folder = Path(config.train.output_dir)
    trackers = Trackers(config.track, folder, to_dict(config), warn=console.warn)
    return Record(config.track, folder, trackers=trackers), Ledger(folder / "ledger.jsonl")


def _summary(config: RunConfig, policy: Policy, learner: Learner, parallel: Parallel) -> str:
    """Return a line for the user: what is trained, where it runs, and where its files are."""
    trained = sum(p.numel() for p in learner.parameters)
    total = sum(p.numel() for _, p in policy.named_parameters())
    adapters = f" with {policy.adapter_kind}" if policy.has_adapters else ""
    computed = "" if config.model.dtype == "float32" else f" in float32, computed in {config.model.dtype}"
    return (
        f"{type(policy.causal_lm).__name__}{adapters}: {trained:,} of {total:,} parameters trained{computed}, "
        f"{parallel.world} process(es) on {parallel.device.type}, run directory {config.train.output_dir}"
    )
