"""The two ways a command ends badly, and the exit code of each."""

from __future__ import annotations

import sys
from collections.abc import Callable


class LlmrlError(Exception):
    """Base of the errors that are explained to the user in one message, without a traceback."""

    exit_code = 1


class UserError(LlmrlError):
    """The arguments or the input are wrong; nothing was started. Exit code 2.

    The message names what is wrong (file, line, field) and how to fix it.
    """

    exit_code = 2


class RunFailed(LlmrlError):
    """A run that had started must not go on. Exit code 1.

    Raised when continuing would train on wrong data or serve wrong weights; the message says what was
    measured, the likely cause, and what to do.
    """


def run_main(main: Callable[[], object]) -> None:
    """Run a recipe's or command's `main`: an explained error is printed without a traceback and sets the exit code."""
    try:
        main()
    except LlmrlError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
