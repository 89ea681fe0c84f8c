"""What the tests of a repository reported, beside what they had to: names, outcomes, and the values kept outside."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from llmrl.sandbox import wire
from llmrl.verify.repository.task import RepositoryTask
from llmrl.verify.repository.withhold import Function, Withheld

Guard = Literal["every", "some"]


class BrokenTask(Exception):
    """The task cannot be judged; the edit is not to blame."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """How the named tests ended."""

    resolved: bool
    reason: str
    """Why it is not resolved."""
    tests: dict[str, str]
    """passed, failed, missing, skipped, or wrong_value: no exception, and a value other than expected."""


def check_guard(task: RepositoryTask, files: dict[str, Withheld], guard: Guard) -> None:
    """Check that the tests that must begin to pass compare values which were withheld.

    Raises:
        BrokenTask: too few of them do, or their names are not pytest's.
    """
    named = [name for name in task.fail_to_pass if "::" not in name and " (" in name]
    if named:
        raise BrokenTask(f"{named[0]!r} is not the name of a pytest test")
    guarded = [_is_guarded(name, files) for name in task.fail_to_pass]
    if all(guarded) if guard == "every" else any(guarded):
        return
    raise BrokenTask(
        f"{task.fail_to_pass[guarded.index(False)]} compares nothing with a value that can be withheld, so a program "
        "could claim that it passes; `guard: some` asks for one such test of the row only"
    )


def _is_guarded(name: str, files: dict[str, Withheld]) -> bool:
    if "::" not in name:
        return any(name.replace(".", "::") in file.functions for file in files.values())
    path, _, inner = name.partition("::")
    return path in files and inner.partition("[")[0] in files[path].functions


class _Opaque:
    """A value that is not plain."""


@dataclass
class Comparison:
    """What the tests reported, beside what they had to."""

    task: RepositoryTask
    files: dict[str, Withheld]
    records: list[dict[str, Any]]
    opaque: set[str] = field(default_factory=set)
    """Comparisons whose value was not plain, so that it could not be compared outside."""

    def __post_init__(self) -> None:
        self.outcomes: dict[str, set[str]] = {}
        self.values: dict[str, list[tuple[str, str | None, Any]]] = {}
        self.problems = [str(record["problem"])[-300:] for record in self.records if "problem" in record]
        for record in self.records:
            node = self.plain_name(str(record.get("node")))
            if "outcome" in record:
                self.outcomes.setdefault(node, set()).add(f"{record.get('when')}:{record['outcome']}")
            elif "site" in record:
                self.note_value(node, record)

    def note_value(self, node: str, record: dict[str, Any]) -> None:
        try:
            value = wire.decode(record.get("value"), lambda *_: _Opaque())
        except wire.BadValue:
            value = _Opaque()
        if isinstance(value, _Opaque) and self.is_named(node):
            self.opaque.add(str(record["site"]))
        token = record.get("token")
        self.values.setdefault(node, []).append((str(record["site"]), token if isinstance(token, str) else None, value))

    def is_named(self, node: str) -> bool:
        return any(self.find(name) == node for name in (*self.task.fail_to_pass, *self.task.pass_to_pass))

    def plain_name(self, node: str) -> str:
        """Return a test's name as it is without withheld parameters."""
        shown = {token: text for file in self.files.values() for token, text in file.shown.items()}
        return re.sub(r"<([\w.]+)>", lambda found: shown.get(found.group(1), found.group(0)), node)

    def find(self, name: str) -> str:
        """Return the reported test that a row means by a name; R2E-Gym writes `Class.test` without the file."""
        if name in self.outcomes or "::" in name:
            return name
        wanted = name.replace(".", "::")
        found = (node for node in self.outcomes if node.partition("::")[0] in self.files)
        return next((node for node in found if node.endswith(f"::{wanted}")), name)

    def outcome(self, name: str) -> str:
        node = self.find(name)
        seen = self.outcomes.get(node, set())
        if not seen:
            return "missing"
        if any(item.endswith(":failed") for item in seen):
            return "failed"
        if "call:passed" not in seen:
            return "skipped"
        return "passed" if self.values_are_right(node) else "wrong_value"

    def function(self, node: str) -> Function | None:
        path, _, inner = node.partition("::")
        file = self.files.get(path)
        return file.functions.get(inner.partition("[")[0]) if file else None

    def values_are_right(self, node: str) -> bool:
        """Return whether every value that a test compared is the expected one, and none was left out."""
        function, values = self.function(node), self.values.get(node, [])
        path = node.partition("::")[0]
        answers = self.files[path].answers if path in self.files else {}
        for site, token, value in values:
            expected = answers.get(token if token is not None else site, _Opaque)
            if expected is _Opaque or not _same(value, expected):
                return False
        if function is None:
            return True
        if not set(function.sites) <= {site for site, _, _ in values}:
            return False
        tokens = {token for _, token, _ in values if token is not None}
        return not any(self.used_elsewhere(node, token) for token in tokens)

    def used_elsewhere(self, node: str, token: str) -> bool:
        return any(token == other for name, values in self.values.items() if name != node for _, other, _ in values)

    def judgement(self) -> Judgement:
        """Return the verdict."""
        tests = {name: self.outcome(name) for name in (*self.task.fail_to_pass, *self.task.pass_to_pass)}
        failed = [name for name, outcome in tests.items() if outcome != "passed"]
        if failed:
            reason = f"{len(failed)} of {len(tests)} tests did not pass, first {failed[0]}: {tests[failed[0]]}"
            return Judgement(resolved=False, reason="; ".join([reason, *self.problems[:1]]), tests=tests)
        return Judgement(resolved=True, reason="", tests=tests)


def _same(value: Any, expected: Any) -> bool:
    if isinstance(value, _Opaque) or value != value:
        return False
    try:
        return bool(value == expected)
    except Exception:
        return False
