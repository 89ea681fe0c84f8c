"""Decisions: the judge answers with one token, and the probability of each level is read from its log-probabilities.

That costs one output token instead of a written verdict, and gives a number between the levels where the judge is in
doubt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llmrl.errors import RunFailed, UserError

MIN_MASS = 0.5
"""Share of the probability that must be on the levels; below it the judge did not answer the question."""


def check_levels(levels: Mapping[str, float]) -> None:
    """Raise a UserError if levels cannot be told apart by one token: each needs a first letter of its own."""
    firsts = [level.strip().casefold()[:1] for level in levels]
    if len(levels) < 2 or "" in firsts or len(set(firsts)) < len(firsts):
        raise UserError(
            f"judge: the levels {list(levels)} cannot be decided by one token: give at least two, each with a first "
            "letter or digit of its own, such as yes and no, or 0 to 9"
        )


def decision_format(levels: Mapping[str, float]) -> str:
    """Return the sentence that tells a judge how to answer."""
    return f"Answer with one word and nothing else: {' | '.join(levels)}"


def decision_body(body: Mapping[str, Any], top_logprobs: int) -> dict[str, Any]:
    """Return the request for one token with the log-probabilities of its alternatives."""
    limit = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    return {**body, limit: 1, "logprobs": True, "top_logprobs": top_logprobs}


def read_decision(reply: Mapping[str, Any], levels: Mapping[str, float], where: str) -> dict[str, float]:
    """Return the probability of each level; they add up to 1.

    Raises:
        RunFailed: the server gives no log-probabilities.
        ValueError: less than MIN_MASS of the probability is on the levels.
    """
    alternatives = _alternatives(reply)
    if not alternatives:
        raise no_logprobs(where, "the reply has none")
    mass = dict.fromkeys(levels, 0.0)
    for token, logprob in alternatives:
        level = _level(token, levels)
        if level is not None and logprob <= 0:  # NaN is left out too
            mass[level] += math.exp(logprob)
    total = sum(mass.values())
    if total < MIN_MASS:
        seen = ", ".join(repr(token) for token, _ in alternatives[:5])
        raise ValueError(
            f"only {total:.0%} of the probability is on {', '.join(levels)}; the judge wanted to write {seen}. A model "
            "that thinks first cannot decide by one token: turn thinking off with extra_body"
        )
    return {level: value / total for level, value in mass.items()}


def no_logprobs(where: str, reason: str) -> RunFailed:
    """Return the error for a server that cannot be used for decisions."""
    return RunFailed(
        f"judge: a decision needs the log-probabilities of the answer, but {where} does not give them: {reason}. Use a "
        "server that has `logprobs` and `top_logprobs` (vLLM, SGLang, OpenAI's chat models), lower the judge's "
        "`top_logprobs`, or ask for a written verdict (decision: false)"
    )


def expected(probabilities: Mapping[str, float], levels: Mapping[str, float]) -> float:
    """Return the mean value of the levels."""
    return sum(probability * levels[level] for level, probability in probabilities.items())


def _alternatives(reply: Mapping[str, Any]) -> list[tuple[str, float]]:
    try:
        first = reply["choices"][0]["logprobs"]["content"][0]
        found = [(entry["token"], float(entry["logprob"])) for entry in first["top_logprobs"]]
        own = (first["token"], float(first["logprob"]))
    except (KeyError, IndexError, TypeError, ValueError):
        return []
    return found if not found or own[0] in dict(found) else [own, *found]


def _level(token: str, levels: Mapping[str, float]) -> str | None:
    """Return the level that a token is, or begins."""
    word = token.replace("\u2581", " ").replace("\u0120", " ").strip(" \t\n\"'*`.").casefold()
    for level in levels:
        name = level.strip().casefold()
        if word and (name.startswith(word) or (word.startswith(name) and not word[len(name) :].isalnum())):
            return level
    return None
