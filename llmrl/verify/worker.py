"""One worker process of the pool: reads messages of (load | call) requests from its pipe and answers each of them.

`llmrl.verify.pool` starts this process and kills it when a call takes too long, so nothing here guards against hanging.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import inspect
import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from llmrl.errors import UserError
from llmrl.verify.failure import describe
from llmrl.verify.spec import find, resolve

_PR_SET_PDEATHSIG = 1


def main(pipe: int, memory_limit_bytes: int, parent: int) -> None:
    """Serve requests until the other end of the pipe closes.

    Args:
        pipe: file descriptor of this end of a socket pair.
        memory_limit_bytes: address space this process may use (RLIMIT_AS); 0 sets no limit.
        parent: process id of the pool's owner.
    """
    _confine(pipe, memory_limit_bytes, parent)
    functions: dict[str, Callable[..., Any]] = {}
    with Connection(pipe) as connection:
        while True:
            try:
                requests = pickle.loads(connection.recv_bytes())
            except EOFError:
                return
            for request in requests:
                connection.send_bytes(_answer(request, functions))


def _confine(pipe: int, memory_limit_bytes: int, parent: int) -> None:
    """Die with the parent, limit memory, write no core files, and do not pass the pipe on to child processes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before the line above took effect
            os._exit(1)
    os.set_inheritable(pipe, False)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_limit_bytes and sys.platform == "linux":  # other systems accept the limit but do not enforce it
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = memory_limit_bytes if hard == resource.RLIM_INFINITY else min(memory_limit_bytes, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _answer(request: bytes, functions: dict[str, Callable[..., Any]]) -> bytes:
    """Carry out a request; any exception, including that of sys.exit, becomes the answer.

    Returns:
        A pickled (True, value); (None, message) for a UserError; (False, traceback) for any other exception.
    """
    spec = ""
    try:
        spec, arguments = pickle.loads(request)
        if arguments is None:
            functions[spec] = resolve(spec)
            getattr(find(spec)[1], "warm_up", _nothing)()
            value = None
        else:
            value = functions[spec](**arguments)
            if inspect.isawaitable(value):
                value = asyncio.run(_finish(value))
        return pickle.dumps((True, value), protocol=pickle.HIGHEST_PROTOCOL)
    except MemoryError as error:
        text = f"MemoryError: the memory limit of this worker was reached {error}".rstrip()
        del error  # its traceback keeps the memory alive that the answer needs
        gc.collect()
        return pickle.dumps((False, text))
    except UserError as error:
        return pickle.dumps((None, str(error)))
    except BaseException as error:
        return pickle.dumps((False, describe(error, functions.get(spec))))
    finally:
        # An alarm or a signal handler that a library left behind must not kill the next call.
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _nothing() -> None:
    pass


async def _finish(awaitable: Any) -> Any:
    return await awaitable
