"""The budgets for rollouts without a score: beyond them, the scored ones are a biased sample."""

from __future__ import annotations

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
        shown = "".join(f"\n--- an error:\n{error}" for error in list(dict.fromkeys(errors))[:3])
        raise RunFailed(
            f"{len(errors)} of {total} {what} have no score because something failed, more than "
            f"verify.max_unscored_frac {options.max_unscored_frac} allows{shown}"
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
