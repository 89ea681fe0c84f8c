"""The installed package is light to import, complete, and its files are short enough to read."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import llmrl

REPOSITORY = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "accelerate", "datasets", "numpy", "jsonargparse", "rich")


def imported_by(statement: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has loaded after `statement`."""
    program = f"{statement}; import sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    return set(found.stdout.split())


def test_import_is_light() -> None:
    assert not imported_by("import llmrl").intersection(HEAVY)
    assert "torch" not in imported_by("import llmrl.types, llmrl.config, llmrl.errors, llmrl.cli")


def test_every_public_name_is_there() -> None:
    for name in llmrl.__all__:
        assert getattr(llmrl, name) is not None
    assert set(llmrl.__all__) <= set(dir(llmrl))


def test_every_folder_is_packaged() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    folders = {
        ".".join(file.parent.relative_to(REPOSITORY).parts) for file in (REPOSITORY / "llmrl").rglob("__init__.py")
    }
    programs = {".".join(file.parent.relative_to(REPOSITORY).parts) for file in (REPOSITORY / "recipes").rglob("*.py")}
    assert listed == folders | {"llmrl.shipped.rewards"} | {f"llmrl.shipped.{name}" for name in programs}


def test_tested_versions_satisfy_the_requirements() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    lines = (REPOSITORY / "requirements" / "tested.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line)
    tested = {name.lower().replace("_", "-"): version for name, version in tested.items()}
    for requirement in map(Requirement, wanted):
        name = requirement.name.lower().replace("_", "-")
        if name in tested:
            assert requirement.specifier.contains(tested[name]), requirement


def test_files_stay_readable() -> None:
    long = {}
    for file in (REPOSITORY / "llmrl").rglob("*.py"):
        lines = len(file.read_text().splitlines())
        if lines > 480:
            long[str(file.relative_to(REPOSITORY))] = lines
    assert not long, f"split these by topic: {long}"
