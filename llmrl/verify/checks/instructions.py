"""Verifiable instructions: the 25 checks of IFEval (arXiv 2311.07911), and more of the same kind.

A response and the arguments of one instruction go in, whether it was followed comes out. Written from the published
definitions; words and sentences are found by regular expressions instead of NLTK's models, and the language by
py3langid.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from llmrl.verify.checks.ifbench import IFBENCH_CHECKS
from llmrl.verify.checks.text_parts import sentences

Check = Callable[..., bool]

# --- parts of a text --------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Split a text into words of letters, digits and underscores."""
    return re.findall(r"\w+", text)


def _first_word(text: str) -> str:
    match = re.match(r"[\s\"'*_#(\u201c]*([^\s.,?!'\"]+)", text)
    return match.group(1).lower() if match else ""


def _last_word(text: str) -> str:
    found = re.findall(r"[\w'-]+", text)
    return found[-1].lower() if found else ""


def _compare(count: int, relation: str, wanted: int) -> bool:
    if relation not in ("at least", "less than", "at most", "exactly"):
        raise ValueError(f"relation is {relation!r}: use `at least` or `less than`")
    return {"at least": count >= wanted, "less than": count < wanted, "at most": count <= wanted}.get(
        relation, count == wanted
    )


def _language(text: str) -> str:
    import py3langid

    return str(py3langid.classify(text)[0])


# --- the checks -------------------------------------------------------------------------------------------------------


def _contains(text: str, keyword: str) -> bool:
    return re.search(re.escape(keyword), text, re.IGNORECASE) is not None


def _existence(text: str, keywords: list[str]) -> bool:
    return all(_contains(text, keyword) for keyword in keywords)


def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(len(re.findall(re.escape(keyword), text, re.IGNORECASE)), relation, frequency)


def _forbidden(text: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


def _letters(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(text.lower().count(letter.lower()), let_relation, let_frequency)


def _response_language(text: str, language: str) -> bool:
    return _language(text) == language.partition("-")[0]


def _num_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _compare(len(sentences(text)), relation, num_sentences)


def _num_paragraphs(text: str, num_paragraphs: int) -> bool:
    pieces = re.split(r"\s?\*\*\*\s?", text)
    if any(not piece.strip() for piece in pieces[1:-1]):
        return False
    return sum(bool(piece.strip()) for piece in pieces) == num_paragraphs


def _num_words(text: str, num_words: int, relation: str) -> bool:
    return _compare(len(words(text)), relation, num_words)


def _nth_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    pieces = re.split(r"\n\n", text)
    count = sum(bool(piece.strip()) for piece in pieces)
    if not 1 <= nth_paragraph <= min(count, len(pieces)):
        return False
    return count == num_paragraphs and _first_word(pieces[nth_paragraph - 1].strip()) == first_word.lower()


def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def _postscript(text: str, postscript_marker: str) -> bool:
    marker = postscript_marker.strip().lower()
    pattern = {"p.p.s": r"p\.\s?p\.\s?s", "p.s.": r"p\.\s?s\."}.get(marker, re.escape(marker))
    return re.search(rf"\s*{pattern}.*$", text.lower(), re.MULTILINE) is not None


def _bullets(text: str, num_bullets: int) -> bool:
    return len(re.findall(r"^\s*\*[^*].*$|^\s*-.*$", text, re.MULTILINE)) == num_bullets


def _constrained(text: str) -> bool:
    return any(f"My answer is {word}." in text for word in ("yes", "no", "maybe"))


def _highlights(text: str, num_highlights: int) -> bool:
    single = [found.strip("*").strip() for found in re.findall(r"\*[^\n*]*\*", text)]
    double = [found[2:-2].strip() for found in re.findall(r"\*\*[^\n*]*\*\*", text)]
    return sum(map(bool, single + double)) >= num_highlights


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"\s?{re.escape(section_spliter.strip())}\s?\d+\s?", text)) >= num_sections


def _json(text: str) -> bool:
    text = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.IGNORECASE)
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    return any(found.strip("<>").strip() for found in re.findall(r"<<[^\n]+>>", text))


def _two_responses(text: str) -> bool:
    pieces = text.split("******")
    if any(not piece.strip() for piece in pieces[1:-1]):
        return False
    answers = [piece.strip() for piece in pieces if piece.strip()]
    return len(answers) == 2 and answers[0] != answers[1]


def _repeat(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _copy(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower() == prompt_to_repeat.strip().lower()


def _end(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    count = sum(word.isupper() for word in re.findall(r"[\w]+(?:[-'][\w]+)*", text))
    return _compare(count, capital_relation, capital_frequency)


def _upper(text: str) -> bool:
    return text.isupper() and _language(text.lower()) == "en"


def _lower(text: str) -> bool:
    return text.islower() and _language(text) == "en"


def _word_once(text: str, keyword: str) -> bool:
    return len(re.findall(rf"\b{re.escape(keyword)}\b", text, re.IGNORECASE)) == 1


def _letter_count(text: str, N: int, relation: str = "at least") -> bool:
    return _compare(len(re.findall(r"[a-zA-Z]", text)), relation, N)


def _every_sentence(part: Callable[[str], str], text: str, word: str) -> bool:
    found = sentences(text)
    return bool(found) and all(part(sentence) == word.strip().lower() for sentence in found)


def _two_paragraphs(text: str) -> bool:
    return sum(bool(piece.strip()) for piece in re.split(r"\n\n", text)) == 2


CHECKS: dict[str, Check] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    "language:response_language": _response_language,
    "length_constraints:number_sentences": _num_sentences,
    "length_constraints:number_paragraphs": _num_paragraphs,
    "length_constraints:number_words": _num_words,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat,
    "startend:end_checker": _end,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _upper,
    "change_case:english_lowercase": _lower,
    "punctuation:no_comma": lambda text: "," not in text,
}
"""IFEval's instruction ids."""
MORE_CHECKS: dict[str, Check] = {
    "punctuation:punctuation_dot": lambda text: "." not in text,
    "punctuation:punctuation_exclamation": lambda text: "!" not in text,
    "keywords:word_once": _word_once,
    "first_word:first_word_answer": lambda text, first_word: _first_word(text) == first_word.strip().lower(),
    "first_word:first_word_sent": lambda text, first_word: _every_sentence(_first_word, text, first_word),
    "last_word:last_word_answer": lambda text, last_word: _last_word(text) == last_word.strip().lower(),
    "last_word:last_word_sent": lambda text, last_word: _every_sentence(_last_word, text, last_word),
    "letters:letter_counting": _letter_count,
    "count:lowercase_counting": lambda text, N: sum(word.islower() for word in words(text)) <= N,
    "count:count_unique": lambda text: len(set(map(str.lower, words(text)))) == len(words(text)),
    "paragraphs:paragraphs": lambda text: _num_paragraphs(text, 2),
    "paragraphs:paragraphs2": _two_paragraphs,
    "copy:copy": _copy,
}
"""Of the constraints that open-instruct trains on (arXiv 2507.02833), those with one plain reading."""


def find_check(instruction: str) -> Check:
    """Return the check of an instruction id.

    Raises:
        ValueError: the id is unknown.
    """
    known = CHECKS | MORE_CHECKS | IFBENCH_CHECKS
    check = known.get(instruction)
    if check is None:
        raise ValueError(f"the instruction id {instruction!r} is unknown; known: {', '.join(sorted(known))}")
    return check


def follows(response: str, instruction: str, arguments: Mapping[str, Any], *, loose: bool = False) -> bool:
    """Return whether a response follows one instruction; an empty response follows none.

    Args:
        response: what the policy wrote, without thinking.
        instruction: an id of CHECKS, MORE_CHECKS or IFBENCH_CHECKS.
        arguments: its keyword arguments; those that are None are left out, as data sets store them.
        loose: also accept the response without its first or last line, and without asterisks (IFEval's loose accuracy).

    Raises:
        ValueError: the id is unknown, or arguments are missing or of the wrong kind.
    """
    check = find_check(instruction)
    given = {name: _whole(value) for name, value in arguments.items() if value is not None}
    try:
        return any(
            bool(text.strip()) and check(text, **given) for text in (_variants(response) if loose else [response])
        )
    except (TypeError, AttributeError) as error:
        raise ValueError(f"the instruction {instruction!r} has the arguments {given!r}: {error}") from None


def _whole(value: Any) -> Any:
    """Undo the float that a column of mixed rows makes of a count."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _variants(response: str) -> list[str]:
    lines = response.split("\n")
    kept = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return kept + [text.replace("*", "") for text in kept]
