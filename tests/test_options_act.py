"""Every option does something: a change of its value changes what an algorithm computes, or is refused with a reason.

`changes` walks the options of a preset and makes other values by type. `Trace` is what an algorithm does with a fixed
batch that has everything in it: truncated rollouts, abstentions, several rewards, dense ones, several turns, and four
different log-probabilities of each token.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import peft
import pytest
import torch
from pydantic import ValidationError

import llmrl
from llmrl.algo.base import Needs
from llmrl.algo.policy_gradient.choices import KlInLoss, Thr, Uncorrected
from llmrl.algo.preference.loss_options import ExoPair, Robust, Sft, Sigmoid, Sum
from llmrl.algo.preference.options import DPO, KTO, Level, MovingReference
from llmrl.config import (
    PRESETS,
    Config,
    EvalRun,
    LoraConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    SharedCritic,
    TrainConfig,
    complete,
    findings,
)
from llmrl.config.schema import OptionField, option_fields, walk
from llmrl.data.chat import Chat
from llmrl.data.options import PreferenceData
from llmrl.data.preferences import preferences_from_rows
from llmrl.methods.bcoder.algorithm import BCoder
from llmrl.methods.bcoder.options import BCoderOptions, PolicyStage, ValueStage
from llmrl.methods.bcoder.policy import QPolicy
from llmrl.methods.bcoder.source import StoredPrograms
from llmrl.rollout.preferences import PreferenceFeed, PreferenceSource
from llmrl.run.methods import make_algorithm
from llmrl.tiny import build_tiny_model, byte_tokenizer
from llmrl.train.learner import _count
from llmrl.train.packing import build_micro_batch
from llmrl.types import (
    ForwardOutputs,
    Message,
    ModelLimits,
    Rollout,
    RolloutGroup,
    Sample,
    Score,
    Status,
    Task,
    TrainBatch,
    Turn,
)
from tests.invariance.cases import make_config, make_learner, make_samples, tiny_model, train_batch

LIMIT = 8
"""`rollout.max_completion_length`."""
REWARDS = {"a": 1.0, "b": 0.5}

# --- a batch with everything in it ------------------------------------------------------------------------------------


def make_groups(*, stored: bool, count: int = 5, size: int = 6) -> list[RolloutGroup]:
    """Make groups of rollouts; `stored`: of pairs of a dataset, with rewards 1 and 0."""
    random = np.random.default_rng(7)
    groups = []
    for number in range(count):
        task = Task(id=f"t{number}", messages=[])
        prompt = random.integers(0, 9, int(random.integers(1, 4))).tolist()
        rollouts = [make_rollout(task, index, prompt, random, stored) for index in range(2 if stored else size)]
        greedy = float(random.integers(0, 2))
        groups.append(RolloutGroup(task=task, rollouts=rollouts, greedy_reward=greedy, position=number))
    return groups


def make_rollout(task: Task, index: int, prompt: list[int], random: np.random.Generator, stored: bool) -> Rollout:
    turns: list[Turn] = []
    for _ in range(1 if stored else 1 + index % 2):
        ids = random.integers(0, 9, int(random.integers(2, 6))).tolist()
        seen = [*turns[0].prompt_ids, *turns[0].completion_ids, 3, 4] if turns else prompt
        logprobs = random.normal(-2, 1, len(ids)).tolist()
        message = Message(role="assistant", content="x")
        turns.append(
            Turn(
                prompt_ids=seen,
                completion_ids=ids,
                rollout_logprobs=logprobs,
                finish="stop",
                policy_version=(0, 0),
                message=message,
            )
        )
    num_tokens = sum(len(turn.completion_ids) for turn in turns)
    right, quality = float(random.uniform() < 0.4), float(random.normal())
    parts = {"a": right, "b": quality, "outcome": right, "rubric": float(random.uniform()), "env/c": 0.1 * index}
    reward = 1.0 - index if stored else right + 0.5 * quality + 0.1 * index
    score = Score(reward=reward, parts=parts)  # pyright: ignore[reportArgumentType]
    if index == 1 and not stored:
        score.token_rewards = random.normal(0, 1, num_tokens).tolist()
    if random.uniform() < 0.1 and not stored:
        score = Score(reward=None)
    status = Status.TRUNCATED_LENGTH if num_tokens >= LIMIT else Status.COMPLETED
    return Rollout(task=task, index=index, turns=turns, score=score, status=status)


def noise(sample: Sample, salt: int, scale: float = 1.0) -> np.ndarray:
    """Return numbers that depend on nothing but the sample's place and tokens."""
    seed = [salt, sample.group, sample.index, int(sample.probe), len(sample.input_ids)]
    return (scale * np.random.default_rng(seed).standard_normal(sample.num_tokens)).astype(np.float32)


# --- what an algorithm does with it -----------------------------------------------------------------------------------


class Trace:
    """Everything that an algorithm of this configuration computes, as a list of texts that compare exactly."""

    def __init__(self, config: RunConfig) -> None:
        self.found: list[str] = []
        stored = isinstance(config.algo, DPO | KTO)
        for version in (0, 7):
            algorithm: Any = make_algorithm(config, REWARDS)
            self.add(algorithm.needs, algorithm.num_iterations, algorithm.num_mini_batches, algorithm.passes)
            self.update(algorithm, make_groups(stored=stored), version)
            if algorithm.policy_frozen:
                algorithm.policy_frozen = False
                self.update(algorithm, make_groups(stored=stored), version)
        algorithm = make_algorithm(config, REWARDS)
        algorithm.num_rollouts = 24
        for step in range(120):  # what adapts
            algorithm.observe({"kl/ref": 0.02 * step, "value/explained_variance": step / 100})
            self.add(algorithm.state_dict(), algorithm.policy_frozen, algorithm.passes, algorithm.num_frozen_updates)

    def add(self, *values: Any) -> None:
        self.found.append(repr(values))

    def update(self, algorithm: Any, groups: list[RolloutGroup], version: int) -> None:
        batch = algorithm.prepare(groups, policy_version=version)
        fill(algorithm, batch)
        if algorithm.needs.refine:
            algorithm.refine(batch)
        samples = batch.samples
        self.add([(s.advantages.tolist(), s.preferences, sorted(s.extras)) for s in samples])
        rows = build_micro_batch(samples, [[i] for i in range(len(samples))])
        outputs, leaves = outputs_of(algorithm.needs, rows.samples)
        loss, _ = algorithm.loss(outputs, rows, _count(samples, batch))  # a change of metrics alone would be no act
        loss.backward()
        self.add(loss.item(), [(name, None if t.grad is None else t.grad.tolist()) for name, t in leaves.items()])


def fill(algorithm: Any, batch: TrainBatch) -> None:
    """Set the streams that a learner would, and no others."""
    needs: Needs = algorithm.needs
    several = algorithm.steps_per_batch > 1
    for s in batch.samples:
        old = s.rollout_logprobs + noise(s, 1, 0.7)
        if needs.rollout_as_old:
            s.old_logprobs = s.rollout_logprobs
        elif several or needs.old_logprobs or s.probe:
            s.old_logprobs = old
        if needs.ref_logprobs:
            s.ref_logprobs = old + noise(s, 2, 0.3)
        wanted = {
            "old_entropies": needs.old_entropies,
            "collisions": needs.collisions,
            "influence": needs.influence,
            "old_values": needs.values,
        }
        s.extras |= {name: np.abs(noise(s, 3)) for name, is_wanted in wanted.items() if is_wanted}


def outputs_of(needs: Needs, samples: list[Sample]) -> tuple[ForwardOutputs, dict[str, torch.Tensor]]:
    def leaf(salt: int, scale: float = 1.0) -> torch.Tensor:
        return torch.tensor(np.concatenate([noise(s, salt, scale) for s in samples]), requires_grad=True)

    old = [s.rollout_logprobs if s.old_logprobs is None else s.old_logprobs for s in samples]
    now = torch.tensor(np.concatenate(old) + leaf(4, 1.5).detach().numpy(), requires_grad=True)
    leaves = {"logprobs": now, "entropy": leaf(5)}
    if needs.full_kl:
        leaves["kl"] = leaf(6)
    if needs.values:
        leaves["values"] = leaf(7)
    return ForwardOutputs(**leaves), leaves


# --- other values of an option ----------------------------------------------------------------------------------------

MEMBERS: dict[type, Any] = {
    ExoPair: ExoPair(label_smoothing=0.1),
    Sum: Sum(terms=[Sigmoid(), Sft(weight=0.5)]),
    MovingReference: MovingReference(steps=2),
    Level: Level(part="b", margin=0.5),
    Robust: Robust(label_smoothing=0.1),
    KlInLoss: KlInLoss(beta=0.1),
    Thr: Thr(p=0.2),
}
"""Option classes that need values, or whose defaults would be no change."""
VALUES: dict[str, list[Any]] = {
    "hierarchy": [[Level(part="b", margin=0.5), Level(part="a", margin=0.1)]],
    "part": ["a"],
    "terms": [[Sigmoid(), Sft(weight=0.7)]],
}
"""Values of options that a type alone does not tell, by name."""
NUMBERS = (lambda x: 0.5 * x, lambda x: 2 * x, lambda _: 0.3, lambda _: 1.5, lambda _: 12.0)


def parts_of(hint: Any) -> list[Any]:
    if get_origin(hint) is not None and hasattr(hint, "__metadata__"):
        return parts_of(get_args(hint)[0])
    if get_origin(hint) in (list, dict, tuple, Literal, None):
        return [hint]
    return [part for member in get_args(hint) for part in parts_of(member)]


def others(field: OptionField, value: Any) -> Iterator[tuple[bool, list[Any]]]:
    """Yield lists of other values: (whether each of them has to act, or one is enough; the values)."""
    if field.name in VALUES:
        yield False, VALUES[field.name]
        return
    if field.optional and value is not None:
        yield True, [None]
    for part in parts_of(field.hint):
        if get_origin(part) is Literal:
            yield True, [choice for choice in get_args(part) if choice != value]
        elif part is bool:
            yield True, [not value]
        elif part is int:
            yield False, [number for number in (3, 1, 40, (value or 0) + 1) if number != value]
        elif part is float:
            yield False, [number for change in NUMBERS if (number := change(value or 0.0)) != value]
        elif dataclasses.is_dataclass(part) and type(value) is not part and not field.many:
            yield True, [MEMBERS[part] if part in MEMBERS else part()]  # pyright: ignore[reportArgumentType, reportCallIssue]


def changes(options: Any, prefix: str = "") -> Iterator[tuple[str, bool, list[Any]]]:
    """Yield (path, whether each value has to act, other values) for everything inside `options`."""
    for name, field in option_fields(type(options)).items():
        value = getattr(options, name)
        if name == "name":
            continue
        for each, values in others(field, value):
            yield prefix + name, each, values
        inner = enumerate(value) if isinstance(value, list) else [(None, value)]
        for place, item in inner:
            if dataclasses.is_dataclass(item):
                yield from changes(item, f"{prefix}{name}." + ("" if place is None else f"{place}."))


def with_value(options: Any, path: str, value: Any) -> Any:
    """Return `options` with one changed.

    Raises:
        ValidationError: it cannot have this value.
    """
    name, _, rest = path.partition(".")
    if isinstance(options, list):
        return [with_value(x, rest, value) if i == int(name) else x for i, x in enumerate(options)]
    return dataclasses.replace(options, **{name: with_value(getattr(options, name), rest, value) if rest else value})


def alternatives(options: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, member) for the members of all choices that `options` did not take."""
    for name, field in option_fields(type(options)).items():
        value = getattr(options, name)
        for member in field.members.values():
            if field.many:
                continue
            if type(value) is not member:
                yield prefix + name, MEMBERS[member] if member in MEMBERS else member()
        if dataclasses.is_dataclass(value):
            yield from alternatives(value, f"{prefix}{name}.")


# --- the property -----------------------------------------------------------------------------------------------------

ELSEWHERE = {
    "max_length": "cuts rows: test_what_stored_rows_are_cut_to",
    "precompute_ref_log_probs": "the same numbers with no reference kept: test_a_precomputed_reference_keeps_no_model",
    "ref_cache_dir": "where they lie: test_a_precomputed_reference_keeps_no_model",
}
"""Options of algorithms that act before or beside one, with the test that shows it."""
BCODER = "bcoder"
"""Its own page tests its options: its loss needs a policy of its own."""


def config_of(algo: Any) -> RunConfig:
    if isinstance(algo, DPO | KTO):
        config: RunConfig = RunConfig(algo=algo)
    else:
        rewards = [RewardConfig(fn=name, weight=weight) for name, weight in REWARDS.items()]
        rollout = RolloutConfig(num_prompts=5, num_generations=6, max_completion_length=LIMIT)
        config = Config(algo=algo, rewards=rewards, rollout=rollout, train=TrainConfig(max_steps=200))
    model, data = dataclasses.replace(config.model, path="m"), dataclasses.replace(config.data, path="d")
    return complete(dataclasses.replace(config, model=model, data=data))


def base_of(algo: Any) -> Any:
    """Return options that pass twice over a batch, where they may: on-policy every ratio is 1."""
    several = dataclasses.replace(algo, num_iterations=2)
    return algo if findings(config_of(several)) else several


@cache
def trace_of(text: str, algo: Any = None) -> list[str]:
    return Trace(config_of(TRACED[text])).found


TRACED: dict[str, Any] = {}
"""Options by their text: they hold lists, so they cannot be keys themselves."""


def traced(algo: Any) -> list[str]:
    TRACED[repr(algo)] = algo
    return trace_of(repr(algo))


SAME = [("sampler", Uncorrected())]
"""Values that say in words what the default does: test_uncorrected_is_for_stale_rollouts."""


def acts(base: Any, path: str, value: Any) -> str:
    """Return what a change does: `acts`, `refused` (by a finding), `invalid` (for the type), or `nothing`."""
    try:
        changed = with_value(base, path, value)
    except ValidationError:
        return "invalid"
    if findings(config_of(changed)):
        return "refused"
    return "nothing" if traced(changed) == traced(base) else "acts"


def dead_options(base: Any, prefix: str = "") -> list[str]:
    """Return the options below `prefix` of which a valid change does nothing."""
    assert findings(config_of(base)) == []
    dead = []
    for path, each, values in changes(base):
        if path in ELSEWHERE or not path.startswith(prefix):
            continue
        values = [value for value in values if (path, value) not in SAME and (path, base_value(base, path)) not in SAME]
        outcomes = [acts(base, path, value) for value in values] if each else any_of(base, path, values)
        if "nothing" in outcomes:
            dead.append(f"{path}: {[v for v, o in zip(values, outcomes, strict=False) if o == 'nothing']}")
    return dead


def base_value(options: Any, path: str) -> Any:
    for name in path.split("."):
        options = options[int(name)] if isinstance(options, list) else getattr(options, name)
    return options


def any_of(base: Any, path: str, values: list[Any]) -> list[str]:
    outcomes: list[str] = []
    for value in values:
        outcomes.append(acts(base, path, value))
        if outcomes[-1] == "acts":
            return ["acts"]
    return outcomes


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PRESETS if name != BCODER])
def test_every_option_of_a_preset_acts_or_is_refused(name: str) -> None:
    assert dead_options(base_of(PRESETS[name])) == []


CHOICES = [
    pytest.param(name, path, member, id=f"{name} {path} {getattr(member, 'kind', type(member).__name__)}")
    for name in ("grpo", "ppo", "dpo", "online_dpo", "kto", "online_kto")
    for path, member in alternatives(base_of(PRESETS[name]))
]


def beside(name: str, path: str, member: Any) -> Any:
    """Return the options of a preset with one choice taken, or None where findings refuse it."""
    base = base_of(with_value(base_of(PRESETS[name]), path, member))
    if findings(config_of(base)):
        base = base_of(with_value(PRESETS[name], path, member))
    return None if findings(config_of(base)) else base


@pytest.mark.slow
@pytest.mark.parametrize(("name", "path", "member"), CHOICES)
def test_every_option_of_a_choice_acts_or_is_refused(name: str, path: str, member: Any) -> None:
    base = beside(name, path, member)
    assert base is None or dead_options(base, f"{path}.") == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "path", "member"), CHOICES)
def test_every_option_beside_a_choice_acts_or_is_refused(name: str, path: str, member: Any) -> None:
    base = beside(name, path, member)
    assert base is None or dead_options(base) == []


def test_uncorrected_is_for_stale_rollouts() -> None:
    """Without staleness nothing is corrected anyway; with it the default is a correction."""
    config = config_of(PRESETS["grpo"])
    assert isinstance(config, Config)
    stale = dataclasses.replace(config.rollout, max_staleness=1)
    found = [
        Trace(complete(dataclasses.replace(config, rollout=stale, algo=dataclasses.replace(PRESETS["grpo"], **given))))
        for given in ({}, {"sampler": Uncorrected()})
    ]
    assert found[0].found != found[1].found


# --- options of stored rows -------------------------------------------------------------------------------------------

ROWS = [{"prompt": f"q{i}", "chosen": f"yes, it is {i}", "rejected": "no" * 9} for i in range(5)]


def feed_of(algo: Any, folder: Path) -> PreferenceFeed:
    data = PreferenceData(path="rows")
    rows = preferences_from_rows(ROWS, data, "rows")
    feed = PreferenceFeed(rows, [], data=data, options=algo, folder=folder, seed=0)
    feed.encode(byte_tokenizer(), None, ModelLimits())
    return feed


@pytest.mark.parametrize("kind", [DPO, KTO])
def test_what_stored_rows_are_cut_to(kind: Any, tmp_path: Path) -> None:
    for limit in (8, 12):
        rows = feed_of(kind(max_length=limit), tmp_path).rows
        assert max(len(row.prompt_ids) + len(ids) for row in rows for ids in row.completion_ids) == limit
        assert all(len(row.prompt_ids) + len(ids) <= limit for row in rows for ids in row.mismatched_ids)


@pytest.mark.parametrize("kind", [DPO, KTO])
def test_a_precomputed_reference_keeps_no_model(kind: Any, tmp_path: Path) -> None:
    def folder_of(**given: Any) -> Path | None:
        feed = feed_of(kind(**given), tmp_path / "run")
        assert feed.has_reference == bool(given)
        source = feed.source(lambda: pytest.fail("nothing samples"))
        assert isinstance(source, PreferenceSource)
        return source.reference_folder

    assert folder_of() is None
    assert folder_of(precompute_ref_log_probs=True) == tmp_path / "run"
    assert folder_of(precompute_ref_log_probs=True, ref_cache_dir=str(tmp_path / "c")) == tmp_path / "c"


# --- B-Coder ----------------------------------------------------------------------------------------------------------


def bcoder_trace(options: BCoderOptions, base: str) -> list[Any]:
    """Return the programs of two tasks, the policy's parameters, and what its loss gives on them."""
    outcomes = zip(["return x", "return y", "("], [1.0, -0.3, -1.0], strict=True)
    samples = [{"completion": text, "reward": reward} for text, reward in outcomes]
    meta = {"samples": samples, "solution": "return 1", "other": "return 22"}
    tasks = [Task(id=f"t{i}", messages=[Message(role="user", content=f"task {i}")], meta=meta) for i in range(2)]
    chat = Chat(byte_tokenizer(), prompt_format="text")
    source = StoredPrograms(chat, options, num_generations=4, seed=0)
    groups = [source.group(task, i) for i, task in enumerate(tasks)]
    algorithm = BCoder(options, max_completion_length=16)
    batch = algorithm.prepare(groups, policy_version=0)
    policy = QPolicy(build_tiny_model("llama", vocab_size=259, seed=1), options, base_model=base, chat={})
    stir(policy)
    rows = build_micro_batch(batch.samples, [[i] for i in range(len(batch.samples))])
    rows.extras |= policy.streams(rows)
    loss, _ = algorithm.loss(policy.forward(rows), rows, _count(batch.samples, batch))
    return [
        [(r.turns[0].completion_ids, r.score) for group in groups for r in group.rollouts],
        [tuple(p.shape) for p in policy.module.parameters() if p.requires_grad],
        loss.item(),
        (algorithm.num_iterations, algorithm.num_mini_batches),
    ]


@torch.no_grad()
def stir(policy: QPolicy) -> None:
    """Move the value heads, which begin at constants."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in policy.module.named_parameters():
        if "head" in name:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)


@pytest.mark.parametrize("stage", [ValueStage(), PolicyStage()], ids=["value", "policy"])
def test_every_option_of_bcoder_acts_or_is_refused(stage: Any, tmp_path: Path) -> None:
    model = build_tiny_model("llama", vocab_size=259, seed=1)
    first = QPolicy(model, BCoderOptions(), base_model="before", chat={})
    first.save_pretrained(tmp_path)
    base = BCoderOptions(stage=stage)
    VALUES["solution_column"] = ["other"]
    expected, dead = bcoder_trace(base, str(tmp_path)), []
    for path, _, values in changes(base):
        if path == "stage":
            continue  # the parameter of this test
        outcomes = []
        for value in values:
            try:
                changed = with_value(base, path, value)
            except ValidationError:
                continue
            if not findings(config_of(changed)):
                outcomes.append(bcoder_trace(changed, str(tmp_path)) != expected)
        if outcomes and not any(outcomes):
            dead.append(path)
    assert dead == []


# --- options of the learner -------------------------------------------------------------------------------------------

LEARNER = {
    "seed": 1,
    "learning_rate": 0.05,
    "adam_beta1": 0.5,
    "adam_beta2": 0.9,
    "adam_epsilon": 0.1,
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 3,
    "max_grad_norm": 0.01,
    "max_steps": 9,
}
MODE = {"dropout": "tests/train/test_dropout.py"}
"""What acts on models that have something random."""
LAYOUT = {"max_tokens_per_micro_batch": 40, "packing": False, "share_prefixes": False}
"""These change memory and speed, never the result: tests/invariance."""
FILES = {
    "output_dir": "where a run's files lie: tests/run/test_trainer.py",
    "max_skipped_steps": "when a run stops: tests/invariance/test_update.py",
    "save_steps": "checkpoints: tests/run/test_checkpoint.py",
    "save_total_limit": "checkpoints: tests/run/test_checkpoint.py",
    "resume_from_checkpoint": "checkpoints: tests/run/test_trainer.py",
    "grace_s": "how a run ends: tests/run/test_interruption.py",
}


@cache
def two_updates(**train: Any) -> list[float]:
    algo = {"num_mini_batches": 2, "num_iterations": 2}
    given = {"lr_scheduler_type": "linear", "max_steps": 4, "max_grad_norm": 1.0} | train
    learner, algorithm = make_learner(tiny_model(), make_config(algo=algo, train=given))
    reports = [learner.update(train_batch(make_samples(k)), algorithm) for k in range(2)]
    return [report["loss/total"] for report in reports] + [p.double().sum().item() for p in learner.parameters]


@pytest.mark.parametrize("name", LEARNER)
def test_every_option_of_the_learner_acts(name: str) -> None:
    assert two_updates(**{name: LEARNER[name]}) != two_updates()


@pytest.mark.parametrize("name", LAYOUT)
def test_options_of_the_layout_change_the_layout(name: str) -> None:
    def shapes(**train: Any) -> list[tuple[int, ...]]:
        learner, _ = make_learner(tiny_model(), make_config(train=train))
        learner.policy.can_share_prefixes = True  # as `check_forward` finds out
        return [tuple(batch.input_ids.shape) for batch in learner.layout.micro_batches(make_samples(0))]

    assert shapes(**{name: LAYOUT[name]}) != shapes()


def test_every_option_of_the_section_train_is_in_one_of_these_tables() -> None:
    assert {*option_fields(TrainConfig)} == {*LEARNER, *MODE, *LAYOUT, *FILES}


# --- every option and every need has a reader -------------------------------------------------------------------------

PACKAGE = Path(llmrl.__file__).parent
PASSED_ON = {LoraConfig: peft.LoraConfig}
"""Option classes that are passed on whole, to a class that has each of their fields."""


@cache
def read_names() -> set[str]:
    """Return the attributes that the package reads outside of the modules that define options."""
    found: set[str] = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
                found |= {str(x.value) for x in node.args[1:2] if isinstance(x, ast.Constant)}
    return found


def test_every_option_has_a_reader() -> None:
    fields = {**dict(walk(Config)), **dict(walk(EvalRun, "eval_run."))}
    for name, algo in PRESETS.items():
        fields |= dict(walk(type(algo), f"{name}."))
    passed = {cls for cls in PASSED_ON}
    unread = {path for path, field in fields.items() if field.name not in read_names() and field.owner not in passed}
    assert unread == set()
    for ours, theirs in PASSED_ON.items():
        assert {*option_fields(ours)} <= {*inspect.signature(theirs).parameters}


def test_every_need_is_read_by_somebody_else() -> None:
    """`Needs` is what an algorithm asks the learner and the loop for."""
    text = "".join(file.read_text() for folder in ("train", "run") for file in (PACKAGE / folder).rglob("*.py"))
    unread = [f.name for f in dataclasses.fields(Needs) if f"needs.{f.name}" not in text]
    assert unread == []


def test_critics_of_all_kinds_read_their_options() -> None:
    config = config_of(PRESETS["ppo"])
    assert isinstance(config, Config)
    shared = complete(dataclasses.replace(config, critic=SharedCritic()))
    apart = complete(dataclasses.replace(config, critic=SharedCritic(train_trunk=False)))
    assert Trace(shared).found != Trace(apart).found, "a shared trunk weighs the value loss"
