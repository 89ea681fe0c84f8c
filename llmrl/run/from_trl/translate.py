"""Configurations of TRL and transformers -> dotted options: nothing is dropped without a word.

A field becomes an option, or is said to be unneeded, or is refused with what takes its place. A configuration object
stands for all of its values: where TRL's default is another than ours, TRL's holds. A dictionary stands for what it
holds. The objects are known by the names of their classes, so that nothing is imported.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any, cast

from llmrl.algo.policy_gradient.options import PolicyGradient
from llmrl.algo.preference.options import DPO, KTO
from llmrl.config import PRESETS, AlgorithmOptions
from llmrl.config.given import from_dotted_names, leaves
from llmrl.config.hints import TRL
from llmrl.errors import UserError
from llmrl.run.from_trl.fields import Fields, Translation, copy, shown
from llmrl.run.from_trl.length import batches, strategies
from llmrl.run.from_trl.rows import rows
from llmrl.run.from_trl.sampled import policy_gradient, sampling
from llmrl.run.from_trl.tables import INSTEAD, MODEL, MORE, NOT_NEEDED, POLICY_GRADIENT, ROWS, SAME, SAMPLED

ALGORITHMS = {"GRPOConfig": "grpo", "DPOConfig": "dpo", "KTOConfig": "kto"}
"""TRL's configuration class -> our preset."""
KNOWN = {*SAME, *SAMPLED, *POLICY_GRADIENT, *ROWS, *NOT_NEEDED, *INSTEAD, *MORE}
"""The names that a dictionary may have beside dotted options."""


def family(args: Any) -> str | None:
    """Return the name of the class that makes `args` a configuration of TRL or transformers, or None.

    A dictionary is one if it holds a name of TRL's.
    """
    if isinstance(args, Mapping):
        return "args" if KNOWN & set(cast("Mapping[Any, Any]", args)) else None
    names = [cls.__name__ for cls in type(args).__mro__]
    if "TrainingArguments" not in names or not dataclasses.is_dataclass(args):
        return None
    return next((name for name in names if name in ALGORITHMS), type(args).__name__)


def translate(args: Any, *, algorithm: str | None = None, evaluates: bool = False) -> Translation:
    """Translate a configuration object, or a dictionary with TRL's names and perhaps dotted options.

    Args:
        args: what `family` knows.
        algorithm: the preset that `Trainer` was asked for.
        evaluates: held-out tasks are given.

    Raises:
        UserError: what cannot be taken over, all of it, with what takes its place.
    """
    source = family(args)
    assert source is not None
    dotted: dict[str, Any] = {}
    if isinstance(args, Mapping):
        given = cast("Mapping[str, Any]", args)
        dotted = {name: value for name, value in given.items() if name not in KNOWN}
        args = {name: value for name, value in given.items() if name in KNOWN}
    found = Translation(source=source)
    options = _algorithm(found, source, algorithm or dotted.get("algo.name"))
    fields = Fields(args)
    refused = fields.wrong_types()
    if refused:
        raise UserError(f"{source}:" + "".join(f"\n  - {line}" for line in refused))
    _common(found, fields)
    batches(found, fields, refused, samples=options.samples)
    strategies(found, fields, refused, evaluates=evaluates)
    _model(found, fields, refused)
    if options.samples:
        sampling(found, fields, refused, evaluates=evaluates)
    if isinstance(options, PolicyGradient):
        policy_gradient(found, fields, refused)
    if isinstance(options, DPO | KTO):
        rows(found, fields, refused, pairs=isinstance(options, DPO))
    refused += _left(found, fields, options.name)
    if refused:
        raise UserError(f"{source} has what cannot be taken over:" + "".join(f"\n  - {line}" for line in refused))
    return _with_dotted(found, dotted)


def _algorithm(found: Translation, source: str, asked: str | None) -> AlgorithmOptions:
    """Return the preset that is meant, and set it."""
    own = ALGORITHMS.get(source)
    if own is None and source not in ("args", "TrainingArguments", "Seq2SeqTrainingArguments"):
        raise UserError(
            f"args is a {source}: its trainer has no counterpart of that name here. Give dotted options with "
            "algo.name (rloo, ppo, simpo, orpo, online_dpo ...), or a GRPOConfig, DPOConfig or KTOConfig"
        )
    if own is not None and asked not in (None, own):
        raise UserError(
            f"args is a {source}, which describes {own}, but the algorithm asked for is {asked}: leave one of them out"
        )
    name = own or asked or "grpo"
    if name not in PRESETS:
        raise UserError(f"algorithm {name!r} does not exist: there are {', '.join(PRESETS)}")
    found.options["algo.name"] = name
    return PRESETS[name]


def _with_dotted(found: Translation, dotted: dict[str, Any]) -> Translation:
    """Add the dotted options of the same dictionary."""
    for path, _ in leaves(from_dotted_names(dotted)):
        twice = [o for o in found.options if o == path or o.startswith(f"{path}.") or path.startswith(f"{o}.")]
        if twice and twice != ["algo.name"]:
            raise UserError(f"args has {path} and a name of TRL's that means {twice[0]}: give one of them")
    found.options |= dotted
    return found


# --- every kind of run ------------------------------------------------------------------------------------------------


def _common(found: Translation, fields: Fields) -> None:
    copy(found, fields, SAME)
    if "bf16" in fields and fields.get("bf16") is not None:
        found.options["model.dtype"] = "bfloat16" if fields.get("bf16") else "float32"
    if "disable_dropout" in fields:
        found.options["train.dropout"] = not fields.get("disable_dropout")
    if "save_total_limit" in fields:
        found.options["train.save_total_limit"] = fields.get("save_total_limit") or 0
    if "report_to" in fields:
        _trackers(found, fields)
    if "project" in fields and fields.get("project") not in (None, "huggingface"):
        found.options["track.project"] = fields.get("project")
    if (
        "use_cpu" in fields
        and fields.get("use_cpu")
        and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true", "yes")
    ):
        import torch

        if torch.cuda.is_available():
            fields.read.discard("use_cpu")


def _trackers(found: Translation, fields: Fields) -> None:
    """Set the trackers, and whether they get tables of completions."""
    named: Any = fields.get("report_to") or []
    trackers = [each for each in ([named] if isinstance(named, str) else named) if each != "none"]
    found.options["track.report_to"] = trackers
    if trackers and "log_completions" in fields:
        shown = bool(fields.get("log_completions"))
        found.options["track.log_completions_steps"] = max(1, math.ceil(fields.get("logging_steps"))) if shown else 0


def _model(found: Translation, fields: Fields, refused: list[str]) -> None:
    """Set what `model_init_kwargs` says about loading the model."""
    loading: dict[str, Any] = fields.get("model_init_kwargs") or {}
    for name, value in loading.items():
        if name in MODEL:
            found.options[MODEL[name]] = value
        elif name in ("dtype", "torch_dtype"):
            dtype = str(value).removeprefix("torch.")
            if dtype not in ("float32", "bfloat16", "auto"):
                refused.append(f"model_init_kwargs {name} {dtype}: use bfloat16 or float32")
            elif dtype != "auto":
                found.options["model.dtype"] = dtype
        elif name in ("use_cache", "device_map"):
            found.notes.append(f"{found.source}: model_init_kwargs {name} is not needed: the run places its model")
        else:
            refused.append(f"model_init_kwargs {name}: load the model yourself and give it as model=...")


# --- what is left -----------------------------------------------------------------------------------------------------


def _left(found: Translation, fields: Fields, algorithm: str) -> list[str]:
    """Note the fields that need nothing in their place, and return the others as lines that say what takes it."""
    refused: list[str] = []
    unneeded: dict[str, list[str]] = {}
    for name, value in fields.unread().items():
        if name in NOT_NEEDED:
            unneeded.setdefault(NOT_NEEDED[name], []).append(name)
        elif name in INSTEAD and not (not fields.complete and not value):
            refused.append(f"{name} {shown(value)}: {INSTEAD[name]}")
        elif name in {*SAMPLED, *POLICY_GRADIENT, *ROWS, *MORE}:
            refused.append(f"{name} {shown(value)}: algo.name {algorithm} does not read it; leave it out")
        elif name in TRL:
            refused.append(f"{name} {shown(value)}: use {TRL[name]}")
        elif name not in INSTEAD:
            refused.append(f"{name} {shown(value)}: there is nothing like it here; leave it out")
    if unneeded:
        reasons = "; ".join(f"{', '.join(names)} ({why})" for why, names in unneeded.items())
        found.notes.append(f"{found.source}: nothing takes the place of {reasons}")
    return refused
