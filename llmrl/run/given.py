"""Python objects passed to `Trainer` in place of names, and the configuration they result in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llmrl.config import Config, DataConfig, LoraConfig, RewardConfig, RunConfig, VerifyConfig, check, complete
from llmrl.config.parsing import from_dotted, with_algorithm
from llmrl.config.schema import GIVEN
from llmrl.errors import UserError

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


def resolve_config(args: RunConfig | dict[str, Any] | None, given: Given) -> RunConfig:
    """Return the configuration, overridden by what was given in Python, completed and checked.

    Raises:
        UserError: what is given does not fit together; all findings are listed.
    """
    if isinstance(args, RunConfig):
        config = args if given.algorithm in (None, args.algo.name) else with_algorithm(args, given.algorithm)
        if isinstance(args, Config) and isinstance(config, Config):
            config = replace(config, rewards=args.rewards)  # functions, whose names alone would be left
    else:
        config = from_dotted(dict(args or {}) | ({"algo.name": given.algorithm} if given.algorithm else {}))
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
        data = config.eval.data or (DataConfig() if isinstance(config, Config) else type(config.data)())
        config = replace(config, eval=replace(config.eval, data=_data(data, given.eval_dataset)))
    if given.reward is not None:
        if not isinstance(config, Config):
            raise UserError(
                f"a reward is given, but algo.name {config.algo.name} does not score anything: leave it out"
            )
        config = replace(config, **_reward_sections(config, given.reward))
    config = complete(config)
    check(config)
    return config


def _reward_sections(config: Config, reward: Any) -> dict[str, Any]:
    """Return the sections `rewards` and `verify` for what was given as `reward`.

    A function stays a function in `rewards[i].fn`: config.yaml records its name.
    """
    from llmrl.verify.rubric import Rubric

    if not isinstance(reward, Rubric):
        rewards = [*reward] if isinstance(reward, Sequence) and not isinstance(reward, str) else [reward]
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
