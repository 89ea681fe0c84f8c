"""Finding functions by spec: `rewards/math_answer.py:math_answer` goes in, the function that it names comes out."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from llmrl.errors import UserError
from llmrl.verify.plugin import load_file

ENTRY_POINT_GROUP = "llmrl.rewards"
FORMS = (
    "`rewards/file.py:function`, an absolute `/path/file.py:function`, `package.module:function`, a shipped name, or "
    f"an installed entry point of group {ENTRY_POINT_GROUP}; append `()` to call the named factory or class "
    "with `args`"
)


def shipped_folder() -> Path:
    """Return the folder of the shipped rewards: inside the wheel, or next to the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "shipped" / "rewards"
    return installed if installed.is_dir() else package.parent / "rewards"


def shipped_names() -> list[str]:
    """Return the sorted names of the shipped rewards."""
    return sorted(file.stem for file in shipped_folder().glob("*.py") if not file.stem.startswith("_"))


def find(spec: str) -> tuple[Any, ModuleType]:
    """Return the object that a spec names and the module it comes from, which may hold `POOL` and `EXAMPLES`.

    Raises:
        UserError: there is no such file, module, name or entry point; the message lists the forms and a near match.
    """
    spec = spec.removesuffix("()")
    place, _, name = spec.rpartition(":") if ":" in spec else (spec, "", "")
    if place.endswith(".py"):
        file = find_file(place)
        module = load_file(file)
        default = file.stem if hasattr(module, file.stem) or not hasattr(module, "score_group") else "score_group"
        return _member(module, name or default, spec)
    if ":" in spec:
        return _member(_import_module(place, spec), name, spec)
    if spec in shipped_names():
        return _member(load_file(shipped_folder() / f"{spec}.py"), spec, spec)
    found = list(entry_points(group=ENTRY_POINT_GROUP, name=spec))
    if len(found) > 1:
        origins = ", ".join(sorted(entry.value for entry in found))
        raise UserError(
            f"reward {spec!r}: more than one installed package offers this name ({origins}); use `module:function`"
        )
    if not found:
        installed = sorted(entry.name for entry in entry_points(group=ENTRY_POINT_GROUP))
        raise _unknown(spec, f"no reward is called {spec!r}", sorted({*shipped_names(), *installed}))
    module, _, name = found[0].value.partition(":")
    return _member(_import_module(module, spec), name, spec)


def find_file(place: str) -> Path:
    """Return the path of a spec's file: absolute, in the working directory, or among the shipped rewards.

    Raises:
        UserError: there is no such file.
    """
    given = Path(place).expanduser()
    candidates = [given]
    if not given.is_absolute() and len(given.parts) <= 2 and given.parent.name in ("rewards", ""):
        candidates.append(shipped_folder() / given.name)
    for file in candidates:
        if file.is_file():
            return file.resolve()
    looked = ", ".join(str(file.absolute()) for file in candidates)
    raise _unknown(place, f"no file {place!r} (looked at {looked})", [f"rewards/{n}.py" for n in shipped_names()])


def _unknown(spec: str, what: str, known: list[str], *, typed: str | None = None) -> UserError:
    near = difflib.get_close_matches(typed or spec, known, n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UserError(f"reward {spec!r}: {what}.{hint}\n  A reward is named by {FORMS}.\n  Known: {', '.join(known)}.")


def _import_module(name: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # the module exists but imports something that is missing; the traceback shows what
        raise _unknown(spec, f"no module {name!r}", shipped_names()) from None


def _member(module: ModuleType, name: str, spec: str) -> tuple[Any, ModuleType]:
    if not name:
        raise UserError(f"reward {spec!r}: add the function's name, as in `{spec.rstrip(':')}:function`")
    target: Any = module
    for part in name.split("."):
        if not hasattr(target, part):
            public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            raise _unknown(
                spec, f"{getattr(module, '__file__', None) or module.__name__} has no {name!r}", public, typed=name
            )
        target = getattr(target, part)
    return target, module


def resolve(spec: str, args: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """Return the callable that a spec names. With a trailing `()`, call the factory or class with `args` to get it.

    Raises:
        UserError: the spec is unknown, or the object is not callable.
    """
    target, _ = find(spec)
    if spec.endswith("()"):
        try:
            target = target(**(args or {}))
        except TypeError as error:
            raise UserError(f"reward {spec!r}, args {dict(args or {})}: {error}") from None
    if not callable(target) and not callable(getattr(target, "score_group", None)):
        raise UserError(f"reward {spec!r} is a {type(target).__name__}, not a function")
    if inspect.isclass(target):
        raise UserError(f"reward {spec!r} is a class: append `()` to create an object from it with `args`")
    return target
