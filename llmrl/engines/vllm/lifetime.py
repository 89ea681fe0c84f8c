"""vLLM's processes end with the trainer that started them, however that ends: nothing keeps a GPU behind it.

A trainer that is killed cannot say goodbye, and vLLM's engine would wait for it for ever. So the processes watch it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable

TRAINER = "LLMRL_TRAINER_PID"
"""Environment variable of vLLM's processes."""


def end_with_trainer(clean_up: Callable[[int], None]) -> None:
    """End this process, and vLLM's process above it if there is one, when the trainer is gone.

    Args:
        clean_up: called first, with the trainer's process id.
    """
    trainer = int(os.environ.get(TRAINER, "0"))
    if trainer in (0, os.getpid()) or not hasattr(os, "pidfd_open"):
        return
    above = os.getppid()
    try:
        watched = os.pidfd_open(trainer)
    except ProcessLookupError:
        watched = None
    except OSError:  # a kernel, or a sandbox around this process, without it
        return

    def watch() -> None:
        if watched is not None:
            waiting = select.poll()
            waiting.register(watched, select.POLLIN)
            waiting.poll()
        with contextlib.suppress(Exception):
            clean_up(trainer)
        if above not in (1, trainer) and os.getppid() == above:  # of several workers each has the engine above it
            with contextlib.suppress(OSError):
                os.kill(above, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="llmrl lifetime", daemon=True).start()
