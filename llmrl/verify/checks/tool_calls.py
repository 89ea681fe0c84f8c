"""Tool calls: read them from a response, and match them against the expected ones as BFCL and xLAM data state them.

Matching follows the AST check of the Berkeley Function Calling Leaderboard: each expected argument has a list of
possible values, strings are compared without case, spaces and punctuation, and calls match in any order.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_CALLS = 64
"""A response with more calls is wrong."""
_TAGGED = re.compile(r"<(tool_call|function_call|tool_calls)>\s*(.*?)\s*</\1>", re.DOTALL)
_FENCED = re.compile(r"^\s*```(?:\w*)\s*\n(.*?)\n?\s*```\s*$", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a tool."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Expected:
    """One expected call."""

    name: str
    arguments: dict[str, list[Any]]
    """Argument -> possible values. The empty string among them says that the argument may be left out."""


# --- reading ----------------------------------------------------------------------------------------------------------


def read_calls(text: str) -> list[Call]:
    """Read the calls of a response: `<tool_call>` blocks, a JSON list or object, or `[f(a=1), g(b="x")]`.

    Text around `<tool_call>` blocks is allowed, around the other forms it is not.

    Raises:
        ValueError: there is a call that cannot be read; the message says why.
    """
    text = text.strip()
    tagged = _TAGGED.findall(text)
    if tagged:
        if "<tool_call" in _TAGGED.sub("", text) or "<function_call" in _TAGGED.sub("", text):
            raise ValueError("a tool call is not closed")
        calls = [call for _, inner in tagged for call in _calls_of(inner)]
    elif "<tool_call" in text or "<function_call" in text:
        raise ValueError("a tool call is not closed")
    else:
        fenced = _FENCED.match(text)
        calls = _calls_of(fenced.group(1).strip() if fenced else text)
    if len(calls) > MAX_CALLS:
        raise ValueError(f"{len(calls)} calls, at most {MAX_CALLS} are read")
    return calls


def _calls_of(text: str) -> list[Call]:
    if not text:
        return []
    if text[0] in "[{":
        try:
            found = json.loads(text, object_pairs_hook=_once)
        except RecursionError:
            raise ValueError("the call is nested too deeply") from None
        except ValueError as error:
            if text[0] == "{" or "given twice" in str(error):
                raise ValueError(f"the call is not JSON: {error}") from None
        else:
            return [as_call(entry) for entry in (found if isinstance(found, list) else [found])]
    return _python_calls(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def as_call(entry: Any) -> Call:
    """Return a call given as an object: name and arguments, OpenAI's `function`, or BFCL's {name: {...}}.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(entry, Mapping) and isinstance(entry.get("function"), Mapping):
        entry = entry["function"]
    if isinstance(entry, Mapping) and isinstance(entry.get("name"), str):
        arguments = next((entry[key] for key in ("arguments", "parameters", "args") if key in entry), {})
        if isinstance(arguments, str):
            arguments = json.loads(arguments or "{}", object_pairs_hook=_once)
        if arguments is None:
            arguments = {}
        if isinstance(arguments, Mapping):
            return Call(entry["name"], dict(arguments))
    elif isinstance(entry, Mapping) and len(entry) == 1:
        ((name, arguments),) = entry.items()
        if isinstance(arguments, Mapping):
            return Call(str(name), dict(arguments))
    raise ValueError(f"{str(entry)[:60]!r} is not a call: it needs `name` and `arguments`")


def _python_calls(text: str) -> list[Call]:
    """Read `[f(a=1), g(b="x")]` or `f(a=1)`; values must be literals."""
    if len(text) > 20_000:
        raise ValueError("no call in a text of this length")
    try:
        node = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError("no tool call, or text around it") from None
    nodes = node.elts if isinstance(node, ast.List | ast.Tuple) else [node]
    return [_python_call(entry) for entry in nodes]


def _python_call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("a call must have the form name(argument=value)")
    name = ast.unparse(node.func)
    if not re.fullmatch(r"[A-Za-z_][\w.]*", name):
        raise ValueError(f"{name[:40]!r} is not the name of a tool")
    arguments: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in arguments:
            raise ValueError("an argument is given twice or by **")
        try:
            arguments[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, RecursionError):
            raise ValueError(f"the argument {keyword.arg!r} is not a literal") from None
    return Call(name, arguments)


# --- what is expected -------------------------------------------------------------------------------------------------


def expected_calls(answer: Any) -> list[Expected]:
    """Return the expected calls of a row.

    Args:
        answer: a list (or its JSON text) of BFCL's `{name: {argument: [possible values]}}`, or of xLAM's
            `{"name": ..., "arguments": {argument: value}}`, whose values are the only possible ones. An empty list says
            that no tool must be called.

    Raises:
        ValueError: it is neither.
    """
    if hasattr(answer, "tolist"):
        answer = answer.tolist()
    if isinstance(answer, str):
        try:
            answer = json.loads(answer)
        except ValueError as error:
            raise ValueError(f"the expected calls are not JSON: {error}") from None
    if isinstance(answer, Mapping):
        answer = [answer]
    if not isinstance(answer, Sequence):
        raise ValueError(f"the expected calls are {type(answer).__name__}, not a list")
    return [_expected(entry) for entry in answer]


def _expected(entry: Any) -> Expected:
    call = as_call(entry)
    if isinstance(entry, Mapping) and not ({"name", "function"} & entry.keys()):  # BFCL
        wrong = [name for name, values in call.arguments.items() if not isinstance(values, list)]
        if wrong:
            raise ValueError(f"the possible values of {wrong[0]!r} must be a list")
        return Expected(call.name, {name: list(values) for name, values in call.arguments.items()})
    return Expected(call.name, {name: [value] for name, value in call.arguments.items()})


# --- matching ---------------------------------------------------------------------------------------------------------


def mismatch(calls: Sequence[Call], expected: Sequence[Expected]) -> str | None:
    """Return why the calls are not the expected ones, in any order; None if they are."""
    if len(calls) != len(expected):
        return f"{len(calls)} calls, expected {len(expected)}"
    matching = [[_differs(call, wanted) for wanted in expected] for call in calls]
    taken: dict[int, int] = {}  # expected -> call

    def place(call: int, seen: set[int]) -> bool:
        for wanted, problem in enumerate(matching[call]):
            if problem is None and wanted not in seen:
                seen.add(wanted)
                if wanted not in taken or place(taken[wanted], seen):
                    taken[wanted] = call
                    return True
        return False

    for call in range(len(calls)):
        if not place(call, set()):
            same_name = [p for p, w in zip(matching[call], expected, strict=True) if w.name == calls[call].name and p]
            return same_name[0] if same_name else f"the call of {calls[call].name!r} is none of the expected ones"
    return None


def _differs(call: Call, wanted: Expected) -> str | None:
    if call.name != wanted.name:
        return f"the tool is {call.name!r}, expected {wanted.name!r}"
    if unknown := sorted(call.arguments.keys() - wanted.arguments.keys()):
        return f"{call.name}: the argument {unknown[0]!r} is not expected"
    for name, values in wanted.arguments.items():
        if name not in call.arguments:
            if "" not in values:
                return f"{call.name}: the argument {name!r} is missing"
        elif not any(_equal(call.arguments[name], value) for value in values):
            return f"{call.name}: the argument {name!r} is {str(call.arguments[name])[:60]!r}"
    return None


def _equal(ours: Any, theirs: Any) -> bool:
    """Compare two values: 1 is 1.0 but neither "1" nor true; strings without case, spaces and punctuation."""
    if isinstance(ours, bool) or isinstance(theirs, bool):
        return ours is theirs
    if isinstance(ours, int | float) and isinstance(theirs, int | float):
        return ours == theirs
    if isinstance(ours, str) and isinstance(theirs, str):
        return _plain(ours) == _plain(theirs) and (ours.strip() != "") == (theirs.strip() != "")
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        return _same_object(ours, theirs)
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(_equal, ours, theirs))
    return ours is None and theirs is None


def _same_object(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Compare objects. Inside a possible value, BFCL lists the possible values of each key again."""
    if ours.keys() == theirs.keys() and all(_equal(ours[key], theirs[key]) for key in ours):
        return True
    if not theirs or not all(isinstance(values, list) for values in theirs.values()) or ours.keys() - theirs.keys():
        return False
    return all(
        any(_equal(ours[key], value) for value in values) if key in ours else "" in values
        for key, values in theirs.items()
    )


def _plain(text: str) -> str:
    """Leave out what BFCL leaves out: spaces and , . / - _ * ^, and the kind of quotes."""
    stripped = re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')
    return stripped or text.strip()
