"""Reward for translation: comparison with an exemplar (ExTrans), a grade (DeepTrans), rules only, or a metric.

The policy answers `<think> thought </think> translation`. A row has `source`, `source_language`, `target_language`, and
`exemplar` and `reference` if the mode needs them; the languages can also be fixed for the run in the reward's args.

    rewards:
      - fn: rewards/translation_compare.py:translation_compare
        args:
          judge: {base_url: "http://localhost:8000/v1", model: deepseek-v3}
          options: {mode: compare, metric: "http://localhost:8100"}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmrl.types import Score
from llmrl.verify.judge.judge import OfflineJudge, get_judge
from llmrl.verify.translation.compare import TranslationRow, check_row, config_from, translation_score
from llmrl.verify.translation.language import check_language


async def translation_compare(
    completion: str,
    source: str,
    source_language: str,
    target_language: str,
    exemplar: str | None = None,
    reference: str | None = None,
    judge: Any = None,
    options: Mapping[str, Any] | None = None,
    prefilled: str = "",
) -> Score:
    """Score one translation; see `llmrl.verify.translation.compare.translation_score` for the terms of the reward.

    Args:
        completion: the policy's output.
        source: the text to translate.
        source_language: ISO 639-1 code.
        target_language: ISO 639-1 code.
        exemplar: the translation to compare with (mode compare).
        reference: a human translation (metrics chrf, bleu, ter).
        judge: see `llmrl.verify.judge.judge.get_judge` (modes compare and grade).
        options: fields of TranslationConfig.
        prefilled: how the prompt already begins the output, such as `<think>`.
    """
    row = TranslationRow(
        source=source,
        source_language=source_language,
        target_language=target_language,
        exemplar=exemplar,
        reference=reference,
    )
    return await translation_score(prefilled + completion, row, config_from(dict(options or {})), judge)


def check(row: dict[str, Any]) -> str | None:
    """Say that a text which the mode needs is missing or not a text, or that a language is unknown."""
    columns = ("source", "source_language", "target_language", "exemplar", "reference")
    texts: dict[str, Any] = {name: row.get(name) for name in columns}
    for name, text in texts.items():
        if not isinstance(text, str) and not (text is None and name in ("exemplar", "reference")):
            return f"the column {name} is {text!r}; it must be a text"
    translation = TranslationRow(**texts)
    config = check_row(translation, config_from(dict(row.get("options") or {})))
    if config.mode in ("compare", "grade"):
        get_judge(row.get("judge"))
    check_language(translation.target_language)
    return None


_SOURCE = "The ministers announced the new rules on Saturday."
_GOOD = "\u90e8\u957f\u4eec\u4e8e\u5468\u516d\u5ba3\u5e03\u4e86\u65b0\u89c4\u5b9a\u3002"
_EXEMPLAR = "\u90e8\u957f\u5468\u516d\u8bf4\u6709\u65b0\u7684\u89c4\u5219\uff0c\u662f\u5b83\u4eec\u3002"
_THOUGHT = "<think>'rules' here are regulations; Saturday goes before the verb.</think>"


def _example_judge(question: str, case: dict[str, str]) -> dict[str, Any] | None:
    """Prefer _GOOD to any other translation, recognize notes as additions, abstain on question marks."""
    if question == "translation_format":
        kind = "translation_with_additions" if "Note" in case["output"] else "translation_only"
        return {"kind": kind}
    if question == "translation_thought":
        return {"kind": "detailed_analysis" if "regulations" in case["thought"] else "no_analysis"}
    a, b = case["translation_a"], case["translation_b"]
    if "?" in a + b:
        return None
    verdict = "comparable" if (a == _GOOD) == (b == _GOOD) else "much_better" if a == _GOOD else "much_worse"
    return {"reason": "known", "verdict": verdict}


_ROW = {
    "source": _SOURCE,
    "source_language": "en",
    "target_language": "zh",
    "exemplar": _EXEMPLAR,
    "reference": _GOOD,
    "judge": OfflineJudge(_example_judge),
}
_LIGHT = {**_ROW, "judge": None, "options": {"mode": "light"}}
EXAMPLES = [
    # Much better than the exemplar (5), detailed thought (2).
    {**_ROW, "completion": f"{_THOUGHT} {_GOOD}", "reward": 7.0},
    {**_ROW, "prefilled": "<think>", "completion": f"{_THOUGHT} {_GOOD}".removeprefix("<think>"), "reward": 7.0},
    # As good as the exemplar (3), a thought without analysis (0).
    {
        **_ROW,
        "completion": "<think>Easy.</think>\u90e8\u957f\u4eec\u5468\u516d\u53d1\u5e03\u65b0\u89c4\u3002",
        "reward": 3.0,
    },
    # The judge abstains, which is not the same as wrong.
    {**_ROW, "completion": "<think>Easy.</think>\u90e8\u957f\u4eec\u5468\u516d\u53d1\u5e03?", "reward": None},
    # Malformed: no thought, two thoughts, nothing after the thought.
    {**_ROW, "completion": _GOOD, "reward": 0.0},
    {**_ROW, "completion": f"<think>a</think><think>b</think>{_GOOD}", "reward": 0.0},
    {**_ROW, "completion": f"{_THOUGHT}  ", "reward": 0.0},
    # Copies: of the source, of the source with the translation, of the exemplar.
    {**_ROW, "completion": f"{_THOUGHT}{_SOURCE}", "reward": 0.0},
    {**_ROW, "completion": f"{_THOUGHT}{_GOOD} {_SOURCE}", "reward": 0.0},
    {**_ROW, "completion": f"{_THOUGHT}{_EXEMPLAR}", "reward": 0.0},
    # The wrong language: Japanese and Korean for Chinese.
    {**_ROW, "completion": f"{_THOUGHT}\u571f\u66dc\u65e5\u306b\u767a\u8868\u3057\u307e\u3057\u305f", "reward": 0.0},
    {**_ROW, "completion": f"{_THOUGHT}\uc7a5\uad00\ub4e4\uc774 \ubc1c\ud45c\ud588\ub2e4", "reward": 0.0},
    # A note after the translation.
    {**_ROW, "completion": f"{_THOUGHT}{_GOOD}\uff08Note\uff09", "reward": 0.0},
    # Endless padding.
    {**_ROW, "completion": f"{_THOUGHT}{_GOOD * 200}", "reward": 0.0},
    # Light: only format and language count.
    {**_LIGHT, "completion": f"<think>Easy.</think>{_GOOD}", "reward": 1.0},
    {**_LIGHT, "completion": f"<think>Easy.</think>{_SOURCE}", "reward": 0.0},
    # A direction that is not judged: no judge is asked, and no exemplar is needed.
    {
        **_LIGHT,
        "exemplar": None,
        "completion": f"<think>Easy.</think>{_GOOD}",
        "options": {"judged_directions": ["zh-en"], "light_reward": 0.5},
        "reward": 0.5,
    },
    # A metric alone: the reference itself has a chrF of 100.
    {
        **_LIGHT,
        "completion": f"<think>x</think>{_GOOD}",
        "options": {"mode": "metric", "metric": "chrf"},
        "reward": 1.0,
    },
]
