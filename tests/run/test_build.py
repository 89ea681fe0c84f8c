"""What is found wrong between the parts of a run before its first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmrl import Trainer
from llmrl.errors import UserError
from llmrl.model.policy import Policy
from llmrl.run.engines import check_replaceable
from llmrl.tiny import build_tiny_model, byte_tokenizer
from tests.model.architectures import build


@pytest.fixture
def widened(tmp_path: Path) -> str:
    """A model of 259 tokens beside a tokenizer of 260."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<tool_call>"], special_tokens=True)
    folder = tmp_path / "widened"
    build_tiny_model("qwen2", vocab_size=259, eos_token_id=257, pad_token_id=256).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def trainer(folder: str, output: Path, rows: list[dict[str, Any]], **options: Any) -> Trainer:
    settings = {"train.output_dir": str(output), "rollout.num_prompts": 2, "train.max_steps": 1}
    return Trainer(settings, model=folder, train_dataset=rows, **options)


def length(completion: str) -> float:
    return len(completion) / 100


@pytest.mark.parametrize("algorithm", [None, "dpo"])
def test_tokens_without_embeddings_are_found_before_the_first_step(
    widened: str, tmp_path: Path, algorithm: str | None
) -> None:
    answers = {"chosen": " yes", "rejected": " no"} if algorithm else {"answer": "1"}
    rows = [{"prompt": f"{i}?", **answers} for i in range(7)]
    options: dict[str, Any] = {"algorithm": algorithm} if algorithm else {"reward": length}
    trainer(widened, tmp_path / "without", rows, **options)  # the tokenizer may have tokens that nothing uses
    rows.append({"prompt": "<tool_call> 1", **answers})
    with pytest.raises(UserError, match=r"no embeddings for: '<tool_call>' .*260.*259.*resize_token_embeddings"):
        trainer(widened, tmp_path / "with", rows, **options)


def test_a_model_whose_weights_vllm_cannot_replace_is_refused() -> None:
    policy = Policy(build("gpt_oss"), temperature=1.0, keep_reference=False)
    check_replaceable(policy, apart=True)
    check_replaceable(Policy(build("mixtral"), temperature=1.0, keep_reference=False), apart=False)
    with pytest.raises(UserError, match="gpt_oss .*rollout.engine hf"):
        check_replaceable(policy, apart=False)
