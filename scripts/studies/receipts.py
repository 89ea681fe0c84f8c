"""The shipped recipe on a pretrained model: each engine, type and kind of training, with the receipts of its pushes.

A folder with SmolLM2-135M-Instruct and one with GSM8K in, one row per run out. The rewards of GSM8K are all 0 for a
model of this size, so each configuration also runs with a reward that gives signal.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from llmrl import Trainer, load_config
from llmrl.track.files import read_jsonl
from studies.tables import markdown

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = REPOSITORY / "recipes" / "grpo_gsm8k.yaml"
VOWELS = Path(__file__).with_name("vowels.py")
SMALL = ("--rollout.num_prompts", "2", "--rollout.num_generations", "4", "--rollout.max_completion_length", "48")
STEPS = 3
ENGINES = {"hf": (), "vllm": (), "vllm, adapter": ("--rollout.vllm.lora_sync", "adapter")}


def run(model: Path, data: Path, output: Path, reward: str, engine: str, dtype: str, trained: str) -> dict[str, Any]:
    """Train a few steps; return the numbers of the receipts."""
    shutil.rmtree(output, ignore_errors=True)
    arguments = [
        *("--config", str(RECIPE), "--model.path", str(model), "--model.dtype", dtype),
        *("--data.path", str(data / "train.jsonl"), "--eval.data.path", str(data / "test.jsonl")),
        *("--eval.data.split", "train", "--eval.data.limit", "2", *SMALL),
        *("--train.max_steps", str(STEPS), "--train.output_dir", str(output)),
        *("--rollout.engine", engine.split(",")[0], *ENGINES[engine]),
    ]
    if trained == "whole":
        arguments += ["--model.lora", "null", "--train.learning_rate", "1e-6"]
    if reward == "vowels":
        arguments += ["--rewards", json.dumps([{"fn": f"{VOWELS}:vowels"}])]
    Trainer(load_config(arguments)).train()
    return numbers(output)


def numbers(output: Path) -> dict[str, Any]:
    """Return what the receipts of a run say: the largest of its steps, and the median of their seconds."""
    rows = [row for row in read_jsonl(output / "metrics.jsonl") if "sync/gap" in row]
    assert len(rows) == STEPS, output
    largest = {key: max(row[f"sync/{key}"] for row in rows) for key in ("gap", "limit", "change")}
    return largest | {
        "step_s": median(row["time/step_s"] for row in rows),
        "receipt_s": median(row["time/receipt_s"] for row in rows),
    }


def resumed(
    file: Path, names: Sequence[str], rows: Iterable[tuple[str, ...]], one: Callable[..., dict[str, Any]]
) -> list[dict[str, Any]]:
    """Run the rows that a file does not hold yet, and append them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for row in rows:
        if any(tuple(found[name] for name in names) == row for found in done):
            continue
        found = dict(zip(names, row, strict=True)) | {"load": os.getloadavg()[0]} | one(*row)
        done.append(found)
        with file.open("a") as out:
            out.write(json.dumps(found) + "\n")
        gc.collect()
    return done


def table(rows: list[dict[str, Any]]) -> None:
    """Print rows as Markdown."""
    names = [name for name in rows[0] if isinstance(rows[0][name], str) and name != "refused"]
    columns = {"gap": "largest gap", "limit": "limit", "change": "largest change", "step_s": "s per step"}
    body = [
        [row[name] for name in names] + ([f"{row[key]:.2g}" for key in columns] if "gap" in row else [row["refused"]])
        for row in rows
    ]
    print(markdown([*names, *columns.values()], body))


def main(model: Path, data: Path, folder: Path) -> None:
    """Run what `folder` does not hold yet, and print the table."""

    def one(*row: str) -> dict[str, Any]:
        return run(model, data, folder / "-".join(row).replace(", ", "_"), *row)

    combinations = itertools.product(("vowels", "math_answer"), ENGINES, ("bfloat16", "float32"), ("whole", "LoRA"))
    rows = [row for row in combinations if row[1] != "vllm, adapter" or row[3] == "LoRA"]
    table(resumed(folder / "receipts.jsonl", ("reward", "engine", "type", "trained"), rows, one))
