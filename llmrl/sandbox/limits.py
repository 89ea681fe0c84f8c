"""Limits and results of programs, and the two ways in which a box can fail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmrl.errors import RunFailed


class SandboxUnavailable(RunFailed):
    """The box could not be started or reached, so the program was not judged."""


class BoxDied(BaseException):
    """The fork server died together with its program. Judge again; the second time, blame the program.

    Not an `Exception`, because test code must not catch it.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits of one run of a script, or of one test in a session."""

    cpu_seconds: float = 6
    """Processor time of all threads, in seconds. The kernel counts whole seconds for a script."""
    wall_seconds: float = 12.0
    """Real time in seconds, without the time in which the program was ready to run and the machine did something else.
    Only a program that sleeps or waits reaches it before the processor time."""
    total_seconds: float | None = None
    """Processor time of all tests of a session together. Default: that of one test."""
    memory_mb: int = 1024
    """Address space in addition to the interpreter's own, in MB."""
    output_mb: int = 8
    """Largest file, standard output and returned value, in MB."""


Conventions = Literal["python", "judge"]
"""What a program may rely on: Python alone, or also what LeetCode and the grader of LiveCodeBench give it (the names of
common modules without an import, a recursion limit of 50,000, `return` at the top level)."""

Status = Literal["ok", "compile_error", "error", "timeout", "output_limit"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """How a program run from standard input to standard output ended."""

    status: Status
    """`error` is an exception, a non-zero exit code or a signal."""
    exit_code: int
    """Exit code, or minus the number of the signal that ended the program."""
    stdout: str
    stderr: str
    detail: str = ""
    """Text of the exception, for people."""
    cpu_seconds: float = 0.0
    seconds: float = 0.0
    """Real time without waiting for a processor; of a short run the processor time."""
    memory_mb: float = 0.0
