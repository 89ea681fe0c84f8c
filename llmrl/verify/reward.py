"""Reward functions as the rest of the project uses them: loaded, with known arguments and a checked return value.

The parameters of a reward function name what it needs (completion, messages, rollout, task, answer, any column of the
row), and they are filled by name. TRL reward functions and group rewards are called once per group instead.
docs/rewards.md describes the contract.
"""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from llmrl.errors import UserError
from llmrl.types import Rollout, Score, Task
from llmrl.verify.arguments import ROLLOUT_ARGUMENTS, ambiguous, available_arguments, columns, row_arguments
from llmrl.verify.rowcheck import RowCheck, check_of
from llmrl.verify.spec import find, find_file, resolve

TRL_ARGUMENTS = frozenset({"prompts", "completions", "completion_ids"})
"""A function that declares one of these is called as TRL calls it. No per-rollout argument has these names."""
TRL_KEYWORDS = TRL_ARGUMENTS | {"trainer_state", "log_extra", "log_metric"}
"""What TRL functions get besides the columns."""


class RewardTypeError(TypeError):
    """A reward returned something other than a number, a bool, None or a Score."""


# --- a reward that can be called --------------------------------------------------------------------------------------


def trl_style(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function that takes TRL's keywords through `**kwargs` alone, so that its signature does not show it."""
    function.__dict__["trl_style"] = True
    return function


def group_reward(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function `f(rollouts, ...) -> list` that scores the finished rollouts of a group together."""
    function.__dict__["group_reward"] = True
    return function


Kind = Literal["rollout", "trl", "group"]


@dataclass(kw_only=True)
class Reward:
    """A loaded reward function and how to call it."""

    name: str
    """Its name in metrics."""
    function: Callable[..., Any]
    kind: Kind
    """How it is called. `rollout`: once per rollout, arguments by name. `trl`: once per group, with TRL's keywords.
    `group`: once per group, with the rollouts and arguments by name."""
    spec: str | None = None
    """Set when the function runs in the pool of worker processes, which load it by its spec."""
    args: dict[str, Any] = field(default_factory=dict)
    """Fixed keyword arguments; they take precedence over columns of the same name."""
    parameters: dict[str, inspect.Parameter] = field(default_factory=dict)
    takes_rest: bool = False
    """The function has `**kwargs`."""
    examples: list[dict[str, Any]] | None = None
    """`EXAMPLES` of the module it comes from."""
    state: Any = None
    """The object, if it has a state that belongs to the run: see `has_state`."""
    check: RowCheck | None = None
    """Says what is wrong with a row's columns, if the reward brings such a function."""
    needs_s: float | None = None
    """Seconds that a call with these `args` may take on a machine that does nothing else, if the reward says so."""
    _missing: dict[frozenset[str], str | None] = field(default_factory=dict, repr=False)
    """What `missing` found, by the names that were available: rows of one dataset have few sets of columns."""

    def arguments(self, rollout: Rollout) -> dict[str, Any]:
        """Return the keyword arguments of a per-rollout function, or of a group function from any of its rollouts.

        The `**kwargs` of a per-rollout function receive the remaining columns of the row.

        Raises:
            UserError: a required parameter cannot be filled.
        """
        available = available_arguments(rollout)
        if text := self.missing(frozenset(available)):
            raise UserError(text)
        chosen = {name: available[name] for name in self.parameters if name in available}
        if self.takes_rest and self.kind == "rollout":
            chosen = row_arguments(rollout.task) | chosen
        return chosen | self.args

    def missing(self, available: frozenset[str]) -> str | None:
        """Return a text that names the first required parameter that is neither available nor fixed, or None."""
        if available not in self._missing:
            self._missing[available] = self._find_missing(available)
        return self._missing[available]

    def _find_missing(self, available: frozenset[str]) -> str | None:
        for name, parameter in self.parameters.items():
            if parameter.default is parameter.empty and name not in available and name not in self.args:
                names = ", ".join(sorted(available))
                near = difflib.get_close_matches(name, sorted(available), n=1, cutoff=0.6)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                hint = " Name the column that has it in data.answer_column." if name == "answer" else hint
                return (
                    f"reward {self.name}: its parameter {name!r} cannot be filled: the row has no column of that "
                    f"name.{hint} Available: {names}. Add it, fix it in `args`, or give the parameter a default."
                )
        return None

    def unusable(self, task: Task) -> str | None:
        """Return why a task's row cannot fill the parameters, or None if it can."""
        if self.kind == "trl":
            return self.missing(TRL_KEYWORDS.union(columns(task)))
        if text := self.missing(frozenset(row_arguments(task)).union(ROLLOUT_ARGUMENTS)):
            return text
        text = ambiguous({n: p for n, p in self.parameters.items() if n not in self.args}, task.meta, task.messages)
        return f"reward {self.name}: {text}" if text else None

    def findings(self, task: Task) -> list[str]:
        """Return what is wrong with a task's row: an argument that cannot be filled, or else what the check says."""
        if text := self.unusable(task):
            return [text]
        if self.check is not None and (text := self.check(row_arguments(task) | self.args)):
            return [f"reward {self.name}: {text.removeprefix(f'{self.name}: ')}"]
        return []


def load_reward(source: str | Callable[..., Any], args: Mapping[str, Any] | None = None) -> Reward:
    """Load a Reward from a spec or from a Python callable.

    Args:
        source: a spec (see `llmrl.verify.spec.FORMS`), a function (sync or async), functools.partial, or callable
            object.
        args: fixed keyword arguments.

    Raises:
        UserError: the spec is unknown, or the function does not take a key of `args`.
    """
    args = dict(args or {})
    if isinstance(source, str):
        function, module = resolve(source, args), find(source)[1]
        if has_state(function):
            function = copy.deepcopy(function)  # each rubric has a state of its own
        if source.endswith("()"):
            args = {}
        spec: str | None = str(_absolute(source))
    else:
        function, module = source, sys.modules.get(getattr(_unwrap(source), "__module__", "") or "")
        spec = _spec_of(source, module)
    # By what the function declares, because a wrong guess from its values would show only in the curves.
    kind, called = _kind(function)
    reward = Reward(name=_name(function, module), function=called, kind=kind, args=args)
    reward.examples = getattr(module, "EXAMPLES", None)
    reward.state = function if has_state(function) else None
    reward.check = check_of(reward.name, function, module)
    signature = inspect.signature(called)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            reward.takes_rest = True
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            raise UserError(
                f"reward {reward.name}: parameter {name!r} is positional-only, but arguments are filled by name"
            )
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            reward.parameters[name] = parameter
    if kind == "group":
        reward.parameters.pop(next(iter(reward.parameters), ""), None)  # the rollouts, which are passed by position
    _check_args(reward)
    if (seconds_needed := getattr(module, "seconds_needed", None)) is not None:
        reward.needs_s = float(seconds_needed(**args))
    if getattr(module, "POOL", False):
        reward.spec = _pool_spec(reward, spec)
    return reward


def isolate(reward: Reward, spec: str) -> None:
    """Let a reward run in worker processes though its file does not say so, if it is one that can.

    Args:
        reward: loaded from `spec`; functions that wait, see groups or come from a factory stay where they are.
        spec: names the function.
    """
    waits = inspect.iscoroutinefunction(_unwrap(reward.function))
    if reward.kind == "rollout" and not waits and not spec.endswith("()"):
        reward.spec = _absolute(spec)


def has_state(reward: Any) -> bool:
    """Return whether a reward is an object whose state belongs to the run (docs/rewards.md)."""
    return all(callable(getattr(reward, name, None)) for name in ("commit", "state_dict", "load_state_dict"))


def _check_args(reward: Reward) -> None:
    for key in reward.args:
        if key not in reward.parameters and not reward.takes_rest:
            raise UserError(
                f"reward {reward.name}: `args` has {key!r}, which the function does not take. "
                f"Its parameters: {', '.join(reward.parameters) or 'none'}."
            )


def _pool_spec(reward: Reward, spec: str | None) -> str:
    if reward.kind != "rollout":
        raise UserError(
            f"reward {reward.name}: `POOL = True` is for per-rollout functions; group functions run in this process"
        )
    if spec is None or spec.endswith("()"):
        raise UserError(
            f"reward {reward.name}: its module has `POOL = True`, but worker processes can find a function only by "
            "its spec. Name it as `rewards/file.py:function`, at the top level of an importable file."
        )
    return spec


def _absolute(spec: str) -> str:
    """Return the same spec for a process that may have another working directory."""
    place, separator, name = spec.rpartition(":") if ":" in spec else (spec, "", "")
    return f"{find_file(place)}{separator}{name}" if place.endswith(".py") else spec


def _spec_of(function: Callable[..., Any], module: ModuleType | None) -> str | None:
    """Return the spec by which a worker finds a Python function, or None if none leads back to the same object."""
    name = getattr(function, "__qualname__", "")
    if module is None or module.__name__ == "__main__" or getattr(module, name, None) is not function:
        return None
    return f"{module.__file__}:{name}" if module.__name__.startswith("llmrl_plugin_") else f"{module.__name__}:{name}"


def _unwrap(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _kind(function: Any) -> tuple[Kind, Callable[..., Any]]:
    """Return how to call a function, by what it declares (never by what it returns), and what to call."""
    inner = _unwrap(function)
    if callable(score_group := getattr(function, "score_group", None)):
        return "group", score_group
    if getattr(inner, "group_reward", False) or getattr(inner, "__name__", "") == "score_group":
        return "group", function
    if getattr(inner, "trl_style", False) or TRL_ARGUMENTS & set(inspect.signature(function).parameters):
        return "trl", function
    return "rollout", function


def _owner(function: Any) -> Any:
    """Return the object whose method a function is, or None."""
    return getattr(function, "__self__", None)


def _name(function: Any, module: ModuleType | None) -> str:
    inner = _unwrap(function)
    if getattr(inner, "__name__", "") == "score_group" and not isinstance(owner := _owner(inner), ModuleType | None):
        return type(owner).__name__
    name = str(getattr(inner, "__name__", type(inner).__name__)).strip("<>")
    if name == "score_group" and module is not None and module.__file__:
        return Path(module.__file__).stem
    return name


# --- return values ----------------------------------------------------------------------------------------------------


def as_score(value: Any, name: str) -> Score:
    """Return the value that reward `name` returned, as a Score.

    Raises:
        RewardTypeError: the value is not a number, a bool, None or a Score, or a Score holds other types.
        ValueError: a number is NaN or infinite.
    """
    score = value if isinstance(value, Score) else Score(reward=value)
    tokens = score.token_rewards
    return replace(
        score,
        reward=_number(score.reward, f"reward {name} returned", "a number, a bool, None (could not judge) or a Score"),
        parts={
            part: _number(number, f"reward {name} returned, as its part {part!r},", "a number, a bool or None")
            for part, number in score.parts.items()
        },
        token_rewards=None if tokens is None else [_token_reward(number, name) for number in tokens],
    )


def _token_reward(value: Any, name: str) -> float:
    number = _number(value, f"reward {name} returned, among its token rewards,", "a number")
    if number is None:
        raise RewardTypeError(f"reward {name} returned None among its token rewards; each must be a number")
    return number


def _number(value: Any, what: str, wanted: str) -> float | None:
    if value is not None and getattr(value, "ndim", None) == 0:  # a NumPy or torch scalar
        value = value.item()
    if value is None:
        return None
    if not isinstance(value, (int, float)):
        raise RewardTypeError(f"{what} {_shown(value)} of type {type(value).__name__}; it must return {wanted}")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond all floats
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{what} {number}; a reward must be a finite number, or None for `could not judge`")
    return number


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
