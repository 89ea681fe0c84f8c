"""Does llmrl learn as fast, per step, as TRL's GRPOTrainer? Held-out accuracy of both along the same run.

    PYTHONPATH=scripts .venv/bin/python -m benchmarks.learning_curve [--seeds 3] [--json FILE]
    PYTHONPATH=scripts .venv/bin/python -m benchmarks.learning_curve --task sums --model "$(scripts/fetch_model)"

Both start from the same model with the settings of a recipe: `additions` is the quickstart after its warm start, `sums`
is smollm2_sums. One evaluator judges the weights at the steps of the table, by greedy answers to the held-out rows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common import SIDES, Meter, machine, measure

STEPS = {"additions": (0, 5, 10, 20, 40), "sums": (0, 10, 20)}
SKIPPED_STEPS = 2
NAMES = {"ours": "llmrl", "rival": "TRL"}


def main() -> None:
    """Run both sides in turn for every seed and print the table."""
    from benchmarks.grpo import WARM_START
    from benchmarks.workloads import warm_start

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=STEPS, default="additions")
    parser.add_argument("--model", type=Path, help="folder of the pretrained model of `sums`")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.task == "sums" and arguments.model is None:
        parser.error("--task sums needs --model FOLDER: see scripts/fetch_model")
    folder = arguments.model if arguments.task == "sums" else warm_start(WARM_START)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for seed in range(arguments.seeds):
        for side in SIDES if seed % 2 == 0 else SIDES[::-1]:
            runs[side].append(
                measure("benchmarks.learning_curve", "--one", side, arguments.task, str(folder), str(seed))
            )
            print(f"seed {seed}, {NAMES[side]}: {runs[side][-1]['accuracy']}", flush=True)
    print(table(runs, STEPS[arguments.task]))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=2) + "\n")


def table(runs: dict[str, list[dict[str, Any]]], steps: Sequence[int]) -> str:
    """Return a Markdown table: accuracy at each step and CPU seconds per step, mean (lowest to highest) over seeds."""
    lines = ["| step | llmrl | TRL |", "|---|---|---|"]
    for step in steps:
        lines.append(
            f"| {step} | " + " | ".join(spread([r["accuracy"][str(step)] for r in runs[s]]) for s in SIDES) + " |"
        )
    lines.append("| CPU s per step | " + " | ".join(spread([r["cpu_s"] for r in runs[s]]) for s in SIDES) + " |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Return the mean, with the range in parentheses."""
    return f"{fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def one_run(side: str, task: str, model_folder: str, seed: str, out: str) -> None:
    """Train one side with one seed; write accuracy at the task's STEPS and CPU seconds per step to `out`."""
    from benchmarks.grpo import NATURAL_MICRO_BATCHES
    from benchmarks.trainers import preload, train_ours, train_trl
    from benchmarks.workloads import natural_work, sums_work

    preload()
    steps, make_work = STEPS[task], {"additions": natural_work, "sums": sums_work}[task]
    meter = Meter()
    weights: dict[int, dict[str, Any]] = {}
    found: dict[str, Any] = {}

    def hook(step: int, model: Any) -> None:
        if step in steps:
            weights[step] = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        meter.mark()
        print(f"{NAMES[side]}: step {step} of {steps[-1]}", file=sys.stderr, flush=True)
        if step == steps[-1]:
            found.update(meter.report(skip=SKIPPED_STEPS))

    with tempfile.TemporaryDirectory() as folder:
        work = make_work(Path(model_folder), seed=int(seed), output_dir=Path(folder) / "run")
        meter.start()
        if side == "ours":
            found["steps"] = train_ours(work, steps[-1], hook)
        else:
            found["steps"] = train_trl(work, steps[-1], hook, micro_batches=NATURAL_MICRO_BATCHES)
    found["accuracy"] = {step: asyncio.run(greedy_accuracy(work, model_folder, weights[step])) for step in steps}
    Path(out).write_text(json.dumps(found))


async def greedy_accuracy(work: Any, model_folder: str, weights: dict[str, Any]) -> float:
    """Return the share of held-out rows that a model with these weights answers correctly."""
    from transformers import AutoModelForCausalLM

    from llmrl.data.chat import Chat
    from llmrl.engines.hf.engine import HFEngine
    from llmrl.model.policy import Policy
    from llmrl.types import Sampling
    from llmrl.verify.reward import resolve

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="float32").eval()
    model.load_state_dict(weights)
    chat = Chat(work.tokenizer, prompt_format=work.config.data.prompt_format)
    reward = resolve(work.config.rewards[0].fn, work.config.rewards[0].args)
    engine = HFEngine(model.config, weights=Policy(model, temperature=1.0, keep_reference=False).weights)
    sampling = Sampling(
        max_tokens=work.config.rollout.max_completion_length, temperature=0, stop_token_ids=chat.stop_token_ids
    )

    async def right(row: dict[str, Any]) -> float:
        prompt = row["prompt"]
        prompt_ids = chat.render([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
        drawn = await engine.generate(prompt_ids, sampling, session=str(prompt))
        return reward(completion=chat.decode(drawn.token_ids), answer=row["answer"]).reward or 0.0

    outcomes = await asyncio.gather(*(right(row) for row in work.held_out))
    await engine.close()
    return fmean(outcomes)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one_run(*sys.argv[2:])
    else:
        main()
