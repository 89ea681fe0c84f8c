"""SIGTERM and Ctrl-C, at every stage: what was trained is saved, and a resumed run ends with the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from llmrl import Trainer
from llmrl.errors import Interrupted
from llmrl.run import checkpoint
from llmrl.run.ledger import audit
from llmrl.track.files import read_jsonl

QUESTIONS = [{"question": f"{i}+{i}?", "answer": str(2 * i)} for i in range(12)]
STEPS = 4


def odd(completion: str) -> float:
    return float(sum(map(ord, completion)) % 2)


def trainer(folder: Path, reward: Callable[..., float] = odd, **more: Any) -> Trainer:
    options = {
        "train.output_dir": str(folder),
        "train.max_steps": STEPS,
        "train.learning_rate": 1e-2,
        "train.save_steps": 0,
        "rollout.num_prompts": 2,
        "rollout.num_generations": 4,
        "rollout.max_completion_length": 6,
        "track.console": "quiet",
        "eval.steps": 2,
    }
    options |= more
    held_out = QUESTIONS if options["eval.steps"] else None
    return Trainer(options, model="tiny:qwen2", reward=reward, train_dataset=QUESTIONS, eval_dataset=held_out)


def resume(folder: Path, **more: Any) -> None:
    trainer(folder, **{"train.resume_from_checkpoint": "last"} | more).train()


def rows(folder: Path) -> list[dict[str, Any]]:
    """The metrics without what depends on the clock."""
    found = read_jsonl(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in found]


def assert_same(found: Path, wanted: Path) -> None:
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (found, wanted))
    assert all(theirs[name].equal(ours[name]) for name in theirs)
    assert rows(found) == rows(wanted)
    assert audit(found / "ledger.jsonl")["exact"]
    assert len(read_jsonl(found / "rollouts.jsonl")) == len(read_jsonl(wanted / "rollouts.jsonl"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    trainer(folder).train()
    return folder


class Sender:
    """Sends a signal to this process at the n-th call of what it wraps."""

    def __init__(self, number: signal.Signals, at: int) -> None:
        self.number, self.left = number, at

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)


def plant(monkeypatch: pytest.MonkeyPatch, run: Trainer, stage: str, number: signal.Signals) -> None:
    """Have the signal sent in the third step, or in what belongs to it."""
    target, name, at = {
        "update": (run.learner, "update", 3),
        "serve": (run.source, "serve", 4),  # the first is before the first step
        "record": (run.record, "step", 3),
        "checkpoint": (checkpoint, "_to_disk", 1),
        "evaluation": (run.method, "evaluate", 1),
    }[stage]
    send, real = Sender(number, at), getattr(target, name)

    def sending(*args: Any, **options: Any) -> Any:
        send()
        return real(*args, **options)

    if target is run.method:
        run.method = replace(run.method, evaluate=sending)
    else:
        monkeypatch.setattr(target, name, sending)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["term", "int"])
@pytest.mark.parametrize("after", [0, 1, 2, 3], ids="after step {}".format)
@pytest.mark.parametrize("staleness", [0, 1], ids=["", "stale"])
def test_rollouts_are_given_up_at_once(
    tmp_path: Path, undisturbed: Path, after: int, number: signal.Signals, staleness: int
) -> None:
    begun = 0

    def reward(completion: str) -> float:
        nonlocal begun
        begun += 1
        if begun == 8 * after + 3:  # two prompts of four completions a step
            os.kill(os.getpid(), number)
        return odd(completion)

    more = {"eval.steps": 0, "rollout.max_staleness": staleness}
    with pytest.raises(Interrupted, match=f"{number.name}: ended") as stopped:
        trainer(tmp_path, reward, **more).train()
    assert stopped.value.exit_code == 128 + number
    steps = [checkpoint.step_of(folder) for folder in checkpoint.list_checkpoints(tmp_path)]
    if staleness:  # rollouts run ahead of the step
        assert len(steps) <= 1
    else:
        assert steps == ([after] if after else [])
        text = f"ended after step {after}; step {after} is saved. Continue with --train.resume_from_checkpoint last"
        assert text in str(stopped.value) or not after
    if not (tmp_path / "metrics.jsonl").is_file():
        return
    resume(tmp_path, **more)
    assert audit(tmp_path / "ledger.jsonl")["exact"]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    if not staleness:
        ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path, undisturbed))
        assert all(theirs[name].equal(ours[name]) for name in theirs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["term", "int"])
@pytest.mark.parametrize("stage", ["update", "serve", "record", "checkpoint", "evaluation"])
def test_a_step_under_way_is_finished_and_saved(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, stage: str, number: signal.Signals
) -> None:
    more = {"train.save_steps": 2} if stage == "checkpoint" else {}
    run = trainer(tmp_path, **more)
    with monkeypatch.context() as planted:
        plant(planted, run, stage, number)
        with pytest.raises(Interrupted) as stopped:
            run.train()
    last = checkpoint.list_checkpoints(tmp_path)[-1]
    assert checkpoint.step_of(last) == (2 if stage in ("checkpoint", "evaluation") else 3)
    assert f"{last.name.lstrip('step-0')} is saved" in str(stopped.value)
    resume(tmp_path, **more)
    assert_same(tmp_path, undisturbed)


def test_handlers_are_those_of_before_again(tmp_path: Path, undisturbed: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    trainer(tmp_path, **{"train.max_steps": 1}).train()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


SCRIPT = """
import os, signal, sys, time
from llmrl import Trainer
from llmrl.errors import run_main

sent = []

def reward(completion):
    if not sent:
        sent.append(1)
        os.kill(os.getpid(), signal.{name})
        {then}
    return float(len(completion) % 2)

options = {{"train.output_dir": sys.argv[1], "train.max_steps": 3, "rollout.num_prompts": 2, "train.grace_s": 0.2,
           "rollout.num_generations": 2, "rollout.max_completion_length": 4, "track.console": "quiet"}}
rows = [{{"question": str(i), "answer": "1"}} for i in range(4)]
run_main(lambda: Trainer(options, model="tiny:qwen2", reward=reward, train_dataset=rows).train())
"""


def run_script(
    folder: Path, name: str, *, then: str = "pass", condition: str = "True"
) -> subprocess.CompletedProcess[str]:
    script = SCRIPT.format(name=name, then=then, condition=condition)
    return subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_command_ends_with_the_code_of_the_signal(tmp_path: Path, name: str, code: int) -> None:
    done = run_script(tmp_path, name)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert done.stderr.rstrip().endswith(f"{name}: ended before the first step; nothing was trained")


@pytest.mark.slow
def test_what_does_not_end_in_its_grace_time_is_ended(tmp_path: Path) -> None:
    done = run_script(tmp_path, "SIGTERM", then="time.sleep(250)")
    assert done.returncode == 143
    assert "not done 0.2 s after SIGTERM (train.grace_s): ended before the first step" in done.stderr


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    done = run_script(tmp_path, "SIGINT", then="os.kill(os.getpid(), signal.SIGINT); time.sleep(250)")
    assert done.returncode == 130
    assert "interrupted twice" in done.stderr
