"""Short-answer scoring: a text and its gold answers in; exact match, F1, substring and two papers' rewards out.

Everything here is linear in the length of the text and accepts any string, including lone surrogates and NUL.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from llmrl.errors import UserError
from llmrl.types import Message, content_text
from llmrl.verify.thinking import without_thinking

GOLD_SEPARATOR = "<|answer_split|>"
"""Joins several gold answers in DeepResearcher rows."""
_PUNCTUATION_TO_NOTHING = dict.fromkeys(map(ord, string.punctuation))
_PUNCTUATION_TO_SPACE = dict.fromkeys(map(ord, string.punctuation), " ")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_TAG = re.compile(r"</?(?:think|search|information|answer)>")
# Search-R1's grammar: start -> think -> (search -> information -> think)* -> answer -> end.
_NEXT_TAGS = {
    "start": {"think"},
    "think": {"search", "answer"},
    "search": {"information"},
    "information": {"think"},
    "answer": set(),
}


# --- normalizers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Normalizer:
    """A way to compare answers."""

    normalize: Callable[[str], str]
    """Maps a text to the form that is compared; its tokens are separated by single spaces."""
    multiset: bool
    """Whether F1 counts repeated tokens (SQuAD) or collapses them (DeepResearcher)."""


def squad_em(text: str) -> str:
    """Normalize as SQuAD and Search-R1: lower case, delete ASCII punctuation, drop a/an/the, squeeze spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION_TO_NOTHING)).split())


def deepresearcher_f1(text: str) -> str:
    """Normalize as DeepResearcher (arXiv 2504.03160): lower case, ASCII punctuation to spaces, articles stay."""
    return " ".join(text.lower().translate(_PUNCTUATION_TO_SPACE).split())


def multilingual(text: str) -> str:
    """Normalize any script as `squad_em` does English: NFKC, case folding, no Unicode punctuation or articles.

    In scripts written without spaces each character becomes a token, because F1 needs tokens.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(_ARTICLES.sub(" ", folded.translate(_MULTILINGUAL)).split())


class _MultilingualTable(dict[int, str]):
    """Code point -> replacement, computed on first use: "" for punctuation, " c " in scripts without spaces."""

    # Thai to Lao, Burmese, Khmer; kana to bopomofo, Han with its extensions.
    UNSPACED = (
        *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF)),
        *((0x3040, 0x312F), (0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)),
    )

    def __missing__(self, code: int) -> str:
        char = chr(code)
        if unicodedata.category(char).startswith("P"):
            char = ""
        elif any(low <= code <= high for low, high in self.UNSPACED):
            char = f" {char} "
        self[code] = char
        return char


_MULTILINGUAL = _MultilingualTable()


NORMALIZERS: dict[str, Normalizer] = {
    "squad_em": Normalizer(squad_em, multiset=True),
    "deepresearcher_f1": Normalizer(deepresearcher_f1, multiset=False),
    "multilingual": Normalizer(multilingual, multiset=True),
}


def get_normalizer(name: str) -> Normalizer:
    """Return the normalizer of a name; UserError lists the known names."""
    if name not in NORMALIZERS:
        raise UserError(f"normalizer {name!r} is unknown: use one of {', '.join(NORMALIZERS)}")
    return NORMALIZERS[name]


def _compared_form(text: str, normalizer: Normalizer) -> str:
    # An answer made only of articles or punctuation ("The", "?") would normalize to nothing and then equal every other
    # such answer, so compare it as it is written.
    return normalizer.normalize(text) or " ".join(text.casefold().split())


# --- measures ---------------------------------------------------------------------------------------------------------


def exact_match(prediction: str, golds: Iterable[str], normalizer: str = "squad_em") -> float:
    """Return 1.0 if the normalized prediction equals a normalized gold answer, else 0.0."""
    chosen = get_normalizer(normalizer)
    predicted = _compared_form(prediction, chosen)
    return float(bool(predicted) and any(predicted == _compared_form(gold, chosen) for gold in golds))


def substring_match(prediction: str, golds: Iterable[str], normalizer: str = "squad_em") -> float:
    """Return 1.0 if a normalized gold answer occurs in the normalized prediction (Search-R1's substring EM), else 0.0.

    Listing many answers raises it, so use it to measure or for short answers, not to train.
    """
    chosen = get_normalizer(normalizer)
    predicted = _compared_form(prediction, chosen)
    gold_forms = (_compared_form(gold, chosen) for gold in golds)
    return float(any(bool(gold) and gold in predicted for gold in gold_forms))


def f1(prediction: str, golds: Iterable[str], normalizer: str = "squad_em") -> float:
    """Return the largest token F1 of the prediction over the gold answers: 2PR / (P + R), 0 without shared tokens.

    `squad_em` and `multilingual` count repeated tokens (Rajpurkar et al. 2016), `deepresearcher_f1` compares sets.
    """
    chosen = get_normalizer(normalizer)
    predicted = _token_counts(prediction, chosen)
    return max((_f1_of_counts(predicted, _token_counts(gold, chosen)) for gold in golds), default=0.0)


def _token_counts(text: str, normalizer: Normalizer) -> Counter[str]:
    tokens = _compared_form(text, normalizer).split()
    return Counter(tokens) if normalizer.multiset else Counter(set(tokens))


def _f1_of_counts(predicted: Counter[str], gold: Counter[str]) -> float:
    shared = (predicted & gold).total()
    return 2 * shared / (predicted.total() + gold.total()) if shared else 0.0


# --- extraction -------------------------------------------------------------------------------------------------------


def completion_text(completion: str | list[Message]) -> str:
    """Return a completion's text: itself, or the content of its last assistant message ("" if there is none)."""
    if isinstance(completion, str):
        return completion
    replies = [message for message in completion if message.get("role") == "assistant"]
    return content_text(replies[-1].get("content")) if replies else ""


def extract_tag(text: str, tag: str = "answer") -> str | None:
    """Return the content of the last closed <tag>...</tag>, stripped; None if there is none.

    `<answer>a</answer> ... <answer>b</answer>` gives "b"; an opening tag that is never closed is ignored.
    """
    opening, closing = f"<{tag}>", f"</{tag}>"
    start = text.rfind(opening, 0, max(text.rfind(closing), 0))
    if start < 0:
        return None
    start += len(opening)
    return text[start : text.index(closing, start)].strip()


def gold_answers(value: Any) -> list[str]:
    """Return the gold answers of a question-answering row, in order, without repetitions or blanks.

    Takes a string (parts joined by `<|answer_split|>` are separated), a number, a list or array of those (NQ's
    `answer` and `golden_answers`), SQuAD's {"text": [...]}, TriviaQA's {"value", "aliases"} and Search-R1's
    {"ground_truth": {"target": [...]}}.
    """
    return list(
        dict.fromkeys(part for text in _leaves(value) for part in map(str.strip, text.split(GOLD_SEPARATOR)) if part)
    )


def _leaves(value: Any) -> Iterator[str]:
    if hasattr(value, "tolist"):  # parquet rows hold lists as arrays
        value = value.tolist()
    if isinstance(value, dict):
        value = [value[key] for key in ("ground_truth", "target", "text", "value", "aliases") if key in value]
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    elif value is not None:
        yield str(value)


# --- whole-response rewards of two papers -----------------------------------------------------------------------------


def deepresearcher_reward(text: str, golds: Iterable[str]) -> float:
    """Return DeepResearcher's reward for format and F1 (arXiv 2504.03160, section 3): -1, or F1 in [0, 1].

    It is -1 if the think, answer or tool_call tags do not pair up (as many closings as openings, and one after the last
    opening) or there is no answer outside the thinking; else the best set F1 of the FIRST such answer, in lower case.

    Args:
        text: the policy's own text of all turns, without observations, because tags inside web text would count.
        golds: gold answers; the best match counts.
    """
    lowered = text.lower()
    for tag in ("tool_call", "think", "answer"):
        opening, closing = f"<{tag}>", f"</{tag}>"
        if lowered.count(opening) != lowered.count(closing) or lowered.rfind(opening) > lowered.rfind(closing):
            return -1.0
    answered = without_thinking(lowered)
    start = answered.find("<answer>")
    end = answered.find("</answer>", start)
    if start < 0 or end < 0:
        return -1.0
    return f1(answered[start + len("<answer>") : end], golds, "deepresearcher_f1")


def search_r1_format(text: str) -> bool:
    """Return whether a transcript follows Search-R1's grammar (arXiv 2505.15117):

        start -> think -> (search -> information -> think)* -> answer -> end

    Every tag must be closed before the next one opens, with only white space between them.
    """
    previous, inside, position = "start", None, 0
    for match in _TAG.finditer(text):
        name, closes = match.group().strip("</>"), match.group().startswith("</")
        if closes:
            if inside != name:
                return False
            previous, inside = name, None
        else:
            if inside is not None or name not in _NEXT_TAGS[previous] or text[position : match.start()].strip():
                return False
            inside = name
        position = match.end()
    return previous == "answer" and inside is None and not text[position:].strip()


def search_r1_reward(
    text: str,
    golds: list[str],
    *,
    structure_format_score: float = 0.2,
    retrieval_score: float = 0.0,
    final_format_score: float = 0.1,
    normalizer: str = "squad_em",
    well_formed: bool | None = None,
) -> float:
    """Return Search-R1's reward for exact match, format and retrieval (arXiv 2505.15117).

    | last <answer> | transcript well-formed                                  | not                            |
    | correct       | 1                                                       | 1 - structure_format_score     |
    | wrong         | structure_format_score (+ retrieval_score, see below)   | final_format_score             |
    | missing       | the same                                                | 0                              |

    The answer is read outside the thinking.

    Args:
        text: the transcript, with the environment's <information> blocks and without the prompt.
        golds: gold answers; the best match counts.
        structure_format_score: see the table; 0.2 in the paper's scripts.
        retrieval_score: added if some <information> block contains a gold answer.
        final_format_score: see the table; 0.1 in the paper's scripts.
        normalizer: how answers are compared.
        well_formed: overrides the result of `search_r1_format`.
    """
    if well_formed is None:
        well_formed = search_r1_format(text)
    answer = extract_tag(without_thinking(text))
    if answer is not None and exact_match(answer, golds, normalizer):
        return 1.0 if well_formed else 1.0 - structure_format_score
    if not well_formed:
        return 0.0 if answer is None else final_format_score
    retrieved = retrieval_score and any(
        substring_match(block, golds, normalizer) for block in _information_blocks(text)
    )
    return structure_format_score + (retrieval_score if retrieved else 0.0)


def _information_blocks(text: str) -> list[str]:
    # Only called on a well-formed transcript, in which every opening tag has a closing one.
    return [part.partition("</information>")[0] for part in text.split("<information>")[1:]]
