"""The ways in which a command fails or is ended, and the exit code of each."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
from collections.abc import Callable
from types import FrameType


class LlmrlError(Exception):
    """Base class of errors that the user sees as one message, without a traceback."""

    exit_code = 1


class UserError(LlmrlError):
    """The arguments or the input are wrong, and nothing has started. Exit code 2.

    The message names what is wrong (file, line, field) and how to fix it.
    """

    exit_code = 2


class RunFailed(LlmrlError):
    """A run that has started must stop. Exit code 1.

    Raised when continuing would train on wrong data or serve wrong weights. The message names what was measured, the
    likely cause, and what to do.
    """


class Interrupted(KeyboardInterrupt):
    """A command was asked to end by SIGTERM or Ctrl-C and has done so in good order. Exit code 143 or 130.

    The message says what was kept and how to go on.
    """

    def __init__(self, text: str = "", *, exit_code: int = 130) -> None:
        super().__init__(text)
        self.exit_code = exit_code


CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves a terminal's cursor, sets its title, turns its text around, or cannot be written to it."""


def printable(text: str) -> str:
    """Return a text that may quote what a model wrote, with control characters as escapes: safe for a terminal."""
    return CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text for a message of one line, or its class where it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def run_main(main: Callable[[], object]) -> None:
    """Run the `main` of a recipe or command; print an `LlmrlError` without a traceback and exit with its code.

    SIGTERM and Ctrl-C end it with one line and the code that shells give them, 143 and 130.
    """
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, _terminated)
    try:
        main()
    except LlmrlError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except Interrupted as stop:
        print(printable(str(stop)), file=sys.stderr, flush=True)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)


def _terminated(number: int, frame: FrameType | None) -> None:
    raise Interrupted("SIGTERM: ended", exit_code=128 + number)
