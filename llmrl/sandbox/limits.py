"""What a program may use, what came of it, and the two ways in which a box can fail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmrl.errors import RunFailed


class SandboxUnavailable(RunFailed):
    """The box could not be started or reached: the program was not judged."""


class BoxDied(BaseException):
    """The fork server died together with the program it ran. Judge again; the second time it is the program's doing.

    No `Exception`, so that test code cannot catch it.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Of one program run: all assertions of one row together, or one input of a program that reads standard input."""

    cpu_seconds: int = 6
    """Processor time of all its threads."""
    wall_seconds: float = 12.0
    """Real time, which only sleeping programs and a busy machine use up first."""
    memory_mb: int = 1024
    """Address space on top of the interpreter's own."""
    output_mb: int = 8
    """Largest file, standard output and returned value."""


Status = Literal["ok", "compile_error", "error", "timeout", "output_limit"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """How a program run from standard input to standard output ended."""

    status: Status
    """`error` is an exception, a non-zero exit code or a signal."""
    exit_code: int
    """Negative: the signal that ended it."""
    stdout: str
    stderr: str
    detail: str = ""
    """The exception, for people."""
    cpu_seconds: float = 0.0
    memory_mb: float = 0.0
