"""The two ways in which a command fails, and the exit code of each."""

from __future__ import annotations

import sys
from collections.abc import Callable


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


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text for a message of one line, or its class where it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def run_main(main: Callable[[], object]) -> None:
    """Run the `main` of a recipe or command; print an `LlmrlError` without a traceback and exit with its code.

    An interruption (Ctrl-C) is one line too, and exits with the code of a run that failed.
    """
    try:
        main()
    except LlmrlError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("error: interrupted; continue with --train.resume_from_checkpoint last", file=sys.stderr, flush=True)
        sys.exit(RunFailed.exit_code)
