"""Repository tasks: sources, rows, judging, an agent's workspace."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from llmrl.errors import UserError
from llmrl.sandbox import Limits, SandboxUnavailable
from llmrl.sandbox.commands import command_box_kind
from llmrl.sandbox.trees import changes, export, files_of, write
from llmrl.verify.repository.judge import BrokenTask, is_protected, judge
from llmrl.verify.repository.task import changed_paths, read_task
from llmrl.verify.repository.workspace import Workspace
from rewards.repository_tests import patch_of, repository_tests
from tests.verify.repository.repositories import BUGGY, FIXED, NAMES, NEW_TESTS, OLD_NAMES, diff, git, make

LIMITS = Limits(cpu_seconds=120, wall_seconds=600.0, memory_mb=2048, output_mb=16)
SOURCE = "src/numerals/__init__.py"


@pytest.fixture(scope="module")
def row(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make(tmp_path_factory.mktemp("numerals"))


@pytest.fixture(scope="module", params=["bwrap", "lite"])
def kind(request: pytest.FixtureRequest) -> str:
    try:
        return command_box_kind(request.param)
    except SandboxUnavailable as error:
        pytest.skip(str(error))


def outcome(row: dict[str, Any], edit: Any, kind: str, **options: Any) -> tuple[bool, str]:
    result = judge(read_task(row), edit, kind=kind, limits=LIMITS, **options)
    return result.resolved, result.reason


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_commit_comes_from_a_folder_a_bare_repository_a_bundle_and_archives(tmp_path: Path) -> None:
    row = make(tmp_path / "whole")
    (tmp_path / "whole" / "untracked.txt").write_text("no")
    git(tmp_path, "clone", "-q", "--bare", "whole", "bare.git")
    git(tmp_path / "whole", "bundle", "create", "-q", "../one.bundle", "--all")
    shutil.make_archive(str(tmp_path / "packed"), "gztar", tmp_path, "whole")
    for name in ("whole", "bare.git", "one.bundle", "packed.tar.gz"):
        export(tmp_path / name, row["base_commit"], tmp_path / f"out-{name}")
        files = files_of(tmp_path / f"out-{name}")
        assert set(files) == {SOURCE, "tests/test_numerals.py", "tests/conftest.py", "pyproject.toml", ".gitattributes"}
        assert files[SOURCE].decode() == BUGGY and not (tmp_path / f"out-{name}" / ".git").exists()
    export(tmp_path / "whole", None, tmp_path / "head")
    assert (tmp_path / "head" / SOURCE).read_text() == FIXED
    shutil.make_archive(str(tmp_path / "plain"), "zip", tmp_path / "head")
    export(tmp_path / "plain.zip", None, tmp_path / "zipped")
    assert files_of(tmp_path / "zipped") == files_of(tmp_path / "head")
    with pytest.raises(UserError, match="has no commit 1234567"):
        export(tmp_path / "whole", "1234567", tmp_path / "x")
    with pytest.raises(UserError, match="does not exist"):
        export(tmp_path / "nowhere", None, tmp_path / "y")


def test_changes_are_read_and_written_without_following_links(tmp_path: Path) -> None:
    before, after, out = tmp_path / "before", tmp_path / "after", tmp_path / "out"
    for folder in (before, after, out):
        folder.mkdir()
    (tmp_path / "secret").write_text("SECRET")
    for name in ("same", "changed", "gone"):
        (before / name).write_text("x")
    for name in ("same", "changed"):
        (after / name).write_text("x" if name == "same" else "y")
    (after / "link").symlink_to(tmp_path / "secret")
    (after / "folder").symlink_to(tmp_path)
    (after / ".git").mkdir()
    (after / ".git" / "config").write_text("evil")
    assert changes(before, after) == {"changed": b"y", "gone": None}
    (out / "door").symlink_to(tmp_path)
    (out / "same").symlink_to(tmp_path / "secret")
    write(out, {"../outside": b"x", "door/outside": b"x", ".git/config": b"x", "a/b": b"x", "same": b"new"})
    assert not (tmp_path / "outside").exists() and (tmp_path / "secret").read_text() == "SECRET"
    write(out, {"same/now/a/folder": b"x", "same": None, "a/b/c": b"a file is in the way"})
    assert (out / "same" / "now" / "a" / "folder").read_bytes() == b"x"
    (out / "same" / "now" / "a" / "folder").unlink()
    shutil.rmtree(out / "same")
    write(out, {"same": b"new"})
    assert (out / "a" / "b").read_bytes() == b"x" and (out / "same").read_bytes() == b"new"


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_in_three_kinds_of_columns(row: dict[str, Any], tmp_path: Path) -> None:
    task = read_task(row | {"FAIL_TO_PASS": json.dumps(NAMES), "PASS_TO_PASS": json.dumps(OLD_NAMES)})
    assert task.fail_to_pass == tuple(NAMES) and task.pass_to_pass == tuple(OLD_NAMES) and task.bug == ""
    assert task.test_paths() == {"tests/test_numerals.py"} and task.hidden_paths() == set()
    assert changed_paths(row["patch"]) == {SOURCE}
    (tmp_path / "me__numerals").symlink_to(row["repository"])
    smith = {"repo": "swesmith/me__numerals.1a2b3c", "patch": diff(SOURCE, FIXED, BUGGY), "FAIL_TO_PASS": NAMES}
    task = read_task(smith, tmp_path)
    assert task.bug and task.source == tmp_path / "me__numerals" and task.hidden_paths() == {"tests/test_numerals.py"}
    r2e = {
        "repo_name": "me/numerals",
        "commit_hash": "abc",
        "execution_result_content": json.dumps({"test_file_names": ["x/test_1.py"], "test_file_codes": ["code"]}),
        "expected_output_json": json.dumps({"TestLarge.test_hundreds": "PASSED", "test_other": "FAILED"}),
    }
    task = read_task(r2e, tmp_path)
    assert (task.commit, task.fail_to_pass) == ("abc^", ("TestLarge.test_hundreds",))
    assert task.test_files == {"r2e_tests/test_1.py": "code"}
    for broken, message in (
        ({"repo": "a/b"}, "has no tests"),
        ({**smith, "FAIL_TO_PASS": "[]"}, "names no test"),
        ({**smith, "repo": "no/such"}, "'no/such' is not in"),
    ):
        with pytest.raises(UserError, match=message):
            read_task(broken, tmp_path)


def test_what_an_edit_may_not_bring(row: dict[str, Any]) -> None:
    task, before = read_task(row), Path(row["repository"])
    protected = [
        *("conftest.py", "src/conftest.py", "pytest.ini", "setup.cfg", "a.pth", "x/__pycache__/a.pyc", "json.so"),
        *("tests/helper.py", "tests/test_numerals.py", "sitecustomize.py", "pytest.py", "src/json/__init__.py"),
        *("evil-1.0.dist-info/entry_points.txt", "src/test_more.py", ".git/hooks/x", "_pytest/runner.py"),
    ]
    assert [path for path in protected if not is_protected(path, task, before)] == []
    free = [SOURCE, "src/numerals/json.py", "README.md", "src/numerals/testing.py", "docs/conf.py"]
    assert [path for path in free if is_protected(path, task, before)] == []


def test_the_patch_in_an_answer() -> None:
    patch = diff("a.py", "x\n", "y\n")
    assert patch_of(patch) == patch
    assert patch_of(f"<think>\n```diff\nno\n```\n</think>Done:\n```diff\n{patch}```\n") == patch
    assert patch_of("I changed nothing.") == ""


# --- judging ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_known_fix_and_other_right_ones_resolve_a_row(row: dict[str, Any], kind: str) -> None:
    assert outcome(row, row["patch"], kind) == (True, "")
    other = FIXED.replace("while number >= value:\n            text, number = text + sign, number - value",
                          "text, number = text + sign * (number // value), number % value")  # fmt: skip
    assert other != FIXED and outcome(row, {SOURCE: other.encode()}, kind) == (True, "")
    assert outcome({**row, "patch": None}, row["patch"], kind) == (True, "")


@pytest.mark.slow
def test_wrong_partial_and_breaking_edits_do_not(row: dict[str, Any], kind: str) -> None:
    partial = FIXED.replace('(90, "XC"), ', "")
    resolved, reason = outcome(row, {SOURCE: partial.encode()}, kind)
    assert (
        not resolved and "1 of 7 tests did not pass, first tests/test_numerals.py::TestLarge::test_hundreds" in reason
    )
    breaking = FIXED.replace('split(" ")', "split()[:1]")
    assert "test_words: wrong_value" in outcome(row, {SOURCE: breaking.encode()}, kind)[1]
    assert "missing" in outcome(row, {SOURCE: b"def roman(:"}, kind)[1]
    assert not outcome(row, {SOURCE: None}, kind)[0]
    assert outcome(row, "diff --git a/x b/x\n--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\n", kind) == (
        False,
        "the patch does not apply",
    )


@pytest.mark.slow
def test_rows_that_cannot_be_judged_say_so(row: dict[str, Any], kind: str) -> None:
    with pytest.raises(BrokenTask, match="the known fix does not pass the tests here"):
        outcome({**row, "patch": diff(SOURCE, BUGGY, BUGGY.replace("positive", "only"))}, row["patch"], kind)
    open_test = NEW_TESTS + "\n\ndef test_open():\n    assert roman(4) < roman(50) or roman(5) == 'V'\n"
    test_patch = git(Path(row["repository"]), "diff", row["base_commit"], "HEAD", "--", "tests")
    assert test_patch
    hidden = {**row, "test_patch": "", "patch": None, "FAIL_TO_PASS": [*NAMES, "tests/test_numerals.py::test_open"]}
    task = read_task(hidden)
    task = type(task)(
        **{name: getattr(task, name) for name in task.__slots__} | {"test_files": {"tests/test_numerals.py": open_test}}
    )
    with pytest.raises(BrokenTask, match="test_open compares nothing"):
        judge(task, {SOURCE: FIXED.encode()}, kind=kind, limits=LIMITS)
    assert judge(task, {SOURCE: FIXED.encode()}, kind=kind, limits=LIMITS, guard="some").resolved
    with pytest.raises(UserError, match="test_patch does not apply"):
        outcome({**row, "test_patch": diff("tests/test_numerals.py", "a\n", "b\n")}, row["patch"], kind)


@pytest.mark.slow
def test_a_row_of_r2e_gym_is_judged(row: dict[str, Any], kind: str) -> None:
    fix = git(Path(row["repository"]), "rev-parse", "HEAD^").strip()
    r2e = {
        "repository": row["repository"],
        "commit_hash": fix,
        "execution_result_content": {"test_file_names": ["test_1.py"], "test_file_codes": [NEW_TESTS]},
        "expected_output_json": {"TestLarge.test_hundreds": "PASSED", "test_small": "PASSED", "test_x": "FAILED"},
    }
    assert outcome(r2e, {SOURCE: FIXED.encode()}, kind) == (True, "")
    assert not outcome(r2e, {SOURCE: BUGGY.encode(), "r2e_tests/test_1.py": b"def test_small(): pass"}, kind)[0]


@pytest.mark.slow
def test_the_reward(row: dict[str, Any]) -> None:
    try:
        command_box_kind()
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    assert repository_tests(f"```diff\n{row['patch']}```", **row).reward == 1.0
    score = repository_tests("", edits={SOURCE: BUGGY.encode()}, **row)
    assert score.reward == 0.0 and score.info["tests"][OLD_NAMES[0]] == "passed"
    assert repository_tests("nothing", **row).reward == 0.0
    smith = {"repository": row["repository"], "FAIL_TO_PASS": NAMES, "PASS_TO_PASS": OLD_NAMES}
    smith["patch"] = diff(SOURCE, FIXED, BUGGY)
    assert repository_tests(diff(SOURCE, BUGGY, FIXED), **smith).reward == 1.0
    assert repository_tests(diff(SOURCE, BUGGY, BUGGY + "\n"), **smith).reward == 0.0


# --- the agent's workspace --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_agent_works_in_a_copy_without_history_and_hidden_tests(row: dict[str, Any], kind: str) -> None:
    task = read_task(row)
    with Workspace(task, kind=kind, python=sys.executable) as workspace:
        fix = git(Path(row["repository"]), "rev-parse", "HEAD").strip()
        seen = workspace.run(
            "git log --all --format=%s; git status --short; git fsck --unreachable --no-reflogs; ls; cat tests/*.py;"
            f" git show {fix} 2>&1; python -m pytest -q -o addopts= 2>&1"
        ).stdout
        assert seen.startswith("base\n") and "XC" not in seen and "all numerals" not in seen and "3 passed" in seen
        assert not workspace.run(f"cat {row['repository']}/{SOURCE}").stdout
        assert workspace.read(SOURCE) == BUGGY and workspace.read("no") is None
        assert workspace.write(SOURCE, FIXED) and workspace.write("notes/a.md", "x")
        edits = workspace.edits()
        made = {path for path in edits if "__pycache__" not in path and ".pytest_cache" not in path}
        assert made == {SOURCE, "notes/a.md"} and edits[SOURCE] == FIXED.encode()
        assert workspace.run("cd /; curl -m 2 http://127.0.0.1 || ls /root || true").exit_code == 0
    assert not workspace.path.exists()
    assert outcome(row, edits, kind) == (True, "")


@pytest.mark.slow
def test_tests_of_a_smith_row_are_not_in_the_workspace(row: dict[str, Any], kind: str) -> None:
    smith = {"repository": row["repository"], "FAIL_TO_PASS": NAMES, "patch": diff(SOURCE, FIXED, BUGGY)}
    with Workspace(read_task(smith), kind=kind) as workspace:
        assert workspace.read("tests/test_numerals.py") is None and workspace.read(SOURCE) == BUGGY
        assert "LXXXVIII" not in workspace.run("git log -p --all; grep -r LXXX .").stdout
        assert workspace.edits() == {}
        workspace.write(SOURCE, FIXED)
        assert outcome(smith, workspace.edits(), kind) == (True, "")
