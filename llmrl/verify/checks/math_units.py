"""Units of measurement after a number: `5 cm^2`, `5 dollars`, five people in Chinese. Text in, value and unit out."""

from __future__ import annotations

import re

NUMBER = r"[-+\u2212]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|[-+\u2212]?\.\d+"
"""A number as people write it."""
_NOT_UNITS = (
    "hundred|thousand|million|billion|trillion|dozen|percent|half|halves|quarters?|thirds?|fourths?|fifths?|sixths?|"
    "sevenths?|eighths?|ninths?|tenths?|hundredths?|thousandths?|squared|cubed|factorial|plus|minus|times|over|mod|"
    "or|and|pi|sqrt|sin|cos|tan|log|exp|not|never|nor|but|if|to|more|less|fewer|least|most|maybe|possibly|than|is|are|isn|wrong|incorrect"
)
"""Words after a number that change its value."""
_SHORT_UNITS = "cm|mm|km|kg|mg|ml|mL|ft|in|lb|lbs|oz|hr|hrs|dm|nm|Hz|kHz|kJ|kW|mph|m|s|g|L|N|J|W|V|K|Pa|mol|rad|deg"
_AFTER_NUMBER = re.compile(
    rf"^(?P<value>{NUMBER}|-?\d+/\d+|-?\\frac\{{\d+\}}\{{\d+\}})"
    rf"(?:\s*(?P<cjk>[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7a3]{{1,6}})"
    rf"|\s+(?P<words>(?:[a-zA-Z]{{3,}}|{_SHORT_UNITS})(?:\s*\^\s*\{{?\d\}}?|\d)?(?:[\s/]+[a-zA-Z]+(?:\^?\{{?-?\d\}}?)?){{0,3}})"
    rf"|(?P<attached>(?:cm|mm|km|kg|mg|ml|mL|ft|lb|lbs|oz|hr|mph)(?:\^\{{?\d\}}?)?))\.?$"
)
_TEXT_UNIT = re.compile(
    r"^(?P<value>.*[\w)}\]%])\s*\\(?:text|mathrm|mbox|textrm|rm|operatorname)\s*\{\s*(?P<unit>[a-zA-Z$][a-zA-Z\s./^\d\-()\\]*)\}"
    r"(?P<power>\s*\^\s*\{?\d\}?)?$",
    re.DOTALL,
)
_CJK_NUMERALS = re.compile(
    "[\u4e07\u842c\u4ebf\u5104\u5343\u767e\u5341\u5146\u5206\u4e4b\u6298\u500d\u6210\u534a\u6216\u548c\u4e0d\u975e\u81f3\u5230"
    "\ub9cc\uc5b5\ucc9c\ubc31]"
)
"""Characters that multiply or question a number: ten thousand, a hundred million, parts, times, half, or, not ..."""
_CJK_LEAD = re.compile(r"^(?:\u5171|\u4e00\u5171|\u5171\u6709|\u6709|\u7b54|\u5f97|\u4e3a|\u662f|\u7ea6)(?=\d)")


def split_unit(text: str) -> tuple[str, str]:
    r"""Split `5 cm^2`, `5\text{ m/s}` or `5` with a counter word into the value and the unit ('' if there is none)."""
    if not text[:1]:
        return text, ""
    text = _CJK_LEAD.sub("", text)
    if match := _AFTER_NUMBER.match(text):
        unit = match.group("cjk") or match.group("words") or match.group("attached")
        if not _changes_value(unit):
            return match.group("value"), unit
        return text, ""
    if match := _TEXT_UNIT.match(text):
        value, unit = match.group("value"), match.group("unit").strip()
        simple = re.search(r"\d|\\(?:pi|sqrt|frac)", value) and not value.endswith("_")
        if simple and unit and not _changes_value(unit) and (_words_only(unit) or _SHORT.fullmatch(unit)):
            return value.strip(), unit + re.sub(r"[\s{}]", "", match.group("power") or "")
    return text, ""


_SHORT = re.compile(rf"(?:{_SHORT_UNITS}|[a-zA-Z]{{1,3}}(?:/[a-zA-Z]{{1,3}})?)(?:\^?\d)?")


def _words_only(unit: str) -> bool:
    return re.fullmatch(r"[a-zA-Z][a-zA-Z\s./^\d\-()]*", unit) is not None


def _changes_value(unit: str) -> bool:
    return bool(re.search(rf"\b(?:{_NOT_UNITS})\b", unit) or _CJK_NUMERALS.search(unit))


_UNIT_NAMES = {
    "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "millimetre": "mm", "kilometer": "km",
    "kilometre": "km", "meter": "m", "metre": "m", "kilogram": "kg", "gram": "g", "milligram": "mg", "second": "s",
    "sec": "s", "minute": "min", "hour": "h", "hr": "h", "liter": "l", "litre": "l", "milliliter": "ml", "inch": "in",
    "inche": "in", "foot": "ft", "feet": "ft", "mile": "mi", "pound": "lb", "ounce": "oz", "degree": "deg",
    "mph": "mi/h", "newton": "n", "joule": "j", "watt": "w", "volt": "v",
    "\u5398\u7c73": "cm", "\u7c73": "m", "\u5343\u7c73": "km", "\u5e73\u65b9\u7c73": "m^2", "\u79d2": "s",
}  # fmt: skip


def same_unit(ours: str, theirs: str) -> bool:
    """Return whether two units are the same one, in words or symbols. Nothing is converted."""
    return _unit_key(ours) == _unit_key(theirs)


def _unit_key(unit: str) -> str:
    text = unit.strip().replace("^", "").replace(" per ", "/").lower()
    text = re.sub(r"\bsquare\s+(\w+)", r"\g<1>2", re.sub(r"\bcubic\s+(\w+)", r"\g<1>3", text))
    text = re.sub(r"(\w)\s+squared\b", r"\g<1>2", re.sub(r"(\w)\s+cubed\b", r"\g<1>3", text))

    def name(match: re.Match[str]) -> str:
        word = match.group()
        return next(
            (_UNIT_NAMES[w] for w in (word, word.removesuffix("s")) if w in _UNIT_NAMES), word.removesuffix("s") or word
        )

    return re.sub(r"[^\W\d_]+", name, text).replace("^", "").replace(" ", "")


def unit_of(answer: str) -> str:
    """Return the unit that an answer states, or ''."""
    text = answer.replace("$", "").replace("\\,", " ").replace("\\ ", " ").replace("\\;", " ").replace("~", " ").strip()
    return split_unit(" ".join(text.split()))[1]
