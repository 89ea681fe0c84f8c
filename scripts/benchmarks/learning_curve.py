"""Does llmrl learn as fast, per step, as TRL's GRPOTrainer? Held-out accuracy of both along the quickstart's run.

    PYTHONPATH=scripts .venv/bin/python -m benchmarks.learning_curve [--seeds 3] [--json FILE]

Both start from the same warm-started model with the settings of recipes/quickstart.yaml. One evaluator judges the
weights at the steps of the table, by greedy answers to the quickstart's 256 held-out additions.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common import SIDES, Meter, machine, measure

STEPS = (0, 5, 10, 20, 40)
SKIPPED_STEPS = 2
NAMES = {"ours": "llmrl", "rival": "TRL"}


def main() -> None:
    """Run both sides in turn for every seed and print the table."""
    from benchmarks.grpo import WARM_START
    from benchmarks.workloads import warm_start

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = warm_start(WARM_START)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for seed in range(arguments.seeds):
        for side in SIDES if seed % 2 == 0 else SIDES[::-1]:
            runs[side].append(measure("benchmarks.learning_curve", "--one", side, str(folder), str(seed)))
            print(f"seed {seed}, {NAMES[side]}: {runs[side][-1]['accuracy']}", flush=True)
    print(table(runs))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=2) + "\n")


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Return a Markdown table: accuracy at each step and CPU seconds per step, mean (lowest to highest) over seeds."""
    lines = ["| step | llmrl | TRL |", "|---|---|---|"]
    for step in STEPS:
        lines.append(
            f"| {step} | " + " | ".join(spread([r["accuracy"][str(step)] for r in runs[s]]) for s in SIDES) + " |"
        )
    lines.append("| CPU s per step | " + " | ".join(spread([r["cpu_s"] for r in runs[s]]) for s in SIDES) + " |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Return the mean, with the range in parentheses."""
    return f"{fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def one_run(side: str, model_folder: str, seed: str, out: str) -> None:
    """Train one side with one seed; write accuracy at STEPS and CPU seconds per step to `out`."""
    from benchmarks.grpo import NATURAL_MICRO_BATCHES
    from benchmarks.trainers import preload, train_ours, train_trl
    from benchmarks.workloads import natural_work

    preload()
    meter = Meter()
    weights: dict[int, dict[str, Any]] = {}
    found: dict[str, Any] = {}

    def hook(step: int, model: Any) -> None:
        if step in STEPS:
            weights[step] = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        meter.mark()
        if step == STEPS[-1]:
            found.update(meter.report(skip=SKIPPED_STEPS))

    with tempfile.TemporaryDirectory() as folder:
        work = natural_work(Path(model_folder), seed=int(seed), output_dir=Path(folder) / "run")
        meter.start()
        if side == "ours":
            found["steps"] = train_ours(work, STEPS[-1], hook)
        else:
            found["steps"] = train_trl(work, STEPS[-1], hook, micro_batches=NATURAL_MICRO_BATCHES)
    found["accuracy"] = {step: asyncio.run(greedy_accuracy(work, model_folder, weights[step])) for step in STEPS}
    Path(out).write_text(json.dumps(found))


async def greedy_accuracy(work: Any, model_folder: str, weights: dict[str, Any]) -> float:
    """Return the share of held-out additions that a model with these weights answers correctly."""
    from transformers import AutoModelForCausalLM

    from benchmarks.workloads import quickstart
    from llmrl.data.chat import Chat
    from llmrl.engines.hf.engine import HFEngine
    from llmrl.model.policy import Policy
    from llmrl.types import Sampling
    from llmrl.verify.reward import resolve

    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    model.load_state_dict(weights)
    chat = Chat(work.tokenizer, prompt_format="text")
    reward = resolve(work.config.rewards[0].fn, work.config.rewards[0].args)
    engine = HFEngine(model.config, weights=Policy(model, temperature=1.0, keep_reference=False).weights)
    sampling = Sampling(
        max_tokens=work.config.rollout.max_completion_length, temperature=0, stop_token_ids=chat.stop_token_ids
    )

    async def right(row: dict[str, Any]) -> float:
        prompt_ids = chat.render([{"role": "user", "content": row["prompt"]}])
        drawn = await engine.generate(prompt_ids, sampling, session=row["prompt"])
        return reward(completion=chat.decode(drawn.token_ids), answer=row["answer"]).reward or 0.0

    outcomes = await asyncio.gather(*(right(row) for row in quickstart().held_out_rows()))
    await engine.close()
    return fmean(outcomes)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one_run(*sys.argv[2:])
    else:
        main()
