"""The copy of a repository in which an agent works: a box with a shell, no history, no hidden tests, no network."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from llmrl.sandbox import Limits, RunResult
from llmrl.sandbox.commands import ENVIRONMENT, CommandBox, command_box_kind, give_to_box, scratch_folder
from llmrl.sandbox.trees import Changes, begin_history, changes
from llmrl.verify.repository.judge import prepare, python_paths
from llmrl.verify.repository.task import RepositoryTask

_COMMAND = Limits(cpu_seconds=120, wall_seconds=180.0, memory_mb=4096, output_mb=64)


class Workspace:
    """A task's repository for one attempt. Close it, or use it in a `with` block.

    Args:
        task: from `read_task`.
        kind: `bwrap` or `lite`; default: the first that works.
        python: interpreter that the shell finds as `python`, with the repository's requirements.

    Raises:
        UserError: the row does not fit its repository.
        SandboxUnavailable: no box for commands works here.
    """

    def __init__(self, task: RepositoryTask, *, kind: str | None = None, python: str = sys.executable) -> None:
        self.task, self.kind = task, command_box_kind(kind)
        self._before = prepare(task).before
        self._folder = Path(tempfile.mkdtemp(prefix="llmrl-workspace-"))
        self._folder.chmod(0o711)
        self.path = self._folder / "repository"
        """Where the repository lies, in the box and outside."""
        self._hidden = task.hidden_paths()
        shutil.copytree(self._before, self.path, symlinks=True)
        for hidden in self._hidden:
            (self.path / hidden).unlink(missing_ok=True)
        self.path.chmod(0o755)
        begin_history(self.path)
        give_to_box(self.path)
        command, folders = python_paths(python)
        modules = f"{self.path}:{self.path}/src"  # where the judge looks for the repository's modules, too
        self._env = ENVIRONMENT | {"PYTHONPATH": modules, "PYTHONDONTWRITEBYTECODE": "1"}
        home = scratch_folder(self._folder / "home")
        self._env |= {"HOME": str(home), "TMPDIR": str(home), "GIT_CONFIG_NOSYSTEM": "1"}
        self._env |= {"PATH": f"{Path(command).parent}:{ENVIRONMENT['PATH']}", "PYTHONNOUSERSITE": "1"}
        self._box = CommandBox(self.kind, read=list(folders), write=[str(self.path), str(home)])

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, command: str, *, stdin: str = "", limits: Limits | None = None) -> RunResult:
        """Run a shell command in the repository. What it leaves running is killed.

        Raises:
            BoxDied: the box is gone.
        """
        argv = ["/bin/bash", "-c", command]
        return self._box.run(
            argv, stdin=stdin, cwd=str(self.path), env=self._env, limits=limits or _COMMAND, stack_mb=64
        )

    def read(self, path: str) -> str | None:
        """Return the text of a file, or None if it cannot be read. The box reads it: links lead nowhere else."""
        end = self._file_command(["/bin/cat", "--", path])
        return end.stdout if end.exit_code == 0 else None

    def write(self, path: str, text: str) -> bool:
        """Write a file, with the folders above it; return whether that worked."""
        script = 'mkdir -p -- "$(dirname -- "$1")" && cat > "$1"'
        return self._file_command(["/bin/bash", "-c", script, "write", path], text).exit_code == 0

    def _file_command(self, argv: list[str], stdin: str = "") -> RunResult:
        return self._box.run(argv, stdin=stdin, cwd=str(self.path), env=self._env, limits=_COMMAND)

    def edits(self) -> Changes:
        """Return what was changed, for `judge`. Hidden tests, which were never here, do not count as removed."""
        found = changes(self._before, self.path)
        return {path: content for path, content in found.items() if content is not None or path not in self._hidden}

    def close(self) -> None:
        """Kill the box and remove the copy. Safe to call twice."""
        self._box.close()
        shutil.rmtree(self._folder, ignore_errors=True)
