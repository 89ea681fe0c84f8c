"""pydantic's findings in this project's words: the dotted path, the value, what it must be."""

from __future__ import annotations

from typing import Any

from llmrl.config.hints import near


def explain(problem: Any, values: dict[str, Any], prefix: str) -> tuple[str, str]:
    """(dotted path, the rest of the message) of one of pydantic's errors about `values`."""
    path = prefix + _dotted(problem["loc"], values)
    kind, context, value = problem["type"], problem.get("ctx", {}), problem["input"]
    bounds = {"greater_than_equal": ("at least", "ge"), "greater_than": ("above", "gt")}
    bounds |= {"less_than_equal": ("at most", "le"), "less_than": ("below", "lt")}
    if kind in bounds:
        words, name = bounds[kind]
        return path, f" is {value}: must be {words} {context[name]:g}"
    if kind == "literal_error":
        allowed = [word.strip("' ") for word in context["expected"].replace(" or ", ", ").split(",")]
        return path, f" is {value!r}: must be one of {', '.join(allowed)}{near(str(value), allowed)}"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return path, ": there is no such option"
    if kind == "missing":
        return path, " is not set"
    wanted = WANTED.get(kind)
    return path, f" is {value!r}: must be {wanted}" if wanted else f" is {value!r}: {problem['msg']}"


WANTED = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text (in quotes, where it looks like a number)",
    "list_type": "a list, such as '[a, b]'",
    "dict_type": "a mapping, such as '{name: value}'",
    "tuple_type": "a list, such as '[0, 1]'",
    "dataclass_type": "a mapping of options, such as '{name: value}'",
    "union_tag_not_found": "a mapping with `kind`",
    "too_short": "longer",
    "too_long": "shorter",
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
