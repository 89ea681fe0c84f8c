"""Checks of rows: a reward says before the first step what is wrong with a row's columns.

A check is a function `check(row)` that returns a text, or None if the row is fine. `row` has what the reward's
arguments are filled with: the columns, `prompt`, `answer`, and the fixed `args`. docs/rewards.md says where a reward
declares it.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from llmrl.errors import UserError, first_line

RowCheck = Callable[[dict[str, Any]], str | None]


def check_of(name: str, function: Any, module: ModuleType | None) -> RowCheck | None:
    """Return the check of a reward, which never raises, or None if the reward brings none.

    It is the attribute `check` of the function or object (or of the object whose method it is), else the entry of the
    module's CHECKS, else the module's function `check`. A function that only happens to be called `check` takes other
    arguments, so that a check is one by its single required parameter `row`.

    Args:
        name: of the reward, the key in CHECKS.
        function: the reward function or object.
        module: where it comes from.

    Raises:
        UserError: CHECKS names nothing that the module has, or holds something that is not such a function.
    """
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    for owner in (inner, getattr(inner, "__self__", None)):
        own: Any = getattr(owner, "check", None)
        if not isinstance(owner, ModuleType) and _is_check(own):
            return _guarded(own)
    checks = getattr(module, "CHECKS", None)
    if isinstance(checks, Mapping):
        _validate(checks, module, name)
        known = [key for key in (name, getattr(inner, "__name__", None)) if key in checks]
        return _guarded(checks[known[0]]) if known else None
    found: Any = getattr(module, "check", None)
    return _guarded(found) if found is not inner and _is_check(found) else None


def _is_check(found: Any) -> bool:
    if not callable(found) or inspect.isclass(found) or inspect.iscoroutinefunction(found):
        return False
    try:
        parameters = list(inspect.signature(found).parameters.values())
    except (TypeError, ValueError):
        return False
    required = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    return required == ["row"] and parameters[0].name == "row"


def _validate(checks: Mapping[str, Any], module: ModuleType | None, reward: str) -> None:
    for name, check in checks.items():
        where = f"reward file {getattr(module, '__file__', None) or module}: CHECKS[{name!r}]"
        if name != reward and not hasattr(module, name):
            near = difflib.get_close_matches(name, dir(module), n=1, cutoff=0.6)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{where}: the file has nothing of that name.{hint}")
        if not _is_check(check):
            raise UserError(
                f"{where} is {check!r}: it must be an ordinary function `check(row)` that returns a text or None"
            )


def _guarded(check: Callable[..., Any]) -> RowCheck:
    """Return a check whose own failures are its findings: an error in it must not look like a good row."""

    def run(row: dict[str, Any]) -> str | None:
        try:
            text = check(row)
        except UserError as error:  # a reader that the reward itself uses
            return first_line(error)
        except Exception as error:
            return f"its check failed: {type(error).__name__}: {first_line(error)}"
        if text is None or isinstance(text, str):
            return text or None
        return f"its check returned {text!r} of type {type(text).__name__}; it must return a text, or None"

    return run
