"""Rewards for machine translation: a policy's output in; its score by format, thought, comparison and metric out.

ExTrans (arXiv 2505.12996) compares the translation with an exemplar; DeepTrans (arXiv 2504.10187) grades it alone; both
reward the thought and require the format. Constants that the papers do not state are fields of TranslationConfig.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rapidfuzz.distance import Levenshtein

from llmrl.errors import UserError
from llmrl.types import Score
from llmrl.verify.judge.judge import AnyJudge, Canary, Question, both_orders, get_judge
from llmrl.verify.thinking import without_thinking
from llmrl.verify.translation.language import base_language, is_language
from llmrl.verify.translation.metrics import LOCAL_METRICS, metric_value, surface_metrics

Mode = Literal["compare", "grade", "light", "metric"]

LEVELS = {"much_worse": -2, "worse": -1, "comparable": 0, "better": 1, "much_better": 2}
THOUGHTS = {"no_analysis": 0, "slight_analysis": 1, "detailed_analysis": 2}
COPY_CHARS, COPY_IDEOGRAPHS = 12, 4
"""Letters per window in the search for copies; ideographs say about three times as much."""
EDITED = 50
"""A text that differs from another in one of this many letters (or in one letter at all) is a copy of it."""
COPIED_SHARE = 0.8
"""Share of copied windows from which a text is a copy. Human translations full of names reach 0.79."""


@dataclass(frozen=True, kw_only=True)
class TranslationConfig:
    """Weights, limits and constants of the translation reward."""

    mode: Mode = "compare"
    """compare: against an exemplar (ExTrans). grade: 0-100 by the judge (DeepTrans). light: format and language only,
    for directions in which no judge can be trusted. metric: the metric alone."""
    judged_directions: Sequence[str] = ()
    """Directions, such as en-zh, in which `mode` applies; all others use mode light. Empty: it applies in all."""
    require_thought: bool = True
    """The output must be `<think> thought </think> translation`. False: whatever is outside the thinking is."""
    check_format: bool = True
    """Ask the judge (compare, grade) whether the translation stands alone, with no explanation attached."""
    levels: Literal[3, 5] = 5
    """Levels of the comparison; 5 adds much_better and much_worse. Both score 1 to 5, with 3 for comparable."""
    on_contradiction: Literal["tie", "abstain"] = "tie"
    """Result when the two orders of the same pair contradict each other."""
    comparison_weight: float = 1.0
    grade_weight: float = 1.0
    thought_weight: float = 1.0
    """DeepTrans uses 20 (with grades up to 100)."""
    metric_weight: float = 1.0
    light_reward: float = 1.0
    metric: str | None = None
    """URL of a metric server (scripts/serve_translation_metric), or chrf, bleu or ter against the row's `reference`."""
    surface: Sequence[str] = ("chrf", "bleu")
    """sacrebleu metrics to show (not reward) if the row has a `reference`. ter takes tens of milliseconds a row."""
    min_length_ratio: float = 0.1
    """Smallest allowed ratio of characters, translation over source."""
    max_length_ratio: float = 8.0
    min_copy_chars: int = 12
    """A copy of the exemplar, or one with a letter in 50 changed, earns 0 from this length on; shorter ones may agree
    by chance."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """A policy's output, split into its parts."""

    thought: str
    translation: str


@dataclass(frozen=True, kw_only=True)
class TranslationRow:
    """The texts and languages that a translation is judged by."""

    source: str
    source_language: str
    target_language: str
    exemplar: str | None = None
    reference: str | None = None


FORMAT = Question(
    name="translation_format",
    instructions=(
        "A translator was asked for nothing but the translation of a source text. Say what the output is: the "
        "translation only, the translation with something added (an explanation, a note, an alternative, the source "
        "text), or something else."
    ),
    fields={"kind": Literal["translation_only", "translation_with_additions", "something_else"]},
    canaries=(
        Canary(
            case={"source": "The river froze early that year.", "output": "Der Fluss fror in jenem Jahr fr\u00fch zu."},
            expected={"kind": "translation_only"},
        ),
        Canary(
            case={
                "source": "The river froze early that year.",
                "output": "Der Fluss fror in jenem Jahr fr\u00fch zu. (Note: 'early' was rendered as 'fr\u00fch'; one "
                "could also say 'zeitig'. I hope this helps!)",
            },
            expected={"kind": "translation_with_additions"},
        ),
    ),
)
THOUGHT = Question(
    name="translation_thought",
    instructions=(
        "Before translating the source text, a translator wrote down a thought. Say how far the thought analyses the "
        "source and how to render it. Length alone is no analysis, and neither is a repetition of the source."
    ),
    fields={"kind": Literal["no_analysis", "slight_analysis", "detailed_analysis"]},
    canaries=(
        Canary(
            case={"source": "He kicked the bucket.", "thought": "I will translate this now. Let me translate it."},
            expected={"kind": "no_analysis"},
        ),
    ),
)
_CANARY_CASE = {"source": "The cat sleeps on the warm stove.", "source_language": "en", "target_language": "de"}
_GOOD, _BAD = "Die Katze schl\u00e4ft auf dem warmen Ofen.", "Der Hund isst den kalten Tisch."
GRADE = Question(
    name="translation_grade",
    instructions=(
        "Grade the translation of the source text from 0 (wrong or no translation) to 100 (as good as that of an "
        "excellent professional), by how faithful it is, how it reads, and how well it keeps style and imagery."
    ),
    fields={"reason": str, "grade": range(101)},
    canaries=(
        Canary(case={**_CANARY_CASE, "translation": _GOOD}, expected={"grade": range(60, 101)}),
        Canary(case={**_CANARY_CASE, "translation": _BAD}, expected={"grade": range(41)}),
    ),
)
COMPARISON = (
    "Compare two translations of one source text by how faithful they are, how they read, and how well they keep style "
    "and imagery. Which stands first says nothing about quality; length and fluency do not make up for a changed "
    "meaning. Say what translation_a is in comparison with translation_b."
)
COMPARE = {
    levels: Question(
        name="translation_comparison",
        instructions=COMPARISON,
        fields={"reason": str, "verdict": kind},
        canaries=tuple(
            Canary(case={**_CANARY_CASE, "translation_a": a, "translation_b": b}, expected={"verdict": expected})
            for a, b, expected in ((_GOOD, _BAD, best), (_BAD, _GOOD, worst), (_GOOD, _GOOD, "comparable"))
        ),
    )
    for levels, kind, best, worst in (
        (3, Literal["worse", "comparable", "better"], "better", "worse"),
        (5, Literal["much_worse", "worse", "comparable", "better", "much_better"], "much_better", "much_worse"),
    )
}


async def translation_score(
    completion: str, row: TranslationRow, config: TranslationConfig, judge: Any = None
) -> Score:
    """Score one translation: 0 if the format is wrong or it is not a translation, else the weighted sum of its parts.

        compare   comparison_weight * (1..5) + thought_weight * (0..2) + metric_weight * (0..1)
        grade     grade_weight * (0..100) + thought_weight * (0..2) + metric_weight * (0..1)
        light     light_reward
        metric    metric_weight * (0..1)

    Leave out the thought's term if `require_thought` is false, and the metric's if no metric is set. If the judge
    abstains on any term, the score is an abstention.

    Args:
        completion: the policy's output.
        row: source, languages, and the texts to compare with.
        config: mode and weights.
        judge: a judge object or its configuration, for modes that use one.

    Raises:
        UserError: the mode needs a column, a judge or a metric that is missing.
        EndpointError: the judge or the metric server failed.
    """
    config = check_row(row, config)
    chosen_judge = get_judge(judge) if config.mode in ("compare", "grade") else None
    output, fault = _first_fault(completion, row, config)
    info: dict[str, Any] = {"mode": config.mode, "translation": output.translation if output else ""}
    if fault is not None or output is None:
        return Score(reward=0.0, parts={"format": 0.0}, info={**info, "fault": fault})
    if row.reference is not None:
        info["surface"] = surface_metrics(output.translation, row.reference, row.target_language, config.surface)
    if config.mode == "light":
        return Score(reward=config.light_reward, parts={"format": 1.0}, info=info)
    if chosen_judge is not None and config.check_format:
        kind = await _choice(chosen_judge, FORMAT, {"source": row.source, "output": output.translation}, "kind")
        if kind is None:
            return Score(reward=None, parts={"format": None}, info={**info, "abstained": ["format"]})
        if kind != "translation_only":
            return Score(reward=0.0, parts={"format": 0.0}, info={**info, "fault": kind})
    parts: dict[str, float | None] = {"format": 1.0, **await _judged_parts(output, row, config, chosen_judge)}
    weights = {
        "comparison": config.comparison_weight,
        "grade": config.grade_weight,
        "thought": config.thought_weight,
        "metric": config.metric_weight,
    }
    abstained = [name for name, part in parts.items() if part is None]
    if abstained:
        return Score(reward=None, parts=parts, info={**info, "abstained": abstained})
    reward = sum(weights[name] * part for name, part in parts.items() if name in weights and part is not None)
    return Score(reward=reward, parts=parts, info=info)


def parse_output(completion: str, *, require_thought: bool = True) -> Output | None:
    """Split `<think> thought </think> translation`; None when it has another form.

    With `require_thought` the form is exactly one thought, at the start, with neither part empty. Without it, all text
    outside the thinking is the translation, and only that must not be empty.
    """
    text = completion.strip()
    thought, _, _ = text.removeprefix("<think>").partition("</think>")
    one_block = text.startswith("<think>") and text.count("<think>") == text.count("</think>") == 1
    if require_thought and not (one_block and thought.strip()):
        return None
    translation = without_thinking(text).strip()
    return Output(thought=thought.strip() if one_block else "", translation=translation) if translation else None


def copied_share(source: str, translation: str) -> float:
    """Return the share of the shorter text that occurs verbatim in the other: 1 for a copy, even one with additions.

    Windows of 12 letters, or of 4 where the source is written in ideographs, are counted, ignoring case, spaces and
    punctuation. Shorter texts are compared as a whole.
    """
    a, b = _letters(source), _letters(translation)
    size = COPY_IDEOGRAPHS if len(IDEOGRAPH.findall(a)) > len(a) / 2 else COPY_CHARS
    if min(len(a), len(b)) < size:
        return float(a == b)
    windows_a, windows_b = _windows(a, size), _windows(b, size)
    return len(windows_a & windows_b) / min(len(windows_a), len(windows_b))


def _is_judged(row: TranslationRow, config: TranslationConfig) -> bool:
    directions = [direction.split("-") for direction in config.judged_directions]
    if not all(len(direction) == 2 for direction in directions):
        raise UserError(f"translation_compare: judged_directions {config.judged_directions}: give a list like [en-zh]")
    own = [base_language(row.source_language), base_language(row.target_language)]
    return own in [[base_language(code) for code in direction] for direction in directions]


def check_row(row: TranslationRow, config: TranslationConfig) -> TranslationConfig:
    """Return the configuration that applies to a row, in whose direction the mode may be another.

    Raises:
        UserError: an option is wrong, or the row lacks what the mode needs.
    """
    if config.judged_directions and not _is_judged(row, config):
        config = dataclasses.replace(config, mode="light", metric=None)
    _check(row, config)
    return config


def _check(row: TranslationRow, config: TranslationConfig) -> None:
    def need(ok: bool, message: str) -> None:
        if not ok:
            raise UserError(f"translation_compare: {message}")

    modes = ("compare", "grade", "light", "metric")
    need(config.mode in modes, f"mode is {config.mode!r}: use one of {', '.join(modes)}")
    need(config.levels in COMPARE, f"levels is {config.levels!r}: use 3 or 5")
    unknown = sorted(set(config.surface) - set(LOCAL_METRICS))
    need(not unknown, f"surface names {unknown}: use any of {', '.join(LOCAL_METRICS)}")
    need(bool(row.source.strip()), "the row's source text is empty")
    need(
        config.mode != "compare" or bool(row.exemplar), "mode compare needs the column `exemplar`; see also mode light"
    )
    need(config.mode != "metric" or config.metric is not None, "mode metric needs `metric`")
    local = config.metric in LOCAL_METRICS
    need(
        config.metric is None or local or config.metric.startswith(("http://", "https://")),
        f"metric is {config.metric!r}: use chrf, bleu, ter or the URL of a metric server",
    )
    need(not local or bool(row.reference), f"metric {config.metric} needs the column `reference`")


def _first_fault(completion: str, row: TranslationRow, config: TranslationConfig) -> tuple[Output | None, str | None]:
    """Split the output; return it with the first fault that a rule finds (None: no fault). Cheap checks come first."""
    output = parse_output(completion, require_thought=config.require_thought)
    if output is None:
        return None, "not in the form <think> thought </think> translation"
    ratio = len(output.translation) / len(row.source.strip())
    if not config.min_length_ratio <= ratio <= config.max_length_ratio:
        return output, f"length is {ratio:.2f} of the source's"
    if copied_share(row.source, output.translation) >= COPIED_SHARE:
        return output, "copy of the source"
    if not is_language(output.translation, row.target_language, source_text=row.source):
        return output, f"not in language {row.target_language}"
    if row.exemplar is not None:
        letters = _letters(output.translation)
        if len(letters) >= config.min_copy_chars and _is_edited(letters, _letters(row.exemplar)):
            return output, "copy of the exemplar"
    return output, None


async def _judged_parts(
    output: Output, row: TranslationRow, config: TranslationConfig, judge: AnyJudge | None
) -> dict[str, float | None]:
    """Compute the parts that need a judge or a metric, all at the same time."""
    pending: dict[str, Any] = {}
    if judge is not None:
        if config.mode == "compare":
            pending["comparison"] = _comparison(judge, output, row, config)
        else:
            pending["grade"] = _grade(judge, output, row)
        if config.require_thought:
            pending["thought"] = _thought(judge, output, row)
    if config.metric is not None:
        pending["metric"] = metric_value(
            config.metric, row.source, output.translation, row.reference, row.target_language
        )
    return dict(zip(pending, await asyncio.gather(*pending.values()), strict=True))


async def _comparison(judge: AnyJudge, output: Output, row: TranslationRow, config: TranslationConfig) -> float | None:
    """Compare with the exemplar: 1 (much worse) to 5 (much better), averaged over both orders."""
    # With 3 levels, "better" and "worse" take the extremes, so that the scale is 1 to 5 either way.
    unit = 1 if config.levels == 5 else 2

    async def prefer(a: str, b: str) -> float | None:
        case = {**_languages(row), "translation_a": a, "translation_b": b}
        level = await _choice(judge, COMPARE[config.levels], case, "verdict")
        return None if level is None else float(LEVELS[level] * unit)

    exemplar = row.exemplar or ""
    preference = await both_orders(prefer, output.translation, exemplar, on_contradiction=config.on_contradiction)
    return None if preference is None else 3.0 + preference


async def _grade(judge: AnyJudge, output: Output, row: TranslationRow) -> float | None:
    verdict = await judge.ask(GRADE, {**_languages(row), "translation": output.translation})
    return None if verdict.values is None else float(verdict.values["grade"])


async def _thought(judge: AnyJudge, output: Output, row: TranslationRow) -> float | None:
    kind = await _choice(judge, THOUGHT, {"source": row.source, "thought": output.thought}, "kind")
    return None if kind is None else float(THOUGHTS[kind])


async def _choice(judge: AnyJudge, question: Question, case: dict[str, str], name: str) -> str | None:
    verdict = await judge.ask(question, case)
    return None if verdict.values is None else verdict.values[name]


def _languages(row: TranslationRow) -> dict[str, str]:
    return {
        "source": row.source,
        "source_language": row.source_language,
        "target_language": row.target_language,
    }


def _letters(text: str) -> str:
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", text).casefold())


IDEOGRAPH = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")


def _windows(letters: str, size: int) -> set[str]:
    return {letters[i : i + size] for i in range(len(letters) - size + 1)}


def _is_edited(letters: str, original: str) -> bool:
    """Return whether a text is another one, with hardly a letter changed, added or left out."""
    allowed = max(1, len(original) // EDITED)
    return Levenshtein.distance(letters, original, score_cutoff=allowed) <= allowed


def config_from(options: dict[str, Any]) -> TranslationConfig:
    """Make a TranslationConfig from a reward's keyword arguments.

    Raises:
        UserError: an option is unknown.
    """
    known = [f.name for f in dataclasses.fields(TranslationConfig)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise UserError(f"translation_compare: unknown options {unknown}; known: {', '.join(known)}")
    return TranslationConfig(**options)
