"""The table of kinds of run: a row for every preset, and what each row promises of a whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmrl import Trainer
from llmrl.config import PRESETS, Config, RolloutConfig, RunConfig, complete
from llmrl.config.config import run_class
from llmrl.engines.hf.engine import HFEngine
from llmrl.errors import UserError
from llmrl.rollout.source import Source
from llmrl.run.engines import ENGINES
from llmrl.run.ledger import audit
from llmrl.run.methods import METHODS, make_algorithm
from llmrl.track.files import read_jsonl
from llmrl.types import Completion, Sampling, WeightSource

TASKS = [{"prompt": f"Count to {i}", "answer": str(i)} for i in range(12)]
PAIRS = [{"prompt": f"Name {i}.", "chosen": f" It is {i}", "rejected": " no"} for i in range(8)]
LABELS = [{"prompt": f"Name {i}.", "completion": f" It is {i}", "label": bool(i % 2)} for i in range(8)]
PROGRAMS = [
    {
        "prompt": f"task {i}",
        "solution": f"return {i}",
        "samples": [{"completion": text, "reward": reward} for text, reward in (("return x", 1.0), ("retrun", -0.6))],
    }
    for i in range(8)
]
KINDS = {
    "grpo": TASKS,
    "ppo": TASKS,
    "online_dpo": TASKS,
    "online_kto": TASKS,
    "dpo": PAIRS,
    "kto": LABELS,
    "bcoder": PROGRAMS,
}
"""One preset of each kind of run, with rows for it."""
OFFLINE = ("dpo", "kto")


def digits(completion: str) -> float:
    return sum(character.isdigit() for character in completion) / 8


def trainer(folder: Path, kind: str, reward: Any = digits, eval_dataset: Any = None, **more: Any) -> Trainer:
    options = {"train.max_steps": 2, "rollout.num_prompts": 4, "track.console": "quiet", "train.save_steps": 0}
    if kind not in OFFLINE:
        options |= {"rollout.num_generations": 2, "rollout.max_completion_length": 8}
    options |= {"train.output_dir": str(folder)} | {key.replace("__", "."): value for key, value in more.items()}
    return Trainer(
        options,
        model="tiny:qwen2",
        reward=None if kind in OFFLINE else reward,
        train_dataset=KINDS[kind],
        eval_dataset=eval_dataset,
        algorithm=kind,
    )


# --- the table --------------------------------------------------------------------------------------------------------


def test_every_preset_has_a_row_and_every_row_a_preset() -> None:
    assert METHODS.keys() == {type(options) for options in PRESETS.values()}
    assert {type(PRESETS[kind]) for kind in KINDS} == METHODS.keys(), "the tests below run all of them"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_its_algorithm(name: str) -> None:
    options = PRESETS[name]
    config = complete(run_class(options)(algo=options))
    assert isinstance(config, Config if run_class(options) is Config else RunConfig)
    algorithm = make_algorithm(config)
    assert algorithm.steps_per_batch == options.num_iterations * options.num_mini_batches


# --- every kind of run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_source_is_closed_even_if_it_could_not_be_opened(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, closed = trainer(tmp_path / "run", kind), list[Source]()
    close = type(run.source).close

    async def failing(source: Source, learner: object) -> list[str]:
        raise OSError("a verifier did not start")

    async def closing(source: Source) -> None:
        closed.append(source)
        await close(source)

    monkeypatch.setattr(type(run.source), "open", failing)
    monkeypatch.setattr(type(run.source), "close", closing)
    with pytest.raises(OSError, match="a verifier did not start"):
        run.train()
    assert closed == [run.source]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_each_issued_task_once_and_closes_its_source(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, closed = trainer(tmp_path / "run", kind), list[Source]()
    close = type(run.source).close

    async def closing(source: Source) -> None:
        closed.append(source)
        await close(source)

    monkeypatch.setattr(type(run.source), "close", closing)
    metrics = run.train()
    assert closed == [run.source]
    assert metrics["rollout/num_tokens"] > 0
    ledger = tmp_path / "run" / "ledger.jsonl"
    assert audit(ledger) == {"issued": 8, "trained": 8, "lost": [], "doubled": [], "exact": True}
    for event in ("issued", "trained"):
        assert [row["position"] for row in read_jsonl(ledger) if row["event"] == event] == list(range(8))


@pytest.mark.parametrize("kind", OFFLINE)
def test_rewards_of_a_dataset_are_not_logged_as_measured(kind: str, tmp_path: Path) -> None:
    trainer(tmp_path / "run", kind).train()
    for row in read_jsonl(tmp_path / "run" / "metrics.jsonl"):
        assert not [key for key in row if key.startswith(("reward/", "sync/", "rollout/staleness"))]
        assert row["rollout/length/mean"] > 0


@pytest.mark.parametrize("kind", OFFLINE)
def test_a_reward_that_nothing_would_read_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"algo.name {kind} does not score anything"):
        Trainer(
            {"train.output_dir": str(tmp_path / "run")},
            model="no/such-model",
            reward=digits,
            train_dataset=KINDS[kind],
            algorithm=kind,
        )


# --- rewards that depend on the step ----------------------------------------------------------------------------------


def test_trl_reward_functions_see_where_the_run_is(tmp_path: Path) -> None:
    seen: list[tuple[int, int, float]] = []

    def reward(prompts: list[str], completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
        seen.append((trainer_state.global_step, trainer_state.max_steps, trainer_state.epoch))
        return [float(len(text) % 2) for text in completions]

    trainer(tmp_path / "run", "grpo", reward, train__max_steps=4).train()
    # 4 of 12 tasks a step: one epoch takes three steps
    expected = [(step, 4, pytest.approx(step / 3)) for step in range(4) for _ in range(4)]
    assert seen == expected


def test_an_epoch_is_one_pass_over_the_tasks_that_are_not_too_long(tmp_path: Path) -> None:
    seen: list[float] = []

    def reward(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
        seen.append(trainer_state.epoch)
        return [0.0] * len(completions)

    rows = [{"prompt": "a" * (400 if i >= 8 else 4), "answer": "x"} for i in range(12)]
    options: dict[str, Any] = {
        "train.output_dir": str(tmp_path / "run"),
        "train.max_steps": 3,
        "data.max_prompt_length": 200,
        "rollout.num_prompts": 4,
        "rollout.num_generations": 2,
        "rollout.max_completion_length": 4,
        "track.console": "quiet",
    }
    Trainer(options, model="tiny:qwen2", reward=reward, train_dataset=rows).train()
    assert sorted(set(seen)) == [0.0, 0.5, 1.0]


# --- B-Coder: an engine only where something samples ------------------------------------------------------------------


def test_stored_programs_start_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing samples in this run")

    monkeypatch.setitem(ENGINES, "hf", refuse)
    metrics = trainer(tmp_path / "run", "bcoder").train()
    assert not [key for key in metrics if key.startswith(("sync/", "kl/mismatch", "reward/"))]
    with pytest.raises(AssertionError, match="nothing samples"):
        trainer(tmp_path / "other", "bcoder", eval_dataset=TASKS[:2], eval__steps=1)


def test_held_out_tasks_are_sampled_from_the_current_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[int] = []
    sampled: list[tuple[int, int]] = []

    class Recording(HFEngine):
        async def load_weights(self, source: WeightSource, *, version: int) -> None:
            pushed.append(version)
            await super().load_weights(source, version=version)

        async def generate(self, prompt_ids: list[int], sampling: Sampling, *, session: str) -> Completion:
            completion = await super().generate(prompt_ids, sampling, session=session)
            sampled.append(completion.policy_version)
            return completion

    monkeypatch.setattr("llmrl.engines.hf.engine.HFEngine", Recording)
    trainer(tmp_path / "run", "bcoder", eval_dataset=TASKS[:3], train__max_steps=4, eval__steps=2).train()
    assert pushed == [2, 4], "only before held-out tasks are sampled"
    assert sampled == [(2, 2)] * 3 + [(4, 4)] * 3
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert ["eval/pass@1" in row for row in rows] == [False, True, False, True]
    assert audit(tmp_path / "run" / "ledger.jsonl")["exact"]


def test_the_engine_of_held_out_tasks_is_asked_for_the_batch_size_of_the_run(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", "bcoder", eval_dataset=TASKS[:2], eval__steps=1)
    assert isinstance(run.config.rollout, RolloutConfig)
    assert run.source.max_staleness is None, "no policy wrote the stored programs"
