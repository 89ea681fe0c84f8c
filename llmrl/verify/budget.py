"""The budgets for rollouts without a score: beyond them, the scored ones are a biased sample."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llmrl.errors import RunFailed
from llmrl.types import Rollout
from llmrl.verify.options import VerifyConfig


def check_scores(rollouts: Sequence[Rollout], options: VerifyConfig, *, what: str) -> None:
    """Stop when too many rollouts failed to be scored, or were not judged.

    An error (of a reward, an environment or the engine) counts against `max_unscored_frac` alone, and an abstention,
    where a reward could not judge, against `max_abstained_frac` alone. One of either kind is always allowed.

    Args:
        rollouts: the rollouts of a step, or of an evaluation.
        options: the two budgets.
        what: what the message calls the rollouts, such as "rollouts of this step".

    Raises:
        RunFailed: a budget is exceeded. The message has the counts, and the first errors or the tasks not judged.
    """
    total = len(rollouts)
    errors = [error for r in rollouts if (error := r.error or (r.score.error if r.score else None))]
    if len(errors) > max(1, int(options.max_unscored_frac * total)):
        raise RunFailed(
            f"{len(errors)} of {total} {what} have no score because something failed, more than "
            f"verify.max_unscored_frac {options.max_unscored_frac} allows\n{_summary(errors)}"
        )
    if options.max_abstained_frac is None:
        return
    abstained = [r for r in rollouts if r.score is not None and r.score.reward is None and r.score.error is None]
    if len(abstained) > max(1, int(options.max_abstained_frac * total)):
        tasks = ", ".join(list(dict.fromkeys(r.task.id for r in abstained))[:5])
        raise RunFailed(
            f"{len(abstained)} of {total} {what} were not judged, more than verify.max_abstained_frac "
            f"{options.max_abstained_frac} allows; the tasks: {tasks}. Look at their references: a reward abstains "
            "where it cannot read one"
        )


def _summary(errors: Sequence[str]) -> str:
    """Return how often which kind of error occurred, the most frequent first, and the first one of each in full."""
    kinds: dict[str, list[str]] = {}
    for error in errors:
        kinds.setdefault(_kind(_headline(error)), []).append(error)
    shown = sorted(kinds.values(), key=len, reverse=True)[:3]
    lines = [f"{_times(len(kind))}: {_headline(kind[0])}" for kind in shown]
    if others := len(errors) - sum(map(len, shown)):
        lines.append(f"{_times(others)}: other errors")
    for kind in shown:
        headline, rest = _headline(kind[0]), kind[0].strip().partition("\n")[2].strip()
        if rest:
            lines.append(f"--- {headline}\n{rest}" if len(shown) > 1 else rest)
    return "\n".join(lines)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _headline(error: str) -> str:
    return (error.strip().splitlines() or [""])[0]


def _kind(headline: str) -> str:
    """Return what errors of one kind share: class and place. The text between often holds a value of the row."""
    place = re.search(r" \(.*, line \d+, in .*\)$", headline)
    if place is None:
        return re.sub(r"\d+(?:\.\d+)? s\b", "seconds", headline)  # how long a worker took before it died
    return headline.partition(":")[0] + place.group()
