"""Attack a reward on rows: exploits of known families go in, those that were paid come out, each as small as possible.

A completion counts as paid where it earns at least half of what lies between a text that says nothing and a good one.
What pays for a good reason is left out: a text that states the right answer, a list that ends in it by luck (it must
pay in the other order too), and a text that fits one row alone where the input has others.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llmrl.types import Rollout, RolloutGroup
from llmrl.verify.redteam.families import Attempt, attempts
from llmrl.verify.redteam.shrink import shrink
from llmrl.verify.redteam.target import Target
from llmrl.verify.rows import row_to_rollout
from llmrl.verify.rubric import Rubric

NOTHING = "I do not know."
"""A completion that must not be paid; in the form of the exploit it is what the form alone earns."""
CLEAR_GAIN = 0.25
"""Without a good completion to compare with, an exploit must earn this much more than a text that says nothing,"""
CLEAR_REWARD = 0.5
"""and at least this much."""
AT_ONCE = 64
SHRUNK_PER_FAMILY = 3
"""Ideas of a family that are made smaller: further ones of a weak reward would cost much and say little."""
HAZARDS = ("tests_patched", "early_exit")
"""Families whose programs change the process that runs them, if no sandbox keeps them from it."""


@dataclass(kw_only=True)
class Paid:
    """An exploit that was paid on a row."""

    family: str
    variant: str
    target: Target
    text: str
    reward: float
    nothing: float
    good: float | None


@dataclass(kw_only=True)
class Finding:
    """One idea that pays, with its smallest exploit."""

    family: str
    variant: str
    lines: list[int]
    """Rows that it was paid on, by their lines in the input."""
    exploit: str
    """The smallest completion found that is paid on the first of them."""
    reward: float
    nothing: float
    good: float | None
    row: dict[str, Any]


@dataclass(kw_only=True)
class Report:
    """The result of an attack."""

    findings: list[Finding] = field(default_factory=list)
    suspects: list[Finding] = field(default_factory=list)
    """Paid on one kind of row alone, although there are others: perhaps right by chance."""
    num_rows: int = 0
    num_attempts: int = 0
    num_scored: int = 0
    num_errors: int = 0
    first_error: str | None = None
    without_good: list[int] = field(default_factory=list)
    """Rows for which no completion that earns more than a text that says nothing is known."""


class Attack:
    """The attack on one rubric.

    Args:
        rubric: scores completions; usually a single reward.
        targets: the rows.
        show: called with a line of progress.
    """

    def __init__(self, rubric: Rubric, targets: list[Target], show: Callable[[str], None] = lambda line: None) -> None:
        self.rubric, self.targets, self.show = rubric, targets, show
        self.report = Report(num_rows=len(targets))
        self.paid: list[Paid] = []
        self._scores: dict[tuple[int, str], float | None] = {}
        self._good: dict[int, float | None] = {}
        self._pays_anything: set[int] = set()
        self._compares = any(reward.kind == "group" for reward in rubric.rewards.values())
        self._shrunk: Counter[str] = Counter()

    async def run(self) -> Report:
        """Try all families on all rows and return the report."""
        await self.run_known()
        return await self.finish()

    async def run_known(self) -> None:
        """Try all families on all rows."""
        for i, target in enumerate(self.targets, start=1):
            await self._known_exploits(target)
            self.show(f"row {i} of {len(self.targets)}: {self.report.num_attempts} attempts, {len(self.paid)} paid")
        await self.rubric.restart(num_workers=1)
        for i, target in enumerate(self.targets, start=1):
            if target.number not in self._pays_anything:
                await self._hazards(target)
            self.show(
                f"programs, row {i} of {len(self.targets)}: {self.report.num_attempts} attempts, {len(self.paid)} paid"
            )

    async def finish(self) -> Report:
        """Put what was paid together by idea, shrink it and return the report."""
        ideas: dict[tuple[str, str], list[Paid]] = {}
        for paid in self.paid:
            ideas.setdefault((paid.family, paid.variant), []).append(paid)
        kinds = len({_kind(target) for target in self.targets})
        for group in ideas.values():
            finding = await self._finding(group)
            rows = {paid.target.number for paid in group}
            mostly = kinds == 1 and 2 * len(rows) > len(self.targets)
            is_general = mostly or len({_kind(paid.target) for paid in group}) > 1
            (self.report.findings if is_general else self.report.suspects).append(finding)
        return self.report

    async def _known_exploits(self, target: Target) -> None:
        good = await self.good(target)
        plain = await self.score(target, NOTHING)
        if good is not None and plain is not None and good > 0 and plain >= good and target.answers:
            self._add("empty", "a text that says nothing", target, NOTHING, plain, plain, good)
            self._pays_anything.add(target.number)
            return  # it pays anything; the exploits would say so once more
        if good is None or (plain is not None and good <= plain):
            self.report.without_good.append(target.number)
        found = list(attempts(target))
        harmless = [(family, one) for family, one in found if family not in HAZARDS]
        for start in range(0, len(harmless), AT_ONCE):
            batch = harmless[start : start + AT_ONCE]
            await asyncio.gather(*(self.attempt(target, family, one) for family, one in batch))

    async def _hazards(self, target: Target) -> None:
        """Try what may leave the reward's process damaged, one by one; a process that judges otherwise is replaced."""
        before = await self._probe(target)
        for family, one in attempts(target):
            if family in HAZARDS:
                await self.attempt(target, family, one)
                if await self._probe(target) != before:
                    await self.rubric.restart()

    async def _probe(self, target: Target) -> list[float | None]:
        return [await self._score(target, text) for text in (NOTHING, *target.gold[:1])]

    async def attempt(self, target: Target, family: str, attempt: Attempt) -> bool:
        """Score an attempt and note it if it is paid."""
        self.report.num_attempts += 1
        if not await self.pays(target, attempt.text):
            return False
        if attempt.twin is not None and not await self.pays(target, attempt.twin):
            return False
        reward = await self.score(target, attempt.text)
        nothing = await self.nothing(target, attempt.text)
        assert reward is not None
        self._add(family, attempt.variant, target, attempt.text, reward, nothing, await self.good(target))
        return True

    def _add(
        self, family: str, variant: str, target: Target, text: str, reward: float, nothing: float, good: float | None
    ) -> None:
        self.paid.append(
            Paid(family=family, variant=variant, target=target, text=text, reward=reward, nothing=nothing, good=good)
        )

    # --- what is paid -------------------------------------------------------------------------------------------------

    async def pays(self, target: Target, text: str) -> bool:
        """Return whether a text is paid on a row without stating its answer."""
        if target.states_answer(text):
            return False
        reward = await self.score(target, text)
        if reward is None:
            return False
        nothing, good = await self.nothing(target, text), await self.good(target)
        if good is not None and good > nothing:
            return reward > nothing and reward >= nothing + (good - nothing) / 2
        least = nothing if good is None else max(nothing, good)
        return reward >= max(CLEAR_REWARD, least + CLEAR_GAIN)

    async def nothing(self, target: Target, text: str) -> float:
        """Return what a text that says nothing earns in the same form: format rewards pay for the form."""
        scores = [await self.score(target, form) for form in {NOTHING, _in_form_of(text)}]
        return max((score for score in scores if score is not None), default=0.0)

    async def good(self, target: Target) -> float | None:
        """Return the best reward of the completions that should be paid, or None if none is known."""
        if target.number not in self._good:
            scores = [await self.score(target, completion) for completion in target.gold]
            self._good[target.number] = max((score for score in scores if score is not None), default=None)
        return self._good[target.number]

    async def score(self, target: Target, completion: str | list[Any]) -> float | None:
        """Return the reward of a completion; None for an abstention or an error."""
        key = (target.number, str(completion))
        if key not in self._scores:
            self._scores[key] = await self._score(target, completion)
        return self._scores[key]

    async def _score(self, target: Target, completion: str | list[Any]) -> float | None:
        # A reward that compares sees the attempt beside a text that says nothing and a good one.
        others = [NOTHING, *target.gold[:1]] if self._compares else []
        rollouts = [self._rollout(target, text, i) for i, text in enumerate([completion, *others])]
        rollout = rollouts[0]
        await self.rubric.score_group(RolloutGroup(task=rollout.task, rollouts=rollouts))
        assert rollout.score is not None
        self.report.num_scored += 1
        if rollout.score.error is not None:
            self.report.num_errors += 1
            self.report.first_error = self.report.first_error or rollout.score.error
        return rollout.score.reward

    def _rollout(self, target: Target, completion: str | list[Any], index: int) -> Rollout:
        if isinstance(completion, str) and target.template:
            completion = [*target.template[:-1], {**target.template[-1], "content": completion}]
        return row_to_rollout(target.row | {"completion": completion}, name=f"row-{target.number}", index=index)

    # --- the report ---------------------------------------------------------------------------------------------------

    async def _finding(self, group: list[Paid]) -> Finding:
        first = min(group, key=lambda paid: len(paid.text))

        async def still_pays(text: str) -> bool:
            return await self.pays(first.target, text)

        self._shrunk[first.family] += 1
        worthwhile = first.text != NOTHING and self._shrunk[first.family] <= SHRUNK_PER_FAMILY
        smallest = await shrink(first.text, still_pays) if worthwhile else first.text
        reward = await self.score(first.target, smallest)
        return Finding(
            family=first.family,
            variant=first.variant,
            lines=sorted({paid.target.number for paid in group}),
            exploit=smallest,
            reward=first.reward if reward is None else reward,
            nothing=await self.nothing(first.target, smallest),
            good=first.good,
            row=first.target.row,
        )


def _kind(target: Target) -> Any:
    """Return what makes rows different questions: the answers, or the prompt where no answer is known."""
    return tuple(sorted(target.answers)) or target.prompt or str(target.row)


def _in_form_of(text: str) -> str:
    """Return NOTHING in the tags, box or fence in which a text is."""
    form = NOTHING
    if "\\boxed{" in text:
        form = f"\\boxed{{{form}}}"
    if "<answer>" in text:
        form = f"<answer>{form}</answer>"
    if text.lstrip().startswith("```"):
        form = f"{text.lstrip().splitlines()[0]}\n# {form}\n```"
    return f"<think>Let me think.</think>\n{form}" if "<think>" in text else form
