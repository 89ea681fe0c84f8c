"""What an edit of a repository may not bring along: tests, and whatever decides how tests are run."""

from __future__ import annotations

import sys
from fnmatch import fnmatchcase
from pathlib import Path

from llmrl.verify.repository.task import RepositoryTask, changed_paths

_CONFIGURATION = {
    *(
        "conftest.py",
        "pytest.ini",
        ".pytest.ini",
        "pytest.toml",
        ".pytest.toml",
        "tox.ini",
        "setup.cfg",
        "pyproject.toml",
    ),
    *("sitecustomize.py", "usercustomize.py", "noxfile.py", ".coveragerc", ".gitattributes", ".gitmodules"),
}
_PATTERNS = ("*.pth", "*.pyc", "*.pyo", "*.so", "*.pyd", "*.egg-link", "test_*.py", "*_test.py", "tests.py")
_FOLDERS = ("__pycache__", ".git", "*.dist-info", "*.egg-info", ".pytest_cache", ".hypothesis")
_MACHINERY = {"pytest", "_pytest", "pluggy", "iniconfig", "py", "tomli", "packaging", "exceptiongroup"}


def is_protected(path: str, task: RepositoryTask, before: Path) -> bool:
    """Return whether an edit of a file is not taken over: it belongs to the tests, or to what runs them.

    Test files are those of the row, what lies in their folders, and what is named like one; but what the known fix
    changes is not protected by its name.
    """
    parts = Path(path).parts
    if any(fnmatchcase(part, pattern) for part in parts for pattern in _FOLDERS) or ".." in parts:
        return True
    if parts[-1] in _CONFIGURATION or path in task.test_paths():
        return True
    if any(fnmatchcase(parts[-1], pattern) for pattern in _PATTERNS):
        return path not in changed_paths(task.reference)
    fixed = changed_paths(task.reference)
    for test in task.test_paths():
        folder = str(Path(test).parent)
        if folder != "." and path.startswith(f"{folder}/") and not any(p.startswith(f"{folder}/") for p in fixed):
            return True
    return _shadows(parts, before)


def _shadows(parts: tuple[str, ...], before: Path) -> bool:
    """Return whether a new top-level module would take the place of the standard library's or the test runner's."""
    top = list(parts[1:] if parts[0] == "src" and len(parts) > 1 else parts)
    name = top[0].partition(".")[0]
    is_module = len(top) > 1 or top[0].endswith(".py")
    known = name in sys.stdlib_module_names or name in _MACHINERY
    return is_module and known and not (before / Path(*parts[: len(parts) - len(top) + 1])).exists()
