"""B-Coder: learn from programs and their unit tests which program to trust; then rank, without running any test.

    python recipes/bcoder.py --config recipes/bcoder_tiny.yaml           # all of it on one CPU core, in a few minutes
    python recipes/bcoder.py --config recipes/bcoder_mbpp.yaml           # Qwen2.5-Coder on MBPP, one GPU

1 sample programs for training and held-out tasks, run their tests    programs.jsonl, held_out.jsonl
2 stage `value`: V of the model as it is                              value/
3 stage `policy`: Q, from conservative Bellman targets                policy/
4 rank the held-out programs, and compare                             summary.json

Without a model.path the tasks are made up (recipes/programs.py), and a tiny model is fine-tuned on buggy programs.
Parts that are there already are not done again. The same in single steps: `llmrl eval --save_samples`, `llmrl train`
twice (with `--algo.name bcoder --algo.stage value`, then `policy`), `llmrl eval --rerank bcoder`.

All of it runs in one process. To train on several, take the steps apart; only the stages use more than one:

    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/train.py --algo.name bcoder --algo.stage ...
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from dataclasses import field
from pathlib import Path
from typing import Any

from llmrl.config import MISSING, Config, DataConfig, EvalRun, parse
from llmrl.errors import UserError, run_main
from llmrl.methods.bcoder.options import BCoderOptions, PolicyStage, ValueStage
from llmrl.option import Count, NotNegative, Positive, Share, option
from llmrl.types import RolloutGroup
from llmrl.verify.spec import load_file

PROGRAMS = load_file(Path(__file__).resolve().with_name("programs.py"))
"""recipes/programs.py. Loaded by its path, because a recipe may be run as a file, installed, or loaded by a test."""
HELD_OUT_SEED = 1_000_003
"""Held-out programs are drawn with another seed than those for training."""


@option
class MadeUpConfig:
    """The made-up task and the model that is fine-tuned for it."""

    num_tasks: Count = 300
    """Tasks to train on."""
    num_held_out: Count = 100
    """Tasks to rank on."""
    mistaken_frac: Share = 0.5
    """In the corpus: share of the lines of commonly mistaken words that are wrong ..."""
    slip_frac: Share = 0.04
    """... and share of all lines that are wrong in some other way."""
    num_examples: Count = 6400
    """Programs of the corpus."""
    max_steps: Count = 600
    """Of 16 examples each."""
    learning_rate: Positive = 3e-3
    """Peak learning rate."""
    hidden_size: Count = 96
    """Width of the model."""


@option
class ValueRun:
    """The stage `value`."""

    max_steps: Count = 300
    """Its length."""
    learning_rate: NotNegative = 1e-3
    """Its learning rate, which is constant."""
    stage: ValueStage = field(default_factory=ValueStage)
    """What only this stage reads."""


@option
class PolicyRun:
    """The stage `policy`."""

    max_steps: Count = 300
    """Its length."""
    learning_rate: NotNegative = 1e-3
    """Its learning rate, which falls linearly to 0."""
    stage: PolicyStage = field(default_factory=PolicyStage)
    """What only this stage reads."""


@option
class BCoderRun(Config):
    """B-Coder in four steps. `train.max_steps` and `learning_rate` are those of the stages."""

    held_out: DataConfig | None = None
    """Tasks to rank on. Read when `model.path` is given."""
    made_up: MadeUpConfig = field(default_factory=MadeUpConfig)
    """Read when `model.path` is not given."""
    num_samples: Count = 16
    """Programs sampled for each task, for training and for ranking."""
    value: ValueRun = field(default_factory=ValueRun)
    """The stage `value`."""
    policy: PolicyRun = field(default_factory=PolicyRun)
    """The stage `policy`."""


def main() -> None:
    config = parse(config_class=BCoderRun)
    check_arguments(config)
    folder = Path(config.train.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if config.model.path == MISSING:
        config = make_up(config, folder)
    assert config.held_out is not None
    programs, held_out = folder / "programs.jsonl", folder / "held_out.jsonl"
    asyncio.run(sample(config, config.data, programs, seed=config.train.seed))
    groups = asyncio.run(sample(config, config.held_out, held_out, seed=config.train.seed + HELD_OUT_SEED))
    first = train(config, config.value, config.model.path, programs)
    second = train(config, config.policy, str(first), programs)
    summary = compare(groups, first, second)
    (folder / "summary.json").write_text(json.dumps(summary | {"seed": config.train.seed}, indent=2) + "\n")
    show(summary)


def check_arguments(config: BCoderRun) -> None:
    """Check what goes together before anything is made.

    Raises:
        UserError: options that do not go together.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "recipes/bcoder.py runs in one process: start it with python. To train on several, start a stage alone: "
            "accelerate launch recipes/train.py --algo.name bcoder --algo.stage ..."
        )
    if not isinstance(config.algo, BCoderOptions):
        raise UserError(f"algo.name is {config.algo.name}, but this recipe trains B-Coder: set algo.name bcoder")
    if config.algo.stage != ValueStage():
        raise UserError(
            "algo.stage is given, but this recipe runs both stages: give value.stage.hidden_size or policy.stage.q_coef"
        )
    if (config.model.path == MISSING) != (config.data.path == MISSING):
        raise UserError("give both model.path and data.path, or neither (then a task and a model are made up)")
    if config.model.path != MISSING and config.held_out is None:
        raise UserError("held_out is not given: say which tasks are ranked (held_out.path)")


def make_up(config: BCoderRun, folder: Path) -> BCoderRun:
    """Make tasks, held-out tasks and a model that gets some of them right. Return the configuration with these."""
    options, seed = vars(config.made_up).copy(), config.train.seed
    num_tasks, num_held_out = options.pop("num_tasks"), options.pop("num_held_out")
    drawn = PROGRAMS.draw_programs(num_tasks + num_held_out, seed=seed)
    for name, programs in (("tasks.jsonl", drawn[:num_tasks]), ("held_out_tasks.jsonl", drawn[num_tasks:])):
        (folder / name).write_text("".join(json.dumps(PROGRAMS.task_row(program)) + "\n" for program in programs))
    place = folder / "warm_start"
    PROGRAMS.fine_tune_on_corpus(drawn[:num_tasks], place, **options, seed=seed)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=str(place)),
        data=dataclasses.replace(config.data, path=str(folder / "tasks.jsonl")),
        held_out=dataclasses.replace(config.data, path=str(folder / "held_out_tasks.jsonl")),
    )


async def sample(config: BCoderRun, data: DataConfig, file: Path, *, seed: int) -> list[RolloutGroup]:
    """Return programs of the model as it is, with their outcomes; written to `file`, or read from it."""
    from llmrl.run.evaluation import Evaluator, read_samples, write_samples

    if not file.is_file():
        rollout = dataclasses.replace(config.rollout, num_generations=config.num_samples, num_prompts=16)
        options = EvalRun(
            model=config.model, data=data, rollout=rollout, rewards=config.rewards, verify=config.verify, seed=seed
        )
        async with Evaluator(options) as evaluator:
            groups = await evaluator.sample()
        write_samples(groups, file)
        scores = [r.score.reward for group in groups for r in group.rollouts if r.score and r.score.reward is not None]
        passed = sum(score >= 1 for score in scores) / len(scores)
        print(f"{file.name}: {len(scores)} programs of {len(groups)} tasks, {passed:.1%} pass", flush=True)
    return read_samples(file)


def train(config: BCoderRun, run: ValueRun | PolicyRun, model: str, programs: Path) -> Path:
    """Run one stage, starting from `model`. Return the folder of its model."""
    from llmrl import Trainer

    first = isinstance(run, ValueRun)
    folder = Path(config.train.output_dir) / run.stage.kind
    if (folder / "model").is_dir():
        return folder / "model"
    assert isinstance(config.algo, BCoderOptions)
    args = Config(
        model=dataclasses.replace(config.model, path=model, lora=None if first else config.model.lora),
        data=dataclasses.replace(config.data, path=str(programs)),
        rollout=config.rollout,
        rewards=config.rewards,
        verify=config.verify,
        algo=dataclasses.replace(config.algo, stage=run.stage),
        train=dataclasses.replace(
            config.train,
            output_dir=str(folder),
            max_steps=run.max_steps,
            learning_rate=run.learning_rate,
            lr_scheduler_type="constant" if first else "linear",
        ),
        track=config.track,
    )
    Trainer(args).train()
    return folder / "model"


def compare(groups: list[RolloutGroup], first: Path, second: Path) -> dict[str, Any]:
    """Return how often the first-ranked program of a task passes, for several ways to rank the same programs."""
    from llmrl.methods.bcoder.rerank import Ranker
    from llmrl.run.evaluation import best_device
    from llmrl.track.ranking import mean_logprob_scores, ranking_rates

    device, accuracy = best_device(), next(iter(groups[0].rollouts[0].score.parts))  # type: ignore[union-attr]
    scores = {
        "mean log-probability": mean_logprob_scores(groups),
        "before training (value stage)": Ranker.load(first, device=device).score_groups(groups),
        "bcoder": Ranker.load(second, device=device).score_groups(groups),
        "bcoder, exact": Ranker.load(second, device=device, exact=True).score_groups(groups),
    }
    found = {name: ranking_rates(groups, values, accuracy=accuracy) for name, values in scores.items()}
    some = next(iter(found.values()))
    return {
        "num_tasks": len(groups),
        "num_samples": len(groups[0].rollouts),
        "random": some["random"],
        "oracle": some["oracle"],
        "ranked": {name: rates["ranked"] for name, rates in found.items()},
    }


def show(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"pass@1 on {summary['num_tasks']} held-out tasks, {summary['num_samples']} programs each")
    table.add_column("choice")
    table.add_column("pass@1", justify="right")
    rows = {"random": summary["random"], **summary["ranked"], "oracle": summary["oracle"]}
    for name, value in rows.items():
        table.add_row(name, f"{value:.3f}")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    run_main(main)
