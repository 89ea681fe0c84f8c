"""HERON: compare two attempts by a ranked list of reward parts, each used only where the ones before do not decide.

No weight between correctness and length has to be chosen: correctness decides, and length among equally correct
attempts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import stdev
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from llmrl.algo.preference.options import Level
from llmrl.errors import UserError

if TYPE_CHECKING:
    from llmrl.types import Rollout

Parts = Mapping[str, float | None]


class HierarchicalPreference:
    """Compares by levels, the most important first.

    With margins the preference may be cyclic: a beats b and b beats c by the second level, because their differences at
    the first are within its margin, while c beats a by the first. A Bradley-Terry fit (DPO, a reward model) averages
    that out.

    Args:
        levels: as `Level`, or as dictionaries of its fields.

    Raises:
        UserError: there is no level, or one has a wrong field.

    Source: Bukharin et al. 2023, arXiv:2309.02632 (HERON), section 3.
    """

    def __init__(self, levels: Sequence[Level | Mapping[str, Any]]) -> None:
        self.levels = [_level(given) for given in levels]
        if not self.levels:
            raise UserError("a hierarchy has no level: name at least one")

    def margins(self, items: Sequence[Parts]) -> list[float]:
        """Return the margin of each level as a difference.

        A margin in standard deviations is multiplied by the unbiased one over `items` (0 with fewer than two values).
        """
        found: list[float] = []
        for level in self.levels:
            values = [value for item in items if (value := item.get(level.part)) is not None]
            spread = stdev(values) if len(values) > 1 else 0.0
            found.append(level.margin * (spread if level.margin_in == "std" else 1.0))
        return found

    def compare(self, a: Parts, b: Parts, margins: Sequence[float]) -> int:
        """Return 1 where `a` is better, -1 where `b` is, 0 where no level decides.

        A part that is missing or None could not be judged. Then nothing is decided: a less important level must not
        overrule what is unknown.
        """
        for level, margin in zip(self.levels, margins, strict=True):
            left, right = a.get(level.part), b.get(level.part)
            if left is None or right is None:
                return 0
            difference = right - left if level.lower_is_better else left - right
            if abs(difference) > margin:
                return 1 if difference > 0 else -1
        return 0

    def pairs(self, items: Sequence[Parts], margins: Sequence[float] | None = None) -> list[tuple[int, int]]:
        """Return (better, worse) positions of every decided pair; `margins` default to those over `items`."""
        margins = self.margins(items) if margins is None else margins
        found: list[tuple[int, int]] = []
        for i in range(len(items)):
            for j in range(i + 1, len(items)):
                sign = self.compare(items[i], items[j], margins)
                if sign:
                    found.append((i, j) if sign > 0 else (j, i))
        return found

    def ranks(self, items: Sequence[Parts], margins: Sequence[float] | None = None) -> list[float]:
        """Return (wins - losses) / (n - 1) of each item against the others, from -1 to 1; 0 for a single item."""
        return net_wins(self.pairs(items, margins), len(items))


def net_wins(pairs: Sequence[tuple[int, int]], count: int) -> list[float]:
    """Return (wins - losses) / (count - 1) of each of `count` items in (better, worse) pairs."""
    balance = [0] * count
    for better, worse in pairs:
        balance[better] += 1
        balance[worse] -= 1
    return [value / max(1, count - 1) for value in balance]


def parts_of(rollout: Rollout) -> dict[str, float | None]:
    """Return what a hierarchy compares: the parts of the score, and the reward itself under the name `reward`."""
    score = rollout.score
    return {} if score is None else {"reward": score.reward, **score.parts}


def _level(given: Level | Mapping[str, Any]) -> Level:
    if isinstance(given, Level):
        return given
    try:
        return Level(**given)
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"hierarchy level {dict(given)}: {reasons}") from None
