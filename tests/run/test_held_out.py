"""Evaluation while training: before the first step, the best model, and evaluations that fail or are interrupted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmrl import Trainer
from llmrl.config import from_dotted
from llmrl.errors import RunFailed, UserError
from llmrl.run.best import Best
from llmrl.run.checkpoint import list_checkpoints
from llmrl.run.given import Given, resolve_config
from llmrl.run.ledger import audit
from llmrl.track.files import read_jsonl
from tests.run.test_trainer import ROWS, letters, numbers, settings

pytestmark = pytest.mark.slow

HELD_OUT = [{"prompt": f"Name {i}", "answer": str(i)} for i in range(4)]


def trainer(folder: Path, reward: Any = letters, **more: Any) -> Trainer:
    options = {"eval__steps": 2, "eval__num_generations": 2, "eval__temperature": 1.0} | more
    return Trainer(
        settings(folder, **options), model="tiny:qwen2", reward=reward, train_dataset=ROWS, eval_dataset=HELD_OUT
    )


def evaluated(folder: Path) -> list[int]:
    return [row["step"] for row in numbers(folder) if "eval/reward" in row]


def test_evaluation_before_the_first_step_is_step_0(tmp_path: Path) -> None:
    trainer(tmp_path / "with", eval__at_start=True).train()
    trainer(tmp_path / "without").train()
    assert [row["step"] for row in numbers(tmp_path / "with")] == [0, 1, 2, 3, 4]
    assert evaluated(tmp_path / "with") == [0, 2, 4]
    assert set(numbers(tmp_path / "with")[0]) == {"step", "eval/pass@1", "eval/pass@2", "eval/reward"}
    assert numbers(tmp_path / "with")[1:] == numbers(tmp_path / "without"), "evaluation leaves training as it is"


def test_the_mean_reward_of_held_out_tasks(tmp_path: Path) -> None:
    metrics = trainer(tmp_path / "run", lambda completion: 0.25, eval__steps=4).train()
    assert metrics["eval/reward"] == 0.25 and metrics["eval/pass@1"] == 0.0


class Broken:
    """A reward whose judge gives up on held-out tasks, after the first `good` of them."""

    def __init__(self, good: int) -> None:
        self.left = good

    def __call__(self, completion: str, prompt: str) -> float:
        if prompt.startswith("Name"):
            if self.left <= 0:
                raise RunFailed("the judge's budget is spent")
            self.left -= 1
        return letters(completion)


def strip(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key.replace("letters", "R").replace("Broken", "R"): value for key, value in row.items()} for row in rows]


@pytest.mark.parametrize("save_steps", [pytest.param(2, marks=pytest.mark.slow), 100])
def test_an_evaluation_that_fails_loses_no_step(save_steps: int, tmp_path: Path) -> None:
    folder, more = tmp_path / "run", {"train__save_steps": save_steps}
    with pytest.raises(RunFailed) as caught:
        trainer(folder, Broken(good=0), **more).train()
    text = str(caught.value)
    assert text.startswith("the judge's budget is spent\n")
    assert "the evaluation after step 2, which is trained, and has a checkpoint" in text
    assert "--train.resume_from_checkpoint last" in text
    assert [row["step"] for row in numbers(folder)] == [1, 2] and not evaluated(folder)
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000002"]
    assert audit(folder / "ledger.jsonl")["exact"] and audit(folder / "ledger.jsonl")["trained"] == 8
    trainer(folder, Broken(good=99), train__resume_from_checkpoint=True, **more).train()
    trainer(tmp_path / "whole", **more).train()
    assert strip(numbers(folder)) == strip(numbers(tmp_path / "whole"))
    whole, parts = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "run"))
    assert all(whole[name].equal(parts[name]) for name in whole)


@pytest.mark.slow
def test_going_on_without_the_evaluation_that_failed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(RunFailed):
        trainer(folder, Broken(good=0)).train()
    options = settings(folder, train__resume_from_checkpoint="last")
    Trainer(options, model="tiny:qwen2", reward=Broken(good=0), train_dataset=ROWS).train()
    assert [row["step"] for row in numbers(folder)] == [1, 2, 3, 4] and not evaluated(folder)


def test_an_error_of_the_users_own_is_raised_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path / "run")

    async def fails(_: Any) -> dict[str, float]:
        raise ZeroDivisionError("mine")

    monkeypatch.setattr(run, "method", type("Method", (), {"evaluate": staticmethod(fails)}))
    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        run.train()
    assert "the evaluation after step 2" in caught.value.__notes__[0]
    assert [row["step"] for row in numbers(tmp_path / "run")] == [1, 2]


def test_too_many_failures_on_held_out_tasks_stop_the_run(tmp_path: Path) -> None:
    def only_training(completion: str, prompt: str) -> float:
        if prompt.startswith("Name"):
            raise KeyError("no such column")
        return letters(completion)

    with pytest.raises(
        RunFailed, match=r"(?s)8 of 8 rollouts of held-out tasks .*no such column.*evaluation after step 2"
    ) as caught:
        trainer(tmp_path / "run", only_training).train()
    assert "no such column" in str(caught.value).replace("\n", " ")


@pytest.mark.parametrize("killed_after_the_row", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_run_that_was_killed_in_an_evaluation_is_resumed_exactly(killed_after_the_row: bool, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more: dict[str, Any] = {"eval__keep_best": "eval/reward"}
    trainer(whole, **more).train()
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "step-00000004")
    lines = (parts / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = lines[:2] if killed_after_the_row else [lines[0], lines[1][:30]]
    (parts / "metrics.jsonl").write_text("".join(kept))
    trainer(parts, train__resume_from_checkpoint="last", **more).train()
    assert numbers(whole) == numbers(parts)
    assert json.loads((whole / "best/best.json").read_text()) == json.loads((parts / "best/best.json").read_text())


@pytest.mark.slow
def test_a_branch_of_a_checkpoint_before_its_evaluation(tmp_path: Path) -> None:
    trainer(tmp_path / "run").train()
    source = tmp_path / "run" / "checkpoints" / "step-00000002"
    for name in ("one", "two"):  # the second begins from the first one's copy
        trainer(tmp_path / name, train__resume_from_checkpoint=str(source)).train()
        assert numbers(tmp_path / name) == numbers(tmp_path / "run")
        source = tmp_path / name / "checkpoints" / "step-00000002"


# --- the best model ---------------------------------------------------------------------------------------------------


def test_best_holds_the_model_of_the_best_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([0.2, 0.6, 0.4, 0.6])

    async def scripted(_: Any) -> dict[str, float]:
        return {"eval/reward": next(values)}

    more: dict[str, Any] = {"eval__steps": 1, "train__save_steps": 1, "train__save_total_limit": 1}
    run = trainer(tmp_path / "run", eval__keep_best="eval/reward", **more)
    monkeypatch.setattr(run, "method", type("Method", (), {"evaluate": staticmethod(scripted)}))
    run.train()
    assert json.loads((tmp_path / "run/best/best.json").read_text()) == {
        "step": 2, "metric": "eval/reward", "value": 0.6,
    }  # fmt: skip
    other = Trainer(
        settings(tmp_path / "two", train__max_steps=2), model="tiny:qwen2", reward=letters, train_dataset=ROWS
    )
    other.train()
    best, second = (load_file(tmp_path / name / "model.safetensors") for name in ("run/best", "two/model"))
    assert all(best[name].equal(second[name]) for name in best)
    AutoModelForCausalLM.from_pretrained(tmp_path / "run/best")
    assert "after 2 training steps" in (tmp_path / "run/best/README.md").read_text()


@pytest.mark.parametrize(
    ("metric", "values", "step"),
    [("eval/loss", [3.0, 1.0, 2.0], 2), ("eval/pass@1", [0.1, 0.3, 0.2], 2), ("eval/loss", [float("nan"), 5.0], 2)],
)
def test_the_direction_is_that_of_the_metric(metric: str, values: list[float], step: int, tmp_path: Path) -> None:
    best = Best(from_dotted({"eval.keep_best": metric}).eval, tmp_path)
    taken = [best.take(k, {metric: value}) for k, value in enumerate(values, start=1)]
    assert best.step == step and taken[step - 1]
    with pytest.raises(RunFailed, match=f"eval.keep_best {metric} was not measured: the evaluation has eval/other"):
        best.take(9, {"eval/other": 1.0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval.keep_best": "eval/pass@4", "eval.steps": 1}, r"not measured with eval.num_generations 1: there are"),
        ({"eval.keep_best": "reward/mean", "eval.steps": 1}, r"eval.keep_best reward/mean is not measured"),
        ({"eval.keep_best": "eval/reward", "eval.at_start": True}, r"looks at evaluations, but eval.steps is 0"),
    ],
)
def test_what_cannot_be_the_best(options: dict[str, Any], message: str) -> None:
    needed = {"model.path": "tiny:qwen2", "data.path": "rows.jsonl", "eval.data.path": "rows.jsonl"}
    with pytest.raises(UserError, match=message):
        resolve_config({**needed, **options}, Given(reward=letters))


def test_at_start_needs_held_out_tasks() -> None:
    needed = {"model.path": "tiny:qwen2", "data.path": "rows.jsonl", "eval.at_start": True}
    with pytest.raises(UserError, match="eval.at_start is set but eval.data is not"):
        resolve_config(needed, Given(reward=letters))
    resolve_config(needed | {"eval.data.path": "rows.jsonl"}, Given(reward=letters))  # once is a use of it
    dpo = {"model.path": "tiny:qwen2", "data.path": "r.jsonl", "algo.name": "dpo", "eval.data.path": "r.jsonl"}
    with pytest.raises(
        UserError, match="eval.keep_best eval/kl is no metric of an evaluation that has a good direction"
    ):
        resolve_config(dpo | {"eval.steps": 1, "eval.keep_best": "eval/kl"}, Given())


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    trainer(tmp_path / "run", eval__at_start=True, train__max_steps=1).train()
    again = trainer(tmp_path / "run", eval__at_start=True, train__max_steps=2, train__resume_from_checkpoint="last")
    again.train()
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]


def test_what_rewards_report_of_held_out_tasks_stays_apart(tmp_path: Path) -> None:
    def reports(completions: list[Any], prompts: list[Any], log_metric: Any, **_: Any) -> list[float]:
        log_metric("held_out", float(prompts[0][0]["content"].startswith("Name")))
        return [0.5] * len(completions)

    trainer(tmp_path / "run", reports).train()
    rows = numbers(tmp_path / "run")
    assert [row["held_out"] for row in rows] == [0.0] * 4
    assert [row.get("eval/held_out") for row in rows] == [None, 1.0, None, 1.0]
