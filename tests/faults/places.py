"""Kill a run at the k-th thing that it does to its files, resume it, and compare it with an undisturbed run.

    python tests/faults/places.py FOLDER SEED NUM_PLACES

Every run is a fork of this process, which has imported everything and started no thread. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llmrl import Trainer
from llmrl.errors import UserError
from llmrl.run import best, checkpoint
from llmrl.run.ledger import audit
from llmrl.track import files, history
from llmrl.train.learner import Learner

QUESTIONS = [{"question": f"{i}+{i}?", "answer": str(2 * i)} for i in range(12)]
STEPS = 3


def odd(completion: str) -> float:
    return float(sum(map(ord, completion)) % 2)


def train(folder: Path, seed: int, wanted: str | None) -> None:
    options = {
        "train.output_dir": str(folder), "train.max_steps": STEPS, "train.learning_rate": 1e-2, "train.seed": seed,
        "train.save_steps": 1, "train.save_total_limit": 1, "train.resume_from_checkpoint": wanted,
        "rollout.num_prompts": 2, "rollout.num_generations": 4, "rollout.max_completion_length": 6,
        "track.console": "quiet", "eval.steps": 2, "eval.keep_best": "eval/reward",
    }  # fmt: skip
    Trainer(options, model="tiny:qwen2", reward=odd, train_dataset=QUESTIONS, eval_dataset=QUESTIONS[:4]).train()


class Places:
    """Counts what the run does, and kills it at the chosen place: before it, or in the middle of it.

    Args:
        chosen: number of the place, from 1; 0 never kills.
        log: where the name of every place is written.
    """

    def __init__(self, chosen: int, log: Path) -> None:
        self.chosen, self.log, self.count = chosen, log, 0

    def at(self, name: str, half: Callable[[], Any] | None = None) -> None:
        for part, do in (("before", None), ("half of", half)):
            if part == "before" or half is not None:
                self.count += 1
                with self.log.open("a") as log:
                    log.write(f"{self.count} {part} {name}\n")
                if self.count == self.chosen:
                    if do is not None:
                        do()
                    os.kill(os.getpid(), signal.SIGKILL)

    def plant(self) -> None:
        """Replace what changes files by the same with a place in front of it."""
        self.around(files.JsonlFile, "append", lambda real, file, *rows: half_line(file, rows), name=path_of)
        for module in (history, best):
            self.around(module, "replace_text", lambda real, file, text: half_text(file, text), name=name_of)
        self.around(checkpoint, "save_file", half_file, name=second_name_of)
        self.around(torch, "save", half_file, name=second_name_of)
        self.around(Path, "write_text", lambda real, file, text, **_: real(file, text[: len(text) // 2]), name=name_of)
        self.around(Path, "rename", None, name=name_of)
        self.around(Path, "replace", None, name=name_of)
        self.around(shutil, "rmtree", lambda real, folder, **_: half_folder(Path(folder)), name=name_of)
        self.around(checkpoint, "_to_disk", None, name=name_of)
        self.around(Learner, "update", None, name=lambda *_: "")
        self.around(Trainer, "_evaluate", None, name=lambda *_: "")

    def around(self, owner: Any, attribute: str, half: Any, *, name: Callable[..., str]) -> None:
        real = getattr(owner, attribute)

        def planted(*args: Any, **options: Any) -> Any:
            in_half = None if half is None else lambda: half(real, *args, **options)
            self.at(f"{attribute} {name(*args)}".strip(), in_half)
            return real(*args, **options)

        setattr(owner, attribute, planted)


def path_of(file: files.JsonlFile, *_: Any) -> str:
    return file.path.name


def name_of(path: Any, *_: Any) -> str:
    return Path(path).name


def second_name_of(_: Any, path: Any, *__: Any) -> str:
    return Path(path).name


def half_line(file: files.JsonlFile, rows: tuple[dict[str, Any], ...]) -> None:
    text = "".join(json.dumps(row, default=str) + "\n" for row in rows)
    with file.path.open("a") as out:
        out.write(text[: len(text) // 2])


def half_text(file: Path, text: str) -> None:
    file.with_name(f".writing-{file.name}").write_bytes(text[: len(text) // 2].encode())


def half_file(real: Any, content: Any, file: Path, **options: Any) -> None:
    real(content, file, **options)
    os.truncate(file, Path(file).stat().st_size // 2)


def half_folder(folder: Path) -> None:
    for file in sorted(folder.glob("*"))[:1]:
        file.unlink()


def forked(work: Callable[[], Any], log: Path) -> int:
    """Run something in a fork and return how it ended, as `os.waitstatus_to_exitcode` does."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with log.open("w") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
                try:
                    work()
                    code = 0
                except BaseException:
                    traceback.print_exc()
                    sys.stderr.flush()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(folder: Path, seed: int, place: int) -> None:
    places = Places(place, folder.with_name(f"{folder.name}.places"))
    places.plant()
    train(folder, seed, None)


def go_on(folder: Path, seed: int) -> None:
    """Continue as a user would: with `last`, and from the beginning if there is nothing to continue."""
    try:
        train(folder, seed, "last")
    except UserError as error:
        if "holds no run" not in str(error):
            raise
        train(folder, seed, None)


def differences(found: Path, wanted: Path) -> list[str]:
    """Return in what two finished runs differ, as far as it may not depend on the clock or an interruption."""
    wrong = []
    for name in ("model", "best"):
        ours, theirs = (load_file(folder / name / "model.safetensors") for folder in (found, wanted))
        if any(not theirs[key].equal(ours[key]) for key in theirs):
            wrong.append(f"the weights in {name}/")

    def rows(folder: Path, name: str) -> list[Any]:
        read = files.read_jsonl(folder / name)
        return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in read]

    wrong += [name for name in ("metrics.jsonl", "rollouts.jsonl") if rows(found, name) != rows(wanted, name)]
    if not audit(found / "ledger.jsonl")["exact"]:
        wrong.append("the ledger")
    names = [{str(p.relative_to(folder)) for p in folder.rglob("*")} for folder in (found, wanted)]
    if names[0] != names[1]:
        wrong.append(f"files {sorted(names[0] ^ names[1])}")
    return wrong


def main(folder: Path, seed: int, num_places: int) -> dict[str, Any]:
    undisturbed = folder / "undisturbed"
    code = forked(lambda: killed_at(undisturbed, seed, 0), folder / "undisturbed.log")
    assert code == 0, (folder / "undisturbed.log").read_text()
    names = (folder / "undisturbed.places").read_text().splitlines()
    total = len(names)
    num_places = min(num_places, total)
    chosen = sorted({1 + round(k * (total - 1) / max(1, num_places - 1)) for k in range(num_places)})
    wrong: dict[str, Any] = {}
    kills = 0
    for place in chosen:
        run = folder / f"place-{place}"
        code = forked(lambda run=run, place=place: killed_at(run, seed, place), folder / f"{run.name}.log")
        kills += code == -signal.SIGKILL
        where = (folder / f"{run.name}.places").read_text().splitlines()[-1]
        if code not in (0, -signal.SIGKILL):
            wrong[where] = f"ended with {code}: {(folder / f'{run.name}.log').read_text()[-2000:]}"
            continue
        if code == 0:  # another order of threads: this place was not reached
            continue
        code = forked(lambda run=run: go_on(run, seed), folder / f"{run.name}.resumed.log")
        if code:
            wrong[where] = f"could not go on: {(folder / f'{run.name}.resumed.log').read_text()[-2000:]}"
        elif found := differences(run, undisturbed):
            wrong[where] = found
        shutil.rmtree(run)
    return {"places": total, "kills": kills, "wrong": wrong, "names": names}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
