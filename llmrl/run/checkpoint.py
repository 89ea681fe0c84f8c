"""Checkpoints: everything that the next step depends on, written to another folder and renamed into place.

checkpoints/step-00000010/
    weights.safetensors   the trained parameters (adapters only, if adapters are trained)
    learner.pt            optimizer, schedule, update counters
    reference.safetensors the reference, where it has moved
    rng-RANK.pt           random states of each process
    state.json            step, sampler, policy version, lengths of the run's JSON-lines files
    SHA256SUMS            what each of these files held; `sha256sum --check SHA256SUMS` checks it, and so does resuming

No file holds code: nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import random as python_random
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]

from llmrl.errors import RunFailed, UserError
from llmrl.run import sums
from llmrl.track import history

if TYPE_CHECKING:
    from llmrl.model.parallel import Parallel
    from llmrl.model.policy import Policy
    from llmrl.train.learner import Learner

FOLDER, PREFIX, STATE = "checkpoints", "step-", "state.json"
UNFINISHED, DELETED = ".writing-", ".deleting-"
FORMAT = 1
"""Of what a checkpoint holds. Another number is refused, since it may mean anything."""


def save_checkpoint(
    output_dir: Path,
    step: int,
    *,
    policy: Policy,
    learner: Learner,
    state: dict[str, Any],
    parallel: Parallel,
    keep: int,
    random: dict[str, Any] | None = None,
) -> Path:
    """Write checkpoint `step` and delete all but the newest `keep` (0 keeps all).

    Args:
        output_dir: the run's folder.
        step: its number.
        policy: its trained parameters, and the reference where it moved.
        learner: its optimizer and schedule.
        state: whatever else the next step depends on, as JSON.
        parallel: the processes.
        keep: how many checkpoints.
        random: an earlier `random_states`; those of this moment by default.

    Raises:
        RunFailed: the disk is full or not writable. What was written so far is removed; older checkpoints stay.
    """
    folder = output_dir / FOLDER / f"{PREFIX}{step:08d}"
    unfinished = folder.with_name(UNFINISHED + folder.name)
    if parallel.is_main:
        _remove_leftovers(output_dir)
        unfinished.mkdir(parents=True)
    parallel.barrier()
    try:
        written = [unfinished / f"rng-{parallel.rank}.pt"]
        torch.save(random_states() if random is None else random, written[0])
        if parallel.is_main:
            written = [unfinished / name for name in ("weights.safetensors", "learner.pt", STATE)] + written
            save_file(policy.trained_parameters(), unfinished / "weights.safetensors")
            if reference := policy.reference_state():
                written.append(unfinished / "reference.safetensors")
                save_file(reference, written[-1])
            torch.save(learner.state_dict(), unfinished / "learner.pt")
            state = state | {"format": FORMAT, "step": step, "num_processes": parallel.world}
            (unfinished / STATE).write_text(json.dumps(state))
        for file in written:
            _to_disk(file)  # a full disk may raise only here
        parallel.barrier()  # every process has written its file
        if parallel.is_main:
            _to_disk(sums.write(unfinished))
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise RunFailed(
            f"checkpoint {folder} could not be written ({error}); free space or choose another train.output_dir, then "
            "resume from the last checkpoint"
        ) from error
    if parallel.is_main:
        if folder.exists():
            _remove(folder)
        unfinished.rename(folder)
        _to_disk(folder.parent)
        _delete_older(output_dir, keep)
    parallel.barrier()
    return folder


def load_checkpoint(folder: Path, *, policy: Policy, learner: Learner, parallel: Parallel) -> dict[str, Any]:
    """Restore everything, and return the `state` that was given to `save_checkpoint`.

    Raises:
        UserError: the checkpoint is damaged, or was taken with another model or number of processes.
    """
    own = f"rng-{parallel.rank}.pt"
    try:
        sums.check(folder, [STATE])
        state = json.loads((folder / STATE).read_text())
        if state.get("format") != FORMAT:
            raise UserError(
                f"checkpoint {folder} has format {state.get('format')}, this version of llmrl reads {FORMAT}: resume "
                "with the version that wrote it"
            )
        same_world = state["num_processes"] == parallel.world
        # The main process reads all files once more for the others.
        sums.check(folder, None if parallel.is_main else [own] if same_world else [])
        weights = load_file(folder / "weights.safetensors")
        moved = folder / "reference.safetensors"
        reference = load_file(moved) if moved.is_file() else {}
        learner_state = torch.load(folder / "learner.pt", map_location="cpu", weights_only=True)
        # Another number of processes: sampling is seeded per request, only dropout will differ.
        states = torch.load(folder / own, weights_only=True) if same_world else None
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, UnpicklingError, SafetensorError) as error:
        raise _damaged(folder, error) from error
    trained = policy.trained_parameters()
    if trained.keys() != weights.keys() or any(trained[k].shape != weights[k].shape for k in trained):
        raise UserError(f"checkpoint {folder} holds the parameters of another model; was model.path or lora changed?")
    policy.load_trained_parameters(weights)
    policy.load_reference_state(reference)
    learner.load_state_dict(learner_state)
    if states is not None:
        _set_random_states(states)
    return state


def _damaged(folder: Path, error: Exception) -> UserError:
    older = [str(path) for path in sorted(folder.parent.glob(PREFIX + "*")) if path.name < folder.name]
    what = str(error) if isinstance(error, sums.Damaged) else f"{type(error).__name__}: {error}"
    return UserError(
        f"checkpoint {folder} is damaged ({what}); delete it and resume from an older one: "
        f"{', '.join(older) or 'there is none'}"
    )


def load_weights(folder: Path, policy: Policy) -> None:
    """Restore the policy's trained parameters alone. What the checkpoint holds beside them (a critic) is left out.

    Raises:
        UserError: the checkpoint is damaged, or was taken with another model.
    """
    try:
        sums.check(folder, ["weights.safetensors"])
        weights = load_file(folder / "weights.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(folder, error) from error
    trained = policy.trained_parameters()
    if any(name not in weights or weights[name].shape != trained[name].shape for name in trained):
        raise UserError(f"checkpoint {folder} holds the parameters of another model than the run's configuration names")
    policy.load_trained_parameters(weights)


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint folder."""
    return int(folder.name.removeprefix(PREFIX))


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the finished checkpoints of a run, oldest first."""
    return sorted((output_dir / FOLDER).glob(PREFIX + "*"))


def tidy(output_dir: Path, keep: int) -> None:
    """Do what a kill kept `save_checkpoint` from: delete older checkpoints, and what is left of half ones."""
    _remove_leftovers(output_dir)
    _delete_older(output_dir, keep)


def _delete_older(output_dir: Path, keep: int) -> None:
    for folder in list_checkpoints(output_dir)[:-keep] if keep else []:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Delete a checkpoint, which is none from the first moment on: a kill leaves no half of it."""
    folder.rename(gone := folder.with_name(DELETED + folder.name))
    shutil.rmtree(gone, ignore_errors=True)


def _remove_leftovers(output_dir: Path) -> None:
    """Delete what a kill left of checkpoints that were being written or deleted."""
    for prefix in (UNFINISHED, DELETED):
        for left in (output_dir / FOLDER).glob(f"{prefix}{PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)


def find_checkpoint(output_dir: Path, wanted: str) -> Path | None:
    """Find the folder that `train.resume_from_checkpoint` names.

    Args:
        output_dir: the run's folder.
        wanted: `last`, a checkpoint, or the folder of a run, which stands for its last checkpoint.

    Returns:
        None for `last` in a run that was stopped before its first checkpoint.

    Raises:
        UserError: there is no such checkpoint, no run to resume, or the run has later checkpoints, which would be lost.
    """
    own = list_checkpoints(output_dir)
    if wanted == "last":
        if not own and not any((output_dir / name).is_file() for name in ("metrics.jsonl", history.FILE)):
            raise UserError(f"train.resume_from_checkpoint last: {output_dir} holds no run; start without it")
        return own[-1] if own else None
    folder = Path(wanted)
    if not (folder / STATE).is_file():
        folder = next(iter(list_checkpoints(folder)[::-1]), folder)
    if not (folder / STATE).is_file():
        raise UserError(
            f"train.resume_from_checkpoint {wanted}: no checkpoint there (a folder with {STATE}, or a run that has one)"
        )
    if belongs_to(folder, output_dir) and folder.name != own[-1].name:
        later = [path.name for path in own if path.name > folder.name]
        raise UserError(
            f"train.resume_from_checkpoint {wanted}: this run has later checkpoints ({', '.join(later)}), which going "
            "on from here would overwrite. To branch off, name a new train.output_dir; for the model of that step, use "
            f"`llmrl export {output_dir} --step {step_of(folder)}`; to give the later ones up, "
            "delete their folders"
        )
    return folder


def belongs_to(folder: Path, output_dir: Path) -> bool:
    """Return whether a checkpoint is one of the run in `output_dir`."""
    return folder.resolve().parent == (output_dir / FOLDER).resolve()


def finished_row(folder: Path, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the metrics of a checkpoint that was taken before its step was evaluated, and the lengths of the files.

    If the evaluation came to its end, the run's metrics.jsonl goes on with the finished row. It is returned with a
    length that includes it. Otherwise the row is the one that the checkpoint holds, without an evaluation.
    """
    files, file = dict(state["files"]), folder.parent.parent / "metrics.jsonl"
    if file.is_file():
        with file.open("rb") as lines:
            lines.seek(files["metrics"])
            line = lines.readline()
        try:
            row: dict[str, Any] = json.loads(line)
        except ValueError:  # nothing, or half a line
            row = {}
        if row.pop("step", None) == state["step"] and any(key.startswith("eval/") for key in row):
            return row, files | {"metrics": files["metrics"] + len(line)}
    return state["unfinished"], files


def branch(folder: Path, output_dir: Path, files: dict[str, int] | None = None) -> dict[str, int]:
    """Begin the run in `output_dir` with a copy of another run's checkpoint, and of its metrics and ledger up to there.

    Rollouts are not copied: they may be large, and stay where they are.

    Args:
        folder: the checkpoint.
        output_dir: the folder of the new run.
        files: the lengths of the other run's files to copy. Default: what the checkpoint says.

    Returns:
        The lengths in bytes of the new run's files.

    Raises:
        RunFailed: the disk is full or not writable. What was copied is removed.
    """
    state = json.loads((folder / STATE).read_text())
    wanted: dict[str, int] = state["files"] if files is None else files
    lengths, kept = dict.fromkeys(wanted, 0), dict.fromkeys(wanted, 0)
    copy = output_dir / FOLDER / folder.name
    unfinished = copy.with_name(UNFINISHED + copy.name)
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        shutil.copytree(folder, unfinished)
        for name in ("metrics", "ledger"):
            source, length = folder.parent.parent / f"{name}.jsonl", wanted.get(name, 0)
            if source.is_file() and source.stat().st_size >= length:
                with source.open("rb") as file:
                    (output_dir / source.name).write_bytes(file.read(length))
                lengths[name], kept[name] = length, state["files"].get(name, 0)  # before a finished row
        (unfinished / STATE).write_text(json.dumps(state | {"files": kept}))
        sums.write(unfinished)
        unfinished.rename(copy)
    except (OSError, shutil.Error) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        for name in ("metrics", "ledger"):
            (output_dir / f"{name}.jsonl").unlink(missing_ok=True)
        raise RunFailed(
            f"checkpoint {folder} could not be copied to {output_dir} ({error}); free space or choose another "
            "train.output_dir"
        ) from error
    return lengths


def random_states() -> dict[str, Any]:
    """Return the state of every random number generator of this process."""
    name, numbers, *rest = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": python_random.getstate(),
        "numpy": (name, torch.as_tensor(np.asarray(numbers, np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, Any]) -> None:
    python_random.setstate(states["python"])
    name, numbers, *rest = states["numpy"]
    np.random.set_state((name, numbers.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
