"""An exception of a reward in; a text that begins with the error itself and where it was raised out."""

from __future__ import annotations

import asyncio
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmrl.errors import first_line
from llmrl.verify import plugin
from llmrl.verify.plugin import PREFIX

_CALLERS = (
    *(str(Path(__file__).with_name(name)) for name in ("rubric.py", "worker.py", "reward.py", "limits.py")),
    str(Path(asyncio.__file__).parent),
)
"""What calls rewards: frames there say nothing about the error."""
MAX_FRAMES = 30


def describe(error: BaseException, function: Callable[..., Any] | None = None) -> str:
    r"""Return `ValueError: text (file, line 3, in name)` and, in the lines below, the traceback.

    The traceback begins with the reward's own frames. Exceptions that were being handled around the whole call, in
    which Python says an error happened "during handling" of another, are left out.

    Args:
        error: what was raised.
        function: the reward; the first line names the deepest place in its file. Default: where it was raised.
    """
    shown = traceback.TracebackException.from_exception(error, limit=-MAX_FRAMES)
    _leave_out_callers(shown, error)
    leaf: BaseException = error
    while isinstance(leaf, BaseExceptionGroup) and len(leaf.exceptions) == 1:
        leaf = leaf.exceptions[0]
    kind = type(leaf).__qualname__
    try:
        text = first_line(leaf)
    except Exception:  # an exception class of the user's, whose `__str__` fails
        text = kind
    headline = kind if text == kind else f"{kind}: {text}"
    frames = [*shown.stack, *(traceback.extract_tb(leaf.__traceback__) if leaf is not error else [])]
    if not frames:  # raised by the call itself, or by us about what was returned
        return text if text.startswith("reward ") else headline
    code = getattr(function, "__code__", None)
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    place = (own or frames)[-1]
    text = f"{headline} ({place.filename}, line {place.lineno}, in {place.name})\n{''.join(shown.format())}".rstrip()
    return re.sub(rf"\b{PREFIX}\w+\.", "", text)


def _leave_out_callers(shown: traceback.TracebackException, error: BaseException) -> None:
    while shown.stack and shown.stack[0].filename.startswith(_CALLERS):
        shown.stack.pop(0)
    shown.stack[:] = [frame for frame in shown.stack if frame.filename != plugin.__file__]  # the import of a neighbor
    if shown.__cause__ is not None and error.__cause__ is not None:
        _leave_out_callers(shown.__cause__, error.__cause__)
    if shown.__context__ is not None and error.__context__ is not None:
        if _handled_inside(error.__context__, error):
            _leave_out_callers(shown.__context__, error.__context__)
        else:
            shown.__context__ = None


def _handled_inside(context: BaseException, error: BaseException) -> bool:
    """Return whether the code that raised `error` was handling `context`, and not something around the whole call.

    The traceback of an exception begins with the frame that caught it.
    """
    caught = context.__traceback__
    return caught is not None and any(
        caught.tb_frame is frame and not frame.f_code.co_filename.startswith(_CALLERS)
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )
