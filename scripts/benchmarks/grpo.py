"""Suite grpo: one GRPO step (rollout, reward, update) with llmrl and with TRL's GRPOTrainer on the same work.

python -m benchmarks.grpo SIDE CASE MODEL_FOLDER SEED OUT      one measurement, in this process
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common import REPOSITORY, Meter, compare, matmul_rate, measure
from benchmarks.workloads import Synthetic, natural_work, save_model, synthetic_work, warm_start

SKIPPED_STEPS = 2
"""Steps that are not measured, in which allocators, caches and lazy setup settle."""
NATURAL_STEPS = 20
NATURAL_MICRO_BATCHES = 4
"""The rival's fastest setting for the case `natural`."""
WARM_START = REPOSITORY / "runs" / "bench" / "warm_start"
SYNTHETIC = {
    "quickstart_16+32": Synthetic(num_prompts=16, prompt_length=16, completion_length=32, rival_micro_batches=4),
    "prompt512_64": Synthetic(num_prompts=4, prompt_length=512, completion_length=64, num_steps=5),
    "vocab32k_16+32": Synthetic(
        num_prompts=8,
        prompt_length=16,
        completion_length=32,
        vocab_size=32_000,
        num_steps=3,
        rival_micro_batches=4,
    ),
    "params5M_16+32": Synthetic(
        num_prompts=16,
        prompt_length=16,
        completion_length=32,
        hidden_size=320,
        intermediate_size=960,
        num_layers=4,
        learning_rate=3e-4,
        num_steps=4,
        rival_micro_batches=4,
    ),
}
CASES = (*SYNTHETIC, "natural")


def run(cases: list[str], repetitions: int) -> list[dict[str, Any]]:
    """Measure the named cases in that order. `benchmarks.common.compare` describes an entry of the result."""
    import trl

    results = []
    for name in cases:
        with tempfile.TemporaryDirectory() as folder:
            if name in SYNTHETIC:
                model = Path(folder)
                save_model(SYNTHETIC[name], model)
            else:
                model = warm_start(WARM_START)

            def one(side: str, repetition: int, name: str = name, model: Path = model) -> dict[str, Any]:
                return measure("benchmarks.grpo", side, name, str(model), str(repetition))

            result = compare(name, f"trl {trl.__version__} GRPOTrainer", one, repetitions=repetitions)
        results.append(result | equal_work(result["measurements"]) | floor(name, result))
    return results


def equal_work(measurements: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return means of tokens, loss, gradient norm and rewards, which show that both sides did the same work."""
    shown = {}
    for side, runs in measurements.items():
        steps = [step for one in runs for step in one["steps"]]
        shown[side] = {
            "tokens_per_step": fmean(step["tokens"] for step in steps),
            "loss": fmean(step["loss"] for step in steps),
            "grad_norm": fmean(step["grad_norm"] for step in steps),
            "reward_first": fmean(one["steps"][0]["reward"] for one in runs),
            "reward_last": fmean(one["steps"][-1]["reward"] for one in runs),
        }
    return {"equal_work": shown}


def floor(name: str, result: dict[str, Any]) -> dict[str, float]:
    """Return the CPU seconds of the step's unavoidable matrix products, at this machine's measured rate.

    Unavoidable: every prompt is read once when sampling and once when training, every completion token once in both;
    the head runs only where a token is sampled or trained on; a backward pass costs two forward passes.
    """
    runs = [one for side in result["measurements"].values() for one in side]
    rate = max(one["matmul_per_s"] for one in runs)
    tokens = fmean(step["tokens"] for one in runs for step in one["steps"])
    shape = runs[0]["shape"]
    operations = forward_operations(shape, tokens) * (1 + 3)
    return {"floor_cpu_s": operations / rate, "matmul_gflops": rate / 1e9}


def forward_operations(shape: dict[str, float], completion_tokens: float) -> float:
    """Return the multiplications and additions of a forward pass over all prompts (once per group) and completions."""
    prompt_tokens = shape["num_prompts"] * shape["prompt_length"]
    completion_length = completion_tokens / (shape["num_prompts"] * shape["num_generations"])
    linear = 2 * shape["linear_parameters"] * (prompt_tokens + completion_tokens)
    head = 2 * shape["vocab_size"] * shape["hidden_size"] * completion_tokens
    seen = prompt_tokens * shape["prompt_length"] / 2 + completion_tokens * (
        shape["prompt_length"] + completion_length / 2
    )
    attention = 4 * shape["num_layers"] * shape["hidden_size"] * seen
    return linear + head + attention


# --- one measurement --------------------------------------------------------------------------------------------------


def worker(side: str, name: str, model_folder: str, seed: str, out: str) -> None:
    """Measure one side once and write the result to `out`."""
    from benchmarks.trainers import preload, train_ours, train_trl

    preload()
    rate = matmul_rate()
    with tempfile.TemporaryDirectory() as folder:
        options = {"seed": int(seed), "output_dir": Path(folder) / "run"}
        case = SYNTHETIC.get(name)
        if case is None:
            work = natural_work(Path(model_folder), **options)
            num_steps, micro_batches = NATURAL_STEPS, NATURAL_MICRO_BATCHES
        else:
            work = synthetic_work(case, Path(model_folder), **options)
            num_steps, micro_batches = case.num_steps, case.rival_micro_batches
        meter = Meter()
        found: dict[str, Any] = {"matmul_per_s": rate, "shape": shape_of(work, model_folder)}

        def hook(step: int, model: Any) -> None:
            meter.mark()
            if step == SKIPPED_STEPS + num_steps:
                found.update(meter.report(skip=SKIPPED_STEPS))

        meter.start()
        num_steps_all = SKIPPED_STEPS + num_steps
        if side == "ours":
            found["steps"] = train_ours(work, num_steps_all, hook)
        else:
            found["steps"] = train_trl(work, num_steps_all, hook, micro_batches=micro_batches)
    Path(out).write_text(json.dumps(found))


def shape_of(work: Any, model_folder: str) -> dict[str, float]:
    """Return the sizes that `forward_operations` needs."""
    from transformers import AutoConfig

    model = AutoConfig.from_pretrained(model_folder)
    head_dim = model.hidden_size // model.num_attention_heads
    attention = 2 * model.hidden_size * (model.hidden_size + model.num_key_value_heads * head_dim)
    mlp = 3 * model.hidden_size * model.intermediate_size
    return {
        "num_prompts": work.config.rollout.num_prompts,
        "num_generations": work.config.rollout.num_generations,
        "prompt_length": len(work.tokenizer(work.rows[0]["prompt"], add_special_tokens=False)["input_ids"]),
        "linear_parameters": model.num_hidden_layers * (attention + mlp),
        "num_layers": model.num_hidden_layers,
        "hidden_size": model.hidden_size,
        "vocab_size": model.vocab_size,
    }


if __name__ == "__main__":
    worker(*sys.argv[1:])
