"""A judge's memory, shared safely by several processes: replies by the hash of the request, and what they cost."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmrl.endpoint import PerLoop
from llmrl.errors import RunFailed
from llmrl.verify.judge.verdict import canonical_json


def request_key(request: dict[str, Any]) -> str:
    """Hash everything that a reply depends on: endpoint, model, messages, sampling, schema."""
    return hashlib.sha256(canonical_json(request).encode()).hexdigest()


class ReplyCache:
    """Store readable replies on disk, one file each, named by the hash of the request.

    Each file is written under a temporary name and renamed, so a reader in another process sees all of it or nothing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    def get(self, key: str) -> str | None:
        """Return the reply's text, or None if there is none or the file is damaged."""
        try:
            content = json.loads(self._file(key).read_text())["content"]
            return content if isinstance(content, str) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, content: str) -> None:
        """Store the text of a reply."""
        file = self._file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=file.parent, prefix=".writing-")
        try:
            with os.fdopen(handle, "w") as stream:
                json.dump({"content": content}, stream)
            os.replace(beside, file)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


@dataclass
class Spent:
    """Tokens and money, in the currency of the configured prices."""

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0

    @property
    def tokens(self) -> int:
        return self.input_tokens + self.output_tokens

    def add(self, other: Spent) -> None:
        self.calls += other.calls
        self.input_tokens += other.input_tokens
        self.output_tokens += other.output_tokens
        self.cost += other.cost


class SpendLedger:
    """Add up the tokens and cost of every paid call, and stop the run when a budget is used up.

    With a file, each call appends one line, and the sum covers every process that ever wrote to it. A budget then holds
    across ranks and restarts.

    Args:
        file: the file to append to; None keeps the sum in this process only.
        budget_tokens: limit on input plus output tokens.
        budget_cost: limit on cost.
    """

    def __init__(self, file: str | Path | None, *, budget_tokens: int | None, budget_cost: float | None) -> None:
        self.file = Path(file).expanduser() if file is not None else None
        self.budget_tokens = budget_tokens
        self.budget_cost = budget_cost
        self._spent = Spent()
        self._read_to = 0
        self._reserved = Spent()
        """What calls in progress may cost at most."""
        self._freed: PerLoop[asyncio.Condition] = PerLoop(asyncio.Condition)

    def record(self, call: Spent) -> None:
        """Count one call."""
        if self.file is None:
            self._spent.add(call)
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        # One write to a file opened with O_APPEND is atomic, so lines of other processes never interleave.
        handle = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, (json.dumps(asdict(call)) + "\n").encode())
        finally:
            os.close(handle)

    def spent(self) -> Spent:
        """Return the sum so far, including lines that other processes appended."""
        if self.file is not None and self.file.exists():
            with self.file.open("rb") as stream:
                stream.seek(self._read_to)
                fresh = stream.read()
            # Leave a line that is still being written for the next call.
            whole = fresh[: fresh.rfind(b"\n") + 1]
            self._read_to += len(whole)
            for line in whole.splitlines():
                try:
                    self._spent.add(Spent(**json.loads(line)))
                except (ValueError, TypeError):
                    raise RunFailed(
                        f"{self.file}: {line[:80]!r} is not a valid ledger line; fix or remove it"
                    ) from None
        return self._spent

    @contextlib.asynccontextmanager
    async def reserved(self, call: Spent) -> AsyncIterator[None]:
        """Hold back what a call may cost; near the end of a budget, wait for what others leave of it.

        Raises:
            RunFailed: a budget is used up.
        """
        if self.budget_tokens is None and self.budget_cost is None:
            yield
            return
        freed = self._freed.get()
        async with freed:
            self.check()
            while self._reserved.calls and not self._has_room(call):
                await freed.wait()
                self.check()
            self._reserved.add(call)
        try:
            yield
        finally:
            self._reserved.add(Spent(-call.calls, -call.input_tokens, -call.output_tokens, -call.cost))
            async with freed:
                freed.notify_all()

    def _has_room(self, call: Spent) -> bool:
        spent = self.spent()
        tokens = spent.tokens + self._reserved.tokens + call.tokens
        cost = spent.cost + self._reserved.cost + call.cost
        fits = self.budget_tokens is None or tokens <= self.budget_tokens
        return fits and (self.budget_cost is None or cost <= self.budget_cost)

    def check(self) -> None:
        """Check the budgets before a call.

        Raises:
            RunFailed: a budget is used up. Calls in progress finish and are counted.
        """
        if self.budget_tokens is None and self.budget_cost is None:
            return
        spent = self.spent()
        over_tokens = self.budget_tokens is not None and spent.tokens >= self.budget_tokens
        over_cost = self.budget_cost is not None and spent.cost >= self.budget_cost
        if over_tokens or over_cost:
            limits = [f"budget_tokens {self.budget_tokens}"] if over_tokens else []
            limits += [f"budget_cost {self.budget_cost:g}"] if over_cost else []
            raise RunFailed(
                f"judge: the budget is used up ({', '.join(limits)}): {spent.calls} calls took {spent.input_tokens} "
                f"input and {spent.output_tokens} output tokens, cost {spent.cost:.4f}. Raise the budget in the "
                "judge's configuration, or lower max_output_tokens, canary_rate or the number of judged rollouts."
            )
