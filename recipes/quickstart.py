"""From nothing to a model that learns by reinforcement, in one to two minutes on one CPU core.

    accelerate launch recipes/quickstart.py --config recipes/quickstart.yaml --train.output_dir runs/quickstart

A tiny model is built from a configuration and warm-started by supervised fine-tuning (TRL's SFTTrainer) on additions,
most of them answered directly, some with a scratchpad, until it is correct a third to half of the time. Then GRPO with
`rewards/math_answer.py` takes over. Nothing tells the model that writing the scratchpad pays; it finds out. Expect
held-out greedy accuracy to rise from about 0.5 to above 0.95, and completions to grow from about 15 to 23 tokens.

Run it again with the folder of an unfinished run to continue that run.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import string
import time
from collections.abc import Callable
from dataclasses import field, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from annotated_types import Ge, Le

from llmrl.config import Config, DataConfig, check, parse
from llmrl.errors import run_main
from llmrl.option import Count, Natural, Positive, Share, option

THINK, END_THINK, BOX = "<think>", "</think>", "\\boxed{"
ALPHABET = "\n" + string.digits + string.ascii_letters + string.punctuation + " "
NUM_HELD_OUT = 256
"""Held-out prompts in the table."""


@option
class WarmStartConfig:
    """The supervised start: it stops when the model is correct often enough to learn from its own attempts."""

    target: Share = 0.33
    """Stop when sampled accuracy on held-out prompts reaches this ..."""
    scratchpad_target: Share = 0.85
    """... and answers with a scratchpad are correct this often: what never succeeds cannot be reinforced."""
    enough: Share = 0.45
    """Always stop when sampled accuracy reaches this, to leave something to learn."""
    min_steps: Natural = 500
    """Check for the first time after this many steps."""
    max_steps: Count = 1600
    """Stop here at the latest."""
    check_every: Count = 50
    """Check every `check_every` steps."""
    learning_rate: Positive = 2e-3
    """Peak learning rate; it falls linearly to 0 at `max_steps`."""
    scratchpad_frac: Share = 0.4
    """Share of the examples that show their work."""


@option
class QuickstartConfig(Config):
    """The quickstart: a run and its warm start."""

    digits: Annotated[int, Ge(2), Le(9)] = 2
    """Digits of each number: one gives too few additions to hold any out; with 3, answers without a scratchpad are
    hardly ever correct."""
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    """The supervised start."""


# --- the task ---------------------------------------------------------------------------------------------------------


def pairs(*, held_out: bool, digits: int = 2) -> list[tuple[int, int]]:
    """Return the pairs of numbers on one side of the split: all with 2 digits, 8,000 random ones with more."""
    if digits == 2:
        everything = ((a, b) for a in range(100) for b in range(100))
        return [pair for pair in everything if is_held_out(*pair) == held_out]
    draw, found = random.Random(7), []
    while len(found) < 8000:
        pair = draw.randrange(10**digits), draw.randrange(10**digits)
        if is_held_out(*pair) == held_out:
            found.append(pair)
    return found


def is_held_out(a: int, b: int) -> bool:
    return (7919 * a + 104729 * b) % 17 == 0


def prompt(a: int, b: int, digits: int = 2) -> str:
    return f"Compute {a:0{digits}d}+{b:0{digits}d}\n"


def completion(a: int, b: int, *, scratchpad: bool, digits: int = 2) -> str:
    """Return a correct answer; the scratchpad adds digit by digit from the right, with the carry."""
    work, carry = [], 0
    for x, y in zip(reversed(f"{a:0{digits}d}"), reversed(f"{b:0{digits}d}"), strict=True):
        total = int(x) + int(y) + carry
        work.append(f"{x}+{y}+{carry}={total}")
        carry = total // 10
    return f"{THINK}{','.join(work) if scratchpad else ''}{END_THINK}{BOX}{a + b}}}"


def rows(chosen: list[tuple[int, int]], digits: int = 2) -> list[dict[str, Any]]:
    return [{"prompt": prompt(a, b, digits), "answer": str(a + b)} for a, b in chosen]


def held_out_rows(digits: int = 2) -> list[dict[str, Any]]:
    """Return the rows that the table is measured on, the same for every seed."""
    return rows(random.Random(0).sample(pairs(held_out=True, digits=digits), NUM_HELD_OUT), digits)


# --- warm start -------------------------------------------------------------------------------------------------------


def warm_start(config: QuickstartConfig, folder: Path) -> None:
    """Build model and tokenizer, fine-tune until the gate opens, and save both in `folder` (whole or not at all)."""
    from llmrl.tiny import build_tiny_model, char_tokenizer, fine_tune

    start, cpu = time.perf_counter(), time.process_time()
    unfinished = folder.with_name(folder.name + ".writing")
    seed, options = config.train.seed, config.warm_start
    tokenizer = char_tokenizer(ALPHABET, [THINK, END_THINK, BOX])
    model = build_tiny_model(
        "qwen2",
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=288,
        max_position_embeddings=128,
        seed=seed,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    draw = random.Random(seed)
    examples = []
    for a, b in draw.choices(pairs(held_out=False, digits=config.digits), k=16 * 750):
        scratchpad = draw.random() < options.scratchpad_frac
        answer = completion(a, b, scratchpad=scratchpad, digits=config.digits)
        examples.append({"prompt": prompt(a, b, config.digits), "completion": answer})
    num_steps = fine_tune(
        model,
        tokenizer,
        examples,
        output_dir=unfinished,
        max_steps=options.max_steps,
        learning_rate=options.learning_rate,
        seed=seed,
        stop=make_gate(config, model, tokenizer),
    )
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    report = {
        "steps": num_steps,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
    }
    (unfinished / "warm_start.json").write_text(json.dumps(report))
    unfinished.rename(folder)


def make_gate(config: QuickstartConfig, model: Any, tokenizer: Any) -> Callable[[int], bool]:
    """Return a function that samples from the model at some steps and returns True when it is good enough."""
    from llmrl.data.chat import Chat
    from llmrl.engines.hf.engine import HFEngine
    from llmrl.model.policy import Policy
    from llmrl.rollout.collector import request_seed
    from llmrl.types import Sampling
    from llmrl.verify.reward import resolve

    options = config.warm_start
    chat = Chat(tokenizer, prompt_format="text")
    spec, fixed = config.rewards[0].fn, config.rewards[0].args
    reward = resolve(spec) if isinstance(spec, str) else spec
    questions = held_out_rows(config.digits)[:64]

    async def measure(step: int) -> tuple[float, float]:
        """Return (accuracy, accuracy of the answers that show their work)."""
        policy = Policy(model, temperature=1.0, keep_reference=False)
        engine = HFEngine(model.config, weights=policy.weights, max_num_seqs=128)

        async def attempt(index: int, row: dict[str, Any]) -> tuple[float, bool]:
            sampling = Sampling(
                max_tokens=config.rollout.max_completion_length,
                stop_token_ids=chat.stop_token_ids,
                seed=request_seed(config.train.seed, "gate", step, index),
            )
            prompt_ids = chat.render([{"role": "user", "content": row["prompt"]}])
            drawn = await engine.generate(prompt_ids, sampling, session=str(index))
            text = chat.decode(drawn.token_ids)
            verdict = reward(completion=text, answer=row["answer"], **fixed)
            return verdict.reward or 0.0, not text.startswith(THINK + END_THINK)

        outcomes = await asyncio.gather(*(attempt(i, questions[i // 4]) for i in range(4 * len(questions))))
        await engine.close()
        worked = [correct for correct, shows_work in outcomes if shows_work]
        return fmean(correct for correct, _ in outcomes), fmean(worked or [0.0])

    def gate(step: int) -> bool:
        if step < options.min_steps or step % options.check_every:
            return False
        model.eval()
        accuracy, worked = asyncio.run(measure(step))
        model.train()
        goal = f"(stops at {options.target} and {options.scratchpad_target}, or at {options.enough})"
        print(
            f"warm start: step {step}, held-out accuracy {accuracy:.2f}, with scratchpad {worked:.2f} {goal}",
            flush=True,
        )
        ready = accuracy >= options.target and worked >= options.scratchpad_target
        return ready or accuracy >= options.enough

    return gate


# --- reinforcement ----------------------------------------------------------------------------------------------------


async def reinforce(config: QuickstartConfig, folder: Path) -> dict[str, Any]:
    """Train with GRPO from the warm start and return the table's numbers before and after."""
    from llmrl import Trainer
    from llmrl.data.tasks import tasks_from_rows

    tasks = rows(pairs(held_out=False, digits=config.digits), config.digits)
    trainer = Trainer(config, train_dataset=tasks)
    held_out = tasks_from_rows(held_out_rows(config.digits), DataConfig(), "additions")

    async def measure() -> dict[str, Any]:
        greedy, groups = await trainer.evaluate(held_out)
        sampled, _ = await trainer.evaluate(held_out, num_generations=8, temperature=1.0)
        return {
            "greedy": greedy["reward/pass@1"],
            "pass@1": sampled["reward/pass@1"],
            "pass@8": sampled["reward/pass@8"],
            "samples": [(g.task.messages[0]["content"], g.rollouts[0].completion) for g in groups[:3]],
        }

    async with trainer:
        # A resumed run no longer has the model from before, so its numbers are kept in a file.
        before_file = folder / "before.json"
        if not before_file.is_file():
            write_json(before_file, await measure())
        start, cpu = time.perf_counter(), time.process_time()
        await trainer.fit()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        after = await measure()
    return {
        "before": json.loads(before_file.read_text()),
        "after": after,
        "seconds": {"grpo": seconds},
        "cpu_seconds": {"grpo": cpu_seconds},
    }


# --- the program ------------------------------------------------------------------------------------------------------


def main() -> None:
    config = parse(config_class=QuickstartConfig)
    folder = Path(config.train.output_dir)
    started = folder / "warm_start"
    config = replace(
        config, model=replace(config.model, path=str(started)), data=replace(config.data, path="additions")
    )
    check(config)
    config = prepare_folder(folder, config)
    begin = time.perf_counter()
    if not started.is_dir():
        print(f"warm start: supervised fine-tuning, at most {config.warm_start.max_steps} steps", flush=True)
        warm_start(config, started)
    result = asyncio.run(reinforce(config, folder))
    report = json.loads((started / "warm_start.json").read_text())
    result["seconds"] |= {"warm_start": report["seconds"], "total": time.perf_counter() - begin}
    result["cpu_seconds"]["warm_start"] = report["cpu_seconds"]
    show(result, folder)
    write_json(folder / "summary.json", {**result, "seed": config.train.seed, "warm_start_steps": report["steps"]})


def prepare_folder(folder: Path, config: QuickstartConfig) -> QuickstartConfig:
    """Rename the folder of a finished run. Return the configuration, which continues an unfinished one."""
    if (folder / "summary.json").is_file():
        aside = next(p for i in range(1, 10_000) if not (p := folder.with_name(f"{folder.name}.{i}")).exists())
        folder.rename(aside)
        print(f"{folder} held a finished run, which is now in {aside}")
    elif (folder / "metrics.jsonl").is_file():
        config = replace(config, train=replace(config.train, resume_from_checkpoint="last"))
    folder.mkdir(parents=True, exist_ok=True)
    return config


def show(result: dict[str, Any], folder: Path) -> None:
    """Print the table, three samples before and after, and the folder of the run."""
    from rich.console import Console
    from rich.table import Table

    out = Console(highlight=False)
    table = Table(title=f"Accuracy on {NUM_HELD_OUT} held-out additions")
    for column in ("", "greedy", "pass@1", "pass@8"):
        table.add_column(column, justify="left" if not column else "right")
    for name in ("before", "after"):
        table.add_row(name, *(f"{result[name][key]:.3f}" for key in ("greedy", "pass@1", "pass@8")))
    out.print(table)
    for (question, before), (_, after) in zip(result["before"]["samples"], result["after"]["samples"], strict=True):
        out.print(f"{question.strip()}\n  before  {before}\n  after   {after}", markup=False)
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in result["seconds"].items())
    out.print(f"{seconds}\nrun directory: {folder}", markup=False)


def write_json(file: Path, value: Any) -> None:
    """Write a small JSON file, whole or not at all: the run may be killed at any moment."""
    unfinished = file.with_name(file.name + ".writing")
    unfinished.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(unfinished, file)


if __name__ == "__main__":
    run_main(main)
