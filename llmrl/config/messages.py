"""pydantic's findings in this project's words: the dotted path, the value, what it must be."""

from __future__ import annotations

from typing import Any

from llmrl.config.hints import near

LONGEST = 80
"""Characters of a value that a message shows."""


def shown(value: Any) -> str:
    """A value as people write it: null and true as in YAML, and not more of it than fits a line."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."


def explain(problem: Any, values: dict[str, Any], prefix: str) -> tuple[str, str]:
    """(dotted path, the rest of the message) of one of pydantic's errors about `values`."""
    path = prefix + _dotted(problem["loc"], values)
    kind, context, value = problem["type"], problem.get("ctx", {}), problem["input"]
    bounds = {"greater_than_equal": ("at least", "ge"), "greater_than": ("above", "gt")}
    bounds |= {"less_than_equal": ("at most", "le"), "less_than": ("below", "lt")}
    if kind in bounds:
        words, name = bounds[kind]
        return path, f" is {value if isinstance(value, str) else shown(value)}: must be {words} {context[name]:g}"
    if kind == "literal_error":
        allowed = [word.strip("' ") for word in context["expected"].replace(" or ", ", ").split(",")]
        return path, f" is {shown(value)}: must be one of {', '.join(allowed)}{near(str(value), allowed)}"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return path, ": there is no such option"
    if kind == "missing":
        return path, " is not set"
    if kind in ("too_short", "too_long"):
        words, number = (
            ("at least", context["min_length"]) if kind == "too_short" else ("at most", context["max_length"])
        )
        return path, f" is {shown(value)}: must have {words} {number} {'entry' if number == 1 else 'entries'}"
    wanted = WANTED.get(kind)
    return path, f" is {shown(value)}: must be {wanted}" if wanted else f" is {shown(value)}: {problem['msg']}"


WANTED = {
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
    "dict_type": "a mapping, such as '{name: value}'",
    "tuple_type": "a list, such as '[0, 1]'",
    "dataclass_type": "a mapping of options, such as '{name: value}'",
    "model_attributes_type": "one of the choices, or a mapping of options with its `kind`",
    "union_tag_not_found": "a mapping with `kind`",
}


def _dotted(loc: tuple[Any, ...], values: Any) -> str:
    """Pydantic's location without the names of union members, which are not part of what people write."""
    path, here = "", values
    for part in loc:
        if isinstance(part, int) and isinstance(here, (list, tuple)):
            path, here = f"{path}[{part}]", here[part] if part < len(here) else None
        elif isinstance(here, dict) and part in here:
            path, here = f"{path}.{part}", here[part]
        elif not (isinstance(here, dict) and part == here.get("kind")) and isinstance(here, dict):
            path, here = f"{path}.{part}", None
    return path.removeprefix(".")
