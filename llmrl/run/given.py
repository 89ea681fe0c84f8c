"""Python objects passed to `Trainer` in place of names, and the configuration they result in."""

from __future__ import annotations

import inspect
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llmrl.config import (
    PRESETS,
    Config,
    LoraConfig,
    PreferenceRows,
    RewardConfig,
    RunConfig,
    TaskRows,
    VerifyConfig,
    check,
    complete,
    from_dotted,
    to_dict,
)
from llmrl.config.hints import near
from llmrl.config.parsing import with_algorithm
from llmrl.config.schema import GIVEN
from llmrl.errors import UserError
from llmrl.run.from_trl.fields import Translation
from llmrl.run.from_trl.translate import KNOWN, family, translate
from llmrl.run.model_folder import is_hub_id
from llmrl.track.flat import flatten

if TYPE_CHECKING:
    from llmrl.verify.rubric import Rubric


@dataclass(frozen=True, kw_only=True)
class Given:
    """The arguments of `Trainer` other than its configuration; see there."""

    model: Any = None
    reward: Any = None
    train_dataset: Any = None
    eval_dataset: Any = None
    processing_class: Any = None
    peft_config: Any = None
    algorithm: str | None = None


@dataclass(kw_only=True)
class Resolved:
    """A configuration, and what was said on the way to it."""

    config: RunConfig
    notes: list[str]
    """Lines for the user."""
    translated: Translation | None = None
    """What TRL's names were translated to, if there were any."""

    def with_rows(self, num_rows: int, *, streams: bool = False) -> RunConfig:
        """Return the configuration once the number of rows is known: TRL gives the length of a run in epochs.

        Raises:
            UserError: rows are read as they are needed, so nobody knows how many there are.
        """
        if self.translated is None or not self.translated.epochs:
            return self.config
        if streams:
            raise UserError(
                f"{self.translated.source} gives the length of the run in epochs, but the rows are a stream, which has "
                "no known length: set max_steps, and steps in place of epochs"
            )
        found = self.translated.at_epochs(num_rows, self.config.rollout.num_prompts)
        self.notes.append(f"{self.translated.source}, for {num_rows} rows: {_typed(found)}")
        config = self.config
        for option, value in found.items():
            section, name = option.split(".")
            config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
        return config


def resolve_config(args: Any, given: Given) -> Resolved:
    """Return the configuration, overridden by what was given in Python, completed and checked.

    Args:
        args: a configuration, dotted options, a dictionary with names of TRL's, or a configuration object of TRL's.
        given: everything else.

    Raises:
        UserError: what is given does not fit together; all findings are listed.
    """
    config, translated = _configuration(args, given)
    model = config.model
    if given.model is not None:
        path = given.model if isinstance(given.model, str) else GIVEN
        if path == GIVEN and given.processing_class is None:
            raise UserError("a loaded model needs its tokenizer too: Trainer(model=..., processing_class=tokenizer)")
        model = replace(model, path=path, dtype=model.dtype if path != GIVEN else _dtype(given.model, model.dtype))
    if isinstance(given.peft_config, LoraConfig):
        model = replace(model, lora=given.peft_config, peft=None)
    elif given.peft_config is not None:
        model = replace(model, lora=None, peft=_peft_fields(given.peft_config))
    config = replace(config, model=model, data=_data(config.data, given.train_dataset))
    if given.eval_dataset is not None:
        data = config.eval.data or (TaskRows() if isinstance(config, Config) else PreferenceRows())
        config = replace(config, eval=replace(config.eval, data=_data(data, given.eval_dataset)))
    if given.reward is not None:
        if not isinstance(config, Config):
            raise UserError(
                f"a reward is given, but algo.name {config.algo.name} does not score anything: leave it out"
            )
        config = replace(config, **_reward_sections(config, given.reward))
    if translated is not None and translated.reward_weights is not None and isinstance(config, Config):
        config = replace(config, rewards=_weighted(config.rewards, translated.reward_weights))
    config = complete(config)
    check(config)
    notes = [] if translated is None else [_as_options(translated), *translated.notes]
    return Resolved(config=config, notes=notes, translated=translated)


def _configuration(args: Any, given: Given) -> tuple[RunConfig, Translation | None]:
    """Return what `args` says, and the translation if it says that in TRL's words."""
    algorithm: Any = given.algorithm  # anything may be given
    if algorithm is not None and not isinstance(algorithm, str):
        raise UserError(
            f"algorithm is {algorithm!r}: give the name of a preset, one of {', '.join(PRESETS)}; its options are "
            "those of `algo`, such as algo.loss.kind"
        )
    if algorithm is not None and algorithm not in PRESETS:
        raise UserError(f"algorithm is {algorithm!r}{near(algorithm, PRESETS)}: there are {', '.join(PRESETS)}")
    if isinstance(args, RunConfig):
        config = args if algorithm in (None, args.algo.name) else with_algorithm(args, algorithm)
        if isinstance(args, Config) and isinstance(config, Config):
            config = replace(config, rewards=args.rewards)  # functions, whose names alone would be left
        return config, None
    if family(args) is not None:
        translated = translate(args, algorithm=algorithm, evaluates=given.eval_dataset is not None)
        return from_dotted(dict.fromkeys(translated.epochs, 1) | translated.options), translated
    if args is not None and not isinstance(args, Mapping):
        raise UserError(_what_args_is(args))
    given_options = dict(cast("Mapping[str, Any]", args or {}))
    return from_dotted(given_options | ({"algo.name": algorithm} if algorithm else {})), None


def _what_args_is(args: Any) -> str:
    if isinstance(args, str) and args.endswith((".yaml", ".yml")):
        return f'args is the name of a file: Trainer(llmrl.load_config(["--config", {args!r}]))'
    if isinstance(args, str) or hasattr(args, "forward"):
        return "args is a model: that is Trainer(model=...)"
    return (
        f"args is of type {type(args).__name__}: give a dictionary of dotted options such as "
        '{"train.learning_rate": 2e-6}, a Config, or a GRPOConfig, DPOConfig or KTOConfig of TRL'
    )


def _weighted(rewards: list[RewardConfig], weights: list[float]) -> list[RewardConfig]:
    """Return the rewards with TRL's `reward_weights`."""
    if len(weights) != len(rewards):
        raise UserError(f"reward_weights has {len(weights)} entries for {len(rewards)} rewards: give one for each")
    if any(reward.weight != 1 for reward in rewards):
        raise UserError("reward_weights is given, and rewards have weights of their own: leave one of them out")
    return [replace(reward, weight=weight) for reward, weight in zip(rewards, weights, strict=True)]


def _as_options(translated: Translation) -> str:
    """Return what a configuration of TRL means, as one would type it, without what is the default here anyway."""
    usual = flatten(to_dict(from_dotted({"algo.name": translated.options.get("algo.name", "grpo")})))
    found = {k: v for k, v in translated.options.items() if k == "algo.name" or usual.get(k) not in (v, str(v))}
    return f"{translated.source} means {_typed(found)}"


def _typed(options: Mapping[str, Any]) -> str:
    def text(value: Any) -> str:
        return value if isinstance(value, str) and value else json.dumps(value, default=str)

    return " ".join(f"--{name} {shlex.quote(text(value))}" for name, value in options.items())


def _reward_sections(config: Config, reward: Any) -> dict[str, Any]:
    """Return the sections `rewards` and `verify` for what was given as `reward`.

    A function stays a function in `rewards[i].fn`: config.yaml records its name.
    """
    from llmrl.verify.rubric import Rubric

    if not isinstance(reward, Rubric):
        rewards: list[Any] = [*reward] if isinstance(reward, Sequence) and not isinstance(reward, str) else [reward]
        return {"rewards": [_as_part(each) for each in rewards]}
    if type(reward) is not Rubric:
        raise UserError(
            f"reward is a {type(reward).__name__}, a subclass of Rubric: give a function score_group(rollouts), which "
            "may combine scores in any way, or a Rubric"
        )
    return {"rewards": [*reward.parts.values()], "verify": _verify_of(config.verify, reward)}


def _as_part(reward: Any) -> RewardConfig:
    if isinstance(reward, RewardConfig):
        return reward
    if inspect.isclass(reward):
        raise UserError(f"reward is the class {reward.__name__}: give an object of it, {reward.__name__}(...)")
    if hasattr(reward, "forward") and hasattr(reward, "config"):
        raise UserError(
            f"reward is a model ({type(reward).__name__}): save it, and give the folder, or "
            'RewardConfig(fn="reward_model", args={"model": FOLDER})'
        )
    is_name = isinstance(reward, str) and ":" not in reward and not reward.endswith(".py")
    if is_name and (is_hub_id(reward) or Path(reward).is_dir()):
        return RewardConfig(fn="reward_model", args={"model": reward})  # TRL's reading of a name
    if isinstance(reward, str) or callable(reward):
        return RewardConfig(fn=reward)
    if callable(method := getattr(reward, "score_group", None)):
        return RewardConfig(fn=method)
    raise UserError(
        f"reward {reward!r} is a {type(reward).__name__}: give a function, a spec such as "
        "rewards/math_answer.py:math_answer, a RewardConfig(fn=..., weight=...), a list of these, or a Rubric"
    )


def _verify_of(verify: VerifyConfig, rubric: Rubric) -> VerifyConfig:
    """Return `verify` with what a ready Rubric says about its worker processes, which a run starts anew.

    Raises:
        UserError: the Rubric says something else than `verify`, or what a run decides in another way.
    """
    if rubric.strict or not rubric.conversational:
        raise UserError(
            "reward is a Rubric with strict=True or conversational=False: in a run, errors of rewards are counted "
            "(verify.max_unscored_frac), and data.prompt_format decides whether TRL functions get strings (text) or "
            "messages (chat); leave both out"
        )
    usual, found = VerifyConfig(), dict[str, Any]()
    for name, value, default in (
        ("num_workers", rubric.pool.num_workers, 1),
        ("memory_limit_gb", rubric.pool.memory_limit_bytes / 2**30, usual.memory_limit_gb),
    ):
        wanted = getattr(verify, name)
        if value == default:  # Rubric(...) did not say anything about it
            continue
        if wanted not in (getattr(usual, name), value):
            raise UserError(f"reward is a Rubric with {name} {value:g}, but verify.{name} is {wanted:g}: choose one")
        found[name] = value
    return replace(verify, **found)


def _dtype(model: Any, wanted: str) -> str:
    """Return the type that a loaded model computes in: bfloat16 if it was loaded so, else what `model.dtype` wants."""
    import torch

    from llmrl.model.precision import own_type

    return "bfloat16" if own_type(model) == torch.bfloat16 else wanted


def _peft_fields(config: Any) -> dict[str, Any]:
    """Return the fields of a peft configuration that differ from its defaults, as YAML can hold them."""
    if not hasattr(config, "peft_type"):
        raise UserError(
            f"peft_config is a {type(config).__name__}: give a configuration of peft, such as peft.LoraConfig(r=16)"
        )
    from llmrl.model.adapters import plain

    default = type(config)().to_dict()
    fields = {k: v for k, v in config.to_dict().items() if v != default.get(k) and k not in ("peft_type", "task_type")}
    return {"peft_type": plain(config.peft_type), **plain(fields)}


def _data(options: Any, dataset: Any) -> Any:
    if dataset is None:
        return options
    return replace(options, path=dataset if isinstance(dataset, str) else GIVEN)


NOT_TAKEN = {
    "tools": "rollouts have one turn: tools are not there yet",
    "environment_factory": "rollouts have one turn: environments of your own are not there yet",
    "rollout_func": "the engine draws rollouts (rollout.engine); a function of your own is not there yet",
    "ref_model": "the reference is the policy as it started; algo.kl.beta (or DPO) uses it",
    "reward_processing_classes": "a reward model has its own tokenizer: fn reward_model, args {model: FOLDER}",
    "optimizers": "AdamW is the optimizer: see train.learning_rate, train.lr_scheduler_type",
    "quantization_config": 'model.quantization "nf4" holds the base of adapters in 4 bits',
    "tokenizer": "use processing_class",
    "data_collator": "rows are rendered with the chat template (data.prompt_format, data.prompt_template)",
    "compute_metrics": "give a reward of weight 0: it is logged as reward/NAME/mean",
    "preprocess_logits_for_metrics": "give a reward of weight 0: it is logged as reward/NAME/mean",
    "compute_loss_func": "algo.loss.kind chooses the loss",
    "formatting_func": "use data.prompt_template, or give rows with the prompt as you want it",
    "model_init": "give the model: model=...",
    "config": "give it first: Trainer(config, ...)",
    "dataset": "use train_dataset",
    "rewards": "use reward, or reward_funcs",
    "reward_func": "use reward, or reward_funcs",
    "callback": "use callbacks=[...]",
}
"""Keywords of other trainers, and what takes their place."""


def first_argument(first: Any, args: Any, model: Any) -> tuple[Any, Any]:
    """Return `args` and `model`: the argument without a name is the configuration, or as in TRL the model."""
    if first is None:
        return args, model
    names_model = isinstance(first, str) and not first.endswith((".yaml", ".yml"))
    if names_model or hasattr(first, "forward"):
        if model is not None:
            raise UserError("the model is given twice: as the first argument, and as model=...")
        return args, first
    if args is not None:
        raise UserError("the configuration is given twice: as the first argument, and as args=...")
    return first, model


def refuse_keywords(other: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise a UserError if `Trainer` got keywords that it does not have. None, or (None, None), asks for nothing."""
    found: list[str] = []
    for name, value in other.items():
        if name in NOT_TAKEN:
            if value is not None and value != (None, None):
                found.append(f"{name}: {NOT_TAKEN[name]}")
        elif name in KNOWN:
            found.append(f"{name}: that is an option; give it in args, as in Trainer({{{name!r}: ...}}, ...)")
        else:
            found.append(f"{name}: there is no such argument{near(name, known)}")
    if found:
        raise UserError("Trainer does not take " + "\n  - ".join(["", *found] if len(found) > 1 else found))
