"""Find the final answer in a completion: its box, or what it says the answer is, or the last mathematics in it.

Everything here is linear in the length of the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from llmrl.verify.checks.math_units import NUMBER
from llmrl.verify.thinking import without_thinking

MAX_ANSWER_LENGTH = 1000
"""Characters; anything longer does not count as an answer."""
TAIL_LENGTH = 10_000
"""Without a box, the answer is searched in this many characters at the end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Extraction:
    """The answer that was found in a completion."""

    answer: str | None
    """None if the completion gives no answer."""
    num_boxes: int
    """Number of \\boxed{} or \\fbox{} in the completion, outside the thinking."""


def extract_answer(completion: str, *, require_box: bool = False) -> Extraction:
    r"""Find the answer of a completion.

    It is the last box; without a box the last `<answer>...</answer>`, then `#### x`, then `answer is x`, then the last
    formula or number, then the whole completion if it is one word or letter. A number is never taken out of a formula:
    the answer of `$x = \frac{5}{3}$` is not 3.

    Only the last box counts. If it is unreadable (empty, never closed) there is no answer, and no earlier box replaces
    it, so several boxes never buy several guesses.

    Args:
        completion: any text; its thinking is removed first.
        require_box: return no answer if there is no box.
    """
    text = without_thinking(completion)
    num_boxes = text.count("\\boxed") + text.count("\\fbox")
    if num_boxes:
        return Extraction(answer=last_box(text), num_boxes=num_boxes)
    found = None if require_box else _unboxed_answer(text[-TAIL_LENGTH:])
    return Extraction(answer=found if found is not None and len(found) <= MAX_ANSWER_LENGTH else None, num_boxes=0)


def last_box(text: str) -> str | None:
    r"""Return what the last \boxed{...}, \boxed x or \fbox{...} holds; None if it is empty, unclosed or too long."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[start : start + MAX_ANSWER_LENGTH + len("\\boxed{}")]
    rest = rest.removeprefix("\\boxed").removeprefix("\\fbox").lstrip()
    if not rest.startswith("{"):  # \boxed 5
        bare = re.match(r"[^\s${}\\]+", rest)
        return bare.group().rstrip(".,;") or None if bare else None
    depth, escaped = 0, False
    for i, character in enumerate(rest):
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return rest[1:i].strip() or None
    return None


# --- without a box ----------------------------------------------------------------------------------------------------

_ANSWER_IS = re.compile(
    r"answers?(?:\s(?:to|of|for)\s[^.\n]{1,80}?)?[\s*_}]*(?:is|are|was|would be|should be|=|:|\uff1a|\n)+[\s:*=]*"
    r"|(?:correct|right)\s(?:option|choice)[\s*_]*(?:is|are|:)[\s:*]*"
    r"|\u7b54\u6848?[\s*]*(?:\u662f|\u4e3a|\u70ba|:|\uff1a)+[\s:*]*",
    re.IGNORECASE,
)
_FILLER = re.compile(
    r"^(?:(?:therefore|thus|hence|then|so|simply|just|indeed|exactly|clearly|now|equal to|given by|found to be|"
    r"the number|the value)[\s,:]+)+",
    re.IGNORECASE,
)
_COPULA = re.compile(r"(?:^|(?<=\s))(?:is|are|equals|be|becomes)(?:\s+(?:equal to|exactly|just))?[\s:*]+(?=\S)")
_IN_DOLLARS = re.compile(r"\$\$?((?:\\\$|[^$])+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_PROSE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")
_WORD_COMMANDS = re.compile(r"\\(?:text\w*|mathrm|mathbf|mbox|operatorname|begin|end)\s*\{[^{}]*\}|\\[a-zA-Z]+")


def _unboxed_answer(tail: str) -> str | None:
    tagged = re.findall(r"<answer>(.*?)</answer>", tail, re.DOTALL)
    if tagged:
        inner = tagged[-1].strip()
        return _first_line(inner) if "\n" not in inner else _unboxed_answer(inner)
    if "####" in tail and (answer := _hash_line(tail[tail.rfind("####") + 4 :])):
        return answer
    starts = [match.end() for match in _ANSWER_IS.finditer(tail)]
    if starts and (answer := _stated(tail[starts[-1] :])):
        return answer
    return _last_mathematics(tail) or _lone_word(tail)


def _hash_line(text: str) -> str | None:
    """Return the line after `####`, unless it is a heading (`#### Step 3`) with a text below it."""
    line = _first_line(text)
    is_heading = "\n" in text.strip() and re.match(r"[a-zA-Z]{2,}", text.lstrip(" *"))
    return None if is_heading else line


def _first_line(text: str) -> str | None:
    line = text.strip().split("\n", 1)[0].strip().strip("*").rstrip(".\u3002").strip()
    return line if 0 < len(line) <= MAX_ANSWER_LENGTH else None


def _stated(text: str) -> str | None:
    """Return the answer that a text begins with: mathematics in dollars, or the end of its first sentence.

    Of a sentence with a subject (`The largest $n$ is 34`) it is what follows the verb.
    """
    line = _first_line(text)
    if line is None:
        return None
    line = _FILLER.sub("", line)
    if in_dollars := _IN_DOLLARS.match(line):
        rest = line[in_dollars.end() :].strip(" .")
        if not re.match(r"(?:or|and|is|are|=)\b|,\s*\$", rest):
            return next(part for part in in_dollars.groups() if part is not None).strip() or None
    sentence = re.split(
        r"\.(?:\s|$)|\u3002|[!?;](?:\s|$)|,?\s(?:because|since|which)\b|,\s+(?:so|as)\b|,\s+not\b", line
    )[0]
    verbs = list(_COPULA.finditer(sentence))
    if verbs and not re.match(r"not\b", sentence[verbs[-1].end() :]):
        sentence = _FILLER.sub("", sentence[verbs[-1].end() :])
    elif verbs:
        return sentence.strip()
    whole = _IN_DOLLARS.fullmatch(sentence.strip())
    if whole:
        sentence = next(part for part in whole.groups() if part is not None)
    sentence = re.sub(r"(?<=\w)\s+\((?!or\b|not\b)[a-z]{3,12}\)$", "", sentence.strip())  # 5 (five)
    return sentence.strip(" *`\"'") or None


_ATOM = (
    r"(?:(?<![a-zA-Z\\])(?:sqrt|sin|cos|tan|log|ln|exp|arcsin|arccos|arctan|gcd|lcm)(?=\()"
    r"|(?<![a-zA-Z])pi(?![a-zA-Z])|\\[a-zA-Z]+|\\[{}|%,;:! ]|(?<![a-zA-Z])[a-zA-Z](?![a-zA-Z])|\d"
    r"|[-+*/^_=<>()\[\]{}|!.,%'\u2212\u00d7"
    r"\u00b7\u221e\u03c0\u221a\u2264\u2265\u2260\u00b0\u222a\u2229\u2208])"
)
_DIGIT = re.compile(r"\d")
_RUN = re.compile(rf"{_ATOM}(?:\s*{_ATOM})*")
_LAST_NUMBER = re.compile(rf"(?<![\d.])(?:{NUMBER})(?:\s*/\s*\d+(?![\d.]))?\s*(?:\\?%)?")


def _last_mathematics(tail: str) -> str | None:
    """Return the last formula or number of a text: in dollars or brackets, or standing free."""
    formulas = list(_delimited(tail))
    covered = bytearray(len(tail))
    for start, end, _ in formulas:
        covered[start:end] = b"\1" * (end - start)
    # Variables alone ("the largest $n$") are not answers as long as anything else is there.
    plain = tail if not formulas else "".join("\n" if covered[i] else character for i, character in enumerate(tail))
    found = sorted((start, text) for start, _, text in formulas if re.search(r"\d|\\[a-zA-Z]", text))
    end = len(plain)
    while end > (found[-1][0] if found else -1):  # line by line from the end, because the last one usually has it
        start = plain.rfind("\n", 0, end) + 1
        runs = [(start + m.start(), m.group()) for m in _RUN.finditer(plain[start:end]) if _DIGIT.search(m.group())]
        free = [(at, text) for at, run in runs if (text := _free_formula(run))]
        if free:
            found.append(free[-1])
            break
        end = start - 1
    return max(found)[1] if found else None


def _delimited(text: str) -> Iterator[tuple[int, int, str]]:
    r"""Yield (start, end, content) of each $...$, \(...\) and \[...\]. A dollar sign before an amount opens nothing."""
    for match in re.finditer(
        r"\\begin\{(align\*?|aligned|equation\*?|gather\*?)\}.{1,1000}?\\end\{\1\}", text, re.DOTALL
    ):
        yield match.start(), match.end(), match.group()
    for match in re.finditer(r"\\\((.{1,1000}?)\\\)|\\\[(.{1,1000}?)\\\]", text, re.DOTALL):
        yield match.start(), match.end(), (match.group(1) or match.group(2)).strip()
    marks = [match for match in re.finditer(r"(?<!\\)\$\$?", text)]
    i = 0
    while i + 1 < len(marks):
        start, end = marks[i], marks[i + 1]
        content = text[start.end() : end.start()]
        display = start.group() == "$$"
        tight = content[:1].strip() and content[-1:].strip() and not text[end.end() : end.end() + 1].isdigit()
        if (tight or (display and content.strip())) and not _PROSE.search(_WORD_COMMANDS.sub(" ", content)):
            yield start.start(), end.end(), content.strip()
            i += 2
        else:
            i += 1


def _free_formula(run: str) -> str | None:
    """Return the answer in a run of mathematics without dollars: what follows its last `=`, or a plain number."""
    text = re.sub(r"^[\s,.;:)*\]}'!]+|[\s,.;:(*\[{'=]+$", "", run)
    text = re.sub(r"^[a-zA-Z]\s+(?=[\d\\])|(?<=\d)\s+[a-zA-Z]$", "", text)  # "a 5", "5 m"
    text = text.strip("* ")
    if "=" in text and not re.search(r"[<>]|,\s*[a-zA-Z]\w*\s*=", text):
        text = text[text.rfind("=") + 1 :].strip()
    numbers = _LAST_NUMBER.findall(text)
    # Numbers listed or counted with commas and spaces are separate ones, and the last is meant.
    if numbers and re.fullmatch(rf"(?:(?:{NUMBER})[,.\s]+)*(?:{NUMBER})(?:\s*/\s*\d+)?\s*\\?%?", text):
        return numbers[-1].strip()
    return text or None


def _lone_word(tail: str) -> str | None:
    """Return a completion that is nothing but one word or one option letter."""
    text = tail.strip().strip("*`_ .").strip()
    match = re.fullmatch(
        r"(?:[Oo]ption|[Cc]hoice)?\s*\(?([A-Za-z]{1,30})\)?|(?:[Oo]ption|[Cc]hoice) [A-J]\)?[:.)] .{1,200}", text
    )
    return text if match else None
