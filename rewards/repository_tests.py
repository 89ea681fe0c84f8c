"""Reward for changes to a repository: 1 if the named tests pass in a fresh box, with hidden tests added afterwards.
In: a patch (or an agent's edited files) and a row of SWE-bench, SWE-smith or R2E-Gym. Out: a Score.
"""

from __future__ import annotations

import re
import sys
import traceback
from typing import Any

from llmrl.errors import UserError
from llmrl.sandbox import Limits, SandboxUnavailable
from llmrl.sandbox.commands import command_box_kind
from llmrl.sandbox.trees import Changes
from llmrl.types import Message, Score
from llmrl.verify.checks.answers import completion_text
from llmrl.verify.repository.judge import BrokenTask, Guard, judge
from llmrl.verify.repository.task import RepositoryTask, read_task
from llmrl.verify.thinking import without_thinking

POOL = True
"""Tests of a repository take seconds to minutes."""
_GUARDS = ("every", "some")
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*(?:diff|patch)[^\n]*\n(.*?)^[ \t]*\1[ \t]*$", re.DOTALL | re.MULTILINE)


def repository_tests(
    completion: str | list[Message],
    edits: Changes | None = None,
    repository: str | dict[str, str] | None = None,
    repo: str | None = None,
    base_commit: str | None = None,
    patch: str | None = None,
    test_patch: str | None = None,
    FAIL_TO_PASS: Any = None,
    PASS_TO_PASS: Any = None,
    repo_name: str | None = None,
    commit_hash: str | None = None,
    parsed_commit_content: Any = None,
    execution_result_content: Any = None,
    expected_output_json: Any = None,
    prefilled: str = "",
    *,
    repositories: str | None = None,
    python: str | None = None,
    guard: Guard = "every",
    cpu_seconds: int = 600,
    wall_seconds: float = 900.0,
    memory_mb: int = 4096,
) -> Score:
    """Run the named tests of a row against a repository with a change.

    Args:
        completion: text or messages; without `edits`, the change is its last block labelled `diff` or `patch`, or all
            of it if it is a unified diff.
        edits: changed files of an agent's workspace (`Workspace.edits`), path to content, None for a removed file.
        repository: folder, archive, git repository or bundle of the row, below `repositories`; or its files, by path.
        repo: SWE-bench, SWE-smith: name of the repository, looked up in `repositories`.
        base_commit: SWE-bench: where the task begins.
        patch: SWE-bench: the known fix, with which the tests are tried first. SWE-smith: makes the bug.
        test_patch: SWE-bench: adds the hidden tests.
        FAIL_TO_PASS: SWE-bench, SWE-smith: tests that must pass.
        PASS_TO_PASS: SWE-bench, SWE-smith: tests that must still pass.
        repo_name: R2E-Gym: name of the repository.
        commit_hash: R2E-Gym: the commit with the fix; the task begins at its parent.
        parsed_commit_content: R2E-Gym: names that parent.
        execution_result_content: R2E-Gym: the hidden test files.
        expected_output_json: R2E-Gym: the tests and how they must end.
        prefilled: how the prompt already begins the completion's message.
        repositories: folder with the repositories of the rows.
        python: interpreter with the repository's requirements and pytest; `{repo}` in it stands for `owner__name`.
            Default: the one that runs this.
        guard: whether `every` test of FAIL_TO_PASS, or `some`, must compare something with a value that is kept out of
            the box. Rows with less are abstentions, because a program could claim that such tests pass.
        cpu_seconds: processor time of the test run.
        wall_seconds: its real time.
        memory_mb: memory of each of its processes.

    Returns:
        A Score: an abstention if the row's tests cannot be judged, an error if no box works.

    Raises:
        UserError: the row lacks columns, or does not fit its repository.
    """
    if guard not in _GUARDS:
        raise UserError(f"repository_tests: guard {guard!r} is unknown: use {' or '.join(_GUARDS)}")
    row = {name: value for name, value in locals().items() if name in _COLUMNS}
    task = read_task(row, repositories)
    name = (repo or repo_name or "").replace("/", "__")
    limits = Limits(cpu_seconds=cpu_seconds, wall_seconds=wall_seconds, memory_mb=memory_mb, output_mb=64)
    change = edits if edits is not None else patch_of(prefilled + completion_text(completion))
    interpreter = (python or sys.executable).replace("{repo}", name)
    return _score(task, change, interpreter, limits, guard)


def seconds_needed(wall_seconds: float = 900.0, **_: Any) -> float:
    """Return how long a call may take on an idle machine: the tests with the known fix, then with the change."""
    return 2 * wall_seconds + 60.0


def check(row: dict[str, Any]) -> str | None:
    """Say that the row names no tests, or a repository that is not there. Nothing is unpacked or run for it."""
    if row.get("guard", "every") not in _GUARDS:
        return f"guard {row['guard']!r} is unknown: use {' or '.join(_GUARDS)}"
    read_task({name: row[name] for name in _COLUMNS if name in row}, row.get("repositories"))
    return None


_COLUMNS = (
    *("repository", "repo", "base_commit", "patch", "test_patch", "FAIL_TO_PASS", "PASS_TO_PASS", "repo_name"),
    *("commit_hash", "parsed_commit_content", "execution_result_content", "expected_output_json"),
)


def _score(task: RepositoryTask, change: str | Changes, python: str, limits: Limits, guard: Guard) -> Score:
    if not change or (isinstance(change, str) and not change.strip()):
        return Score(reward=0.0, info={"reason": "no change"})
    try:
        result = judge(task, change, kind=command_box_kind(), python=python, limits=limits, guard=guard)
    except BrokenTask as error:
        return Score(reward=None, info={"reason": str(error)})
    except SandboxUnavailable:
        return Score(reward=None, error=traceback.format_exc())
    return Score(reward=float(result.resolved), info={"reason": result.reason, "tests": result.tests})


def patch_of(answer: str) -> str:
    """Return the patch in an answer: its last block labelled `diff` or `patch`, or the answer itself if it is one."""
    text = without_thinking(answer)
    blocks = [content for _, content in _FENCE.findall(text)]
    if blocks:
        return str(blocks[-1])
    return text if re.search(r"^(?:diff --git |--- )", text, re.MULTILINE) and "\n+++ " in text else ""


_ROW = {
    "repository": {
        "area.py": "def area(a, b):\n    return a + b\n",
        "test_old.py": "def test_old():\n    assert True\n",
    },
    "test_patch": (
        "--- /dev/null\n+++ b/test_area.py\n@@ -0,0 +1,4 @@\n"
        "+from area import area\n+\n+def test_area():\n+    assert [area(3, 7), area(4, 4)] == [21, 16]\n"
    ),
    "FAIL_TO_PASS": ["test_area.py::test_area"],
    "PASS_TO_PASS": ["test_old.py::test_old"],
}
_FIX = (
    "```diff\n--- a/area.py\n+++ b/area.py\n@@ -1,2 +1,2 @@\n def area(a, b):\n-    return a + b\n+    return {}\n```\n"
)
_EXIT = _FIX.format("__import__('os')._exit(0)")
_HOOK = "+def pytest_pyfunc_call(pyfuncitem):\n+    return True\n"
_RUNNER = f"```diff\n--- /dev/null\n+++ b/conftest.py\n@@ -0,0 +1,2 @@\n{_HOOK}```\n"
EXAMPLES: list[dict[str, Any]] = [
    {"completion": _FIX.format("a * b"), **_ROW, "reward": 1.0},
    {"completion": _FIX.format("a - b"), **_ROW, "reward": 0.0},
    {"completion": "There is nothing to change.", **_ROW, "reward": 0.0},
    # Hostile: leaves the test runner with success, plants a test runner of its own.
    {"completion": _EXIT, **_ROW, "reward": 0.0},
    {"completion": _RUNNER, **_ROW, "reward": 0.0},
]
