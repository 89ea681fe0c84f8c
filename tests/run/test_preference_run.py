"""Whole runs of the DPO family: offline from a dataset, online from rollouts; resumed, precomputed, evaluated."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from llmrl import Trainer
from llmrl.errors import UserError
from llmrl.run.ledger import audit
from llmrl.track.files import read_jsonl

pytestmark = pytest.mark.slow

PAIRS = [
    {"prompt": f"Name number {i}.", "chosen": f" It is {i}, surely", "rejected": f" no {chr(97 + i)}"}
    for i in range(16)
]
LABELLED = [
    {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
    for i, row in enumerate(PAIRS)
]


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "train.output_dir": str(folder),
        "train.max_steps": 4,
        "train.learning_rate": 1e-3,
        "train.save_steps": 2,
        "rollout.num_prompts": 4,
        "track.console": "quiet",
        **{key.replace("__", "."): value for key, value in more.items()},
    }


def trainer(folder: Path, algorithm: str = "dpo", rows: Any = PAIRS, **more: Any) -> Trainer:
    return Trainer(settings(folder, **more), model="tiny:qwen2", train_dataset=rows, algorithm=algorithm)


def numbers(folder: Path) -> list[dict[str, Any]]:
    rows = read_jsonl(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def assert_same_run(one: Path, other: Path, *, weights: str = "model.safetensors") -> None:
    found, expected = (load_file(folder / "model" / weights) for folder in (one, other))
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in found)
    assert numbers(one) == numbers(other)


@pytest.mark.parametrize("algorithm", ["dpo", "cdpo", "ipo", "simpo", "orpo", "kto"])
def test_every_preset_trains_from_a_dataset_without_rewards_or_engine(algorithm: str, tmp_path: Path) -> None:
    rows = LABELLED if algorithm == "kto" else PAIRS
    run = trainer(tmp_path / "run", algorithm, rows, train__max_steps=2)
    metrics = run.train()
    assert metrics["policy/grad_norm"] > 0
    assert {"preference/accuracy", "loss/total", "policy/entropy"} <= metrics.keys()
    assert not [key for key in metrics if key.startswith(("sync/", "kl/mismatch", "reward/"))], "nothing was measured"
    assert audit(tmp_path / "run" / "ledger.jsonl")["exact"]
    assert metrics["train/computed_frac"] == 1


def test_kto_reads_pairs_as_two_completions(tmp_path: Path) -> None:
    metrics = trainer(tmp_path / "run", "kto", PAIRS, train__max_steps=1).train()
    assert metrics["preference/desirable_frac"] == 0.5


@pytest.mark.parametrize("options", [{}, {"model__lora": {"r": 4}}, {"algo__num_mini_batches": 2}], ids=str)
def test_resumed_equals_undisturbed(options: dict[str, Any], tmp_path: Path) -> None:
    trainer(tmp_path / "whole", **options).train()
    trainer(tmp_path / "parts", train__max_steps=2, **options).train()
    trainer(tmp_path / "parts", train__resume_from_checkpoint="last", **options).train()
    file = "adapter_model.safetensors" if "model__lora" in options else "model.safetensors"
    assert_same_run(tmp_path / "parts", tmp_path / "whole", weights=file)


def test_a_moving_reference_resumes_too(tmp_path: Path) -> None:
    options = {"algo__reference__steps": 1, "algo__reference__alpha": 0.5}
    trainer(tmp_path / "whole", **options).train()
    trainer(tmp_path / "parts", train__max_steps=2, **options).train()
    trainer(tmp_path / "parts", train__resume_from_checkpoint="last", **options).train()
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    trainer(tmp_path / "fixed").train()
    assert numbers(tmp_path / "fixed")[1] != numbers(tmp_path / "whole")[1]


def test_the_reference_can_become_the_policy(tmp_path: Path) -> None:
    """Rounds of iterative DPO: right after a round begins all log-ratios are 0."""
    options = {"algo__reference__steps": 2, "algo__reference__alpha": 1.0}
    trainer(tmp_path / "run", **options).train()
    margins = [row["preference/margin"] for row in numbers(tmp_path / "run")]
    assert margins[0] == pytest.approx(0, abs=1e-6) and margins[2] == pytest.approx(0, abs=1e-6)
    assert abs(margins[1]) > 1e-4 and abs(margins[3]) > 1e-4


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_a_precomputed_reference_changes_nothing(lora: dict[str, int] | None, tmp_path: Path) -> None:
    common: dict[str, Any] = {"model__lora": lora} if lora else {}
    trainer(tmp_path / "plain", **common).train()
    cached = {**common, "algo__precompute_ref_log_probs": True, "algo__ref_cache_dir": str(tmp_path / "c")}
    first = trainer(tmp_path / "first", **cached)
    assert first.policy._reference is None
    first.train()
    files = list((tmp_path / "c").iterdir())
    assert len(files) == 1
    stamp = files[0].stat().st_mtime_ns
    trainer(tmp_path / "second", **cached).train()
    assert files[0].stat().st_mtime_ns == stamp, "computed again"
    assert_same_run(
        tmp_path / "second", tmp_path / "first", weights="adapter_model.safetensors" if lora else "model.safetensors"
    )
    for ours, plain in zip(numbers(tmp_path / "first"), numbers(tmp_path / "plain"), strict=True):
        for key in ("loss/total", "preference/margin", "policy/grad_norm"):
            assert ours[key] == pytest.approx(plain[key], rel=1e-4, abs=1e-5)
    parts = trainer(tmp_path / "parts", train__max_steps=2, **cached)
    parts.train()
    trainer(tmp_path / "parts", train__resume_from_checkpoint="last", **cached).train()
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "first")


@pytest.mark.parametrize("lora", [None, {"r": 4}])
@pytest.mark.parametrize("rows", [LABELLED, PAIRS], ids=["labels", "pairs"])
def test_a_precomputed_reference_knows_the_completions_that_kto_puts_behind_other_prompts(
    rows: list[dict[str, Any]], lora: dict[str, int] | None, tmp_path: Path
) -> None:
    for name, known in (("plain", False), ("known", True)):
        options = settings(tmp_path / name, algo__precompute_ref_log_probs=known, eval__steps=2, model__lora=lora)
        held_out = [{**row, "prompt": f"Held out: {row['prompt']}"} for row in rows[:5]]
        run = Trainer(options, model="tiny:qwen2", train_dataset=rows, eval_dataset=held_out, algorithm="kto")
        if known:
            assert run.policy._reference is None
        run.train()
    plain, known = numbers(tmp_path / "plain"), numbers(tmp_path / "known")
    assert any(row["preference/kl"] > 0 for row in plain), "an easy case"
    for ours, other in zip(known, plain, strict=True):
        assert ours.keys() == other.keys()
        for key in {"loss/total", "preference/kl", "policy/grad_norm", "eval/loss", "eval/kl"} & ours.keys():
            assert ours[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5), key


def test_another_model_does_not_get_the_cache(tmp_path: Path) -> None:
    cached = {"algo__precompute_ref_log_probs": True, "algo__ref_cache_dir": str(tmp_path / "c")}
    trainer(tmp_path / "a", train__max_steps=1, **cached).train()
    trainer(tmp_path / "b", train__max_steps=1, train__seed=1, **cached).train()
    trainer(tmp_path / "c2", rows=PAIRS[:12], train__max_steps=1, **cached).train()
    assert len(list((tmp_path / "c").iterdir())) == 3


def test_sharing_the_prompt_and_cutting_the_batch_change_nothing(tmp_path: Path) -> None:
    runs = {
        "shared": {},
        "apart": {"train__share_prefixes": False, "train__max_tokens_per_micro_batch": 60},
        "padded": {"train__packing": False, "train__share_prefixes": False},
    }
    for name, options in runs.items():
        terms = [{"kind": "sigmoid"}, {"kind": "aot_unpaired"}]
        trainer(tmp_path / name, train__max_steps=2, algo__loss={"kind": "sum", "terms": terms}, **options).train()
    for name in ("apart", "padded"):
        for ours, other in zip(numbers(tmp_path / "shared"), numbers(tmp_path / name), strict=True):
            for key in ("loss/total", "preference/margin", "policy/grad_norm"):
                assert ours[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5), (name, key)


def letters(completion: str) -> float:
    return sum(character.isalpha() for character in completion) / 16


@pytest.mark.parametrize(
    "options",
    [
        {"algo__pairs": "all", "algo__min_margin": 0.05},
        {"algo__reference__steps": 1},
        {"algo__loss": "simpo"},
        {"algo__name": "online_kto", "algo__desirable_above": 0.3},
        {"algo__hierarchy": [{"part": "letters", "margin": 0.5}]},
        {"algo__num_mini_batches": 2},
    ],
    ids=str,
)
def test_online_from_any_reward_function(options: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": f"Count to {i}", "answer": str(i)} for i in range(16)]
    more = {"rollout__num_generations": 4, "rollout__max_completion_length": 12, "train__max_steps": 2}
    run = Trainer(
        settings(tmp_path / "run", **more, **options),
        model="tiny:qwen2", reward=letters, train_dataset=rows, algorithm=options.get("algo__name", "online_dpo"),
    )  # fmt: skip
    metrics = run.train()
    assert metrics["policy/grad_norm"] > 0
    assert metrics["sync/change"] > 0
    assert metrics["kl/mismatch/max"] < 1e-4


def test_online_while_the_learner_updates(tmp_path: Path) -> None:
    """Preferences among rollouts one version old; nothing weighs them (an option that would is refused)."""
    rows = [{"prompt": f"Count to {i}", "answer": str(i)} for i in range(16)]
    more = {"rollout__num_generations": 4, "rollout__max_completion_length": 12, "rollout__max_staleness": 1}
    run = Trainer(
        settings(tmp_path, **more), model="tiny:qwen2", reward=letters, train_dataset=rows, algorithm="online_dpo"
    )
    run.train()
    metrics = numbers(tmp_path)
    assert [row["rollout/staleness/max"] for row in metrics] == [0, 1, 1, 1]
    assert all(row["policy/grad_norm"] > 0 for row in metrics)
    assert audit(tmp_path / "ledger.jsonl")["exact"]


def test_online_dpo_learns_and_resumes(tmp_path: Path) -> None:
    rows = [{"prompt": f"Count to {i}", "answer": str(i)} for i in range(16)]
    more = {"rollout__num_generations": 8, "rollout__max_completion_length": 8, "train__learning_rate": 3e-3}

    def run(folder: Path, **options: Any) -> None:
        settled = settings(folder, **more, **{"train__max_steps": 12, "train__save_steps": 6, **options})
        Trainer(settled, model="tiny:qwen2", reward=letters, train_dataset=rows, algorithm="online_dpo").train()

    run(tmp_path / "whole")
    rewards = [row["reward/mean"] for row in numbers(tmp_path / "whole")]
    assert sum(rewards[-3:]) > 1.3 * sum(rewards[:3])
    run(tmp_path / "parts", train__max_steps=6)
    run(tmp_path / "parts", train__resume_from_checkpoint="last")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
def test_offline_on_real_preferences(shared_data: Path, tmp_path: Path) -> None:
    """Real rows (ShareGPT form): margin and accuracy on held-out pairs rise."""
    file = shared_data / "preference" / "dpo_en_demo.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    options = {
        "algo__max_length": 384,
        "rollout__num_prompts": 16,
        "train__max_steps": 24,
        "train__save_steps": 0,
        "eval__steps": 12,
    }
    run = Trainer(
        settings(tmp_path / "run", **options),
        model="tiny:qwen2", train_dataset=rows[:200], eval_dataset=rows[200:], algorithm="dpo",
    )  # fmt: skip

    async def both() -> dict[str, float]:
        async with run:
            before = await run.method.evaluate(run)
            await run.fit()
            return before

    before = asyncio.run(both())
    assert before["eval/margin"] == pytest.approx(0, abs=1e-5)
    assert before["eval/loss"] == pytest.approx(0.6931, abs=1e-3)
    measured = [row for row in numbers(tmp_path / "run") if "eval/margin" in row]
    assert [row["step"] for row in measured] == [12, 24]
    assert 0.02 < measured[0]["eval/margin"] < measured[1]["eval/margin"]
    assert measured[1]["eval/accuracy"] > 0.55


@pytest.mark.parametrize(
    ("algorithm", "rows", "options", "said"),
    [
        ("dpo", LABELLED, {}, "compares pairs"),
        ("dpo", [{"prompt": "a", "answer": "b"}], {}, "the columns are prompt, answer"),
        ("dpo", PAIRS, {"rollout__num_generations": 3}, "rollout.num_generations: algo.name dpo does not read it"),
        ("dpo", PAIRS, {"data__answer_column": "none"}, "data.answer_column: algo.name dpo does not read it"),
        ("dpo", PAIRS, {"algo__beta": 0.2}, "algo.beta: now algo.kl.beta (policy gradients) or algo.loss.beta"),
        ("dpo", PAIRS, {"algo__pairs": "all"}, "algo.pairs: not read by what was chosen, but by algo.name online_dpo"),
        ("dpo", PAIRS, {"algo__loss__gamma": 1.0}, "algo.loss.gamma: not read by what was chosen, but by kind simpo"),
        ("dpo", PAIRS, {"algo__loss": "exo_pair"}, "algo.loss.label_smoothing is not set"),
        ("dpo", PAIRS, {"algo__loss": "kto"}, "algo.loss.kind 'kto': not one of"),
        ("dpo", PAIRS, {"algo__loss": "aot", "algo__num_mini_batches": 2}, "aot compares all pairs"),
        ("dpo", PAIRS, {"algo__max_length": 3}, "all 16 rows are left out"),
        ("grpo", PAIRS, {"preference__beta": 0.2}, "preference.beta: now algo.loss.beta"),
        ("online_dpo", PAIRS, {}, "rewards is empty"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    algorithm: str, rows: Any, options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        trainer(tmp_path / "run", algorithm, rows, **options)
    assert said in str(caught.value)


def test_the_resolved_configuration_can_be_given_again(tmp_path: Path) -> None:
    from llmrl.config import load_config

    run = trainer(tmp_path / "run", train__max_steps=1)
    run.train()
    config = load_config(["--config", str(tmp_path / "run" / "config.yaml")])
    assert config == run.config
    assert "null" not in (tmp_path / "run" / "config.yaml").read_text()
