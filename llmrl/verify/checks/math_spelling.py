"""One spelling of an answer: the many ways to write the same text, number or set become one. Text in, text out."""

from __future__ import annotations

import functools
import re
from fractions import Fraction

from llmrl.verify.checks.math_units import split_unit

_NUMERAL = re.compile(r"[-+]?\d+(?:\.\d+)?")

# --- characters and wrappers ------------------------------------------------------------------------------------------

_CHARACTERS = str.maketrans(
    {0xFF01 + i: 0x21 + i for i in range(94)}
    | {
        "\u2212": "-",
        "\u2013": "-",
        "\u00b0": "^\\circ ",
        "\u221e": "\\infty ",
        "\u03c0": "\\pi ",
        "\u00d7": "\\times ",
    }
    | {"\u00b7": "\\cdot ", "\u2264": "\\le ", "\u2265": "\\ge ", "\u2260": "\\neq ", "\u222a": "\\cup "}
    | {"\u2229": "\\cap ", "\u2205": "\\emptyset ", "\u2208": "\\in ", "\u211d": "\\mathbb{R}", "\u00b1": "\\pm "}
    | {
        "\u3001": ", ",
        "\u3002": ".",
        "\u2026": "...",
        "\u03b8": "\\theta ",
        "\u00b2": "^2",
        "\u00b3": "^3",
        "\u00a0": " ",
    }
    | {"\u00bd": "\\frac12", "\u00bc": "\\frac14", "\u00be": "\\frac34", "\u2080": "_0", "\u2081": "_1", "\u2082": "_2"}
    | dict.fromkeys("\u00a3\u20ac\u00a5\u20b9")
)
"""Unicode as LaTeX and full width as ASCII; currency signs are removed."""
_SPACING = re.compile(
    r"(?<!\\)\\[!,;:> ]|\\(?:quad|qquad|left|right|middle|displaystyle|textstyle|limits|large|Large|LARGE|huge|Huge"
    r"|small|bf|rm|it|checkmark|bigl?|bigr|Bigl?|Bigr|biggl?|biggr)(?![a-zA-Z])|~"
)
_GROUPED = re.compile(r"(?<=\d)(?:\{,\}|\s*\\[!,;: ]\s*|,\s*\\!\s*|\s)(?=\d{3}(?!\d))")
_DECORATED = re.compile(r"\\(?:boldsymbol|bm|mathbf|pmb|underline|underbrace|boxed|fbox|displaystyle|mathnormal)\s*\{")
_COLOR = re.compile(r"\\(?:textcolor|color)\s*\{[a-zA-Z!0-9]*\}")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_MIXED = re.compile(r"^([-+]?\d+)\s+(\d+)\s*/\s*(\d+)$")


@functools.lru_cache(maxsize=4096)
def normalize(answer: str) -> str:
    """Unify the spelling of an answer: spacing, thousands separators, currency, degrees, units, wrappers."""
    if _NUMERAL.fullmatch(answer):
        return answer
    text = _unwrapped(answer.translate(_CHARACTERS).strip())
    text = text.replace("\\%", "%").replace("\\$", "").replace("\\text{}", "").replace("$", "")
    if "\\begin" in text:
        text = _without_environment(text)
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\\[dt]?binom\s*(\d)\s*(\d)", r"\\binom{\1}{\2}", text)
    text = re.sub(r"\\(leq|geq)slant(?![a-zA-Z])", r"\\\1", text)
    text = _notations(text) if "\\" in text or "_" in text or "percent" in text else text
    text = _GROUPED.sub("", text)
    text = re.sub(r"^([-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?)(?=\D|$)", lambda m: m.group().replace(",", ""), text)
    text = _plain_code(_SPACING.sub(" ", text))
    text = _repeating_decimals(text)
    whole = _TEXT.fullmatch(text.strip())
    if whole and whole.group(1).strip()[:1].isdigit():
        text = whole.group(1)
    text = re.sub(r"^\\approx(?![a-zA-Z])\s*", "", text.strip())
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", " ", text).strip().rstrip(".").strip()
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", split_unit(text)[0])
    text = _ALL_INTEGERS.sub("", text)
    if single := re.fullmatch(r"\\\{\s*(\([^()]*\))\s*\\\}", text):
        text = single.group(1)
    return _named_sets(_without_set_braces(text))


_ALL_INTEGERS = re.compile(
    r"(?<=\w|\})\s*[,;]?\s*(?:\(\s*|\\text\s*\{\s*(?:for|where)\s*\}\s*)?([kmn])\s*\\in\s*(?:\\mathbb\s*\{?\s*Z\s*\}?|Z)\s*\)?$"
)
"""Says that a parameter is an integer, as in k pi, k in Z."""


def _unwrapped(text: str) -> str:
    """Remove dollars, bold marks, colors and the like around the whole answer, however they are nested."""
    for _ in range(6):
        before = text
        text = _COLOR.sub("", text).strip()
        text = re.sub(r"(?:\\\\|\\newline)$", "", text).strip().strip("$`").strip()
        for left, right in (("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("__", "__"), ("{", "}")):
            if text.startswith(left) and text.endswith(right) and len(text) > len(left + right):
                inner = text[len(left) : -len(right)]
                if left not in inner and right not in inner and not inner.endswith("\\"):
                    text = inner.strip()
        if (match := _DECORATED.match(text)) and closing(text, match.end()) == len(text) - 1:
            text = text[match.end() : -1].strip()
        if text == before:
            break
    return text


def closing(text: str, start: int) -> int:
    """Return where the brace that was opened before `start` closes, or the length of the text."""
    depth = 1
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return i
    return len(text)


_ENVIRONMENT = re.compile(
    r"\s*\\begin\{(aligned|align\*?|alignedat|split|gathered|gather\*?|equation\*?|cases|array)\}(?:\{[lcr|\d]*\})?"
    r"(.*?)\\end\{\1\}\s*",
    re.DOTALL,
)


def _without_environment(text: str) -> str:
    r"""Return the lines of an answer that is one aligned block: a chain of equations as its end, others as a list."""
    inner = _ENVIRONMENT.fullmatch(text.replace("\\left\\{", "").replace("\\right.", ""))
    if not inner:
        return text
    kind, body = inner.group(1), inner.group(2)
    if kind == "cases" and re.search(r"\\text|&.*[<>]|&.*\\[lg]e|\\quad", body):  # defined piece by piece
        return text
    lines = [line.replace("&", "").strip() for line in re.split(r"\\\\(?:\[[^\]]*\])?", body)]
    lines = [line.rstrip(",.") for line in lines if line]
    if len(lines) > 1 and all(re.match(r"=|\\(?:Rightarrow|implies|iff)", line) for line in lines[1:]):
        return re.split(r"=|\\(?:Rightarrow|implies|iff)", lines[-1])[-1].strip()
    return ", ".join(lines)


def _notations(text: str) -> str:
    r"""Unify \log_e and \ln, the imaginary unit, degrees in sines and of temperature, \langle, C_5^2 and percent."""
    text = re.sub(r"\\(?:mathrm|text|mathit)\s*\{\s*([ie])\s*\}", r"\1", text)
    text = re.sub(r"\\log_\s*(?:\{\s*e\s*\}|e)(?![a-zA-Z])", r"\\ln", text)
    text = re.sub(r"\\lg(?![a-zA-Z])", r"\\log_{10}", text)
    text = text.replace("\\langle", "(").replace("\\rangle", ")")
    text = re.sub(r"\s*(?:\\text\s*\{\s*per\s?cent\s*\}|\bper\s?cent\b)", "%", text)
    text = re.sub(r"\s*\\degree(?![a-zA-Z])", r"^\\circ", text)
    text = _DEGREES_C.sub(r"^\\circ", text)
    text = _SINE_OF_DEGREES.sub(r"\\\1(\\frac{\2\\pi}{180})", text)
    return _COMBINATIONS.sub(r"\\binom{\1}{\2}", text)


_DEGREES_C = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)\s*(?:\\(?:text|mathrm)\s*\{\s*)?[CF]\s*\}?$")
_SINE_OF_DEGREES = re.compile(
    r"\\(sin|cos|tan|cot|sec|csc)\s*[({]?\s*(\d+)\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))\s*[)}]?"
)
_COMBINATIONS = re.compile(r"(?<![a-zA-Z\\])C_\s*\{?\s*(\d+)\s*\}?\s*\^\s*\{?\s*(\d+)\s*\}?")
_CODE = re.compile(
    r"(?<![\\a-zA-Z])(?:(?:np|numpy|math|sympy|sp)\.)?(arcsin|arccos|arctan|asin|acos|atan|sin|cos|tan|log|ln|exp)\("
)
_CODE_ROOT = re.compile(r"(?<![\\a-zA-Z])(?:(?:np|numpy|math|sympy|sp)\.)?sqrt\(([^()]*)\)")


def _plain_code(text: str) -> str:
    """Rewrite what is spelled as in a programming language: `np.arcsin(1/2)`, `sqrt(2)`, `x**2`, `pi`, `-3./2`."""
    if not re.search(r"[a-z]\(|\*\*|\dpi|\bpi\b|\u221a|\d\.(?!\d)", text):
        return text
    text = text.replace("**", "^")
    for _ in range(3):
        text = _CODE_ROOT.sub(r"\\sqrt{\1}", text)
    text = re.sub(r"\u221a\s*(?:\((?P<a>[^()]*)\)|\{(?P<b>[^{}]*)\}|(?P<c>\d+|[a-zA-Z]))", _root, text)
    text = _CODE.sub(lambda match: f"\\{_NAMES.get(match.group(1), match.group(1))}(", text)
    text = re.sub(r"(?<![\\a-zA-Z])(?:np\.|math\.)?pi(?![a-zA-Z])", r"\\pi ", text)
    return re.sub(r"(?<=\d)\.(?=\s*[/*+)\]-]|$)(?!\.)", "", text)


_NAMES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan"}


def _root(match: re.Match[str]) -> str:
    return f"\\sqrt{{{match.group('a') or match.group('b') or match.group('c')}}}"


_REPEATING = re.compile(
    r"(?<![\d.])([-+]?)(\d*)\.(\d*)(?:\\(?:overline|bar|dot|overset\{\\cdot\})\s*\{(\d+)\}|\((\d+)\)"
    r"|\\dot\s*(\d)(?:(\d*)\\dot\s*(\d))?)(?![\d.])"
)
_DOTTED = re.compile(r"(?<![\d.])([-+]?)(\d*)\.(\d+)\s*(?:\.\.\.+|\\l?dots|\\cdots)(?![\d.])")


def _repeating_decimals(text: str) -> str:
    r"""Write 0.\overline{3}, 0.(3), 0.\dot3 and 0.333... as fractions, which they exactly are."""
    if "." not in text:
        return text
    text = re.sub(r"\\dot\{(\d)\}(\d*)\\dot\{(\d)\}", r"\\overline{\1\2\3}", text)
    text = _REPEATING.sub(_exact, text)
    return _DOTTED.sub(_exact_of_dots, text)


def _exact(match: re.Match[str]) -> str:
    sign, whole, fixed = match.group(1, 2, 3)
    block = match.group(4) or match.group(5) or "".join(match.group(i) or "" for i in (6, 7, 8))
    return _fraction_of(sign, whole, fixed, block)


def _exact_of_dots(match: re.Match[str]) -> str:
    sign, whole, digits = match.groups()
    for size, fixed in ((s, f) for s in range(1, 7) for f in range(len(digits) - 2 * s + 1)):
        block = digits[fixed : fixed + size]
        repeats = digits[fixed:]
        enough = len(repeats) >= (3 if size == 1 else 2) * size
        if enough and (block * (len(repeats) // size + 1)).startswith(repeats):
            return _fraction_of(sign, whole, digits[:fixed], block)
    return match.group()


def _fraction_of(sign: str, whole: str, fixed: str, block: str) -> str:
    value = Fraction(int((whole + fixed) or "0"), 10 ** len(fixed))
    value += Fraction(int(block), (10 ** len(block) - 1) * 10 ** len(fixed))
    return (
        f"{sign}{value.numerator}"
        if value.denominator == 1
        else f"{sign}\\frac{{{value.numerator}}}{{{value.denominator}}}"
    )


# --- sets -------------------------------------------------------------------------------------------------------------

_SET_BUILDER = re.compile(
    r"^\\\{\s*([a-zA-Z])\s*(?:\\in\s*(?:\\mathbb\s*\{?R\}?|R)\s*)?(?:\||\\mid|\\vert|:)\s*(.+?)\s*(?:,\s*\1\s*\\in\s*(?:\\mathbb\s*\{?R\}?|R)\s*)?\\\}$"
)
_RELATION = r"<=|>=|<|>|\\leq?(?![a-zA-Z])|\\geq?(?![a-zA-Z])"
_NO_SOLUTION = re.compile(
    r"(?:there (?:is|are) )?(?:no solutions?|no (?:such )?values?|empty set|the empty set)", re.IGNORECASE
)


def _without_set_braces(text: str) -> str:
    r"""Write {x | -2 <= x < 1} as its inequality, and inequalities joined by `or` as a union of intervals."""
    if "<" not in text and ">" not in text and "\\l" not in text and "\\g" not in text:
        return text
    if match := _SET_BUILDER.match(text):
        variable, condition = match.groups()
        if re.search(_RELATION, condition) and not re.search(r"\\in|,", condition):
            text = condition if variable in condition else text
    pieces = re.split(
        r"\s*(?:\\text\s*\{\s*or\s*\}|\bor\b|\\lor(?![a-zA-Z])|\\vee(?![a-zA-Z])|\\cup(?![a-zA-Z]))\s*", text
    )
    if len(pieces) > 1 and all(re.search(_RELATION, piece) for piece in pieces):
        intervals = [interval(piece) for piece in pieces]
        if all(found is not None for found in intervals) and len({found[0] for found in intervals if found}) == 1:
            return " \\cup ".join(found[1] for found in intervals if found)
    return _ascending(text)


def _ascending(text: str) -> str:
    """Turn a chain of two or more `>` around: b > a > c is c < a < b."""
    parts = re.split(rf"\s*({_RELATION})\s*", text)
    signs = parts[1::2]
    if len(signs) < 2 or not all(sign[:1] == ">" or sign.startswith("\\g") for sign in signs):
        return text
    turned = ["<" if sign == ">" else "\\le" for sign in reversed(signs)]
    terms = parts[0::2][::-1]
    return terms[0] + "".join(f" {sign} {term}" for sign, term in zip(turned, terms[1:], strict=True))


def interval(condition: str) -> tuple[str, str] | None:
    """Return the variable of an inequality and its interval: `x < -1` is (-oo, -1); None for anything else."""
    parts = [part.strip() for part in re.split(rf"({_RELATION})", condition.strip())]
    terms, signs = parts[0::2], ["<" if s in ("<", ">") else "\\le" for s in parts[1::2]]
    upward = [s[:1] == "<" or s.startswith("\\l") for s in parts[1::2]]
    if len(terms) not in (2, 3) or not all(terms) or len(set(upward)) != 1:
        return None
    if not upward[0]:
        terms, signs = terms[::-1], signs[::-1]
    at = next((i for i, term in enumerate(terms) if re.fullmatch(r"[a-zA-Z]", term)), None)
    if at is None or (len(terms) == 3 and at != 1):
        return None
    low = terms[at - 1] if at > 0 else "-\\infty"
    high = terms[at + 1] if at + 1 < len(terms) else "\\infty"
    left = "[" if at > 0 and signs[at - 1] == "\\le" else "("
    right = "]" if at + 1 < len(terms) and signs[at] == "\\le" else ")"
    return terms[at], f"{left}{low}, {high}{right}"


_NUMBER_WORDS = {
    word: str(value)
    for value, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
    )
}
_CIRCLED = "".join(chr(0x2460 + i) for i in range(20))


def _named_sets(text: str) -> str:
    if text in ("\\varnothing", "\\{\\}", "\\{ \\}", "\\phi"):
        return "\\emptyset" if text != "\\phi" else text
    plain = words(text)
    if (number := _NUMBER_WORDS.get(plain.lower())) is not None:
        return number
    if plain and plain[0] in _CIRCLED and not plain.strip(_CIRCLED + ", "):
        return plain.replace(",", "").replace(" ", "")
    if plain and _NO_SOLUTION.fullmatch(plain):
        return "\\emptyset"
    if plain.lower() in ("all real numbers", "all reals", "the real numbers", "all real x"):
        return "\\mathbb{R}"
    return text


# --- readings ---------------------------------------------------------------------------------------------------------


def words(answer: str) -> str:
    r"""Return the answer as plain words, without \text{} and outer spaces; '' if it contains mathematics."""
    plain = " ".join(_TEXT.sub(r"\1", answer).split()).strip("() ")
    return "" if re.search(r"[\\{}^=<>+*]", plain) else plain


_SCIENTIFIC = re.compile(
    r"(?:([-+]?\d+(?:\.\d+)?)\s*(?:\\times|\\cdot|\*|x)\s*)?10\s*\^\s*(?:\{\s*([-+]?\d{1,3})\s*\}|([-+]?\d{1,3}))"
)


def as_fraction(text: str) -> Fraction | None:
    """Return a plain number, fraction or mixed number as an exact value; None for anything else."""
    text = re.sub(r"(?:\s*\^\s*(?:\\circ|\{\s*\\circ\s*\}))\s*$", "", text)
    if match := re.fullmatch(r"([-+]?)(\d+)?\s?\\frac\s?(?:\{([-+]?\d+)\}|(\d))\s*(?:\{([-+]?\d+)\}|(\d))", text):
        sign, whole, *parts = match.groups()
        top, bottom = int(parts[0] or parts[1]), int(parts[2] or parts[3])
        if whole and (top < 0 or bottom < 0):
            return None
        value = int(whole or 0) + Fraction(top, bottom) if bottom else None
        return -value if value is not None and sign == "-" else value
    if re.fullmatch(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?", text):
        return Fraction(text)
    if match := _SCIENTIFIC.fullmatch(text):
        factor = Fraction(match.group(1) or "1")
        return factor * Fraction(10) ** int(match.group(2) or match.group(3))
    if match := re.fullmatch(r"([-+]?\d+)\s*/\s*(\d+)", text):
        return Fraction(int(match.group(1)), int(match.group(2))) if int(match.group(2)) else None
    return None


def as_percent(text: str) -> Fraction | None:
    """Return X of a plain `X%`; None for anything else."""
    return as_fraction(text[:-1].strip()) if text.endswith("%") else None


def skeleton(text: str) -> str:
    """Return the answer without what never changes its meaning: spaces, braces around one token, spellings of signs."""
    text = re.sub(r"\\mathbb\s*\{?([A-Z])\}?", r"\1", text).replace("\\mid", "|").replace("\\vert", "|")
    text = re.sub(r"\\leq(?![a-zA-Z])", r"\\le", re.sub(r"\\geq(?![a-zA-Z])", r"\\ge", text))
    text = re.sub(r"\\(?:mathrm|text|operatorname)\s*\{([^{}]*)\}", r"\1", text).replace("\\cdot", "")
    text = re.sub(r"\s+(?=[^a-zA-Z])|(?<![a-zA-Z])\s+", "", text)
    text = re.sub(r"(?<=[\^_])\{(\w|\\[a-zA-Z]+)\}", r"\1", text)
    return re.sub(r"(?<=[\^_])\{([-+]?\w+)\}", r"{\1}", text)
