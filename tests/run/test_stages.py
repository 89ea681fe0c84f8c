"""SFT -> GRPO -> DPO -> merged, each from the folder that the one before has left: each begins where that ended."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmrl import Trainer
from llmrl.track.files import read_jsonl
from tests.model.test_adapter_folder import logits, save_base

pytestmark = pytest.mark.slow

PAIRS = [{"prompt": f"Name {i}.", "chosen": f" It is {i}, surely", "rejected": f" no {chr(97 + i)}"} for i in range(8)]
QUESTIONS = [{"question": f"{i}+{i}?", "answer": str(2 * i)} for i in range(8)]


def odd(completion: str) -> float:
    return float(sum(map(ord, completion)) % 2)


def fine_tune(base: Path, folder: Path) -> torch.Tensor:
    """Fine-tune adapters with TRL, save them, and return the logits at the end."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=str(base),
        args=SFTConfig(
            output_dir=str(folder / "trainer"),
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=Dataset.from_list([{"prompt": p["prompt"], "completion": p["chosen"]} for p in PAIRS]),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.05, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model(str(folder))
    return logits(trainer.model)


def stage(folder: Path, model: Path, **more: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Train two steps from `model`; return the logits before and after, and the first step's metrics."""
    settings: dict[str, Any] = {
        "train.output_dir": str(folder),
        "train.max_steps": 2,
        "train.learning_rate": 1e-2,
        "rollout.num_prompts": 4,
        "track.console": "quiet",
    }
    if more.get("algorithm") != "dpo":
        settings |= {"rollout.num_generations": 4, "rollout.max_completion_length": 6, "algo.kl.beta": 0.1}
    trainer = Trainer(settings, model=str(model), **more)
    before = logits(trainer.policy.causal_lm)
    trainer.train()
    return before, logits(trainer.policy.causal_lm), read_jsonl(folder / "metrics.jsonl")[0]


def test_every_stage_begins_where_the_one_before_ended(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    tuned = fine_tune(base, tmp_path / "sft")
    before, sampled, first = stage(tmp_path / "grpo", tmp_path / "sft", reward=odd, train_dataset=QUESTIONS)
    torch.testing.assert_close(before, tuned, rtol=0, atol=1e-5)
    assert first["kl/ref"] == 0.0
    before, preferred, first = stage(
        tmp_path / "dpo", tmp_path / "grpo" / "model", algorithm="dpo", train_dataset=PAIRS
    )
    torch.testing.assert_close(before, sampled, rtol=0, atol=1e-5)
    assert first["loss/total"] == pytest.approx(math.log(2), abs=1e-6)
    loaded = AutoModelForCausalLM.from_pretrained(base)
    merged = peft.PeftModel.from_pretrained(loaded, tmp_path / "dpo" / "model").merge_and_unload()
    torch.testing.assert_close(logits(merged), preferred, rtol=0, atol=1e-5)
    moved = [(b - a).abs().max() for a, b in ((logits(load(base)), tuned), (tuned, sampled), (sampled, preferred))]
    assert min(moved) > 1e-3, "each stage moved it"


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)
