"""Arguments -> the parts of a run.

In the order in which mistakes are cheapest: everything is checked before a model loads.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrl.algo import preference_presets
from llmrl.algo.bcoder_options import resolve_bcoder
from llmrl.algo.critic_presets import describe_critic, resolve_critic
from llmrl.algo.preference_presets import is_offline, is_preference, is_single, resolve_preference
from llmrl.algo.presets import FAMILIES, describe, resolve, with_staleness
from llmrl.config import Config, DataConfig, LoraConfig, RewardConfig, parse, to_dict, validate
from llmrl.errors import UserError
from llmrl.run.methods import check_stored, make_collector, make_policy
from llmrl.train.offline import NoEngine, NoSync, OfflineData
from llmrl.types import Task

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmrl.algo.base import Algorithm
    from llmrl.data.chat import Chat
    from llmrl.data.preferences import PreferenceCollector
    from llmrl.data.sampler import TaskSampler
    from llmrl.engines.base import Engine
    from llmrl.model.policy import Policy
    from llmrl.rollout.collector import Collector
    from llmrl.run.ledger import Ledger
    from llmrl.run.sync import WeightSync
    from llmrl.track.console import Console
    from llmrl.track.health import Health
    from llmrl.track.record import Record
    from llmrl.train.learner import Learner
    from llmrl.verify.rubric import Rubric

GIVEN = "(given in Python)"
"""Stands in the configuration for an object that was handed over instead of named."""
PROCESS_TIMEOUT = timedelta(minutes=30)
"""How long a process waits for another before it gives up."""


@dataclass(kw_only=True)
class Parts:
    """What a run consists of."""

    config: Config
    accelerator: Accelerator
    console: Console
    tokenizer: PreTrainedTokenizerBase
    sampler: TaskSampler
    tasks: dict[str, Task]
    """What the sampler draws from, by id."""
    eval_tasks: list[Task]
    rubric: Rubric
    policy: Policy
    learner: Learner
    engine: Engine | NoEngine
    sync: WeightSync | NoSync
    collector: Collector | PreferenceCollector
    algorithm: Algorithm
    health: Health
    record: Record | None
    """On the main process only, as is the ledger."""
    ledger: Ledger | None


def build(args: Config | dict[str, Any] | None, **given: Any) -> Parts:
    """Build all parts of a run; `given` are the keyword arguments of `Trainer`.

    Raises:
        UserError: the arguments or the data are wrong.
    """
    config = resolve_config(args, given)
    tasks, eval_tasks, offline = [], [], None
    rubric = _rubric(config, given["reward"])
    if is_offline(config):
        offline = OfflineData(config, given["train_dataset"], given["eval_dataset"])
    else:
        tasks = _tasks(given["train_dataset"], config.data)
        eval_tasks = _tasks(given["eval_dataset"], config.eval.data) if _wants_eval(config, given) else []
        rubric.check(tasks[0])
        check_stored(config, tasks)

    from llmrl.model.load import load_generation_config, load_tokenizer
    from llmrl.track.health import Health
    from llmrl.train.learner import Learner

    quieten_libraries()
    accelerator = make_accelerator(config)
    if config.rollout.num_prompts < accelerator.num_processes:
        raise UserError(
            f"rollout.num_prompts {config.rollout.num_prompts} is less than the {accelerator.num_processes} processes"
        )
    loaded: PreTrainedModel | None = None if isinstance(given["model"], str) else given["model"]
    tokenizer = given["processing_class"]
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(config.model)
    generation = load_generation_config(config.model) if loaded is None else loaded.generation_config
    chat, collector = None, None
    if offline is not None:
        notes, sampler, collector = offline.encode(tokenizer, generation), offline.sampler(), offline.collector()
        eval_tasks = [row.task for row in offline.eval_rows]
    else:
        chat, sampler, notes = _prompts(config, tokenizer, generation, tasks)
    resume = check_output_dir(config, accelerator)

    console = _console(config, accelerator)
    described = preference_presets.describe(config) if is_preference(config) else describe(config.algo)
    for note in notes + described + describe_critic(config):
        console.say(note)
    accelerator.wait_for_everyone()
    policy, algorithm = _policy(config, given, loaded, tokenizer, accelerator, rubric)
    learner = Learner(config, policy, accelerator)
    engine, sync = NoEngine(), NoSync()
    if chat is not None:
        engine, sync = _engine(config, policy, accelerator, console)
        collector = make_collector(config, engine, chat, rubric)
    assert collector is not None
    record, ledger = _files(config, accelerator, resume=resume)
    console.say(_summary(config, policy, learner, accelerator))
    return Parts(
        config=config,
        accelerator=accelerator,
        console=console,
        tokenizer=tokenizer,
        sampler=sampler,
        tasks={task.id: task for task in tasks},
        eval_tasks=eval_tasks,
        rubric=rubric,
        policy=policy,
        learner=learner,
        engine=engine,
        sync=sync,
        collector=collector,
        algorithm=algorithm,
        health=Health(on_policy=learner.steps_per_batch == 1 and config.bcoder is None),
        record=record,
        ledger=ledger,
    )


def quieten_libraries() -> None:
    """Leave the console to the run: no progress bars or notes of transformers, whose warnings and errors stay.

    Someone who sets TRANSFORMERS_VERBOSITY wants to see what it says.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_warning()


def resolve_config(args: Config | dict[str, Any] | None, given: dict[str, Any]) -> Config:
    """The configuration with what was given in Python put in its place, validated."""
    if isinstance(args, Config):
        config = dataclasses.replace(args)
    else:
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in (args or {}).items()}
        config = parse([f"--{key}={text}" for key, text in texts.items()])
    model, reward, peft_config = given["model"], given["reward"], given["peft_config"]
    if model is not None:
        path = model if isinstance(model, str) else GIVEN
        config.model = dataclasses.replace(config.model, path=path)
        if path == GIVEN and given["processing_class"] is None:
            raise UserError("a loaded model needs its tokenizer too: Trainer(model=..., processing_class=tokenizer)")
    if reward is not None:
        rewards = reward if isinstance(reward, (list, tuple)) else [reward]
        config.rewards = [RewardConfig(fn=r if isinstance(r, str) else getattr(r, "__name__", GIVEN)) for r in rewards]
    config.data = _data_config(config.data, given["train_dataset"])
    if given["eval_dataset"] is not None:
        config.eval = dataclasses.replace(
            config.eval, data=_data_config(config.eval.data or DataConfig(), given["eval_dataset"])
        )
    if given["algorithm"] is not None:
        config.algo = dataclasses.replace(config.algo, name=given["algorithm"])
    if isinstance(peft_config, LoraConfig):
        config.model = dataclasses.replace(config.model, lora=peft_config)
    validate(config)
    config.critic = resolve_critic(config)
    config.algo = resolve(with_staleness(config))
    config.bcoder = resolve_bcoder(config)
    if is_preference(config):
        config.preference, _ = resolve_preference(config)
    return config


def _data_config(config: DataConfig, dataset: Any) -> DataConfig:
    if dataset is None:
        return config
    return dataclasses.replace(config, path=dataset if isinstance(dataset, str) else GIVEN)


def _wants_eval(config: Config, given: dict[str, Any]) -> bool:
    return config.eval.data is not None or given["eval_dataset"] is not None


def precomputes_reference(config: Config) -> bool:
    """Whether the reference's log-probabilities of all rows are computed before the first step."""
    return config.preference is not None and bool(config.preference.precompute_ref_log_probs)


def _tasks(dataset: Any, config: DataConfig | None) -> list[Task]:
    from llmrl.data.tasks import load_tasks, tasks_from_rows

    config = config or DataConfig()
    if dataset is None or isinstance(dataset, str):
        return load_tasks(config)
    if isinstance(dataset, list) and dataset and isinstance(dataset[0], Task):
        return dataset
    return tasks_from_rows(dataset, config, "dataset")


def _rubric(config: Config, reward: Any) -> Rubric:
    from llmrl.verify.rubric import Rubric

    if reward is not None and not all(
        isinstance(r, str) for r in (reward if isinstance(reward, (list, tuple)) else [reward])
    ):
        return Rubric(list(reward) if isinstance(reward, (list, tuple)) else [reward])
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Rubric.from_config(
        config.rewards,
        config.verify,
        num_processes=num_processes,
        conversational=config.data.prompt_format == "chat",
    )


def _prompts(config: Config, tokenizer: Any, generation: Any, tasks: list[Task]) -> tuple[Chat, TaskSampler, list[str]]:
    """How prompts are rendered, the order of tasks (too long ones left out), and what to tell the user about it."""
    from llmrl.data.chat import Chat, filter_long
    from llmrl.data.sampler import TaskSampler

    chat = Chat(
        tokenizer,
        prompt_format=config.data.prompt_format,
        chat_template=config.data.chat_template,
        generation_config=generation,
    )
    chat.render(tasks[0].messages)
    notes = [f"{len(tasks)} tasks from {config.data.path}"]
    if config.data.max_prompt_length is not None:
        tasks, dropped = filter_long(tasks, chat, config.data.max_prompt_length)
        notes.append(f"{dropped} tasks left out: prompt longer than data.max_prompt_length tokens")
    sampler = TaskSampler(tasks, seed=config.train.seed, shuffle=config.data.shuffle)
    sampler.check(config.rollout.num_prompts)
    return chat, sampler, notes


def make_accelerator(config: Config) -> Accelerator:
    """What accelerate sees of the processes, checked against the launcher's.

    Raises:
        UserError: the launcher started processes that do not know of each other, or a kind of distribution that the
            learner does not support.
    """
    from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
    from accelerate.utils import set_seed

    accelerator = Accelerator(
        log_with=[*config.track.report_to] or None,
        project_dir=config.train.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)],
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise UserError(
            f"the launcher started {launched} processes, but each sees {accelerator.num_processes}: they would all "
            "train alone and write the same files. On CPU launch with ACCELERATE_USE_CPU=true and "
            "--multi_gpu --num_processes N"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError(
            f"accelerate is configured with gradient_accumulation_steps {accelerator.gradient_accumulation_steps}, "
            "which would scale the loss: remove it; train.max_tokens_per_micro_batch decides what is computed at once"
        )
    if accelerator.mixed_precision == "fp16":
        raise UserError("accelerate is configured with mixed_precision fp16, which is not supported: use bf16 or no")
    supported = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
    if accelerator.distributed_type not in supported:
        raise UserError(
            f"accelerate is configured for {accelerator.distributed_type.value}; this version trains in one process or "
            "with data parallelism (DDP): use recipes/accelerate/ddp.yaml"
        )
    set_seed(config.train.seed)
    return accelerator


def check_output_dir(config: Config, accelerator: Accelerator) -> bool:
    """Refuse to write over another run. Returns whether this one is resumed."""
    folder = Path(config.train.output_dir)
    if config.train.resume_from_checkpoint:
        from llmrl.run.checkpoint import find_checkpoint

        find_checkpoint(folder, config.train.resume_from_checkpoint)
        return True
    metrics = folder / "metrics.jsonl"
    if accelerator.is_main_process and metrics.is_file() and metrics.stat().st_size:
        raise UserError(
            f"train.output_dir {folder} already holds a run: choose another folder, or continue it with "
            "--train.resume_from_checkpoint last"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"train.output_dir {folder} cannot be created: {error}") from error
    return False


def make_algorithm(config: Config, rubric: Rubric | None = None) -> Algorithm:
    """The algorithm that `algo.name` names, told the names and weights of the rewards."""
    rewards = {name: part.weight for name, part in rubric.parts.items()} if rubric is not None else {}
    make = ALGORITHMS[FAMILIES.get(config.algo.name, "grpo")]
    algorithm = make(config, max_completion_length=config.rollout.max_completion_length, rewards=rewards)
    algo = resolve(config.algo)
    algorithm.num_iterations, algorithm.num_mini_batches = algo.num_iterations or 1, algo.num_mini_batches or 1
    return algorithm


def _make_grpo(config: Config, **options: Any) -> Algorithm:
    from llmrl.algo.policy_gradient.algorithm import GRPO

    return GRPO(config.algo, **options)


def _make_preference(config: Config, *, max_completion_length: int, **_: Any) -> Algorithm:
    from llmrl.algo.preference.dpo import DPO
    from llmrl.algo.preference.kto import KTO

    preference, _findings = resolve_preference(config)
    return (KTO if is_single(preference) else DPO)(preference, max_completion_length=max_completion_length)


def _make_ppo(config: Config, **options: Any) -> Algorithm:
    from llmrl.algo.ppo.algorithm import PPO

    critic = resolve_critic(config)
    assert critic is not None
    return PPO(config.algo, critic, **options)


def _make_bcoder(config: Config, *, max_completion_length: int, **_: Any) -> Algorithm:
    from llmrl.methods.bcoder.algorithm import BCoder

    assert config.bcoder is not None
    return BCoder(config.bcoder, max_completion_length=max_completion_length)


ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "grpo": _make_grpo,
    "ppo": _make_ppo,
    "dpo": _make_preference,
    "bcoder": _make_bcoder,
}
"""By family of presets (`FAMILIES`). Each imports what it needs only when it is called."""


def _console(config: Config, accelerator: Accelerator) -> Console:
    from llmrl.track.console import Console

    return Console(config.track.console, enabled=accelerator.is_main_process)


def _policy(
    config: Config,
    given: dict[str, Any],
    loaded: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    rubric: Rubric,
) -> tuple[Policy, Algorithm]:
    """The model, whole or with adapters, its critic and reference, and what trains it."""
    from llmrl.model.critic import build_critic
    from llmrl.model.load import add_lora, load_model

    model = load_model(config.model, tokenizer, seed=config.train.seed) if loaded is None else loaded
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.to(accelerator.device)  # pyright: ignore[reportArgumentType]
    critic = build_critic(config, model, tokenizer) if config.critic is not None else None
    adapters = given["peft_config"] or config.model.lora
    wrapped = model if adapters is None else add_lora(model, adapters, seed=config.train.seed)
    algorithm = make_algorithm(config, rubric)
    keep_reference = algorithm.needs.reference and not precomputes_reference(config)
    return make_policy(config, wrapped.to(accelerator.device), critic, keep_reference=keep_reference), algorithm


def _engine(config: Config, policy: Policy, accelerator: Accelerator, console: Console) -> tuple[Engine, WeightSync]:
    from llmrl.run.engines import engine_precision, make_engine
    from llmrl.run.sync import WeightSync

    causal_lm = policy.bare.causal_lm
    engine = make_engine(config, causal_lm, policy, accelerator, console.say)
    vocab_size = causal_lm.config.get_text_config().vocab_size
    return engine, WeightSync(policy, engine, vocab_size=vocab_size, **engine_precision(config))


def _files(config: Config, accelerator: Accelerator, *, resume: bool) -> tuple[Record | None, Ledger | None]:
    """The run's files, on the main process; and its trackers."""
    from llmrl.run.ledger import Ledger
    from llmrl.track.options import TrackConfig
    from llmrl.track.record import Record, environment, flatten

    record = ledger = None
    folder, plain = Path(config.train.output_dir), to_dict(config)
    if accelerator.is_main_process:
        found = environment(
            device=str(accelerator.device),
            num_processes=accelerator.num_processes,
            distributed_type=accelerator.distributed_type.value,
        )
        track = TrackConfig(**vars(config.track))
        record = Record(track, folder, plain, environment=found, log=accelerator.log, resume=resume)
        ledger = Ledger(folder / "ledger.jsonl")
    if config.track.report_to:
        accelerator.init_trackers(config.track.project, flatten(plain))
    return record, ledger


def _summary(config: Config, policy: Policy, learner: Learner, accelerator: Accelerator) -> str:
    """A line for the user: what is trained, on what, and where the run is."""
    trained = sum(p.numel() for p in learner.parameters)
    total = sum(p.numel() for p in policy.bare.parameters())
    return (
        f"{type(policy.bare.causal_lm).__name__}: {trained:,} of {total:,} parameters trained, "
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}, run directory {config.train.output_dir}"
    )
