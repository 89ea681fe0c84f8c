"""Repository tasks: a row of SWE-bench, SWE-smith or R2E-Gym becomes a source, a commit, patches and named tests."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmrl.errors import UserError

_SUFFIXES = ("", ".git", ".bundle", ".tar.gz", ".tgz", ".tar", ".tar.xz", ".tar.bz2", ".zip")


@dataclass(frozen=True, kw_only=True, slots=True)
class RepositoryTask:
    """One repository at one state, and the tests that a change to it must pass."""

    source: Path | None = None
    """Folder, archive, git repository or bundle; or None, with `files` in its place."""
    files: dict[str, str] = field(default_factory=dict)
    """All files, by path."""
    commit: str | None = None
    bug: str = ""
    """Patch that leads from the commit to the state in which the task begins (SWE-smith)."""
    test_patch: str = ""
    """Patch with the hidden tests."""
    test_files: dict[str, str] = field(default_factory=dict)
    """Hidden test files, by path (R2E-Gym)."""
    fail_to_pass: tuple[str, ...] = ()
    pass_to_pass: tuple[str, ...] = ()
    reference: str = ""
    """The known fix. It is read for the paths that it changes."""

    def test_paths(self) -> set[str]:
        """Return the files of the named tests and of the hidden ones."""
        named = {test.partition("::")[0] for test in (*self.fail_to_pass, *self.pass_to_pass) if "::" in test}
        return named | changed_paths(self.test_patch) | set(self.test_files)

    def hidden_paths(self) -> set[str]:
        """Return files that the agent must not see: those of the tests to pass, where they are in the repository."""
        if self.test_patch or self.test_files:
            return set()
        return {test.partition("::")[0] for test in self.fail_to_pass}


def changed_paths(patch: str) -> set[str]:
    """Return the paths that a unified diff changes, adds, moves or removes."""
    found = set(re.findall(r"^diff --git a/(.+?) b/", patch, re.MULTILINE))
    found |= set(re.findall(r"^diff --git a/.+? b/(.+)$", patch, re.MULTILINE))
    found |= {path.split("\t")[0] for path in re.findall(r"^(?:---|\+\+\+) [ab]/(.+)$", patch, re.MULTILINE)}
    return {path.strip() for path in found}


def read_task(row: Mapping[str, Any], repositories: str | Path | None = None) -> RepositoryTask:
    """Read a row.

    Args:
        row: with the columns of SWE-bench (`repo`, `base_commit`, `test_patch`, `FAIL_TO_PASS`, `PASS_TO_PASS`,
            `patch`), SWE-smith (the same without `test_patch`: `patch` makes the bug) or R2E-Gym (`repo_name`,
            `commit_hash`, `parsed_commit_content`, `execution_result_content`, `expected_output_json`). `repository`
            may name the source, or be its files, by path.
        repositories: folder that holds the sources, as `owner__name` or `name`: folders, bare repositories (`.git`),
            `.bundle` files or archives.

    Raises:
        UserError: a column or the source is missing.
    """
    present = {name: value for name, value in row.items() if value is not None}
    if "expected_output_json" in present:
        return _r2e(present, repositories)
    if "FAIL_TO_PASS" not in present:
        raise UserError(
            "repository_tests: the row has no tests. Expected the columns FAIL_TO_PASS and PASS_TO_PASS (SWE-bench, "
            f"SWE-smith) or expected_output_json (R2E-Gym). Found: {', '.join(sorted(present)) or 'none'}."
        )
    tests = _names(present["FAIL_TO_PASS"], "FAIL_TO_PASS")
    if not tests:
        raise UserError("FAIL_TO_PASS: the row names no test that has to pass")
    patch, is_bug = str(present.get("patch") or ""), "test_patch" not in present
    return RepositoryTask(
        **_source(present, repositories, str(present.get("repo") or "")),
        commit=present.get("base_commit"),
        bug=patch if is_bug else "",
        test_patch=str(present.get("test_patch") or ""),
        fail_to_pass=tests,
        pass_to_pass=_names(present.get("PASS_TO_PASS") or [], "PASS_TO_PASS"),
        reference="" if is_bug else patch,
    )


def _r2e(row: Mapping[str, Any], repositories: str | Path | None) -> RepositoryTask:
    outcomes = _object(row["expected_output_json"], "expected_output_json")
    passing = tuple(name for name, outcome in outcomes.items() if outcome == "PASSED")
    content = _object(row.get("execution_result_content") or "{}", "execution_result_content")
    names, codes = content.get("test_file_names") or [], content.get("test_file_codes") or []
    if not passing or not names or len(names) != len(codes):
        raise UserError("execution_result_content: a row of R2E-Gym needs test_file_names, test_file_codes and tests")
    before = _object(row.get("parsed_commit_content") or "{}", "parsed_commit_content").get("old_commit_hash")
    return RepositoryTask(
        **_source(row, repositories, str(row.get("repo_name") or row.get("repo") or "")),
        commit=str(before or f"{row['commit_hash']}^"),
        test_files={f"r2e_tests/{Path(name).name}": str(code) for name, code in zip(names, codes, strict=True)},
        fail_to_pass=passing,
    )


def _names(value: Any, column: str) -> tuple[str, ...]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UserError(f"{column}: neither a list nor JSON of one ({error})") from error
    return tuple(map(str, value))


def _object(value: Any, column: str) -> dict[str, Any]:
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise UserError(f"{column}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{column}: expected an object, found {type(value).__name__}")
    return value


def _source(row: Mapping[str, Any], repositories: str | Path | None, name: str) -> dict[str, Any]:
    """Return `source` or `files` of a task."""
    if isinstance(row.get("repository"), Mapping):
        return {"files": {str(path): str(text) for path, text in row["repository"].items()}}
    if row.get("repository"):
        path = Path(repositories or ".") / str(row["repository"])
        if not path.exists():
            raise UserError(f"repository: {path} does not exist")
        return {"source": path}
    if repositories is None or not name:
        raise UserError("repository_tests: set `repositories` to the folder that holds the repositories of the rows")
    plain = name.removeprefix("swesmith/").partition(".")[0] if name.startswith("swesmith/") else name
    stems = dict.fromkeys([name.replace("/", "__"), plain.replace("/", "__"), plain.rpartition("/")[2], name])
    for stem in stems:
        for suffix in _SUFFIXES:
            if (path := Path(repositories) / f"{stem}{suffix}").exists():
                return {"source": path}
    raise UserError(f"repository {name!r} is not in {repositories}: expected {', '.join(stems)}, with or without .git, "
                    ".bundle, .tar.gz or .zip")  # fmt: skip
