"""Suite dpo: one step of offline DPO with llmrl and with TRL's DPOTrainer on the same pairs.

python -m benchmarks.dpo SIDE CASE MODEL_FOLDER SEED OUT      one measurement, in this process
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common import Meter, compare, measure
from benchmarks.workloads import ALPHABET, Synthetic, load_tokenizer, save_model

SKIPPED_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """A random model and random pairs. Chosen and rejected completions have lengths around `completion_length`."""

    shape: Synthetic
    num_pairs: int = 8
    """Pairs per step."""
    num_steps: int = 6
    rival_batch: int = 8
    """Pairs that the rival computes at once, its fastest setting for this case."""
    precompute: bool = False
    """Whether both sides compute the reference beforehand (not measured)."""


LONG = Synthetic(num_prompts=8, prompt_length=512, completion_length=64)
SHORT = Synthetic(num_prompts=32, prompt_length=16, completion_length=32)
CASES = {
    "prompt512_64": Pairs(shape=LONG, rival_batch=2),
    "prompt512_64_precomputed": Pairs(shape=LONG, rival_batch=2, precompute=True),
    "short16_32": Pairs(shape=SHORT, num_pairs=32, num_steps=10, rival_batch=32),
    "short16_32_precomputed": Pairs(shape=SHORT, num_pairs=32, num_steps=10, rival_batch=32, precompute=True),
}


def run(cases: list[str], repetitions: int) -> list[dict[str, Any]]:
    """Measure the named cases in that order. `benchmarks.common.compare` describes an entry of the result."""
    import trl

    results = []
    for name in cases:
        with tempfile.TemporaryDirectory() as folder:
            save_model(CASES[name].shape, Path(folder))

            def one(side: str, repetition: int, name: str = name, folder: str = folder) -> dict[str, Any]:
                return measure("benchmarks.dpo", side, name, folder, str(repetition))

            result = compare(name, f"trl {trl.__version__} DPOTrainer", one, repetitions=repetitions)
        pairs = CASES[name].num_pairs
        per_pair = {f"{side}_cpu_s_per_pair": result[f"{side}_cpu_s"] / pairs for side in ("ours", "rival")}
        results.append(result | per_pair | equal_work(result["measurements"]))
    return results


def equal_work(measurements: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return means over all steps of loss, gradient norm and margin, which show that both sides did the same work."""
    return {
        "equal_work": {
            side: {key: fmean(step[key] for one in runs for step in one["steps"]) for key in runs[0]["steps"][0]}
            for side, runs in measurements.items()
        }
    }


def rows_of(case: Pairs, seed: int) -> list[dict[str, str]]:
    """Return plain pairs. Completion lengths vary by a quarter in both directions."""
    draw = random.Random(seed)
    low, high = (int(case.shape.completion_length * share) for share in (0.75, 1.25))

    def text(length: int) -> str:
        return "".join(draw.choices(ALPHABET.strip(), k=length))

    count = (SKIPPED_STEPS + case.num_steps + 1) * case.num_pairs
    names = ("prompt", "chosen", "rejected")
    return [
        dict(
            zip(
                names, (text(case.shape.prompt_length), *(text(draw.randint(low, high)) for _ in range(2))), strict=True
            )
        )
        for _ in range(count)
    ]


def worker(side: str, name: str, model_folder: str, seed: str, out: str) -> None:
    """Measure one side once and write the result to `out`."""
    import datasets  # noqa: F401
    import trl.trainer.dpo_trainer  # noqa: F401

    import llmrl.algo.preference.dpo
    import llmrl.run.trainer  # noqa: F401

    case, meter = CASES[name], Meter()
    found: dict[str, Any] = {}
    last = SKIPPED_STEPS + case.num_steps

    def hook(step: int) -> None:
        meter.mark()
        if step == last:
            found.update(meter.report(skip=SKIPPED_STEPS))

    with tempfile.TemporaryDirectory() as folder:
        train = train_ours if side == "ours" else train_trl
        meter.start()
        found["steps"] = train(case, model_folder, rows_of(case, int(seed)), Path(folder) / "run", hook, last)
    Path(out).write_text(json.dumps(found))


def train_ours(case: Pairs, model: str, rows: list, folder: Path, hook: Any, num_steps: int) -> list[dict[str, float]]:
    """Train with llmrl; return loss, gradient norm and margin of each step."""
    from llmrl import Trainer

    arguments = {
        "train.output_dir": str(folder),
        "train.max_steps": num_steps + 1,
        "train.learning_rate": 1e-3,
        "train.save_steps": 0,
        "rollout.num_prompts": case.num_pairs,
        "data.shuffle": False,
        "track.console": "quiet",
        "track.save_rollouts": "none",
        **({"algo.precompute_ref_log_probs": True} if case.precompute else {}),
    }
    tokenizer = tokenizer_of(model)
    trainer = Trainer(arguments, model=model, processing_class=tokenizer, train_dataset=rows, algorithm="dpo")
    next_tasks, begun = trainer.sampler.next, iter(range(num_steps + 2))

    def next_with_hook(count: int) -> Any:
        hook(next(begun))
        return next_tasks(count)

    trainer.sampler.next = next_with_hook
    trainer.train()
    lines = (folder / "metrics.jsonl").read_text().splitlines()[:num_steps]
    keys = {"loss": "loss/total", "grad_norm": "policy/grad_norm", "margin": "preference/margin"}
    return [{name: row[key] for name, key in keys.items()} for row in map(json.loads, lines)]


def train_trl(case: Pairs, model: str, rows: list, folder: Path, hook: Any, num_steps: int) -> list[dict[str, float]]:
    """Train with TRL in its cheapest configuration for a CPU; return the same."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    class Hook(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            hook(state.global_step)

    trainer = InOrder(
        model=model,
        args=DPOConfig(
            output_dir=str(folder),
            max_steps=num_steps + 1,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            per_device_train_batch_size=case.rival_batch,
            gradient_accumulation_steps=case.num_pairs // case.rival_batch,
            precompute_ref_log_probs=case.precompute,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer_of(model),
        callbacks=[Hook()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    steps = [row for row in trainer.state.log_history if "rewards/margins" in row][:num_steps]
    return [
        {"loss": row["loss"], "grad_norm": float(row["grad_norm"]), "margin": row["rewards/margins"]} for row in steps
    ]


def tokenizer_of(model: str) -> Any:
    """Return the case's tokenizer. A printable character ends completions, since its eos is beyond the vocabulary."""
    tokenizer = load_tokenizer(Path(model))
    tokenizer.eos_token = tokenizer.pad_token = "~"
    return tokenizer


if __name__ == "__main__":
    worker(*sys.argv[1:])
