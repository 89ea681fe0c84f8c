"""Translate pydantic's errors: the dotted path, the value, and what it must be."""

from __future__ import annotations

from typing import Any

from llmrl.config.hints import near

LONGEST = 80
"""Characters of a value that a message shows."""


def shown(value: Any) -> str:
    """Return a value as people write it: null and true as in YAML, cut to what fits a line."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."


WANTED = {
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "above {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "below {lt:g}",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text (in quotes, where it looks like a number)",
    "list_type": "a list, such as '[a, b]'",
    "dict_type": "a mapping, such as '{{name: value}}'",
    "tuple_type": "a list, such as '[0, 1]'",
    "dataclass_type": "a mapping of options, such as '{{name: value}}'",
    "model_attributes_type": "one of the choices, or a mapping of options with its `kind`",
    "union_tag_not_found": "a mapping with `kind`",
}
"""pydantic's type of error -> what the value must be."""


def explain(problem: Any, values: dict[str, Any], prefix: str) -> tuple[str, str]:
    """Return (dotted path, rest of the message) for one of pydantic's errors about `values`."""
    path = prefix + _dotted(problem["loc"], values)
    kind, context, value = problem["type"], problem.get("ctx", {}), problem["input"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return path, ": there is no such option"
    if kind == "missing":
        return path, " is not set"
    text = problem["msg"]
    if kind in WANTED:
        text = f"must be {WANTED[kind].format(**context)}"
    elif kind == "literal_error":
        allowed = [word.strip("' ") for word in context["expected"].replace(" or ", ", ").split(",")]
        text = f"must be one of {', '.join(allowed)}{near(str(value), allowed)}"
    elif kind in ("too_short", "too_long"):
        words, key = ("at least", "min_length") if kind == "too_short" else ("at most", "max_length")
        text = f"must have {words} {context[key]} {'entry' if context[key] == 1 else 'entries'}"
    is_number = isinstance(value, str) and kind in (
        "greater_than_equal",
        "greater_than",
        "less_than_equal",
        "less_than",
    )
    return path, f" is {value if is_number else shown(value)}: {text}"


def _dotted(loc: tuple[Any, ...], values: Any) -> str:
    """Return pydantic's location without the names of union members, which nobody writes."""
    path, here = "", values
    for part in loc:
        if isinstance(part, int) and isinstance(here, (list, tuple)):
            path, here = f"{path}[{part}]", here[part] if part < len(here) else None
        elif isinstance(here, dict) and part in here:
            path, here = f"{path}.{part}", here[part]
        elif isinstance(here, dict) and part != here.get("kind"):
            path, here = f"{path}.{part}", None
    return path.removeprefix(".")
