"""Callbacks in transformers' style: which hooks are called with what, and what they can ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback

from llmrl import Trainer
from llmrl.config import Config
from llmrl.errors import RunFailed, UserError
from llmrl.run.callbacks import Callbacks, check_callbacks
from llmrl.run.checkpoint import list_checkpoints
from tests.run.test_trainer import ROWS, letters, numbers, settings

HELD_OUT = ROWS[:2]


class Diary:
    """Writes down what it is called with; it knows no base class."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.logs: list[dict[str, float]] = []
        self.found: list[dict[str, float]] = []
        self.seen: set[str] = set()

    def _note(self, event: str, state: Any, more: dict[str, Any]) -> None:
        self.events.append((event, state.global_step))
        self.seen |= set(more)

    def on_init_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._note("init", state, more)

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.args, self.max_steps = args, state.max_steps
        self._note("begin", state, more)

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._note("step", state, more)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.epoch = state.epoch
        self._note("stepped", state, more)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        self.logs.append(logs)
        self._note("log", state, more)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **more: Any) -> None:
        self.found.append(metrics)
        self._note("evaluate", state, more)

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._note("save", state, more)

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.history = state.log_history
        self._note("end", state, more)


def trainer(folder: Path, *callbacks: Any, **more: Any) -> Trainer:
    held_out = {"eval_dataset": HELD_OUT} if any(key.startswith("eval__") for key in more) else {}
    options = settings(folder, **more)
    return Trainer(options, model="tiny:qwen2", reward=letters, train_dataset=ROWS, callbacks=[*callbacks], **held_out)


def test_the_hooks_of_a_run_in_their_order(tmp_path: Path) -> None:
    diary = Diary()
    metrics = trainer(tmp_path / "run", diary, train__max_steps=2, train__save_steps=1, eval__steps=2).train()
    assert diary.events == [
        ("init", 0), ("begin", 0),
        ("step", 0), ("stepped", 1), ("log", 1), ("save", 1),
        ("step", 1), ("stepped", 2), ("save", 2), ("log", 2), ("evaluate", 2),
        ("end", 2),
    ]  # fmt: skip
    assert diary.seen == {
        "model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader",
    }  # fmt: skip
    assert diary.logs[1] == metrics and diary.max_steps == 2
    assert diary.found == [
        {key: metrics["eval/" + key[5:]] for key in ("eval/pass@1", "eval/reward", "eval_pass@1", "eval_reward")}
    ]
    assert diary.epoch == pytest.approx(2 * 4 / 24)
    assert [row["step"] for row in diary.history] == [1, 2]
    assert isinstance(diary.args.config, Config) and diary.args.output_dir == str(tmp_path / "run")


def test_callbacks_do_not_change_what_is_trained(tmp_path: Path) -> None:
    trainer(tmp_path / "with", Diary(), train__max_steps=2).train()
    trainer(tmp_path / "without", train__max_steps=2).train()
    assert numbers(tmp_path / "with") == numbers(tmp_path / "without")


def test_stopping_early_saves_the_model_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
            control.should_training_stop = state.global_step >= 3
            return control

    more = {"train__max_steps": 6, "train__save_steps": 0, "track__console": "plain", "eval__steps": 6}
    trainer(tmp_path / "run", Stop, **more).train()
    assert len(numbers(tmp_path / "run")) == 3
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert [folder.name for folder in list_checkpoints(tmp_path / "run")] == ["step-00000003"]
    assert "stopped after step 3 of 6 by Stop" in capsys.readouterr().out
    trainer(tmp_path / "run", train__resume_from_checkpoint=True, **more).train()
    trainer(tmp_path / "whole", **more).train()
    assert "eval/reward" in numbers(tmp_path / "run")[2], "where it ended, it was evaluated"
    without = [
        [{key: value for key, value in row.items() if "eval/" not in key} for row in numbers(tmp_path / name)]
        for name in ("run", "whole")
    ]
    assert without[0] == without[1]


@pytest.mark.parametrize("hook", ["on_log", "on_save", pytest.param("on_evaluate", marks=pytest.mark.slow)])
def test_a_stop_after_the_step_is_kept_too(hook: str, tmp_path: Path) -> None:
    def stop(args: Any, state: Any, control: Any, **more: Any) -> None:
        control.should_training_stop = state.global_step == 2

    callback = type("Stop", (), {hook: staticmethod(stop)})()
    trainer(tmp_path / "run", callback, train__save_steps=2 if hook == "on_save" else 0, eval__steps=1).train()
    assert [row["step"] for row in numbers(tmp_path / "run")] == [1, 2]
    assert [folder.name for folder in list_checkpoints(tmp_path / "run")] == ["step-00000002"]


def test_a_checkpoint_and_an_evaluation_can_be_asked_for(tmp_path: Path) -> None:
    class Ask:
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            control.should_save = control.should_evaluate = state.global_step == 1

    trainer(tmp_path / "run", Ask(), train__max_steps=3, train__save_steps=0, eval__steps=3).train()
    assert ["eval/reward" in row for row in numbers(tmp_path / "run")] == [True, False, True]
    assert [folder.name for folder in list_checkpoints(tmp_path / "run")] == ["step-00000001", "step-00000003"]


def test_an_evaluation_of_nothing_is_refused(tmp_path: Path) -> None:
    class Ask:
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            control.should_evaluate = True

    with pytest.raises(RunFailed, match="a callback asked for an evaluation, but there are no held-out tasks"):
        trainer(tmp_path / "run", Ask()).train()


def test_callbacks_can_be_added_before_the_run(tmp_path: Path) -> None:
    first, second = Diary(), Diary()
    run = trainer(tmp_path / "run", first, train__max_steps=1)
    run.add_callback(second)
    run.train()
    assert first.events == second.events and first.events[0] == ("init", 0) and len(first.events) == 7


class Patience(EarlyStoppingCallback):
    """Transformers' own, and a diary of its counter."""

    def __init__(self, diary: list[int], patience: int = 2) -> None:
        super().__init__(early_stopping_patience=patience)
        self.diary = diary

    def state(self) -> dict[str, Any]:
        return {"attributes": {"early_stopping_patience_counter": self.early_stopping_patience_counter}}

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **more: Any) -> None:
        super().on_evaluate(args, state, control, metrics, **more)
        self.diary.append(self.early_stopping_patience_counter)


def scripted(run: Trainer, values: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    async def evaluate(trainer: Any) -> dict[str, float]:
        return {"eval/reward": values[trainer.step - 1]}

    monkeypatch.setattr(run, "method", type("Method", (), {"evaluate": staticmethod(evaluate)}))


@pytest.mark.slow
def test_early_stopping_of_transformers_survives_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values, more = [0.3, 0.5, 0.4, 0.5, 0.9, 0.9], {"eval__keep_best": "eval/reward", "eval__steps": 1}
    whole, parts = list[int](), list[int]()
    run = trainer(tmp_path / "whole", Patience(whole), train__max_steps=6, train__save_steps=1, **more)
    scripted(run, values, monkeypatch)
    run.train()
    assert whole == [0, 0, 1, 2] and len(numbers(tmp_path / "whole")) == 4
    first = trainer(tmp_path / "parts", Patience(parts), train__max_steps=3, train__save_steps=1, **more)
    scripted(first, values, monkeypatch)
    first.train()
    second = trainer(
        tmp_path / "parts", Patience(parts), train__max_steps=6, train__save_steps=1,
        train__resume_from_checkpoint="last", **more,
    )  # fmt: skip
    scripted(second, values, monkeypatch)
    second.train()
    assert parts == [0, 0, 1, 1, 2]  # the evaluation of step 3 is told again
    assert len(numbers(tmp_path / "parts")) == 4


def test_an_error_of_a_callback_is_the_users_own(tmp_path: Path) -> None:
    class Fails:
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            raise ZeroDivisionError("my mistake")

    with pytest.raises(ZeroDivisionError, match="^my mistake") as caught:
        trainer(tmp_path / "run", Fails()).train()
    assert caught.value.__notes__ == ["raised by the callback Fails.on_step_end after step 1"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [(lambda control: 5, "returned 5: return control, or nothing"), (None, "set control.should_epoch_stop")],
)
def test_answers_that_mean_nothing_stop_the_run(answer: Any, message: str, tmp_path: Path) -> None:
    class Odd:
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
            control.should_epoch_stop = answer is None
            return control if answer is None else answer(control)

    with pytest.raises(RunFailed, match=message):
        trainer(tmp_path / "run", Odd()).train()


class OnStepEnd:
    def onStepEnd(self) -> None: ...


class Misspelt:
    def on_stepend(self) -> None: ...


class Optimizer(TrainerCallback):
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None: ...


class Waits:
    async def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None: ...


class Needs:
    def __init__(self, patience: int) -> None: ...
    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None: ...


class Narrow:
    def on_evaluate(self, args: Any, state: Any, control: Any) -> None: ...


class Empty(TrainerCallback):
    """Overrides nothing."""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([Misspelt()], "Misspelt has on_stepend, which is no event; did you mean on_step_end"),
        (OnStepEnd(), "OnStepEnd has no hook; did you mean on_step_end"),
        ([Optimizer], "Optimizer has on_optimizer_step, which is not called: .* use on_step_end"),
        ([Waits()], "Waits.on_log is a coroutine function"),
        ([Needs], "callback Needs cannot be made without arguments"),
        (
            [Narrow()],
            r"Narrow.on_evaluate cannot be called as on_evaluate\(args, state, control, \*\*kwargs\): got an unex",
        ),
        ("progress", "callback str has no hook; give it one of"),
        ([Empty()], "callback Empty has no hook; give it one of on_init_end"),
        ([letters], "is a function: give an object with a method"),
        ([object()], "callback object has no hook"),
    ],
)
def test_what_is_no_callback_is_refused_before_a_model_loads(given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Trainer({"model.path": "/nowhere"}, reward=letters, train_dataset=ROWS, callbacks=given)


def test_what_one_process_asks_for_holds_on_all() -> None:
    class Parallel:
        world, is_main = 2, True
        accelerator = type("A", (), {"is_local_main_process": True})

        def gather_objects(self, items: list[Any]) -> list[Any]:
            return [*items, {**items[0], "should_training_stop": True, "should_save": True}]

    class Quiet:
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None: ...

    called = Callbacks([Quiet()], config=Config(), args=None, parallel=Parallel(), context={})  # pyright: ignore
    called.call("on_step_end")
    assert called.stops and called.asks("should_save") and not called.asks("should_evaluate")


def test_known_callbacks_of_transformers_are_taken(tmp_path: Path) -> None:
    from transformers import PrinterCallback, ProgressCallback

    called = check_callbacks([PrinterCallback, ProgressCallback()])
    metrics = trainer(tmp_path / "run", *called, train__max_steps=1, eval__steps=1).train()
    assert "eval/reward" in metrics
