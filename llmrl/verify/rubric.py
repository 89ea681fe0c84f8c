"""Several rewards combined into one: rollouts go in, each gets a Score (a number, an abstention, or an error).

reward = sum over parts of weight * part. A part with weight 0 is a metric: it never changes the outcome.
"""

from __future__ import annotations

import asyncio
import difflib
import logging
import math
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from llmrl.errors import LlmrlError, UserError
from llmrl.types import ENVIRONMENT, Rollout, RolloutGroup, Score, Task
from llmrl.verify.arguments import columns, trl_completion, trl_completion_ids, trl_prompt
from llmrl.verify.failure import describe
from llmrl.verify.limits import LimitReached, call
from llmrl.verify.options import RewardConfig, VerifyConfig
from llmrl.verify.pool import CallRefused, CallTimedOut, Pool, PoolError, available_cores
from llmrl.verify.reward import Reward, RewardTypeError, as_score, load_reward

T = TypeVar("T")
_logger = logging.getLogger(__name__)
POOL_LIMIT_S = 20.0
"""Default time limit of a call in the pool, in seconds."""
_BUSY = 20.0
"""A call that takes this many times what it needs on an idle machine hangs."""
LIMIT_S = 1200.0
"""Default time limit of a call in this process: longer than a judge's `outage_budget_s`."""

Part = RewardConfig
"""A rubric written in Python calls its rewards parts; they take the same options as in a recipe."""


@dataclass(kw_only=True)
class TrainerState:
    """What TRL reward functions read from their `trainer_state`. The trainer keeps it up to date."""

    global_step: int = 0
    """Steps of the run finished so far (batches of rollouts)."""
    max_steps: int = 0
    """Steps of the whole run."""
    epoch: float = 0.0
    """Passes over the training data so far, as a fraction."""


class RowError(UserError):
    """A reward refused the rollout with this index in its group, or returned a wrong type for it."""

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index


@dataclass(kw_only=True, slots=True)
class _Result:
    """The result of one part for one rollout."""

    score: Score


@dataclass(kw_only=True, slots=True)
class _Unfinished(Score):
    """The score of a rollout whose group rewards have not run yet."""

    results: dict[str, _Result] = field(default_factory=dict)


class Rubric:
    """Scores rollouts with one or more rewards.

    Args:
        parts: Part objects, or callables or specs, which get weight 1. Equal names are made unique by a suffix.
        num_workers: worker processes for rewards marked `POOL = True`.
        memory_limit_bytes: address space of each worker process.
        conversational: give TRL functions completions as lists of messages; otherwise as strings.
        strict: raise RowError when a reward returns a wrong type or raises a UserError, instead of recording an error
            for that rollout.

    Raises:
        UserError: unknown spec, argument or gate.
    """

    def __init__(
        self,
        parts: Sequence[Part | str | Callable[..., Any]],
        *,
        num_workers: int = 1,
        memory_limit_bytes: int = 4 << 30,
        conversational: bool = True,
        strict: bool = False,
    ) -> None:
        self.parts: dict[str, Part] = {}
        self.rewards: dict[str, Reward] = {}
        for given in parts:
            part = given if isinstance(given, Part) else Part(fn=given)
            reward = load_reward(part.fn, part.args)
            reward.name = _unique(reward.name, self.rewards)
            self.parts[reward.name], self.rewards[reward.name] = part, reward
        self._check_parts()
        self.conversational = conversational
        self.strict = strict
        self.trainer_state = TrainerState()
        self.metrics: dict[str, list[float]] = {}
        """Values that TRL functions reported through `log_metric` since the last `take_metrics`."""
        self.pool = Pool(num_workers, memory_limit_bytes=memory_limit_bytes)

    @classmethod
    def from_config(
        cls,
        rewards: Sequence[RewardConfig],
        verify: VerifyConfig,
        *,
        num_processes: int = 1,
        conversational: bool = True,
    ) -> Rubric:
        """Return the rubric of a run whose `num_processes` training processes on this machine share its cores."""
        workers = verify.num_workers or available_cores() // num_processes
        return cls(
            [Part(**vars(reward)) for reward in rewards],
            num_workers=max(1, workers),
            memory_limit_bytes=int(verify.memory_limit_gb * 2**30),
            conversational=conversational,
        )

    def _check_parts(self) -> None:
        for name, part in self.parts.items():
            needed = self.rewards[name].needs_s or 0.0
            if part.time_limit_s is not None and part.time_limit_s < needed:
                raise UserError(
                    f"reward {name}: time_limit_s {part.time_limit_s:g} is less than the {needed:g} seconds that a "
                    "call may take with its `args`, so slow answers would be errors: raise time_limit_s or leave it out"
                )
            if part.gate is not None and (part.gate not in self.parts or part.gate == name):
                others = ", ".join(n for n in self.parts if n != name) or "none"
                raise UserError(
                    f"reward {name}: gate {part.gate!r} is not another reward of this rubric (others: {others})"
                )
            if part.scale is not None and not part.scale[0] < part.scale[1]:
                raise UserError(f"reward {name}: scale {part.scale} must be (low, high) with low < high")

    @property
    def names(self) -> list[str]:
        """Names of the parts, in order; they are also the names of their metrics."""
        return list(self.rewards)

    @property
    def accuracy_name(self) -> str | None:
        """The reward that pass@k and filters look at: the first with weight > 0; none if sources have their own."""
        if any(part.sources for part in self.parts.values() if part.weight > 0):
            return None
        return next((name for name, part in self.parts.items() if part.weight > 0), None)

    def of(self, task: Task) -> list[Reward]:
        """Return the rewards that score a task: those without `sources`, and those that name its source."""
        sources = {name: part.sources for name, part in self.parts.items()}
        return [r for name, r in self.rewards.items() if not sources[name] or task.source in sources[name]]

    def check_sources(self, known: set[str]) -> None:
        """Raise a UserError when a reward is limited to a source that no task comes from."""
        for name, part in self.parts.items():
            for source in part.sources:
                if source not in known:
                    near = difflib.get_close_matches(source, known, n=1, cutoff=0.6)
                    hint = f" Did you mean {near[0]!r}?" if near else ""
                    names = ", ".join(sorted(known)[:20])
                    raise UserError(f"reward {name}: no task comes from its source {source!r}.{hint} Sources: {names}")

    def findings(self, task: Task) -> list[str]:
        """Return what is wrong with a task's row, a text for each finding; an empty list if every reward can use it.

        A reward has an argument that the row cannot fill, or its check finds a column wrong (docs/rewards.md). Takes
        microseconds a row, so that whole datasets can be read before the first step.
        """
        rewards = self.of(task)
        if len(rewards) < len(self.rewards) and not any(self.parts[reward.name].weight for reward in rewards):
            return [f"no reward with a weight scores tasks of the source {task.source!r}: see `sources` of the rewards"]
        return [text for reward in rewards for text in reward.findings(task)]

    def check(self, task: Task) -> None:
        """Raise a UserError with the first of the findings."""
        for text in self.findings(task):
            raise UserError(text)

    def require(self, task: Task) -> None:
        """Raise a UserError when a reward requires an argument that this task cannot fill; columns are not read."""
        for reward in self.of(task):
            if text := reward.unusable(task):
                raise UserError(text)

    async def warm(self) -> None:
        """Start the worker processes and import the pooled rewards in them, which would slow down the first step."""
        if specs := [reward.spec for reward in self.rewards.values() if reward.spec is not None]:
            await self.pool.warm(specs)

    async def score(self, rollout: Rollout) -> Score:
        """Run the per-rollout rewards concurrently, combine their results and set `rollout.score`.

        A rollout that ended in an error is not scored. When the rubric has group rewards, the score becomes final in
        `score_group`.
        """
        if rollout.status.is_error:
            return Score(reward=None, error=rollout.error or f"the rollout ended in {rollout.status}")
        all_rewards = self.of(rollout.task)
        rewards = [reward for reward in all_rewards if reward.kind == "rollout"]
        found = await _all_of([self._call_one(reward, rollout) for reward in rewards])
        results = {reward.name: result for reward, result in zip(rewards, found, strict=True)}
        score = self._combine(rollout, results)
        if len(rewards) < len(all_rewards):  # keep the results, which `score_group` combines with the others
            score = _Unfinished(**{name: getattr(score, name) for name in Score.__slots__}, results=results)
        rollout.score = score
        return score

    async def score_group(self, group: RolloutGroup) -> None:
        """Score the rollouts that have no score yet, run TRL and group rewards on the group, set all final scores."""
        rollouts = [rollout for rollout in group.rollouts if not rollout.status.is_error]
        await _all_of([self.score(rollout) for rollout in rollouts if rollout.score is None])
        batched = [reward for reward in self.of(group.task) if reward.kind != "rollout"]
        if not rollouts or not batched:
            return
        found = await _all_of([self._call_group(reward, rollouts) for reward in batched])
        for i, rollout in enumerate(rollouts):
            results = dict(rollout.score.results) if isinstance(rollout.score, _Unfinished) else {}
            results |= {reward.name: scores[i] for reward, scores in zip(batched, found, strict=True)}
            rollout.score = self._combine(rollout, results)

    def take_metrics(self) -> dict[str, float]:
        """Return the means of all `log_metric` values since the last call, and the totals of all judges so far."""
        means = {name: sum(values) / len(values) for name, values in self.metrics.items()}
        self.metrics = {}
        # Looked up rather than imported: only a reward with a judge loads the module, which needs the extra `judge`.
        judges = sys.modules.get("llmrl.verify.judge.judge")
        return means | (judges.judge_metrics() if judges is not None else {})

    def commit(self, groups: Sequence[RolloutGroup]) -> list[dict[str, Any]]:
        """Let rewards with a state learn from groups that are trained on; return what changed, for the ledger.

        Scores hold all that is needed, so that every process, which has all groups, comes to the same state.
        """
        events: list[dict[str, Any]] = []
        for name, reward in self.rewards.items():
            state = reward.state
            if state is None:
                continue
            for group in groups:
                info: dict[str, Any] = {}
                for rollout in group.rollouts:
                    info |= (rollout.score.info.get(name) or {}) if rollout.score is not None else {}
                if info and (event := state.commit(group, info)):
                    events.append({"reward": name, "position": group.position, **event})
        return events

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the rewards that have one, by name."""
        return {name: reward.state.state_dict() for name, reward in self.rewards.items() if reward.state is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; a reward that is new in this run begins afresh."""
        for name, reward in self.rewards.items():
            if reward.state is not None and name in state:
                reward.state.load_state_dict(state[name])

    async def restart(self, num_workers: int | None = None) -> None:
        """Replace the worker processes, which a reward may have left in any state."""
        await self.pool.close()
        self.pool = Pool(num_workers or self.pool.num_workers, memory_limit_bytes=self.pool.memory_limit_bytes)

    async def close(self) -> None:
        """Stop the worker processes."""
        await self.pool.close()

    # --- calling ---

    def time_limit(self, reward: Reward) -> float:
        """Return the time limit of one call of a reward, in seconds."""
        given = self.parts[reward.name].time_limit_s
        if given is not None:
            return given
        own = _BUSY * (reward.needs_s or 0.0)
        return max(own, LIMIT_S if reward.spec is None else POOL_LIMIT_S)

    async def _call_one(self, reward: Reward, rollout: Rollout) -> _Result:
        try:
            arguments = reward.arguments(rollout)
            if reward.spec is not None:
                value = await self.pool.call(reward.spec, arguments, self.time_limit(reward))
            else:
                value = await call(lambda: reward.function(**arguments), self.time_limit(reward))
            return _Result(score=as_score(value, reward.name))
        except BaseException as error:
            return self._failed(reward, error, [rollout])[0]

    async def _call_group(self, reward: Reward, rollouts: list[Rollout]) -> list[_Result]:
        extra: dict[str, list[Any]] = {}
        try:
            values = await call(self._group_call(reward, rollouts, extra), self.time_limit(reward))
            values = _as_list(values, len(rollouts), reward.name)
            extra = {
                name: _as_list(entry, len(rollouts), f"{reward.name}, log_extra({name!r})")
                for name, entry in extra.items()
            }
        except BaseException as error:
            return self._failed(reward, error, rollouts)
        results = []
        for i, value in enumerate(values):
            try:
                score = as_score(value, reward.name)
                score.info = score.info | {name: entry[i] for name, entry in extra.items()}
                results.append(_Result(score=score))
            except (RewardTypeError, ValueError) as error:
                results += self._failed(reward, error, [rollouts[i]])
        return results

    def _group_call(self, reward: Reward, rollouts: list[Rollout], extra: dict[str, list[Any]]) -> Callable[[], Any]:
        """Return the call of a group or TRL reward; `log_extra` writes to `extra`."""
        if reward.kind == "group":
            arguments = reward.arguments(rollouts[0])
            return lambda: reward.function(rollouts, **arguments)
        keywords = self._trl_keywords(rollouts, extra)
        if text := reward.missing(frozenset(keywords)):
            raise UserError(text)
        taken = {k: v for k, v in keywords.items() if reward.takes_rest or k in reward.parameters}
        return lambda: reward.function(**taken | reward.args)

    def _failed(self, reward: Reward, error: BaseException, rollouts: list[Rollout]) -> list[_Result]:
        """Return the error as the result of the rollouts of a call; raise what must not become one."""
        if _ends_the_process(error):
            raise error
        if self.strict and isinstance(error, RewardTypeError):
            raise RowError(f"field reward: {error}", rollouts[0].index) from None
        if self.strict and isinstance(error, (UserError, CallRefused)):
            raise RowError(str(error), rollouts[0].index) from None
        if isinstance(error, LlmrlError):  # it must stop the run: an exhausted budget, a judge that fails its canaries
            raise error
        if isinstance(error, (LimitReached, CallTimedOut)):
            limit = self.time_limit(reward)
            text = f"reward {reward.name}: timed out after {limit:g} s (time_limit_s) and was given up"
            _logger.warning("%s: task %s", text, rollouts[0].task.id)
            if error.__traceback__ is not None and not isinstance(error, PoolError):  # says where it was waiting
                text += f"\n{describe(error, reward.function)}"
        elif isinstance(error, SystemExit):
            text = f"reward {reward.name}: it ended with sys.exit({error.code!r})\n{describe(error, reward.function)}"
        else:
            text = str(error) if isinstance(error, PoolError) else describe(error, reward.function)
        return [_Result(score=Score(reward=None, error=text)) for _ in rollouts]

    def _trl_keywords(self, rollouts: list[Rollout], extra: dict[str, list[Any]]) -> dict[str, Any]:
        """Return TRL's keyword arguments for one group; `log_extra` writes to `extra`."""
        rows = [columns(rollout.task) for rollout in rollouts]
        keywords: dict[str, Any] = {name: [row.get(name) for row in rows] for name in rows[0]}
        return keywords | {
            "prompts": [trl_prompt(r.task, self.conversational) for r in rollouts],
            "completions": [trl_completion(r, self.conversational) for r in rollouts],
            "completion_ids": [trl_completion_ids(r) for r in rollouts],
            "trainer_state": self.trainer_state,
            "log_extra": extra.__setitem__,
            "log_metric": lambda name, value: self.metrics.setdefault(name, []).append(float(value)),
        }

    # --- combining ---

    def _combine(self, rollout: Rollout, results: dict[str, _Result]) -> Score:
        """Return an error if any weighted part failed, else the weighted sum, else (all abstained) an abstention."""
        values = {name: result.score.reward for name, result in results.items()}
        details = {f"{name}/{key}": v for name, result in results.items() for key, v in result.score.parts.items()}
        environment = {ENVIRONMENT + name: value for name, value in rollout.env_rewards.items()}
        total = Score(reward=None, parts=values | details | environment)
        terms: list[tuple[str, float, float]] = [(name, 1.0, value) for name, value in environment.items()]
        abstained, errors = [], []
        for name, result in results.items():
            part, value, error = self.parts[name], result.score.reward, result.score.error
            info = result.score.info | ({"error": error} if error is not None else {})
            gate = results[part.gate].score if part.gate in results else None
            if gate is not None and gate.error is not None:
                error = error or f"it is gated by {part.gate}, which failed:\n{gate.error}"
            if part.weight == 0:  # a metric: neither its value nor its failure counts
                pass
            elif error is not None:
                errors.append(error if len(results) == 1 else f"[{name}] {error}")
            elif value is None or (gate is not None and gate.reward is None):  # an unjudged gate decides nothing
                abstained.append(name)
            elif gate is not None and gate.reward is not None and gate.reward <= 0:
                terms.append((name, 0.0, 0.0))
                info = info | {"gate": f"{part.gate} is not above 0"}
            else:
                terms.append((name, part.weight, _scaled(value, part.scale)))
            if info:
                total.info[name] = info
        if abstained:
            total.info["abstained"] = abstained
        if errors:
            total.error = "\n".join(errors)
        elif terms:
            _add_up(total, terms, results, rollout)
        return total


def _add_up(total: Score, terms: list[tuple[str, float, float]], results: dict[str, _Result], rollout: Rollout) -> None:
    """Set the reward, and the token rewards if any part has them: sums of weight * value over (name, weight, value).

    The value of a part without dense rewards goes to the last token, because algorithms that read token rewards do
    not read the reward itself.
    """
    reward = sum(weight * value for _, weight, value in terms)
    try:
        given = {name: _dense_rewards(results[name].score, rollout) for name, _, _ in terms if name in results}
    except ValueError as error:
        total.error = str(error)
        return
    if not math.isfinite(reward):
        total.error = f"the weighted sum of the rewards is {reward}: {terms}"
        return
    total.reward, total.terms = reward, {name: value for name, _, value in terms}
    dense = [(weight, given[name]) for name, weight, _ in terms if given.get(name)]
    if dense:
        total.token_rewards = [sum(weight * tokens[t] for weight, tokens in dense) for t in range(len(dense[0][1]))]
        total.token_rewards[-1] += sum(weight * value for name, weight, value in terms if not given.get(name))


def _dense_rewards(score: Score, rollout: Rollout) -> list[float]:
    """Return a part's token rewards, with its turn rewards added at the last token of each turn; empty if it has none.

    Raises:
        ValueError: the number of rewards is not the number of turns or tokens.
    """
    num_tokens, tokens = rollout.num_completion_tokens, list(score.token_rewards or [])
    if score.turn_rewards and num_tokens:
        if len(score.turn_rewards) != len(rollout.turns):
            raise ValueError(f"{len(score.turn_rewards)} turn rewards for a rollout of {len(rollout.turns)} turns")
        tokens, end = tokens or [0.0] * num_tokens, 0
        for turn, reward in zip(rollout.turns, score.turn_rewards, strict=True):
            end += len(turn.completion_ids)
            tokens[max(0, end - 1)] += reward
    if tokens and len(tokens) != num_tokens:
        raise ValueError(f"{len(tokens)} token rewards for a rollout of {num_tokens} completion tokens")
    return tokens


def _scaled(value: float, scale: tuple[float, float] | None) -> float:
    if scale is None:
        return value
    low, high = scale
    return min(max((value - low) / (high - low), 0.0), 1.0)


def _unique(name: str, taken: dict[str, Reward]) -> str:
    if name not in taken:
        return name
    return next(f"{name}_{i}" for i in range(2, len(taken) + 3) if f"{name}_{i}" not in taken)


async def _all_of(coroutines: list[Coroutine[Any, Any, T]]) -> list[T]:
    """Run coroutines concurrently; a single one runs in this task, which is cheaper than starting another."""
    if len(coroutines) == 1:
        return [await coroutines[0]]
    return list(await asyncio.gather(*coroutines))


def _ends_the_process(error: BaseException) -> bool:
    """Return whether an exception means this process or this task, and not the reward that it was raised in."""
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is None or task.cancelling() > 0  # otherwise the reward was cancelled by what it waited for
    return isinstance(error, KeyboardInterrupt | GeneratorExit)


def _as_list(values: Any, length: int, name: str) -> list[Any]:
    try:
        values = list(values)
    except TypeError:
        raise RewardTypeError(
            f"reward {name} returned a {type(values).__name__}; a group needs a list with one entry per rollout"
        ) from None
    if len(values) != length:
        raise ValueError(f"reward {name} returned {len(values)} values for {length} rollouts")
    return values
