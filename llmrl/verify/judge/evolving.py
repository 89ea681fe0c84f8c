"""Rubrics that evolve with the policy, per task: persistent, active and inactive ones (DR Tulu's RLER).

A group's answers are scored by all of a task's persistent and active rubrics and by new ones that a judge writes after
comparing the answers. Then those whose scores have no spread over the group rest, since they tell nothing about which
answer is better, and of the others the k with the largest spread stay active. Persistent rubrics always count.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, pstdev
from typing import Any

MAX_INACTIVE = 50
"""Resting rubrics that are remembered per task, so that they are not written again; the oldest are forgotten."""
SAME_SPREAD = 1e-9


@dataclass(kw_only=True)
class TaskRubrics:
    """The rubrics of one task. A weight of -1 is a fault that an answer should not have."""

    active: dict[str, float] = field(default_factory=dict)
    """Text -> weight, by falling spread."""
    inactive: dict[str, float] = field(default_factory=dict)
    """Text -> weight: those that rest, the oldest first."""


@dataclass(kw_only=True)
class RubricBook:
    """The rubrics of all tasks of a run, by the task's id."""

    tasks: dict[str, TaskRubrics] = field(default_factory=dict)

    def of(self, task: str) -> TaskRubrics:
        """Return the rubrics of a task; they change only by `update`."""
        return self.tasks.get(task, TaskRubrics())

    def update(self, task: str, scored: Mapping[str, tuple[float, Sequence[float]]], *, max_active: int) -> Event:
        """Let a task's rubrics rest or stay active by the scores of a group.

        Args:
            task: its id.
            scored: rubric -> (weight, its score of each answer). Those that are not among them stay as they are.
            max_active: k.

        Returns:
            What changed.
        """
        old = self.of(task)
        known = old.active | {text: weight for text, (weight, _) in scored.items()}
        spread = {text: pstdev(scores) if len(scores) > 1 else 0.0 for text, (_, scores) in scored.items()}
        telling = [text for text in known if text not in spread or spread[text] > SAME_SPREAD]
        telling.sort(key=lambda text: -spread.get(text, 0.0))  # stable: of equal ones the older stays
        active = {text: known[text] for text in telling[:max_active]}
        rested = {text: known[text] for text in known if text not in active}
        kept = {text: weight for text, weight in old.inactive.items() if text not in known} | rested
        inactive = dict(list(kept.items())[-MAX_INACTIVE:])
        self.tasks[task] = TaskRubrics(active=active, inactive=inactive)
        return Event(
            task=task,
            added=[text for text in active if text not in old.active],
            rested=list(rested),
            active=list(active),
            spread={text: round(value, 6) for text, value in spread.items()},
        )

    def state_dict(self) -> dict[str, Any]:
        """Return everything, as JSON."""
        return {task: asdict(rubrics) for task, rubrics in self.tasks.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.tasks = {task: TaskRubrics(**rubrics) for task, rubrics in state.items()}


@dataclass(kw_only=True)
class Event:
    """What an update changed, for the ledger."""

    task: str
    added: list[str]
    rested: list[str]
    active: list[str]
    spread: dict[str, float]


def reward_of(scores: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Return the weighted mean of rubric scores (0 to 1); faults take away, and the result lies in [0, 1]."""
    total = sum(weight for weight in weights.values() if weight > 0)
    if total <= 0:  # faults alone: how few of them an answer has
        return 1.0 - fmean(scores[text] for text in weights) if weights else 0.0
    value = sum(weights[text] * scores[text] for text in weights) / total
    return min(max(value, 0.0), 1.0)


def new_rubrics(text: str, known: Iterable[str], *, most: int) -> dict[str, float]:
    """Read the rubrics that a judge wrote, a line each, `+ what to do` or `- what not to do`; skip known ones."""
    seen = {_folded(rubric) for rubric in known}
    found: dict[str, float] = {}
    for line in text.splitlines():
        line = line.strip()
        if line[:1] not in ("+", "-", "\u2212"):
            continue
        rubric, weight = line[1:].strip(), 1.0 if line[0] == "+" else -1.0
        if len(rubric) < 8 or _folded(rubric) in seen or len(found) >= most:
            continue
        seen.add(_folded(rubric))
        found[rubric[:500]] = weight
    return found


def _folded(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())
