"""The options of a run: the sections of each kind of run, the defaults that span sections, and what clashes.

The option classes live in the packages that read them; this module puts them together. Nothing here needs torch, so
that whatever is wrong with the arguments is reported before a model loads.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import field, fields, replace
from typing import Literal

from llmrl.algo.options import AlgorithmOptions, Setting
from llmrl.algo.policy_gradient import options as policy_gradient
from llmrl.algo.policy_gradient.options import Correction, PolicyGradient, PolicyLossOptions
from llmrl.algo.ppo import options as ppo
from llmrl.algo.ppo.options import PPO
from llmrl.algo.preference import options as preference
from llmrl.config import secrets
from llmrl.data.options import DataConfig, PreferenceData, PreferenceRows, TaskRows
from llmrl.engines.options import staleness_findings
from llmrl.errors import UserError
from llmrl.methods.bcoder import options as bcoder
from llmrl.model.options import AdapterCritic, Critic, ModelConfig, SeparateCritic, SharedCritic
from llmrl.option import MISSING, Count, Natural, NotNegative, option
from llmrl.rollout.options import BatchConfig, RolloutConfig
from llmrl.track.names import METRICS, find
from llmrl.track.options import TrackConfig
from llmrl.train.options import TrainConfig
from llmrl.verify.options import RewardConfig, VerifyConfig

FAMILIES = (policy_gradient, ppo, preference, bcoder)
"""The families of algorithms, each by the module of its options."""
PRESETS: dict[str, AlgorithmOptions] = {
    name: options for family in FAMILIES for name, options in family.PRESETS.items()
}
"""What `algo.name` can be."""


@option
class OfflineEvalConfig:
    """Evaluation on held-out rows while training."""

    data: PreferenceRows | None = None
    """Held-out rows; they are rendered as those of `data`."""
    steps: Natural = 0
    """Evaluate every `steps` steps (and at the end); 0 never."""
    at_start: bool = False
    """Evaluate before the first step too: step 0 of metrics.jsonl."""
    keep_best: str | None = None
    """Keep the model with the best value of this metric of the evaluations, such as eval/pass@1, eval/reward or
    eval/loss, in the folder best/. `track/names.py` says which way is good. Default: the last model alone is kept."""

    @property
    def better(self) -> Literal["up", "down", "none"]:
        """Which way of `keep_best` is good."""
        found = None if self.keep_best is None else find(self.keep_best)
        return "none" if found is None else found.better

    def findings(self) -> list[str]:
        """Return what is wrong among these options: one line each, with the fix."""
        known = [key for key, metric in METRICS.items() if key.startswith("eval/") and metric.better != "none"]
        best, data = self.keep_best, self.data is not None
        rules = {
            "eval.steps is set but eval.data is not: say where the held-out tasks come from (eval.data.path)":
                self.steps > 0 and not data,
            "eval.at_start is set but eval.data is not: say where the held-out tasks come from (eval.data.path)":
                self.at_start and not data,
            "eval.data is set but eval.steps is 0, so it would never be used: set eval.steps":
                data and self.steps == 0 and not self.at_start,
            f"eval.keep_best {best} is no metric of an evaluation that has a good direction: "
            f"there are {', '.join(known)}":
                best is not None and (not best.startswith("eval/") or self.better == "none"),
            f"eval.keep_best {best} looks at evaluations, but eval.steps is 0: set eval.steps":
                best is not None and self.steps == 0,
        }  # fmt: skip
        return [text for text, wrong in rules.items() if wrong]


@option
class EvalConfig(OfflineEvalConfig):
    """Evaluation on held-out tasks while training."""

    data: TaskRows | None = None  # pyright: ignore[reportIncompatibleVariableOverride]  # another kind of rows
    """Held-out tasks; they are rendered as those of `data`."""
    num_generations: Count = 1
    """Rollouts of each task."""
    temperature: NotNegative = 0.0
    """Softmax temperature; 0 is greedy."""

    def findings(self) -> list[str]:
        """Return what is wrong among these options: one line each, with the fix."""
        measured = re.fullmatch(r"eval/pass@(\d+)", self.keep_best or "eval/pass@1")
        if self.keep_best in (None, "eval/reward") or (measured and int(measured[1]) in pass_at(self.num_generations)):
            return super().findings()
        known = ["eval/reward", *(f"eval/pass@{k}" for k in pass_at(self.num_generations))]
        return [
            f"eval.keep_best {self.keep_best} is not measured with eval.num_generations {self.num_generations}: "
            f"there are {', '.join(known)}",
            *OfflineEvalConfig.findings(dataclasses.replace(self, keep_best=None)),
        ]


def pass_at(num_generations: int) -> list[int]:
    """Return the k of the pass@k that so many rollouts of a task measure."""
    return [2**i for i in range(9) if 2**i <= num_generations]


@option
class RunConfig:
    """A run on stored preferences: what every run reads."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The policy."""
    data: PreferenceData = field(default_factory=PreferenceData)
    """Where rows come from."""
    rollout: BatchConfig = field(default_factory=BatchConfig)
    """The size of a batch."""
    algo: AlgorithmOptions = field(default_factory=PolicyGradient)
    """What turns rewards or preferences into a gradient."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The optimizer, the length of the run, and what is saved."""
    eval: OfflineEvalConfig = field(default_factory=OfflineEvalConfig)
    """Evaluation while training."""
    track: TrackConfig = field(default_factory=TrackConfig)
    """What is written and shown."""


@option
class Config(RunConfig):
    """A run whose policy samples, and is evaluated by sampling."""

    data: DataConfig = field(default_factory=DataConfig)  # pyright: ignore[reportIncompatibleVariableOverride]
    """Where tasks come from."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How completions are drawn."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation while training."""
    rewards: list[RewardConfig] = field(default_factory=list)
    """The reward functions."""
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    """How rewards are computed."""
    critic: Critic | None = None
    """What the critic is made of. Read by ppo and vapo."""


ORDER = ("model", "data", "rollout", "rewards", "verify", "algo", "critic", "train", "eval", "track")
"""Sections as they are written and shown."""


def run_class(algo: AlgorithmOptions) -> type[RunConfig]:
    """Return the class with the sections of a run of this algorithm: without an engine there are fewer."""
    return Config if algo.samples else RunConfig


def unread_sections(algo: AlgorithmOptions) -> set[str]:
    """Return the sections of `Config` that this algorithm does not read."""
    return set() if algo.reads_critic else {"critic"}


def complete(config: RunConfig) -> RunConfig:
    """Fill the defaults that depend on other sections. Doing it twice changes nothing."""
    algo = config.algo
    if not isinstance(config, Config):
        return config
    if isinstance(algo, PolicyLossOptions) and algo.sampler is None and config.rollout.max_staleness > 0:
        algo = replace(algo, sampler=Correction())
    critic = config.critic
    if isinstance(algo, PPO):
        critic = critic or SeparateCritic()
        if critic.learning_rate is None:
            critic = replace(critic, learning_rate=config.train.learning_rate)
        if isinstance(critic, AdapterCritic) and critic.lora is None:
            critic = replace(critic, lora=config.model.lora)
        if algo.value.coef is None and isinstance(critic, SharedCritic) and critic.train_trunk:
            algo = replace(algo, value=replace(algo.value, coef=0.1))
    return replace(config, algo=algo, critic=critic)


def findings(config: RunConfig) -> list[str]:
    """Return what types cannot express about a completed configuration, one line each, with the fix."""
    sampled = config if isinstance(config, Config) else None
    setting = Setting(num_prompts=config.rollout.num_prompts, has_adapters=config.model.fresh_adapters is not None)
    if sampled is not None:
        names = [reward.name for reward in sampled.rewards]
        setting = replace(
            setting,
            num_generations=sampled.rollout.num_generations,
            temperature=sampled.rollout.temperature,
            max_staleness=sampled.rollout.max_staleness,
            rewards={f"{i} {name}": r.weight for i, (name, r) in enumerate(zip(names, sampled.rewards, strict=True))},
            shaped=[
                f"{i} {name}"
                for i, (name, r) in enumerate(zip(names, sampled.rewards, strict=True))
                if r.gate is not None or r.scale is not None
            ],
            max_steps=config.train.max_steps,
        )
    found = config.model.findings() + config.algo.findings() + config.algo.findings_with(setting)
    for name, part in (("model", config.model), ("data", config.data), ("eval.data", config.eval.data)):
        if part is not None and part.path in ("", MISSING) and not getattr(part, "sources", None):
            found.append(f"{name}.path is not set: give a hub id or a local {'folder' if name == 'model' else 'file'}")
    found += config.eval.findings()
    if config.eval.data is None:
        usual = type(config.eval)()
        found += [
            f"eval.{name} is set but eval.data is not, so nothing is evaluated: set eval.data.path, or leave it out"
            for name in ("num_generations", "temperature")
            if getattr(config.eval, name, None) != getattr(usual, name, None)
        ]
    found += config.track.findings()
    found += _dropout_findings(config)
    found += secrets.findings(config)
    if sampled is None:
        return found
    return found + _source_findings(sampled) + _sampling_findings(sampled) + _critic_findings(sampled)


def _source_findings(c: Config) -> list[str]:
    data, found = c.data, []
    if data.sources and data.path not in ("", MISSING):
        found.append(f"data.path {data.path} and data.sources both say where tasks come from: keep one")
    alone = DataConfig()
    for name in (f.name for f in fields(TaskRows) if f.name != "path"):
        if data.sources and getattr(data, name) != getattr(alone, name):
            found.append(f"data.{name} is set beside data.sources: set it in each source")
    found += [f"data.sources[{i}].path is not set" for i, source in enumerate(data.sources) if source.path == MISSING]
    if any(reward.sources for reward in c.rewards) and c.algo.name == "gdpo":
        found.append("rewards with `sources` do not go with gdpo, which normalizes each reward over every group")
    return found


def _dropout_findings(c: RunConfig) -> list[str]:
    adapters = {"model.lora": c.model.lora}
    if isinstance(c, Config) and isinstance(c.critic, SeparateCritic | AdapterCritic):
        adapters["critic.lora"] = c.critic.lora
    return [
        f"{name}.lora_dropout {lora.lora_dropout:g} is off while train.dropout is false: leave it out (ratios are then "
        "exact), or set train.dropout true"
        for name, lora in adapters.items()
        if lora is not None and lora.lora_dropout and not c.train.dropout
    ][:1]


def check(config: RunConfig) -> None:
    """Raise a UserError that lists all findings."""
    if found := findings(config):
        raise UserError(listed(found))


def listed(found: list[str]) -> str:
    """Return findings as one message."""
    return "configuration:" + (f" {found[0]}" if len(found) == 1 else "".join(f"\n  - {line}" for line in found))


def _sampling_findings(c: Config) -> list[str]:
    found = [*c.rollout.findings(), *staleness_findings(c.rollout, c.rollout.max_staleness)]
    if not c.rewards:
        found.append("rewards is empty: name at least one, such as `fn: rewards/math_answer.py:math_answer`")
    if c.rewards and not any(reward.weight for reward in c.rewards):
        found.append("all rewards have weight 0, so nothing would be trained: give one of them a weight")
    for i, reward in enumerate(c.rewards):
        if reward.fn in ("", MISSING):
            found.append(f"rewards[{i}].fn is not set: such as rewards/math_answer.py:math_answer")
    if c.rollout.temperature == 0:
        found.append("rollout.temperature is 0.0: greedy rollouts are all alike and carry no signal; use 1.0")
    if c.rollout.top_p != 1 or c.rollout.top_k != 0:
        found.append(
            f"rollout.top_p {c.rollout.top_p} / top_k {c.rollout.top_k} cut the support that rollouts are drawn from, "
            "which biases every probability ratio by the mass cut off; train with top_p 1 and top_k 0"
        )
    return found


def _critic_findings(c: Config) -> list[str]:
    algo, found = c.algo, []
    if not isinstance(algo, PPO):
        if c.critic is not None:
            found.append(f"critic is given, but algo.name {algo.name} has none: leave it out, or use ppo or vapo")
        return found
    shared = isinstance(c.critic, SharedCritic) and c.critic.train_trunk
    if algo.value.coef is not None and not shared:
        found.append(
            f"algo.value.coef {algo.value.coef} weighs the value loss beside the policy loss on a shared trunk: set "
            "critic.kind shared, or leave it out"
        )
    if isinstance(c.critic, AdapterCritic) and c.critic.lora is None:
        found.append(
            "critic.kind adapter is a second adapter on the policy's frozen base, but nothing describes it: set "
            "critic.lora (or model.lora, if the policy is trained whole), or use critic.kind separate or shared"
        )
    return found
