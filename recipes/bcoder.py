"""B-Coder: learn from programs and their unit tests which program to trust; then rank, without running any test.

    python recipes/bcoder.py --config recipes/bcoder_tiny.yaml           # all of it on one CPU core, in a few minutes
    python recipes/bcoder.py --config recipes/bcoder_mbpp.yaml           # Qwen2.5-Coder on MBPP, one GPU

1 sample programs for training and held-out tasks, run their tests    programs.jsonl, held_out.jsonl
2 stage `value`: V of the model as it is                              value/
3 stage `policy`: Q, from conservative Bellman targets                policy/
4 rank the held-out programs, and compare                             summary.json

Without a model.path the tasks are made up (recipes/programs.py), and a tiny model is fine-tuned on buggy programs.
Parts that are there already are not done again. In its steps: `llmrl eval --save_samples`, `llmrl train` twice (with
`--algo.name bcoder --bcoder.stage value`, then `policy`), `llmrl eval --rerank bcoder`.

The whole is one process. To train on several, take the steps apart; only the stages use more than one:

    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/grpo.py --algo.name bcoder --bcoder.stage ...
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmrl.config import MISSING, BCoderConfig, Config, DataConfig, EvalRun, parse
from llmrl.errors import UserError, run_main
from llmrl.types import RolloutGroup
from llmrl.verify.spec import load_file

PROGRAMS = load_file(Path(__file__).resolve().with_name("programs.py"))
"""recipes/programs.py. Loaded by its path, because a recipe may be run as a file, installed, or loaded by a test."""
HELD_OUT_SEED = 1_000_003
"""Held-out programs are drawn with another seed than those for training."""


@dataclass
class MadeUpConfig:
    """The made-up task and the model that is fine-tuned for it."""

    num_tasks: int = 300
    num_held_out: int = 100
    mistaken_frac: float = 0.5
    """In the corpus: share of the lines of commonly mistaken words that are wrong ..."""
    slip_frac: float = 0.04
    """... and share of all lines that are wrong in some other way."""
    num_examples: int = 6400
    max_steps: int = 600
    """Of 16 examples each."""
    learning_rate: float = 3e-3
    hidden_size: int = 96


@dataclass
class StageConfig:
    """The length of one stage."""

    max_steps: int = 300
    learning_rate: float = 1e-3


@dataclass
class BCoderRun(Config):
    """B-Coder in four steps. `train.max_steps` and `learning_rate` are those of the stages."""

    held_out: DataConfig | None = None
    """Tasks to rank on. Read when `model.path` is given."""
    made_up: MadeUpConfig = field(default_factory=MadeUpConfig)
    """Read when `model.path` is not given."""
    num_samples: int = 16
    """Programs sampled for each task, for training and for ranking."""
    value: StageConfig = field(default_factory=StageConfig)
    policy: StageConfig = field(default_factory=StageConfig)


def main() -> None:
    config: BCoderRun = parse(config_class=BCoderRun)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "recipes/bcoder.py runs in one process: start it with python. To train on several, start a stage alone: "
            "accelerate launch recipes/grpo.py --algo.name bcoder --bcoder.stage ..."
        )
    if (config.model.path == MISSING) != (config.data.path == MISSING):
        raise UserError("give both model.path and data.path, or neither (then a task and a model are made up)")
    if config.model.path != MISSING and config.held_out is None:
        raise UserError("held_out is not given: say which tasks are ranked (held_out.path)")
    folder = Path(config.train.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if config.model.path == MISSING:
        make_up(config, folder)
    assert config.held_out is not None
    programs, held_out = folder / "programs.jsonl", folder / "held_out.jsonl"
    asyncio.run(sample(config, config.data, programs, seed=config.train.seed))
    groups = asyncio.run(sample(config, config.held_out, held_out, seed=config.train.seed + HELD_OUT_SEED))
    first = train(config, folder / "value", "value", config.value, config.model.path, programs)
    second = train(config, folder / "policy", "policy", config.policy, str(first), programs)
    summary = compare(groups, first, second)
    (folder / "summary.json").write_text(json.dumps(summary | {"seed": config.train.seed}, indent=2) + "\n")
    show(summary)


def make_up(config: BCoderRun, folder: Path) -> None:
    """Tasks, held-out tasks and a model that gets some of them right; `config` then points to them."""
    options, seed = vars(config.made_up).copy(), config.train.seed
    num_tasks, num_held_out = options.pop("num_tasks"), options.pop("num_held_out")
    drawn = PROGRAMS.draw_programs(num_tasks + num_held_out, seed=seed)
    for name, programs in (("tasks.jsonl", drawn[:num_tasks]), ("held_out_tasks.jsonl", drawn[num_tasks:])):
        (folder / name).write_text("".join(json.dumps(PROGRAMS.task_row(program)) + "\n" for program in programs))
    place = folder / "warm_start"
    PROGRAMS.fine_tune_on_corpus(drawn[:num_tasks], place, **options, seed=seed)
    config.model.path = str(place)
    config.data.path = str(folder / "tasks.jsonl")
    config.held_out = dataclasses.replace(config.data, path=str(folder / "held_out_tasks.jsonl"))


async def sample(config: BCoderRun, data: DataConfig, file: Path, *, seed: int) -> list[RolloutGroup]:
    """Programs of the model as it is, with their outcomes; written to `file`, or read from it."""
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


def train(
    config: BCoderRun,
    folder: Path,
    stage: Literal["value", "policy"],
    length: StageConfig,
    model: str,
    programs: Path,
) -> Path:
    """One stage; returns the folder of its model."""
    from llmrl import Trainer

    if (folder / "model").is_dir():
        return folder / "model"
    given = dataclasses.replace(config.bcoder or BCoderConfig(), stage=stage)
    # Each stage is given what it reads.
    dropped = ("q_coef", "adv_coef", "ce_coef") if stage == "value" else ("value_hidden_size",)
    given = dataclasses.replace(given, **dict.fromkeys(dropped))
    args = Config(
        model=dataclasses.replace(config.model, path=model, lora=None if stage == "value" else config.model.lora),
        data=dataclasses.replace(config.data, path=str(programs)),
        rollout=config.rollout,
        rewards=config.rewards,
        verify=config.verify,
        algo=dataclasses.replace(config.algo, name="bcoder"),
        bcoder=given,
        train=dataclasses.replace(
            config.train,
            output_dir=str(folder),
            max_steps=length.max_steps,
            learning_rate=length.learning_rate,
            lr_scheduler_type="constant" if stage == "value" else "linear",
        ),
        track=config.track,
    )
    Trainer(args).train()
    return folder / "model"


def compare(groups: list[RolloutGroup], first: Path, second: Path) -> dict[str, Any]:
    """How often the first-ranked program of a task passes, for several ways to rank the same programs."""
    from llmrl.methods.bcoder.rerank import Ranker, mean_logprob_scores, ranking_rates
    from llmrl.run.evaluation import best_device

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
