"""Checking a reward file by its EXAMPLES: completions with the rewards they must get go in, a result each comes out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llmrl.errors import UserError
from llmrl.types import RolloutGroup, Score
from llmrl.verify.redteam.attack import NOTHING, Attack
from llmrl.verify.redteam.target import targets_of_examples
from llmrl.verify.rows import check_row, is_conversational, row_to_rollout
from llmrl.verify.rubric import Part, Rubric

TOLERANCE = 1e-6
"""Largest difference, relative or absolute, between a reward and its example's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExampleResult:
    """One example and the score it got."""

    row: dict[str, Any]
    expected: float | None
    score: Score

    @property
    def passed(self) -> bool:
        """Whether it got the expected number within TOLERANCE, or abstained as expected; an error never passes."""
        if self.score.error is not None:
            return False
        if self.expected is None or self.score.reward is None:
            return self.expected is self.score.reward
        return math.isclose(self.score.reward, self.expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def examples_of(rubric: Rubric) -> list[dict[str, Any]]:
    """Return the EXAMPLES of the rubric's only reward. A file with several functions has a dict of lists by name.

    Raises:
        UserError: there are no examples, or one has no `completion` or no `reward`.
    """
    (name, reward), *_ = rubric.rewards.items()
    examples = reward.examples
    if isinstance(examples, dict):
        examples = examples.get(name)
    if not examples:
        raise UserError(
            f"reward {name}: its file has no EXAMPLES for it. Add a list of dicts: `completion`, the columns that the "
            "function names, and the `reward` it must give (None where it must abstain)"
        )
    if not isinstance(examples, (list, tuple)):
        raise UserError(f"reward {name}: EXAMPLES must be a list of dicts, not {type(examples).__name__}")
    for i, example in enumerate(examples):
        where = f"reward {name}, EXAMPLES[{i}]"
        if not isinstance(example, dict):
            raise UserError(f"{where}: must be a dict with `completion` and `reward`, not {example!r:.60}")
        check_row(example, where)
        expected = example.get("reward", "missing")
        if expected is not None and not isinstance(expected, (int, float)):
            raise UserError(f"{where}, field reward: must be a number or None, not {expected!r}")
    return [*examples]


async def run_examples(spec: str, args: dict[str, Any] | None = None, *, num_workers: int = 1) -> list[ExampleResult]:
    """Score every example of the reward that `spec` names.

    Raises:
        UserError: the spec is unknown, there are no examples, or one lacks an argument that the reward needs.
    """
    rubric = Rubric([Part(fn=spec, args=args or {})], num_workers=num_workers)
    try:
        examples = examples_of(rubric)
        rubric.conversational = is_conversational(examples[0])
        results = []
        for i, example in enumerate(examples):
            row = {key: value for key, value in example.items() if key != "reward"}
            rollout = row_to_rollout(row, name=f"example-{i}")
            rubric.require(rollout.task)
            await rubric.score_group(RolloutGroup(task=rollout.task, rollouts=[rollout]))
            assert rollout.score is not None
            results.append(ExampleResult(row=row, expected=example["reward"], score=rollout.score))
        return results
    finally:
        await rubric.close()


async def gold_and_nothing(spec: str, args: dict[str, Any] | None = None, *, num_workers: int = 1) -> list[str]:
    """Check on the rows of the EXAMPLES that know an answer that it is paid, and that saying nothing is not.

    Returns:
        What is wrong, a text for each finding.

    Raises:
        UserError: the spec is unknown, or there are no examples.
    """
    rubric = Rubric([Part(fn=spec, args=args or {})], num_workers=num_workers)
    try:
        examples = examples_of(rubric)
        rubric.conversational = is_conversational(examples[0])
        targets = [target for target in targets_of_examples(examples) if target.answers]
        attack, found, is_paid = Attack(rubric, targets), [], not targets
        wrong_rows: set[int] = set()
        for target in targets:
            good = await attack.good(target)
            scores = {text: await attack.score(target, text) for text in ("", NOTHING)}
            for text, nothing in scores.items():
                if good is not None and nothing is not None and nothing >= good > 0:
                    wrong_rows.add(target.number)
                    found.append(
                        f"no-op: the completion {text!r} earns {nothing:g}, as much as a good one, on the row "
                        f"{_shown(target.row)}"
                    )
                is_paid = is_paid or (good is not None and (nothing is None or good > nothing))
        if 2 * len(wrong_rows) <= len(targets):  # some rows may be about something else, such as a bad judge
            found = []
        if not is_paid:
            found.append("gold: on no row of the EXAMPLES does a good completion earn more than one that says nothing")
        return found
    finally:
        await rubric.close()


def _shown(row: dict[str, Any]) -> str:
    text = repr(row)
    return text if len(text) <= 200 else f"{text[:197]}..."
