"""One class for each tracker: how a run is started or continued there, and how numbers and tables get in."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from llmrl.track.flat import flatten

DEFAULT_PROJECT = "llmrl"

Row = list[Any]


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a tracker is started with."""

    project: str | None
    run_name: str | None
    id: str | None
    """What the tracker called the run when it was started first; None for a new run."""
    step: int
    """Steps that are done already."""
    folder: Path
    config: dict[str, Any]

    def project_or(self, variable: str) -> str:
        """Return the name of the project: the option, else the tracker's own environment variable, else ours."""
        return self.project or os.environ.get(variable) or DEFAULT_PROJECT

    @property
    def flat(self) -> dict[str, Any]:
        """The options as one dictionary with dotted keys."""
        return flatten(self.config)


class Backend:
    """A tracker that has been started."""

    id: str | None = None
    """What the tracker calls the run, with which it is continued; None where it cannot be."""
    replaces = False
    """Whether numbers that are sent again take the place of the old ones."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Send numbers."""
        raise NotImplementedError

    def table(self, columns: list[str], rows: list[Row], step: int) -> None:
        """Send a table, if the tracker has tables."""

    def close(self, failed: bool) -> None:
        """End the run there."""


class TensorBoard(Backend):
    """Event files in the run's folder. Those of a resumed run hide what older ones hold of later steps."""

    replaces = True

    def __init__(self, start: Start) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        folder = start.folder / (start.project or DEFAULT_PROJECT) / (start.run_name or "")
        self.writer: Any = SummaryWriter(str(folder), purge_step=start.step + 1)
        for summary in hparams(start.flat, {}):  # `add_hparams` would make another run for them
            self.writer.file_writer.add_summary(summary)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Write scalars."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def table(self, columns: list[str], rows: list[Row], step: int) -> None:
        """Write a text for each completion: its numbers, the prompt and the completion, word by word."""
        for i, row in enumerate(rows):
            cells = dict(zip(columns, row, strict=True))
            prompt, completion = cells.pop("prompt"), cells.pop("completion")
            numbers = ", ".join(f"{name} {value}" for name, value in cells.items())
            text = f"{numbers}\n\n{_indented(prompt)}\n\n---\n\n{_indented(completion)}"
            self.writer.add_text(f"completions/{i}", text, step)
        self.writer.flush()

    def close(self, failed: bool) -> None:
        """Close the event file."""
        self.writer.close()


def _indented(text: str) -> str:
    """Return a text as a Markdown block that shows it as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines()) or "    "


class Wandb(Backend):
    """A run of Weights & Biases, which is continued by its id."""

    def __init__(self, start: Start) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self.wandb: Any = wandb
        self.run: Any = wandb.init(
            project=start.project_or("WANDB_PROJECT"),
            name=start.run_name,
            id=start.id,
            resume="allow" if start.id else None,
            dir=os.environ.get("WANDB_DIR") or str(start.folder),
        )
        self.run.config.update(start.config, allow_val_change=True)
        self.id = str(self.run.id)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Send numbers."""
        self.run.log(metrics, step=step)

    def table(self, columns: list[str], rows: list[Row], step: int) -> None:
        """Send a table for the same step."""
        self.run.log({"completions": self.wandb.Table(columns=columns, data=rows)}, step=step)

    def close(self, failed: bool) -> None:
        """End the run, as crashed if it failed."""
        self.run.finish(exit_code=int(failed))


class Trackio(Backend):
    """A run of trackio, which is continued by its name."""

    def __init__(self, start: Start) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self.trackio: Any = trackio
        self.run: Any = trackio.init(
            project=start.project_or("TRACKIO_PROJECT"),
            name=start.id or start.run_name,
            config=start.flat,
            resume="allow" if start.id else "never",
            embed=False,
        )
        self.id = str(self.run.name)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Send numbers."""
        self.run.log(metrics, step=step)

    def table(self, columns: list[str], rows: list[Row], step: int) -> None:
        """Send a table for the same step."""
        from pandas import DataFrame

        self.run.log({"completions": self.trackio.Table(dataframe=DataFrame(rows, columns=columns))}, step=step)

    def close(self, failed: bool) -> None:
        """End the run."""
        self.run.finish()


class Mlflow(Backend):
    """A run of MLflow, which is continued by its id."""

    MAX_PARAMS = 100
    """What one call may send."""

    def __init__(self, start: Start) -> None:
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
        from mlflow.entities import Param  # pyright: ignore[reportMissingImports]

        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        self.client: Any = MlflowClient()
        if start.id is None:
            name = start.project_or("MLFLOW_EXPERIMENT_NAME")
            experiment = self.client.get_experiment_by_name(name)
            place = experiment.experiment_id if experiment is not None else self.client.create_experiment(name)
            run = self.client.create_run(place, run_name=start.run_name)
        else:
            run = self.client.get_run(start.id)
            self.client.update_run(start.id, status="RUNNING")
        self.id = str(run.info.run_id)
        # Parameters cannot be changed: a resumed run keeps those it began with.
        given = {_allowed(key): str(value)[:500] for key, value in start.flat.items()}
        params = [Param(key, value) for key, value in given.items() if key not in run.data.params]
        for i in range(0, len(params), self.MAX_PARAMS):
            self.client.log_batch(self.id, params=params[i : i + self.MAX_PARAMS])

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Send numbers, under names that MLflow allows (`reward/pass_at_1`)."""
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now = int(time.time() * 1000)
        self.client.log_batch(
            self.id, metrics=[Metric(_allowed(name), float(value), now, step) for name, value in metrics.items()]
        )

    def table(self, columns: list[str], rows: list[Row], step: int) -> None:
        """Append to the table completions.json."""
        data = {name: [row[i] for row in rows] for i, name in enumerate(columns)}
        self.client.log_table(self.id, data=data, artifact_file="completions.json")

    def close(self, failed: bool) -> None:
        """End the run."""
        self.client.set_terminated(self.id, status="FAILED" if failed else "FINISHED")


def _allowed(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))


class Accelerate(Backend):
    """A tracker that we know through accelerate only: numbers, and a new run after every start."""

    RUN_NAMES: ClassVar = {"clearml": "task_name", "swanlab": "experiment_name", "dvclive": "exp_name"}
    """What each calls the name of a run. What accelerate calls so is the project."""

    def __init__(self, start: Start, name: str) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        project = start.project or DEFAULT_PROJECT
        places = [str(start.folder)] if kind.requires_logging_directory else []
        named = {self.RUN_NAMES[name]: start.run_name} if start.run_name and name in self.RUN_NAMES else {}
        experiment = {"experiment": project} if name == "aim" and start.run_name else {}
        self.tracker: Any = kind(project, *places, **named, **experiment)
        self.tracker.start()
        self.tracker.store_init_configuration(start.flat)
        if start.run_name and name == "comet_ml":  # these two take a name only once they run
            self.tracker.tracker.set_name(start.run_name)
        if start.run_name and name == "aim":
            self.tracker.tracker.name = start.run_name

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Send numbers."""
        self.tracker.log(metrics, step=step)

    def close(self, failed: bool) -> None:
        """End the run."""
        self.tracker.finish()


BACKENDS: dict[str, Callable[..., Backend]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
    "mlflow": Mlflow,
    "accelerate": Accelerate,
}
"""By the name in `track.report_to`; all others go through accelerate."""
