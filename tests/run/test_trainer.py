"""Whole runs in this process: the Python interface, evaluation, budgets, and resuming without a difference."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmrl import Score, Trainer
from llmrl.errors import RunFailed, UserError
from llmrl.run.ledger import audit
from llmrl.tiny import build_tiny_model, byte_tokenizer
from llmrl.track.files import read_jsonl

ROWS = [{"prompt": f"Count to {i}", "answer": str(i)} for i in range(24)]


def letters(completion: str) -> float:
    """Something a random model is sometimes better and sometimes worse at."""
    return sum(character.isalpha() for character in completion) / 16


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "train.output_dir": str(folder),
        "train.max_steps": 4,
        "train.learning_rate": 1e-3,
        "train.save_steps": 2,
        "rollout.num_prompts": 4,
        "rollout.num_generations": 4,
        "rollout.max_completion_length": 16,
        "track.console": "quiet",
        **{key.replace("__", "."): value for key, value in more.items()},
    }


def trainer(folder: Path, reward: Any = letters, **more: Any) -> Trainer:
    return Trainer(settings(folder, **more), model="tiny:qwen2", reward=reward, train_dataset=ROWS)


def numbers(folder: Path) -> list[dict[str, Any]]:
    rows = read_jsonl(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def test_a_function_a_list_and_a_loaded_model_are_enough(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    model = build_tiny_model(
        "llama", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    run = Trainer(
        settings(tmp_path / "run"), model=model, processing_class=tokenizer, reward=letters, train_dataset=ROWS
    )
    metrics = run.train()
    assert metrics["policy/grad_norm"] > 0
    assert metrics["reward/letters/mean"] == pytest.approx(metrics["reward/mean"])
    assert metrics["kl/mismatch/max"] < 1e-4
    assert metrics["sync/max_gap"] < 1e-4
    assert metrics["sync/change"] > 0
    assert audit(tmp_path / "run" / "ledger.jsonl") == {
        "issued": 16, "trained": 16, "lost": [], "doubled": [], "exact": True,
    }  # fmt: skip
    assert len(read_jsonl(tmp_path / "run" / "rollouts.jsonl")) == 4 * 4 * 4
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_loaded_models_own_type_decides(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()

    def run(name: str, dtype: torch.dtype, **more: Any) -> Trainer:
        tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        model = build_tiny_model("qwen2", vocab_size=len(tokenizer), **tokens).to(dtype)
        options = settings(tmp_path / name, train__max_steps=2, **more)
        return Trainer(options, model=model, processing_class=tokenizer, reward=letters, train_dataset=ROWS)

    for name, loaded, wanted in [
        ("own", torch.bfloat16, "float32"),
        ("both", torch.bfloat16, "bfloat16"),
        ("asked", torch.float32, "bfloat16"),
    ]:
        trained = run(name, loaded, model__dtype=wanted, algo__kl__beta=0.1)
        assert trained.config.model.dtype == "bfloat16" and trained.policy.dtype == torch.bfloat16
        assert {p.dtype for p in trained.learner.parameters} == {torch.float32}
        metrics = trained.train()
        assert metrics["policy/grad_norm"] > 0 and metrics["sync/max_gap"] < 0.05
    with pytest.raises(UserError, match="type float16, .* load it with dtype=torch.bfloat16"):
        run("half", torch.float16)


def test_it_runs_inside_a_running_event_loop(tmp_path: Path) -> None:
    async def notebook() -> dict[str, float]:
        return trainer(tmp_path / "run", train__max_steps=1).train()

    assert asyncio.run(notebook())["reward/mean"] > 0


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_resumed_equals_undisturbed(lora: dict[str, int] | None, dtype: str, tmp_path: Path) -> None:
    more = {"model__lora": lora, "model__dtype": dtype, "algo__kl__beta": 0.1, "algo__num_mini_batches": 2}
    trainer(tmp_path / "whole", **more).train()
    trainer(tmp_path / "parts", train__max_steps=2, **more).train()
    trainer(tmp_path / "parts", train__resume_from_checkpoint="last", **more).train()
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    whole, parts = (load_file(tmp_path / name / "model" / file) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(whole[name].equal(parts[name]) for name in whole)
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}, "nothing that was learned is rounded away"
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "parts")


def test_evaluation_on_held_out_tasks(tmp_path: Path) -> None:
    run = Trainer(
        settings(tmp_path / "run", eval__steps=2, eval__num_generations=2, eval__temperature=1.0),
        model="tiny:qwen2",
        reward=lambda completion: float(len(completion) > 8),
        train_dataset=ROWS,
        eval_dataset=ROWS[:6],
    )
    run.train()
    found = [row.get("eval/pass@1") for row in numbers(tmp_path / "run")]
    assert [value is not None for value in found] == [False, True, False, True]
    assert all(0 <= row["eval/pass@1"] <= row["eval/pass@2"] <= 1 for row in numbers(tmp_path / "run")[1::2])


def test_too_many_unscored_rollouts_stop_the_run_with_the_traceback(tmp_path: Path) -> None:
    def broken(completion: str) -> float:
        raise KeyError("the table has moved")

    with pytest.raises(RunFailed) as caught:
        trainer(tmp_path / "run", broken).train()
    assert "the table has moved" in str(caught.value)
    assert "16 of 16 rollouts" in str(caught.value)


def test_abstentions_are_left_out_and_counted(tmp_path: Path) -> None:
    def picky(completion: str) -> Score | float:
        return Score(reward=None) if completion[:1] < "0" else letters(completion)

    metrics = trainer(tmp_path / "run", picky, verify__max_unscored_frac=1.0).train()
    assert 0 < metrics["reward/abstained_frac"] == metrics["reward/unscored_frac"] < 1
    rows = read_jsonl(tmp_path / "run" / "rollouts.jsonl")
    assert all(row["advantage"] == 0 for row in rows if row["reward"] is None)


def test_a_sync_that_does_not_arrive_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path / "run")
    engine: Any = run.source.engine  # pyright: ignore
    load = engine.load_weights

    async def forgetful(source: Any, *, version: int) -> None:
        if version < 2:
            await load(source, version=version)

    monkeypatch.setattr(engine, "load_weights", forgetful)
    with pytest.raises(RunFailed, match="weight sync"):
        run.train()
    assert len(numbers(tmp_path / "run")) == 1


def test_arguments_are_checked_before_a_model_is_built(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="subject"):
        trainer(tmp_path / "run", lambda completion, subject: 0.0)
    with pytest.raises(UserError, match="processing_class"):
        Trainer(settings(tmp_path / "run"), model=object(), reward=letters, train_dataset=ROWS)
    with pytest.raises(UserError, match=r"rollout\.num_prompts"):
        trainer(tmp_path / "run", rollout__num_prompts=100)
    assert not (tmp_path / "run").exists()
