"""The check of every row of a set, in one pass with progress; a second start reads the result of a long one.

Rewards look at a row's columns, `prompts` at how it renders. What they find goes into `RowReport`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmrl.data.prompts import CHUNK, Prompt, PromptCheck
from llmrl.data.report import RowReport
from llmrl.errors import LlmrlError
from llmrl.track.files import cache_folder, replacing
from llmrl.track.progress import progress
from llmrl.types import Task

WORTH_CACHING_S = 5.0
"""A check that took less long is repeated at every start."""

RowCheck = Callable[[Task], list[str]]
"""Returns what is wrong with the columns of a task's row."""


@dataclass(frozen=True, kw_only=True)
class Checks:
    """What is checked about every row.

    Args:
        prompts: checks how it renders.
        columns: checks what rewards need.
        fingerprint: of the code behind `columns`; None if it is not known, so that nothing is cached.
    """

    prompts: PromptCheck
    columns: RowCheck
    fingerprint: str | None = None

    def run(self, tasks: Sequence[Task], report: RowReport) -> list[tuple[Task, Prompt]]:
        """Check all tasks, and note in `report` which cannot be used and why.

        Returns:
            The others in order, with what is known about their prompts.
        """
        file = self._cache_file(tasks)
        start = time.monotonic()
        found = _read(file, len(tasks))
        if found is None:
            found = self._look_at(tasks, report.what)
            if file is not None and time.monotonic() - start > WORTH_CACHING_S:
                _write(file, found)
        kept: list[tuple[Task, Prompt]] = []
        for task, (problems, prompt) in zip(tasks, found, strict=True):
            if problems:
                report.add(report.place_of(task.id), "; ".join(problems), task.meta)
            else:
                kept.append((task, prompt))
        return kept

    def _look_at(self, tasks: Sequence[Task], what: str) -> list[tuple[list[str], Prompt]]:
        found: list[tuple[list[str], Prompt]] = []
        with progress(f"checking {what}", len(tasks)) as advance:
            for start in range(0, len(tasks), CHUNK):
                chunk = tasks[start : start + CHUNK]
                for task, prompt in zip(chunk, self.prompts.check(chunk), strict=True):
                    problems = self.columns(task) + ([prompt.problem] if prompt.problem is not None else [])
                    found.append((problems, prompt))
                advance(len(chunk))
        return found

    def _cache_file(self, tasks: Sequence[Task]) -> Path | None:
        """Return where the result of exactly this check is kept: its name is a hash of all that decides it."""
        if self.fingerprint is None or len(tasks) < CHUNK:
            return None
        prompts = self.prompts
        digest = hashlib.sha256()
        for code in sorted(Path(__file__).parent.glob("*.py")):
            digest.update(code.read_bytes())
        for part in (
            [self.fingerprint, asdict(prompts.limits), prompts.room, prompts.longest],
            [prompts.chat.prompt_format, prompts.chat.template, prompts.chat.template_options],
            tokenizer_content(prompts.chat.tokenizer),
        ):
            digest.update(_canonical(part))
        for task in tasks:
            digest.update(
                _canonical([task.id, task.messages, task.answer, task.meta, task.tools, task.template_options])
            )
        return cache_folder() / "rows" / f"{digest.hexdigest()[:32]}.json"


def tokenizer_content(tokenizer: Any) -> Any:
    """Return what decides the token ids of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    known = [type(tokenizer).__name__, tokenizer.name_or_path, len(tokenizer), tokenizer.bos_token]
    return [*known, backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())]


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=repr).encode("utf-8", errors="backslashreplace")


def _write(file: Path, found: list[tuple[list[str], Prompt]]) -> None:
    """Keep a result. A cache that cannot be written costs the next start its time, and nothing else."""
    columns = {
        "problems": {i: problems for i, (problems, _) in enumerate(found) if problems},
        "lengths": [prompt.length for _, prompt in found],
        "largest_ids": [prompt.largest_id for _, prompt in found],
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as out:
            json.dump(columns, out)
    except (OSError, LlmrlError):
        pass


def _read(file: Path | None, length: int) -> list[tuple[list[str], Prompt]] | None:
    if file is None or not file.is_file():
        return None
    try:
        columns = json.loads(file.read_text())
        rows = list(zip(columns["lengths"], columns["largest_ids"], strict=True))
        problems = columns["problems"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if len(rows) != length:
        return None
    prompts = [Prompt(length=tokens, largest_id=largest) for tokens, largest in rows]
    return [(problems.get(str(i), []), prompt) for i, prompt in enumerate(prompts)]
