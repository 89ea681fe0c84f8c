"""How a part of a run begins: new, from a checkpoint, or as a branch of another run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llmrl.config import to_dict
from llmrl.run import checkpoint
from llmrl.run.model_folder import TOKENIZER
from llmrl.track import history
from llmrl.track.files import read_jsonl
from llmrl.track.record import environment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmrl.algo.base import Algorithm
    from llmrl.config import RunConfig
    from llmrl.data.sampler import Sampler
    from llmrl.model.parallel import Parallel
    from llmrl.model.policy import Policy
    from llmrl.rollout.source import Source
    from llmrl.run.best import Best
    from llmrl.run.callbacks import Callbacks
    from llmrl.run.ledger import Ledger
    from llmrl.run.pipeline import RolloutQueue
    from llmrl.track.console import Console
    from llmrl.track.health import Health
    from llmrl.track.record import Record
    from llmrl.train.learner import Learner
    from llmrl.types import Task


class Run(Protocol):
    """The part of `Trainer` that is restored. The trainer imports this module, so this one cannot import it."""

    config: RunConfig
    parallel: Parallel
    tokenizer: PreTrainedTokenizerBase
    policy: Policy
    learner: Learner
    algorithm: Algorithm
    sampler: Sampler
    source: Source
    queue: RolloutQueue
    health: Health
    best: Best
    callbacks: Callbacks
    tasks: dict[str, Task]
    record: Record | None
    ledger: Ledger | None
    console: Console
    output_dir: Path
    step: int
    saved_step: int
    policy_version: int
    unfinished: dict[str, Any] | None

    @property
    def epoch(self) -> float:
        """Passes over the training data so far."""
        ...


def resume(run: Run) -> None:
    """Restore what `train.resume_from_checkpoint` names, and cut the run's files back to that step."""
    wanted = run.config.train.resume_from_checkpoint
    if not wanted:
        if run.record is not None and run.ledger is not None:  # a start that was killed may have left lines
            for file in (run.record.metrics, run.record.rollouts, run.ledger.file):
                file.path.unlink(missing_ok=True)
        return _begin_part(run, None)
    folder = checkpoint.find_checkpoint(run.output_dir, wanted)
    files = {"metrics": 0, "rollouts": 0, "ledger": 0}
    state: dict[str, Any] = {}
    if folder is not None:
        state = checkpoint.load_checkpoint(folder, policy=run.policy, learner=run.learner, parallel=run.parallel)
        run.step = run.saved_step = state["step"]
        run.policy_version, files = state["policy_version"], state["files"]
        run.sampler.load_state_dict(state["sampler"])
        run.queue.load_state_dict(state["queue"], run.tasks)
        run.health.load_state_dict(state["health"])
        run.source.load_state_dict(state.get("source", {}))
        run.algorithm.load_state_dict(state["algorithm"])
        run.best.load_state_dict(state.get("best", {}))
        if state.get("unfinished") is not None:
            run.unfinished, files = run.parallel.broadcast(checkpoint.finished_row(folder, state))
    if run.record is not None and run.ledger is not None:
        if folder is not None and not checkpoint.belongs_to(folder, run.output_dir):
            files = checkpoint.branch(folder, run.output_dir, files)
            run.console.say(f"a branch of {folder.parent.parent}: its steps up to here are copied")
        checkpoint.tidy(run.output_dir, run.config.train.save_total_limit)
        run.record.truncate(files)
        run.ledger.file.truncate(files["ledger"])
    run.console.say(
        f"resumed from {folder} (step {run.step} of {run.config.train.max_steps})"
        if folder is not None
        else "the run was stopped before its first checkpoint: it starts again from the beginning"
    )
    _begin_part(run, folder)
    if folder is not None:
        rows = read_jsonl(run.output_dir / "metrics.jsonl") if run.parallel.is_main else []
        run.callbacks.at(run.step, run.epoch)
        run.callbacks.best(run.best.value, run.best.step)
        run.callbacks.load_state_dict(state.get("callbacks", {}), run.parallel.broadcast(rows))


def _begin_part(run: Run, resumed_from: Path | None) -> None:
    """Write down what this part of the run uses, and say what differs from the part before."""
    if not run.parallel.is_main:
        return
    run.tokenizer.save_pretrained(run.output_dir / TOKENIZER)  # pyright: ignore[reportUnknownMemberType]
    found = environment(
        device=str(run.parallel.device),
        num_processes=run.parallel.world,
        distributed_type=run.parallel.kind,
    )
    for change in history.begin(
        run.output_dir,
        to_dict(run.config),
        step=run.step,
        environment=found,
        resumed_from=resumed_from,
    ):
        run.console.say(f"changed: {change}")
    if run.record is not None:
        run.record.begin(run.step)
