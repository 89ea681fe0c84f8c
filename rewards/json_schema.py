"""Structured output: 1.0 if the response is JSON that its schema accepts, and nothing else.

Rows have `schema` (a JSON schema, as an object or as text). The JSON is the whole response, or its only fenced block.
Needs the extra `llmrl[json]`. Runs in the worker pool, because a pattern in a schema can backtrack for very long.
"""

from __future__ import annotations

import json
import re
from typing import Any

from llmrl.errors import UserError
from llmrl.types import Score
from llmrl.verify.thinking import without_thinking

POOL = True
MAX_CHARS = 1_000_000
"""A longer response is wrong."""
_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[ \t]*\r?\n(.*?)\r?\n?[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)

_ROW = {
    "schema": {
        "type": "object",
        "properties": {"name": {"type": "string", "minLength": 1}, "age": {"type": "integer", "minimum": 0}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
}
EXAMPLES = [
    # good
    {**_ROW, "completion": '{"name": "Ada", "age": 36}', "reward": 1.0},
    {**_ROW, "completion": 'Here it is:\n```json\n{"name": "Ada", "age": 36}\n```', "reward": 1.0},
    {"schema": json.dumps(_ROW["schema"]), "completion": '{"age": 36, "name": "Ada"}', "reward": 1.0},
    {**_ROW, "completion": '<think>{}</think>{"name": "Ada", "age": 36}', "reward": 1.0},
    {**_ROW, "answer": '{"age": 36, "name": "Ada"}', "completion": '{"name": "Ada", "age": 36}', "reward": 1.0},
    # bad
    {**_ROW, "completion": '{"name": "Ada"}', "reward": 0.0},
    {**_ROW, "completion": '{"name": "Ada", "age": "36"}', "reward": 0.0},
    {**_ROW, "completion": '{"name": "Ada", "age": 36} as you asked', "reward": 0.0},
    {**_ROW, "completion": 'Here: ```json\n{"name": "Ada", "age": 36}\n```', "only_json": True, "reward": 0.0},
    {**_ROW, "answer": {"name": "Bob", "age": 36}, "completion": '{"name": "Ada", "age": 36}', "reward": 0.0},
    # hostile
    {**_ROW, "completion": "", "reward": 0.0},
    {**_ROW, "completion": json.dumps(_ROW["schema"]), "reward": 0.0},
    {**_ROW, "completion": '{"name": "Ada", "age": 36, "age": -1}', "reward": 0.0},
    {**_ROW, "completion": '{"name": "Ada", "age": NaN}', "reward": 0.0},
    {**_ROW, "completion": '```json\n{}\n```\n```json\n{"name": "Ada", "age": 36}\n```', "reward": 0.0},
    {**_ROW, "completion": "[" * 5000, "reward": 0.0},
]


def json_schema(
    completion: str, schema: Any, answer: Any = None, prefilled: str = "", only_json: bool = False
) -> Score:
    """Check the response's JSON against the row's schema.

    Args:
        completion: the policy's response; its thinking is not read.
        schema: a JSON schema, as an object or as text.
        answer: the expected value, as an object or as JSON text; None: any value that the schema accepts is right.
        prefilled: how the prompt already begins the response, such as `<think>`.
        only_json: refuse fences and text around them.

    Raises:
        UserError: the schema is not a valid one, or the package jsonschema is missing.
    """
    validator = _validator(schema)
    text = without_thinking(prefilled + completion).strip()
    try:
        value = _value(text, only_json)
    except ValueError as error:
        return Score(reward=0.0, info={"reason": str(error)})
    problem = next(iter(validator.iter_errors(value)), None)
    if problem is not None:
        return Score(reward=0.0, info={"reason": f"{problem.json_path}: {problem.message[:200]}"})
    if answer is not None and not _equal(value, _expected(answer)):
        return Score(reward=0.0, info={"reason": "the value is not the expected one"})
    return Score(reward=1.0)


def check(row: dict[str, Any]) -> str | None:
    """Say what is wrong with a row's schema."""
    try:
        _validator(row["schema"])
        if row.get("answer") is not None:
            _expected(row["answer"])
    except (UserError, ValueError) as error:
        return str(error)
    return None


def _validator(schema: Any) -> Any:
    try:
        import jsonschema
        from jsonschema.validators import validator_for
        from referencing import Registry
    except ImportError:
        raise UserError("json_schema: needs the package jsonschema: pip install 'llmrl[json]'") from None
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise UserError(f"json_schema: the column `schema` is not JSON: {error}") from None
    if not isinstance(schema, (dict, bool)):
        raise UserError(
            f"json_schema: the column `schema` is {type(schema).__name__}; it must be an object or its text"
        )
    kind: Any = validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise UserError(f"json_schema: the schema is not valid at {error.json_path}: {error.message[:200]}") from None
    # An empty registry: a $ref to a URL must not be fetched.
    return kind(schema, registry=Registry(), format_checker=kind.FORMAT_CHECKER)


def _value(text: str, only_json: bool) -> Any:
    """Return the value of the whole text, or of its only fenced block."""
    if len(text) > MAX_CHARS:
        raise ValueError(f"the response has {len(text)} characters, at most {MAX_CHARS} are read")
    blocks = [] if only_json else [match.group(2) for match in _FENCE.finditer(text)]
    if len(blocks) > 1:
        raise ValueError(f"{len(blocks)} fenced blocks, expected one")
    try:
        return json.loads(blocks[0] if blocks else text, object_pairs_hook=_once, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _expected(answer: Any) -> Any:
    return json.loads(answer) if isinstance(answer, str) else answer


def _equal(a: Any, b: Any) -> bool:
    """Compare as JSON does: true is not 1, and 1 is 1.0."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return type(a) is type(b) and a == b if not isinstance(a, (int, float)) else isinstance(b, (int, float)) and a == b
