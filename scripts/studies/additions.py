"""Compare presets on three-digit additions, a task with headroom in greedy accuracy and in pass@16.

The examples of the warm start are mostly direct answers, often a scratchpad without carries, rarely one with carries.
All presets of a seed start from the same warm start and sample equally many tokens. Each run writes one JSON line.
"""

from __future__ import annotations

import asyncio
import json
import random
import string
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from llmrl import Trainer
from llmrl.config import (
    Config,
    DataConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    TrackConfig,
    TrainConfig,
    preset,
)
from llmrl.data.tasks import tasks_from_rows
from llmrl.tiny import build_tiny_model, char_tokenizer

THINK, END_THINK, BOX = "<think>", "</think>", "\\boxed{"
ALPHABET = "\n" + string.digits + string.ascii_letters + string.punctuation + " "
FORMS = {"direct": 0.5, "no_carry": 0.35, "carry": 0.15}
TOKEN_BUDGET = 150_000
"""Tokens that a run may sample, those of groups that dynamic sampling drops included."""
NUM_HELD_OUT = 128
ARMS: dict[str, dict[str, Any]] = {
    "grpo": {"name": "grpo"},
    "dapo": {"name": "dapo"},
    "lite_ppo": {"name": "lite_ppo"},
    "gspo": {"name": "gspo"},
    "cispo": {"name": "cispo"},
    "passk": {"name": "passk", "baseline": {"k": 4}},
    "thr p=0": {"name": "thr", "token_weighting": {"p": 0.0}},
    "thr p=+0.1": {"name": "thr", "token_weighting": {"p": 0.1}},
    "thr p=-0.1": {"name": "thr", "token_weighting": {"p": -0.1}},
}
"""Presets unchanged, except for two mini-batches each: with one, ratios are 1 and nothing is clipped."""


def is_held_out(a: int, b: int) -> bool:
    return (7919 * a + 104729 * b) % 17 == 0


def draw_pairs(generator: random.Random, count: int, *, held_out: bool) -> list[tuple[int, int]]:
    pairs: list[tuple[int, int]] = []
    while len(pairs) < count:
        pair = (generator.randrange(100, 1000), generator.randrange(100, 1000))
        if is_held_out(*pair) == held_out:
            pairs.append(pair)
    return pairs


def prompt(a: int, b: int) -> str:
    return f"Compute {a}+{b}\n"


def completion(a: int, b: int, form: str) -> str:
    """Return a correct answer with the scratchpad of the given form."""
    digits = [(int(x), int(y)) for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True)]
    work, carry = [], 0
    for x, y in digits:
        if form == "carry":
            work.append(f"{x}+{y}+{carry}={x + y + carry}")
            carry = (x + y + carry) // 10
        elif form == "no_carry":
            work.append(f"{x}+{y}={x + y}")
    return f"{THINK}{','.join(work)}{END_THINK}{BOX}{a + b}}}"


def rows(pairs: list[tuple[int, int]]) -> list[dict[str, Any]]:
    return [{"prompt": prompt(a, b), "answer": str(a + b)} for a, b in dict.fromkeys(pairs)]


def make_config(folder: str, model: str, seed: int, algo: dict[str, Any]) -> Config:
    return Config(
        model=ModelConfig(path=model),
        data=DataConfig(path="additions", prompt_format="text"),
        rollout=RolloutConfig(num_prompts=16, num_generations=8, max_completion_length=48),
        rewards=[RewardConfig(fn="rewards/math_answer.py:math_answer", args={"strict_single_box": True})],
        algo=preset(**{"num_mini_batches": 2} | algo),
        train=TrainConfig(
            output_dir=folder, seed=seed, max_steps=10_000, learning_rate=3e-4, adam_beta2=0.95, warmup_steps=5
        ),
        track=TrackConfig(console="quiet", save_rollouts="none"),
    )


# --- warm start -------------------------------------------------------------------------------------------------------


def warm_start(folder: Path, seed: int, *, target: float = 0.15, max_steps: int = 3000) -> None:
    """Fine-tune a tiny model until its sampled accuracy reaches `target`, and save it in `folder`."""
    tokenizer = char_tokenizer(ALPHABET, [THINK, END_THINK, BOX])
    sizes = {"hidden_size": 96, "intermediate_size": 288, "max_position_embeddings": 128}
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = build_tiny_model("qwen2", vocab_size=len(tokenizer), seed=seed, **sizes, **special)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    draw = random.Random(seed)
    for step in range(1, max_steps + 1):
        examples = []
        for a, b in draw_pairs(draw, 32, held_out=False):
            form = draw.choices(list(FORMS), list(FORMS.values()))[0]
            examples.append((prompt(a, b), completion(a, b, form)))
        loss = supervised_loss(model, tokenizer, examples)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step >= 300 and step % 100 == 0:
            with tempfile.TemporaryDirectory() as scratch:
                model.save_pretrained(scratch)
                tokenizer.save_pretrained(scratch)
                found = asyncio.run(sampled_accuracy(scratch, seed))
            print(f"seed {seed}: warm start step {step}, loss {loss.item():.2f}, pass@1 {found:.3f}", flush=True)
            if found >= target:
                break
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def supervised_loss(model: Any, tokenizer: Any, examples: list[tuple[str, str]]) -> torch.Tensor:
    """Compute the mean negative log-likelihood of the completions, end of sequence included."""
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text, _ in examples]
    answers = [
        tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for _, text in examples
    ]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(examples), width), tokenizer.pad_token_id)
    labels = torch.full((len(examples), width), -100)
    for i, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        ids[i, : len(p) + len(a)] = torch.tensor(p + a)
        labels[i, len(p) : len(p) + len(a)] = torch.tensor(a)
    logits = model(input_ids=ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


async def sampled_accuracy(model: str, seed: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(make_config(folder, model, seed, {"name": "grpo"}), train_dataset=held_out()[:32])
        async with trainer:
            rates, _ = await trainer.evaluate(trainer_tasks(held_out()[:64]), num_generations=4, temperature=1.0)
    return rates["reward/pass@1"]


# --- runs -------------------------------------------------------------------------------------------------------------


def held_out() -> list[dict[str, Any]]:
    return rows(draw_pairs(random.Random(0), NUM_HELD_OUT, held_out=True))


def trainer_tasks(given: list[dict[str, Any]]) -> list[Any]:
    return tasks_from_rows(given, DataConfig(prompt_format="text"), "additions")


async def measure(trainer: Trainer) -> dict[str, float]:
    tasks = trainer_tasks(held_out())
    greedy, _ = await trainer.evaluate(tasks)
    sampled, groups = await trainer.evaluate(tasks, num_generations=16, temperature=1.0)
    texts = [r.completion for group in groups for r in group.rollouts]
    work = [text.split(END_THINK)[0] for text in texts]
    return {
        "greedy": greedy["reward/pass@1"],
        "pass@1": sampled["reward/pass@1"],
        "pass@4": sampled["reward/pass@4"],
        "pass@16": sampled["reward/pass@16"],
        "carry_frac": sum(w.count("+") == 6 for w in work) / len(work),
        "length": sum(r.num_completion_tokens for g in groups for r in g.rollouts) / len(texts),
    }


async def run(model: str, seed: int, algo: dict[str, Any], budget: int) -> dict[str, Any]:
    """Train until the token budget is used up: the loop of `Trainer.fit`, bounded by tokens instead of steps."""
    train_rows = rows(draw_pairs(random.Random(seed + 1), 4000, held_out=False))
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(make_config(folder, model, seed, algo), train_dataset=train_rows)
        async with trainer:
            before, tokens, step, curve = await measure(trainer), 0, 0, []
            while tokens < budget:
                groups, drawn = await trainer._draw(step + 1)
                tokens += sum(r.num_completion_tokens for g in drawn for r in g.rollouts)
                batch = trainer.algorithm.prepare(groups, policy_version=step)
                stats = trainer.learner.update(batch, trainer.algorithm)
                step += 1
                await trainer.source.serve(step)
                rewards = [r.score.reward for g in drawn for r in g.rollouts if r.score is not None]
                curve.append([tokens, sum(rewards) / len(rewards), stats.get("policy/entropy", 0.0)])
            after = await measure(trainer)
    seconds = time.process_time() - begin
    return {"before": before, "after": after, "steps": step, "tokens": tokens, "curve": curve, "cpu_seconds": seconds}


def main(folder: Path, num_seeds: int, budget: int = TOKEN_BUDGET) -> None:
    """Run all arms of a seed before the next seed: an unfinished study then still compares equal numbers of seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "additions.jsonl"
    done = {
        (r["seed"], r["arm"])
        for line in (results.read_text().splitlines() if results.is_file() else ())
        if (r := json.loads(line))
    }
    for seed in range(num_seeds):
        start = folder / f"warm_start_{seed}"
        if not (start / "config.json").is_file():
            warm_start(start, seed)
        for arm, algo in ARMS.items():
            if (seed, arm) in done:
                continue
            found = asyncio.run(run(str(start), seed, algo, budget))
            with results.open("a") as file:
                file.write(json.dumps({"seed": seed, "arm": arm, **found}) + "\n")
            print(
                f"seed {seed} {arm}: {found['before']} -> {found['after']} ({found['cpu_seconds']:.0f} CPU s)",
                flush=True,
            )
