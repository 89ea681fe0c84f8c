"""IRCoCo: an evaluator of prefixes pays every token of a code completion at once, in place of one reward at its end.

    python recipes/ircoco/train.py --config recipes/ircoco_tiny.yaml     # all of it on one CPU core, in a few minutes
    python recipes/ircoco/train.py --config recipes/ircoco_py150.yaml    # lines of Py150, one GPU

1 measure the model on held-out completions                           before.json
2 fit the evaluator to prefixes and what the model makes of them      evaluator/
3 train, every token paid what the evaluator gains with it            dense/
4 train as long on the true metric at the end                         terminal_PRESET/, for each of `terminal`
5 measure again, and compare                                          summary.json

Without a model.path the task is made up (recipes/programs.py), and a tiny model is fine-tuned on buggy programs.
Parts that are there already are not done again. `algo.name` is ircoco, or ppo (tokens are paid through a critic then).

All of it runs in one process. To train on several, with an evaluator that is there (config.yaml in dense/ names it):

    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/train.py --config runs/ircoco/dense/config.yaml
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from llmrl.algo.policy_gradient.options import NoBaseline, PolicyGradient, PolicyLossOptions, TokenRewards
from llmrl.algo.ppo.options import PPO
from llmrl.config import (
    MISSING,
    PRESETS,
    AlgorithmOptions,
    Config,
    DataConfig,
    EvalRun,
    RewardConfig,
    check,
    complete,
    parse,
    preset,
)
from llmrl.errors import UserError, run_main
from llmrl.option import Count, Positive, Share, option
from llmrl.verify.spec import load_file

HERE = Path(__file__).resolve()
# Neighbors are loaded by their path, because a recipe may be run as a file, installed, or loaded by a test.
if TYPE_CHECKING:
    from recipes import programs
    from recipes.ircoco.options import PrefixEvaluatorConfig, SamplePrefixes
else:
    programs, OPTIONS = load_file(HERE.parents[1] / "programs.py"), load_file(HERE.with_name("options.py"))
    PrefixEvaluatorConfig, SamplePrefixes = OPTIONS.PrefixEvaluatorConfig, OPTIONS.SamplePrefixes

REWARD = "rewards/ircoco.py:ircoco"
NUM_SAMPLES = 4
"""Completions of each held-out task, beside the greedy one."""
T = TypeVar("T")


@option
class MadeUpConfig:
    """The made-up task and the model that is fine-tuned for it."""

    num_tasks: Count = 400
    """Tasks to train on."""
    num_held_out: Count = 150
    """Tasks to measure on."""
    mistaken_frac: Share = 0.5
    """In the corpus: share of the lines of commonly mistaken words that are wrong ..."""
    slip_frac: Share = 0.0
    """... and share of all lines that are wrong in some other way."""
    num_examples: Count = 6400
    """Programs of the corpus."""
    max_steps: Count = 400
    """Of 16 examples each."""
    learning_rate: Positive = 3e-3
    """Peak learning rate."""
    hidden_size: Count = 96
    """Width of the model."""


@option
class IRCoCoRun(Config):
    """IRCoCo. `rewards` are the recipe's own."""

    held_out: DataConfig | None = None
    """Tasks to measure on. Read when `model.path` is given."""
    made_up: MadeUpConfig = field(default_factory=MadeUpConfig)
    """Read when `model.path` is not given."""
    evaluator: PrefixEvaluatorConfig = field(default_factory=PrefixEvaluatorConfig)
    """What pays the tokens."""
    boundary: Literal["token", "line"] = "token"
    """Where the evaluator is looked at: after every token, or where lines end."""
    terminal: list[str] = field(default_factory=list)
    """Presets that are trained too, for as many steps, on the true metric at the end of the completion. What else is
    given under `algo` is theirs too, as far as they have it."""


def main() -> None:
    config = parse(config_class=IRCoCoRun)
    folder = Path(config.train.output_dir)
    made_up = check_arguments(config)
    if made_up:
        config = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, path=str(folder / "warm_start")),
            data=dataclasses.replace(config.data, path=str(folder / "tasks.jsonl")),
            held_out=dataclasses.replace(config.data, path=str(folder / "held_out_tasks.jsonl")),
        )
    runs = plan(config, folder)
    folder.mkdir(parents=True, exist_ok=True)
    if made_up:
        make_up(config, folder)
    report = fit_evaluator(config, folder / "evaluator")
    before = measure(config, config.model.path, folder / "before.json")
    found = {"before": before} | {name: train(config, args) for name, args in runs.items()}
    (folder / "summary.json").write_text(
        json.dumps({"evaluator": report, **found, "seed": config.train.seed}, indent=2) + "\n"
    )
    show(found, report)


# --- what will be done ------------------------------------------------------------------------------------------------


def check_arguments(config: IRCoCoRun) -> bool:
    """Return whether task and model are made up.

    Raises:
        UserError: options that do not go together.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "recipes/ircoco/train.py runs in one process: start it with python. To train on several, with an evaluator "
            "that is there: accelerate launch recipes/train.py --config OUTPUT_DIR/dense/config.yaml"
        )
    made_up = config.model.path == MISSING
    if made_up != (config.data.path == MISSING):
        raise UserError("give both model.path and data.path, or neither (then a task and a model are made up)")
    if not made_up and config.held_out is None:
        raise UserError("held_out is not given: say which tasks are measured on (held_out.path)")
    if config.rewards:
        raise UserError(f"rewards is given, but this recipe trains on {REWARD}: leave it out")
    if found := config.evaluator.findings():
        raise UserError("configuration:\n" + "\n".join(f"  - {line}" for line in found))
    return made_up


def plan(config: IRCoCoRun, folder: Path) -> dict[str, Config]:
    """Return the runs: `dense`, and one for each preset in `terminal`.

    Raises:
        UserError: a run that could not begin, or whose algorithm does not pay single tokens.
    """
    if not pays_tokens(config.algo):
        raise UserError(
            f"algo.name {config.algo.name} as it is given does not pay single tokens, as IRCoCo does: use ircoco "
            "(algo.baseline token_rewards) or ppo (algo.use_token_rewards true)"
        )
    runs = {"dense": run_config(config, folder / "dense", config.algo)}
    for name in config.terminal:
        runs[f"terminal {name}"] = run_config(config, folder / f"terminal_{name}", terminal(config.algo, name))
    for args in runs.values():
        check(complete(args))
    return runs


def pays_tokens(algo: AlgorithmOptions) -> bool:
    """Return whether an algorithm pays each token its own reward."""
    if isinstance(algo, PPO):
        return algo.use_token_rewards
    return isinstance(algo, PolicyGradient) and isinstance(algo.baseline, TokenRewards)


def terminal(dense: AlgorithmOptions, name: str) -> AlgorithmOptions:
    """Return the preset `name` with what was given for the run `dense`, but paid at the end of the completion.

    Raises:
        UserError: there is no such preset, or it is not one of policy gradients.
    """
    known = [known for known, options in PRESETS.items() if isinstance(options, PolicyLossOptions)]
    if name not in known:
        raise UserError(f"terminal: {name} is not one of {', '.join(known)}")
    unpaid = ["baseline"] if isinstance(dense, PolicyGradient) else ["use_token_rewards"]
    algo = carry_over(dense, preset(dense.name), preset(name), leave_out=unpaid)
    if isinstance(algo, PPO):
        return dataclasses.replace(algo, use_token_rewards=False)
    if isinstance(algo, PolicyGradient) and isinstance(algo.baseline, TokenRewards):
        return dataclasses.replace(algo, baseline=NoBaseline())
    return algo


def carry_over(given: Any, default: Any, target: T, *, leave_out: Sequence[str] = ()) -> T:
    """Return `target` with the options in which `given` differs from `default`, as far as `target` has them."""
    changed: dict[str, Any] = {}
    for f in dataclasses.fields(cast("Any", target)):
        if f.name in {"name", "kind", *leave_out} or not hasattr(given, f.name):
            continue
        mine, before, there = (getattr(options, f.name) for options in (given, default, target))
        if mine != before:
            nested = dataclasses.is_dataclass(there) and type(mine) is type(before)
            changed[f.name] = carry_over(mine, before, there) if nested else mine
    return dataclasses.replace(cast("Any", target), **changed)


def run_config(config: IRCoCoRun, folder: Path, algo: AlgorithmOptions) -> Config:
    """Return the configuration of one run in `folder`; it is continued where it was interrupted."""
    reward = {
        "evaluator": str(Path(config.train.output_dir) / "evaluator"),
        "boundary": config.boundary,
        "pay_stop": isinstance(config.evaluator.prefixes, SamplePrefixes),
    }
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(Config)}
    unfinished = (folder / "metrics.jsonl").is_file() and not (folder / "model").is_dir()
    resume = "last" if unfinished else config.train.resume_from_checkpoint
    return Config(
        **given
        | {
            "algo": algo,
            "critic": config.critic if isinstance(algo, PPO) else None,
            "rewards": [RewardConfig(fn=REWARD, args=reward)],
            "train": dataclasses.replace(config.train, output_dir=str(folder), resume_from_checkpoint=resume),
        }
    )


# --- the parts --------------------------------------------------------------------------------------------------------


def make_up(config: IRCoCoRun, folder: Path) -> None:
    """Make tasks, held-out tasks, and a model that gets some of them right."""
    options, seed = vars(config.made_up).copy(), config.train.seed
    num_tasks, num_held_out = options.pop("num_tasks"), options.pop("num_held_out")
    drawn = programs.draw_programs(num_tasks + num_held_out, seed=seed)
    for name, chosen in (("tasks.jsonl", drawn[:num_tasks]), ("held_out_tasks.jsonl", drawn[num_tasks:])):
        rows = programs.completion_rows(chosen, seed=seed)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    programs.fine_tune_on_corpus(drawn[:num_tasks], Path(config.model.path), **options, seed=seed)


def fit_evaluator(config: IRCoCoRun, folder: Path) -> dict[str, float]:
    """Make the evaluator, unless it is there already. Return how well it predicts."""
    if TYPE_CHECKING:
        from recipes.ircoco import evaluator
    else:
        evaluator = load_file(HERE.with_name("evaluator.py"))
    file = folder / evaluator.REPORT
    if not file.is_file():
        from llmrl.data.chat import Chat
        from llmrl.data.checks import Checks
        from llmrl.data.prompts import PromptCheck
        from llmrl.data.tasks import load_tasks
        from llmrl.model.load import load_generation_config, load_model, load_tokenizer, model_limits
        from llmrl.rollout.tasks import TaskSet
        from llmrl.run.evaluation import best_device

        tasks, seed = load_tasks(config.data), config.train.seed
        if any(task.answer is None for task in tasks):
            raise UserError("data.answer_column: a task has no answer, the true completion")
        tokenizer = load_tokenizer(config.model)
        model: Any = load_model(dataclasses.replace(config.model, lora=None), tokenizer, seed=seed)
        model.to(best_device())
        chat = Chat(
            tokenizer,
            prompt_format=config.data.prompt_format,
            chat_template=config.data.chat_template,
            generation_config=load_generation_config(config.model),
        )
        prompts = PromptCheck(
            chat,
            model_limits(config.model),
            max_completion_length=config.rollout.max_completion_length,
            max_prompt_length=config.data.max_prompt_length,
        )
        found = TaskSet(tasks, config.data)
        found.check(Checks(prompts=prompts, columns=lambda _: []))
        tasks = found.tasks
        options = config.evaluator
        print(f"evaluator: {options.num_examples} examples from {options.prefixes.kind}", flush=True)
        if isinstance(options.prefixes, SamplePrefixes):
            limit = config.rollout.max_completion_length
            examples = evaluator.label_samples(model, chat, tasks, options, max_completion_length=limit, seed=seed)
        else:
            examples = evaluator.label_files(model, chat, tasks, options, seed=seed)
        evaluator.train_evaluator(examples, tokenizer, options, folder, policy=model, seed=seed)
    report = json.loads(file.read_text())
    print(
        f"evaluator: correlation {report['correlation']:.3f}, rmse {report['rmse']:.3f} on held-out examples",
        flush=True,
    )
    return report


def train(config: IRCoCoRun, args: Config) -> dict[str, float]:
    """Do one run. Return the scores of its model on the held-out tasks."""
    from llmrl import Trainer

    folder = Path(args.train.output_dir)
    if not (folder / "model").is_dir():
        Trainer(args).train()
    return measure(config, str(folder / "model"), folder / "held_out.json")


def measure(config: IRCoCoRun, model: str, file: Path) -> dict[str, float]:
    """Return edit similarity and exact match on the held-out tasks, greedy and sampled; kept in `file`."""
    if not file.is_file():
        greedy = asyncio.run(scores(config, model, num_generations=1, temperature=0.0))
        sampled = asyncio.run(scores(config, model, num_generations=NUM_SAMPLES, temperature=1.0))
        found = greedy | {f"sampled_{name}": value for name, value in sampled.items()}
        file.write_text(json.dumps(found, indent=2) + "\n")
    return json.loads(file.read_text())


async def scores(config: IRCoCoRun, model: str, **sampling: Any) -> dict[str, float]:
    from llmrl.run.evaluation import Evaluator

    assert config.held_out is not None
    options = EvalRun(
        model=dataclasses.replace(config.model, path=model, lora=None),
        data=config.held_out,
        rollout=dataclasses.replace(config.rollout, **sampling),
        rewards=run_config(config, Path(), config.algo).rewards,
        verify=config.verify,
        seed=config.train.seed,
    )
    async with Evaluator(options) as evaluator:
        groups = await evaluator.sample()
    parts = [r.score.parts for group in groups for r in group.rollouts if r.score and r.score.reward is not None]
    return {
        "edit_similarity": fmean(p["ircoco"] or 0.0 for p in parts),
        "exact_match": fmean(p["ircoco/exact_match"] or 0.0 for p in parts),
    }


def show(found: dict[str, dict[str, float]], report: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Held-out completions (evaluator's correlation {report['correlation']:.2f})")
    table.add_column("")
    names = list(found["before"])
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for run, values in found.items():
        table.add_row(run, *(f"{values[name]:.3f}" for name in names))
    Console(highlight=False).print(table)


if __name__ == "__main__":
    run_main(main)
