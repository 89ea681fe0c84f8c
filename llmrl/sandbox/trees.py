"""Folders of files as a repository has them at one commit: exporting, comparing, changing. No history comes along.

Sources are trusted. What a policy edited is not: its files are read without following links, and git never runs there.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from llmrl.errors import UserError

MAX_FILE = 16 << 20
"""Larger files of an edited tree are not taken."""
MAX_TREE = 1 << 30
"""Nor are files beyond this many bytes in all."""
_GIT_SECONDS = 600.0
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")

Changes = dict[str, bytes | None]
"""Relative path -> new content, or None for a file that is gone."""


def export(source: Path, commit: str | None, target: Path) -> None:
    """Write the files of a repository at a commit to a new folder, without its history.

    Args:
        source: a git repository (also a bare one), a git bundle, a tar or zip archive, or a plain folder.
        commit: which commit of a repository; None means its HEAD. An archive or plain folder has only one state.
        target: a folder that does not exist yet.

    Raises:
        UserError: the source does not exist, is none of these, or does not have the commit.
    """
    if not source.exists():
        raise UserError(f"repository {source} does not exist")
    target.mkdir(parents=True)
    if source.is_file() and source.name.endswith(_ARCHIVES):
        _unpack(source, commit, target)
    elif source.is_file():
        with tempfile.TemporaryDirectory(prefix="llmrl-bundle-") as folder:
            _git(["clone", "-q", "--bare", str(source), f"{folder}/r"], f"{source} is not an archive or a git bundle")
            _from_git(Path(folder) / "r", commit, target)
    elif (source / ".git").exists() or (source / "HEAD").is_file():
        _from_git(source, commit, target)
    else:
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".git"))


def _unpack(source: Path, commit: str | None, target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="llmrl-archive-") as name:
        folder = Path(name) / "files"
        folder.mkdir()
        if source.name.endswith(".zip"):
            with zipfile.ZipFile(source) as archive:
                archive.extractall(folder)
        else:
            with tarfile.open(source) as archive:
                archive.extractall(folder, filter="data")
        entries = list(folder.iterdir())
        root = entries[0] if len(entries) == 1 and entries[0].is_dir() and entries[0].name != ".git" else folder
        if (root / ".git").exists():
            _from_git(root, commit, target)
        else:
            shutil.copytree(root, target, symlinks=True, dirs_exist_ok=True)


def _from_git(repository: Path, commit: str | None, target: Path) -> None:
    """Check a commit out with an index of its own; `git archive` would leave out what .gitattributes says."""
    problem = f"{repository} has no commit {commit or 'HEAD'}"
    folder = _git(["-C", str(repository), "rev-parse", "--absolute-git-dir"], problem).strip()
    where = [f"--git-dir={folder}", f"--work-tree={target}"]
    with tempfile.TemporaryDirectory(prefix="llmrl-index-") as index:
        _git([*where, "read-tree", f"{commit or 'HEAD'}^{{tree}}"], problem, index=f"{index}/index")
        _git([*where, "checkout-index", "-a", "-f"], problem, index=f"{index}/index")


def _git(arguments: list[str], problem: str, index: str = "") -> str:
    environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "HOME": "/nonexistent", "LC_ALL": "C"}
    environment |= {"GIT_CONFIG_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0"}
    environment |= {"GIT_INDEX_FILE": index} if index else {}
    settings = ["-c", "safe.directory=*", "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false"]
    try:
        done = subprocess.run(
            ["git", *settings, *arguments], env=environment, capture_output=True, text=True, timeout=_GIT_SECONDS
        )
    except FileNotFoundError:
        raise UserError("git is not installed (apt-get install git)") from None
    if done.returncode != 0:
        raise UserError(f"{problem}: {done.stderr.strip()[-500:]}")
    return done.stdout


def begin_history(folder: Path) -> None:
    """Make a folder a git repository with one commit, so that `git diff` shows what was changed and nothing else."""
    author = ["-c", "user.name=base", "-c", "user.email=base@localhost", "-c", "commit.gpgsign=false"]
    _git(["-C", str(folder), "init", "-q", "-b", "main"], f"{folder} cannot become a repository")
    _git(["-C", str(folder), "add", "-A", "-f"], f"the files of {folder} cannot be added")
    _git(["-C", str(folder), *author, "commit", "-q", "--allow-empty", "-m", "base"], f"{folder} cannot be committed")


def apply_patch(folder: Path, patch: str, what: str) -> None:
    """Apply a trusted patch to a folder.

    Raises:
        UserError: it does not apply. `what` names it in the message.
    """
    if not patch.strip():
        return
    with tempfile.NamedTemporaryFile("w", suffix=".diff", encoding="utf-8", errors="surrogateescape") as file:
        file.write(patch if patch.endswith("\n") else f"{patch}\n")
        file.flush()
        done = subprocess.run(
            ["git", "apply", "--whitespace=nowarn", file.name],
            cwd=folder,
            env={"PATH": os.environ.get("PATH", ""), "GIT_CEILING_DIRECTORIES": str(folder.parent), "LC_ALL": "C"},
            capture_output=True,
            text=True,
        )
    if done.returncode != 0:
        raise UserError(f"{what} does not apply: {done.stderr.strip()[:500]}")


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the regular files below a folder. Links, devices, `.git` and files over `MAX_FILE` are left out."""
    found: dict[str, bytes] = {}
    left = MAX_TREE
    for inner, folders, names in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if name != ".git" and not os.path.islink(os.path.join(inner, name))]
        for name in names:
            path = os.path.join(inner, name)
            content = _read(path)
            if content is not None and len(content) <= left:
                found[os.path.relpath(path, folder)] = content
                left -= len(content)
    return found


def _read(path: str) -> bytes | None:
    """Return the content of a regular file, opened so that neither a link nor a pipe can be put in its place."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if status.st_size > MAX_FILE or not stat.S_ISREG(status.st_mode):
            return None
        return file.read(MAX_FILE + 1)[:MAX_FILE]


def changes(before: Path, after: Path) -> Changes:
    """Return what differs between two trees, of which the second may be hostile."""
    old, new = files_of(before), files_of(after)
    found: Changes = {path: content for path, content in new.items() if old.get(path) != content}
    return found | dict.fromkeys(path for path in old if path not in new)


def write(folder: Path, edits: Mapping[str, bytes | None]) -> None:
    """Change files below a folder. Paths that lead out of it, or through a link, are left out."""
    root = os.path.realpath(folder)
    # Removals first: a file may make room for a folder of its name.
    for name, content in sorted(edits.items(), key=lambda edit: edit[1] is not None):
        path = Path(folder, name)
        parent = os.path.realpath(path.parent)
        if (parent != root and not parent.startswith(f"{root}/")) or ".git" in Path(name).parts or path.is_dir():
            continue
        if path.is_symlink() or (content is None and path.exists()):
            path.unlink()
        if content is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError:  # a file is in the way
                continue
            mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
            path.write_bytes(content)
            path.chmod(mode)
