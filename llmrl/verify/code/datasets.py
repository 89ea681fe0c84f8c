"""Rows of further data sets, told in the columns that `rows.py` reads.

AceCode (test_cases), SYNTHETIC-1 and open-r1 verifiable-coding (verification_info), DeepCoder (tests), CodeContests
(public_tests, private_tests, generated_tests), Eurus and verl (reward_model), open-r1 Codeforces (official_tests).
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping
from typing import Any

from llmrl.errors import UserError
from llmrl.verify.code.suite import is_suite

_KINDS = {"stdin": "stdin", "stdin_stdout": "stdin", "functional": "functional", "function_call": "functional"}


def translated(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a row, with its tests moved to columns of APPS, MBPP or LiveCodeBench.

    Raises:
        UserError: a column is not in its data set's format.
    """
    for column, read in _READERS.items():
        if row.get(column) is not None:
            return {**row, **read(row, column)}
    return dict(row)


def _verification_info(row: Mapping[str, Any], column: str) -> dict[str, Any]:
    info = _parsed(row[column], column)
    language = str(info.get("language") or "python").lower() if isinstance(info, dict) else ""
    if not isinstance(info, dict) or "test_cases" not in info:
        raise UserError(f"{column}: expected an object with test_cases, found {_shown(info)}")
    if not language.startswith("python"):
        raise UserError(f"{column}: its tests call {language} functions; only Python is read")
    return _tests(info["test_cases"], column, row)


def _reward_model(row: Mapping[str, Any], column: str) -> dict[str, Any]:
    model = _parsed(row[column], column)
    if not isinstance(model, dict) or model.get("ground_truth") is None:
        raise UserError(f"{column}: expected an object with ground_truth, found {_shown(model)}")
    return _tests(model["ground_truth"], f"{column}.ground_truth", row)


def _one_column(row: Mapping[str, Any], column: str) -> dict[str, Any]:
    return _tests(row[column], column, row)


def _code_contests(row: Mapping[str, Any], _: str) -> dict[str, Any]:
    inputs: list[str] = []
    outputs: list[str] = []
    for column in ("public_tests", "private_tests", "generated_tests"):
        found = _parsed(row.get(column) or {}, column)
        if isinstance(found, dict):  # other data sets use these names for numbers
            inputs += list(found.get("input") or [])
            outputs += list(found.get("output") or [])
    return {"input_output": {"inputs": inputs, "outputs": outputs}, "judged": True}


def _codeforces(row: Mapping[str, Any], column: str) -> dict[str, Any]:
    if (row.get("input_mode") or "stdio") != "stdio":
        raise UserError(f"input_mode: {row['input_mode']!r}: only programs that read standard input are judged")
    checker = {} if row.get("checker") else {"checker": row.get("generated_checker")}
    return _tests(row[column], column, row) | checker


_READERS: dict[str, Callable[[Mapping[str, Any], str], dict[str, Any]]] = {
    "verification_info": _verification_info,
    "test_cases": _one_column,
    "tests": _one_column,
    "official_tests": _codeforces,
    "public_tests": _code_contests,
    "private_tests": _code_contests,
    "reward_model": _reward_model,
}
READ_FURTHER = tuple(_READERS)
"""Columns with tests."""
COLUMNS = (*READ_FURTHER, "generated_tests", "generated_checker", "checker", "input_mode", "tolerance", "ignore_case")


def _tests(value: Any, column: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return tests in any of the forms in which they are written, in the columns of `rows.py`."""
    if isinstance(value, str) and is_suite(value):
        return {"test": value}
    if isinstance(value, str) and "assert" in value and not value.lstrip().startswith(("[", "{")):
        return {"test_list": [value]}
    value = _parsed(value, column)
    if isinstance(value, dict) and "test_cases" in value:
        return _tests(value["test_cases"], column, row)
    if isinstance(value, dict) and "inputs" in value:
        return {"input_output": value, "judged": True}
    if isinstance(value, dict) and "input" in value:
        return {"input_output": {"inputs": value["input"], "outputs": value["output"]}, "judged": True}
    if isinstance(value, dict) and "assert_case" in value:
        return {"test_list": value["assert_case"]}
    if isinstance(value, dict) and isinstance(value.get("functional"), str):
        return _tests(value["functional"], column, row)
    if isinstance(value, list) and all(isinstance(case, str) for case in value):
        return {"test_list": value}
    if isinstance(value, list) and all(isinstance(case, dict) and {"input", "output"} <= case.keys() for case in value):
        return _cases(value, column, row)
    raise UserError(
        f"{column}: expected assertions, cases with input and output, or inputs and outputs; found {_shown(value)}"
    )


def _cases(cases: list[dict[str, Any]], column: str, row: Mapping[str, Any]) -> dict[str, Any]:
    found = {str(case.get("testtype") or case.get("type") or "stdin") for case in cases}
    kinds = {_KINDS.get(kind) for kind in found}
    if len(kinds) > 1 or None in kinds:
        raise UserError(f"{column}: a row's tests must be of one kind (stdin or functional), found {sorted(found)}")
    inputs, outputs = [case["input"] for case in cases], [case["output"] for case in cases]
    content: dict[str, Any] = {"inputs": inputs, "outputs": outputs}
    if kinds == {"functional"}:
        content["fn_name"] = _function(cases, row)
        if content["fn_name"] is None:
            raise UserError(f"{column}: functional tests need fn_name, or func_name in metadata")
    return {"input_output": content, "judged": True}


def _function(cases: list[dict[str, Any]], row: Mapping[str, Any]) -> str | None:
    for place in (*cases[:1], *(case.get("metadata") for case in cases[:1]), row.get("metadata")):
        place = _parsed(place, "metadata") if isinstance(place, str) else place
        if isinstance(place, Mapping) and (name := place.get("fn_name") or place.get("func_name")):
            return str(name)
    return None


def _parsed(value: Any, column: str) -> Any:
    """Return a value that may be written as JSON, or as Python writes it."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        pass
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise UserError(f"{column}: neither JSON nor a Python literal: {value[:80]!r}") from None


def _shown(value: Any) -> str:
    return f"an object with {', '.join(map(str, value)) or 'nothing'}" if isinstance(value, dict) else repr(value)[:80]
