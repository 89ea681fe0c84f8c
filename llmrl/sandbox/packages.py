"""Installed packages that programs may import: what they consist of, and whether they are there."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from importlib import metadata
from pathlib import Path

from llmrl.errors import UserError


def check_installed(packages: tuple[str, ...]) -> None:
    """Raise a UserError for a package that cannot be imported here."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"packages: {package!r} is not installed, so programs could not import it: pip install {package}, or "
                "remove it from `packages`"
            )


@cache
def paths_of(package: str) -> tuple[str, ...]:
    """Return the files and folders of a package and of all that its distribution requires. Nothing if not installed."""
    found = dict.fromkeys(_own_paths(package))
    pending = [_distribution(package)]
    seen: set[str] = set()
    while pending:
        name = pending.pop()
        if name is None or name in seen:
            continue
        seen.add(name)
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        found |= dict.fromkeys(_top_level(distribution))
        for requirement in distribution.requires or []:
            if "extra ==" not in requirement:
                pending.append(re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0])
    return tuple(found)


def _own_paths(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    if spec is None:
        return []
    folders = list(spec.submodule_search_locations or [])
    return [path for folder in folders for path in (folder, f"{folder}.libs")] or [str(spec.origin)]


def _distribution(package: str) -> str | None:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return next(iter(metadata.packages_distributions().get(package, [])), None)
    return package


def _top_level(distribution: metadata.Distribution) -> list[str]:
    """Return the modules of a distribution: the files and folders at the top of what it installed."""
    tops = {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}
    paths = [Path(str(distribution.locate_file(top))) for top in tops if not top.endswith((".dist-info", ".data"))]
    return sorted(str(path) for path in paths if path.is_dir() or path.suffix in (".py", ".so"))
