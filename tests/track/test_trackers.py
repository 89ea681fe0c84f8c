"""Trackers: what reaches each of them, what a resumed run sends, and what is refused before anything starts."""

from __future__ import annotations

import json
import sys
from operator import attrgetter
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from llmrl.errors import UserError
from llmrl.track import backends, trackers
from llmrl.track.backends import Backend, Start
from llmrl.track.metrics import completion_table
from llmrl.track.options import TrackConfig
from llmrl.track.trackers import Trackers, check_installed, chosen
from llmrl.types import Rollout, RolloutGroup, Score, Task, Turn

CONFIG = {"train": {"seed": 3, "output_dir": "o"}, "rewards": [{"fn": "f"}]}


def group(*completions: str, prefilled: str = "") -> RolloutGroup:
    task = Task(id="t-1", messages=[{"role": "user", "content": "2+2?"}])
    rollouts = [
        Rollout(
            task=task,
            index=i,
            score=Score(reward=float(i), parts={"right": float(i), "form": None}),
            turns=[
                Turn(
                    prompt_ids=[1],
                    completion_ids=[2],
                    rollout_logprobs=[0.0],
                    finish="stop",
                    policy_version=(0, 0),
                    message={"role": "assistant", "content": text},
                    prefilled=prefilled,
                )
            ],
        )
        for i, text in enumerate(completions)
    ]
    return RolloutGroup(task=task, rollouts=rollouts)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("wandb", ["wandb"]),
        ("wandb, tensorboard", ["wandb", "tensorboard"]),
        (["mlflow"], ["mlflow"]),
        ("none", []),
        (["none"], []),
        ([], []),
    ],
)
def test_one_name_or_several(given: Any, names: list[str]) -> None:
    assert TrackConfig(report_to=given).report_to == names


@pytest.mark.parametrize("given", [3, [3], {"wandb": True}])
def test_other_types_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="report_to"):
        TrackConfig(report_to=given)


def test_what_no_tracker_would_read_is_a_finding() -> None:
    assert TrackConfig().findings() == []
    assert TrackConfig(report_to="wandb", project="p", run_name="r", log_completions_steps=0).findings() == []
    found = TrackConfig(project="p", run_name="r", log_completions_steps=5).findings()
    assert [line.partition(" is set, but track.report_to names no tracker")[0] for line in found] == [
        "track.project",
        "track.run_name",
        "track.log_completions_steps",
    ]
    (misspelt,) = TrackConfig(report_to=["tensorbord"]).findings()
    assert misspelt.startswith("track.report_to: no tracker is called 'tensorbord'; did you mean 'tensorboard'?")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mlflow").mkdir()  # what a run leaves behind looks like a package
    monkeypatch.syspath_prepend(tmp_path)
    find = trackers.importlib.util.find_spec
    missing = {"wandb", "comet_ml"}

    def find_spec(name: str) -> Any:
        if name == "mlflow":
            spec = MagicMock(origin=None)
            return spec
        return None if name in missing else find(name)

    monkeypatch.setattr(trackers.importlib.util, "find_spec", find_spec)
    for name, fix in (("wandb", "'llmrl[wandb]'"), ("mlflow", "'llmrl[mlflow]'"), ("comet_ml", "comet-ml")):
        with pytest.raises(UserError, match=f"track.report_to {name}: its package is not installed: pip install") as it:
            check_installed([name])
        assert fix in str(it.value)
    check_installed(["tensorboard", "all"])
    assert chosen(["tensorboard", "tensorboard"]) == ["tensorboard"]
    assert "tensorboard" in chosen(["all"])
    assert "wandb" not in chosen(["all"])


# --- the life of a run ------------------------------------------------------------------------------------------------


class Fake(Backend):
    """Keeps what it is sent."""

    def __init__(self, start: Start) -> None:
        self.start = start
        self.id = start.id or "new-id"
        self.sent: list[Any] = []
        self.breaks = False

    def log(self, metrics: dict[str, float], step: int) -> None:
        if self.breaks:
            raise ConnectionError("server gone")
        self.sent.append((step, metrics))

    def table(self, columns: list[str], rows: list[list[Any]], step: int) -> None:
        self.sent.append((step, len(rows)))

    def close(self, failed: bool) -> None:
        self.sent.append(("closed", failed))


class Replacing(Fake):
    replaces = True


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, "wandb", Fake)
    monkeypatch.setitem(backends.BACKENDS, "tensorboard", Replacing)


def run(folder: Path, warned: list[str] | None = None, **options: Any) -> Trackers:
    warn = (warned if warned is not None else []).append
    return Trackers(TrackConfig(**options), folder, CONFIG, warn=warn)


def test_a_resumed_run_sends_each_step_once(tmp_path: Path, fakes: None) -> None:
    first = run(tmp_path, report_to=["wandb", "tensorboard"], log_completions_steps=2, project="p", run_name="r")
    first.start(0)
    first.log(0, {"m": 0.0})
    for step in (1, 2, 3):
        first.table(step, [group("a", "b")])
        first.log(step, {"m": float(step)})
    wandb: Any = first.backends["wandb"]
    start = wandb.start
    assert (start.project, start.run_name, start.id, start.step, start.config) == ("p", "r", None, 0, CONFIG)
    assert wandb.sent == [(0, {"m": 0.0}), (1, 2), (1, {"m": 1.0}), (2, 2), (2, {"m": 2.0}), (3, {"m": 3.0})]
    # The run dies, and goes on from a checkpoint of step 1.
    later = run(tmp_path, report_to=["wandb", "tensorboard"], log_completions_steps=2)
    later.start(1)
    wandb, board = later.backends["wandb"], later.backends["tensorboard"]
    assert (wandb.start.id, wandb.start.step) == ("new-id", 1)
    for step in (2, 3, 4):
        later.table(step, [group("a")])
        later.log(step, {"m": 10.0 * step})
    assert wandb.sent == [(4, 1), (4, {"m": 40.0})], "what it has is not sent again"
    assert board.sent == [(2, {"m": 20.0}), (3, {"m": 30.0}), (4, 1), (4, {"m": 40.0})], "numbers replace the old ones"
    later.close(failed=True)
    assert wandb.sent[-1] == ("closed", True)
    assert later.backends == {}
    # A tracker that joins later, and a run in another folder, get everything.
    known = json.loads((tmp_path / trackers.FILE).read_text())
    assert {name: entry["step"] for name, entry in known.items()} == {"wandb": 4, "tensorboard": 4}
    other = run(tmp_path / "..", report_to="wandb")
    other.start(2)
    other.log(3, {"m": 1.0})
    assert other.backends["wandb"].sent == [(3, {"m": 1.0})]  # type: ignore[attr-defined]


def test_a_failure_costs_a_warning_and_not_the_run(tmp_path: Path, fakes: None) -> None:
    warned: list[str] = []
    it = run(tmp_path, warned, report_to="wandb")
    it.start(0)
    wandb: Any = it.backends["wandb"]
    wandb.breaks = True
    it.log(1, {})
    it.log(2, {})
    wandb.breaks = False
    it.log(3, {"m": 1.0})
    assert warned == ["wandb failed at step 1 (server gone); the run goes on without it"]
    assert wandb.sent == [(3, {"m": 1.0})]


def test_a_tracker_that_cannot_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fakes: None) -> None:
    def refuses(start: Start) -> Backend:
        raise PermissionError("No API key configured.\nlong explanation")

    monkeypatch.setitem(backends.BACKENDS, "wandb", refuses)
    it = run(tmp_path, report_to=["tensorboard", "wandb"])
    with pytest.raises(UserError, match="it cannot be started .PermissionError: No API key configured.*wandb login"):
        it.start(0)
    assert it.backends == {}


def test_no_trackers_write_nothing(tmp_path: Path) -> None:
    it = run(tmp_path)
    it.log(1, {})
    it.table(1, [group("a")])
    it.close(failed=False)
    assert list(tmp_path.iterdir()) == []


def test_the_table_shows_prompt_completion_reward_and_parts() -> None:
    columns, rows = completion_table(7, [group("a</think>4", "b", prefilled="<think>")])
    assert columns == ["step", "task", "prompt", "completion", "reward", "form", "right"]
    assert rows[0] == [7, "t-1", "user: 2+2?", "<think>a</think>4", 0.0, None, 0.0]
    assert len(completion_table(7, [group(*"abcdefghijkl")])[1]) == 8
    assert completion_table(7, [])[1] == []


# --- each library -----------------------------------------------------------------------------------------------------


def start(folder: Path, **more: Any) -> Start:
    given: dict[str, Any] = {"project": "mine", "run_name": "my-run", "id": None, "step": 0}
    return Start(folder=folder, config=CONFIG, **(given | more))


CALLS = {
    "wandb": ("init", {"project": "mine", "name": "my-run", "id": None, "resume": None}),
    "trackio": ("init", {"project": "mine", "name": "my-run", "resume": "never"}),
    "swanlab": ("init", {"project": "mine", "experiment_name": "my-run"}),
    "comet_ml": ("start", {"project_name": "mine"}),
    "dvclive": ("Live", {"exp_name": "my-run"}),
    "clearml": ("Task.init", {"project_name": "mine", "task_name": "my-run"}),
    "aim": ("Run", {"experiment": "mine"}),
    "mlflow": ("MlflowClient.return_value.create_run", {"run_name": "my-run"}),
}
"""What starts a run in each library, with what it has to be told, by its own documentation."""


@pytest.mark.parametrize("library", CALLS)
def test_project_and_name_reach_every_tracker(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import PartialState

    PartialState(cpu=True)
    module = MagicMock(__version__="3.50.0")
    module.Task.current_task.return_value = None
    monkeypatch.setitem(sys.modules, library, module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", module.entities)
    monkeypatch.delenv("CLEARML_PROJECT", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    begin = start(tmp_path)
    made = backends.BACKENDS.get(library)
    made(begin) if made is not None else backends.Accelerate(begin, library)
    name, expected = CALLS[library]
    call = attrgetter(name)(module).call_args
    assert expected.items() <= call.kwargs.items()
    if library == "comet_ml":
        module.start.return_value.set_name.assert_called_once_with("my-run")
    if library == "aim":
        assert module.Run.return_value.name == "my-run"
    if library == "mlflow":
        module.MlflowClient.return_value.get_experiment_by_name.assert_called_once_with("mine")


def test_wandb_continues_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = MagicMock()
    module.init.return_value.id = "abc"
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    backend = backends.Wandb(start(tmp_path, id="abc", project=None))
    expected = {"project": "theirs", "id": "abc", "resume": "allow", "dir": str(tmp_path)}
    assert expected.items() <= module.init.call_args.kwargs.items()
    opened = module.init.return_value
    opened.config.update.assert_called_once_with(CONFIG, allow_val_change=True)
    backend.table(["a"], [[1]], 4)
    module.Table.assert_called_once_with(columns=["a"], data=[[1]])
    assert opened.log.call_args.kwargs == {"step": 4}
    backend.close(True)
    opened.finish.assert_called_once_with(exit_code=1)


def send(backend: Backend, *steps: int) -> None:
    for step in steps:
        backend.log({"reward/pass@1": step / 2, "nan": float("nan")}, step)
        backend.table(["prompt", "completion", "reward"], [["q", "a\nb", 1.0], ["q", "c", None]], step)


def test_tensorboard_for_real(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    first = backends.TensorBoard(start(tmp_path))
    send(first, 1, 2, 3)  # and dies
    again = backends.TensorBoard(start(tmp_path, step=1))
    again.log({"reward/pass@1": 7.0}, 2)
    again.close(False)
    events: Any = EventAccumulator(str(tmp_path / "mine" / "my-run"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/pass@1")] == [(1, 0.5), (2, 7.0)]
    text = events.Tensors("completions/0/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == "reward 1.0\n\n    q\n\n---\n\n    a\n    b"
    assert "_hparams_/experiment" in events.summary_metadata


def test_mlflow_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    first = backends.Mlflow(start(tmp_path))
    send(first, 1, 2)
    again = backends.Mlflow(start(tmp_path, id=first.id, step=2))
    send(again, 3)
    again.close(True)
    client = mlflow.MlflowClient()
    found = client.get_run(first.id)
    assert (found.info.run_name, found.info.status) == ("my-run", "FAILED")
    assert found.data.params["train.seed"] == "3"
    assert [point.step for point in client.get_metric_history(first.id, "reward/pass_at_1")] == [1, 2, 3]
    table = json.loads(Path(client.download_artifacts(first.id, "completions.json", str(tmp_path))).read_text())
    assert table == {"columns": ["prompt", "completion", "reward"], "data": [["q", "a\nb", 1.0], ["q", "c", None]] * 3}


def test_trackio_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    pytest.importorskip("trackio")
    first = backends.Trackio(start(tmp_path))
    send(first, 1, 2)
    first.close(False)
    again = backends.Trackio(start(tmp_path, id=first.id, step=2))
    send(again, 3)
    again.close(False)
    assert first.id == again.id == "my-run"


def test_wandb_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    first = backends.Wandb(start(tmp_path))
    send(first, 1, 2)
    first.close(False)
    again = backends.Wandb(start(tmp_path, id=first.id, step=2))
    send(again, 3)
    again.close(False)
    assert first.id == again.id
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{first.id}"))) == 2
    assert len(list((tmp_path / "wandb").glob("offline-run-*/files/media/table/completions_*.table.json"))) == 3
