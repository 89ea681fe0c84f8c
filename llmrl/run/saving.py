"""What of a run is saved, and when it is asked to end: the state after a step, as a checkpoint."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from llmrl.errors import Interrupted
from llmrl.run import checkpoint
from llmrl.run.resume import Run

if TYPE_CHECKING:
    from llmrl.run.interruption import Interruption


@dataclass(frozen=True, kw_only=True)
class Noted:
    """The state of a run after a step, beside weights and optimizer, which drawing the next step leaves alone."""

    state: dict[str, Any]
    random: dict[str, Any]
    ledger: int
    """Length of the ledger in bytes."""


class Interruptible(Run, Protocol):
    """The part of `Trainer` that is saved."""

    interruption: Interruption
    noted: Noted | None


def state_of(run: Run, unfinished: dict[str, float] | None = None) -> dict[str, Any]:
    """Return what a checkpoint holds beside weights, optimizer, random states and the lengths of files."""
    return {
        "policy_version": run.policy_version,
        "sampler": run.sampler.state_dict(),
        "source": run.source.state_dict(),
        "queue": run.queue.state_dict(),
        "health": run.health.state_dict(),
        "algorithm": run.algorithm.state_dict(),
        "best": run.best.state_dict(),
        "callbacks": run.callbacks.state_dict(),
        "unfinished": unfinished,
    }


def note(run: Interruptible) -> None:
    """Note the state after a step, which drawing the next one changes: what an interruption goes back to."""
    ledger = 0 if run.ledger is None else run.ledger.file.length()
    run.noted = Noted(state=copy.deepcopy(state_of(run)), random=checkpoint.random_states(), ledger=ledger)
    run.interruption.advice = advice(run)


def save(run: Run, unfinished: dict[str, float] | None = None, *, noted: Noted | None = None) -> None:
    """Save a checkpoint.

    Args:
        run: the run, after a step.
        unfinished: the metrics of a step that will be recorded when it is evaluated.
        noted: save this instead of the state of this moment.
    """
    files = {}
    if run.record is not None and run.ledger is not None:
        files = run.record.lengths() | {"ledger": run.ledger.file.sync()}
        if noted is not None:
            files["ledger"] = noted.ledger
    state = state_of(run, unfinished) if noted is None else noted.state
    checkpoint.save_checkpoint(
        run.output_dir,
        run.step,
        policy=run.policy,
        learner=run.learner,
        state=state | {"files": files},
        random=None if noted is None else noted.random,
        parallel=run.parallel,
        keep=run.config.train.save_total_limit,
    )
    run.saved_step = run.step


def interrupted(run: Interruptible) -> Interrupted:
    """Save what was trained since the last checkpoint, and return the exception that ends the run."""
    if run.saved_step < run.step:
        save(run, noted=run.noted)
        run.callbacks.call("on_save")
    return run.interruption.end(advice(run))


def advice(run: Run) -> str:
    """Return what of the run is kept, and how to go on."""
    if not run.step:
        return "ended before the first step; nothing was trained"
    kept = f"step {run.saved_step} is saved" if run.saved_step else "no step is saved"
    lost = f", and {run.step - run.saved_step} after it will be repeated" if run.saved_step < run.step else ""
    return f"ended after step {run.step}; {kept}{lost}. Continue with --train.resume_from_checkpoint last"
