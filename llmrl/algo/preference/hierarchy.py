"""HERON: compare two attempts by a ranked list of reward parts, the next one only where the last did not decide.

Nobody has to weigh correctness against length: correctness decides, and length only among equally correct ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import TYPE_CHECKING, Any, Literal

from llmrl.errors import UserError

if TYPE_CHECKING:
    from llmrl.config import LevelConfig
    from llmrl.types import Rollout

Parts = Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Level:
    """One reward part of the hierarchy, and how large a difference has to be to decide."""

    part: str
    margin: float = 0.0
    """Differences up to this much leave the decision to the next level."""
    margin_in: Literal["std", "value"] = "std"
    """The margin counts in standard deviations over what is compared, or is a difference itself."""
    lower_is_better: bool = False


class HierarchicalPreference:
    """Compares by levels, the most important first.

    Args:
        levels: as `Level`, as `LevelConfig`, or as dictionaries of their fields.

    With margins the preference need not be transitive: a may beat b by the second level and b beat c so, while c beats
    a by the first, where each step was too small to count. A Bradley-Terry fit (DPO, a reward model) averages that out.

    Source: Bukharin et al. 2023, arXiv:2309.02632 (HERON), section 3.
    """

    def __init__(self, levels: Sequence[Level | LevelConfig | dict[str, Any]]) -> None:
        self.levels = [_level(given) for given in levels]
        if not self.levels:
            raise UserError("a hierarchy needs at least one level")
        for level in self.levels:
            if level.margin < 0:
                raise UserError(f"hierarchy level {level.part}: margin {level.margin} must not be negative")

    def margins(self, items: Sequence[Parts]) -> list[float]:
        """The margin of each level as a difference: times the unbiased standard deviation over `items` where it is so
        counted (0 with fewer than two values).
        """
        found = []
        for level in self.levels:
            values = [value for item in items if (value := item.get(level.part)) is not None]
            spread = stdev(values) if len(values) > 1 else 0.0
            found.append(level.margin * (spread if level.margin_in == "std" else 1.0))
        return found

    def compare(self, a: Parts, b: Parts, margins: Sequence[float]) -> int:
        """1 where `a` is better, -1 where `b` is, 0 where no level decides.

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
        """(better, worse) of every pair that is decided, by position; `margins` are those of `items` unless given."""
        margins = self.margins(items) if margins is None else margins
        found = []
        for i in range(len(items)):
            for j in range(i + 1, len(items)):
                verdict = self.compare(items[i], items[j], margins)
                if verdict:
                    found.append((i, j) if verdict > 0 else (j, i))
        return found

    def ranks(self, items: Sequence[Parts], margins: Sequence[float] | None = None) -> list[float]:
        """(wins - losses) / (n - 1) of each item against the others, from -1 to 1; 0 for a single item."""
        return net_wins(self.pairs(items, margins), len(items))


def net_wins(pairs: Sequence[tuple[int, int]], count: int) -> list[float]:
    """(wins - losses) / (count - 1) of each of `count` items in (better, worse) pairs."""
    balance = [0] * count
    for better, worse in pairs:
        balance[better] += 1
        balance[worse] -= 1
    return [value / max(1, count - 1) for value in balance]


def parts_of(rollout: Rollout) -> dict[str, float | None]:
    """What a hierarchy compares: the parts of the score, and the reward itself under the name `reward`."""
    score = rollout.score
    return {} if score is None else {"reward": score.reward, **score.parts}


def _level(given: Level | LevelConfig | dict[str, Any]) -> Level:
    if isinstance(given, Level):
        return given
    try:
        return Level(**(given if isinstance(given, dict) else vars(given)))
    except TypeError as error:
        raise UserError(f"hierarchy level {given}: {error}") from None
