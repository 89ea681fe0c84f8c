"""Reading code data sets: a row becomes tests. `extract.py` finds the program in a model's answer.

Rows are recognized by their own column names: HumanEval (test, entry_point), MBPP (test_list), APPS (input_output),
LiveCodeBench (public_test_cases, private_test_cases); `datasets.py` knows more. Tests and references are trusted.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import pickle
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llmrl.errors import UserError
from llmrl.sandbox import Conventions
from llmrl.verify.code.datasets import translated
from llmrl.verify.code.suite import SuiteTests, read_suite


@dataclass(frozen=True, kw_only=True, slots=True)
class AssertTests:
    """Test code that runs outside the box and calls into it."""

    checks: list[str]
    """Source code of each test; an exception fails it."""
    setup: str = ""
    """Code that runs before the checks, in their namespace; it may use the program's names."""
    helpers: str = ""
    """Trusted definitions for the checks (functions of a HumanEval prompt)."""
    entry_point: str | None = None
    """Name of the function that the checks call `candidate`."""
    defined: frozenset[str] = frozenset()
    """Top-level names of the reference solution. They mean the program's, even if they are built-ins."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CallTests:
    """A function, lists of arguments, and the values that it must return."""

    function: str
    inputs: list[list[Any]]
    outputs: list[Any]
    in_place: bool = False
    """The function returns nothing and changes its first argument, which is then compared instead."""
    maybe_wrapped: bool = False
    """APPS: a list with one output may also mean that output itself; the rows do not tell which."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StdinTests:
    """The texts that a whole program reads, and those that it must print."""

    inputs: list[str]
    outputs: list[str]


Tests = AssertTests | CallTests | StdinTests | SuiteTests


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The tests of a row, and the facts needed to find the program in an answer."""

    tests: Tests | None
    """None if the row has no usable test."""
    prompt: str = ""
    """Code that an answer may continue with a bare function body (HumanEval)."""
    names: list[str] = field(default_factory=list)
    """Names that the tests call; the program defines at least one of them."""
    conventions: Conventions = "python"
    """What programs may rely on where the row comes from."""
    checker: str = ""
    """A program that decides about outputs where several are right; see `checker.py`."""
    tolerance: float | None = None
    """Of numbers in outputs, where the row has its own."""
    ignore_case: bool = False
    """Whether letter case in outputs does not matter."""


# --- rows -------------------------------------------------------------------------------------------------------------


def read_row(row: Mapping[str, Any]) -> Row:
    """Read the tests of a row of HumanEval, MBPP, APPS or LiveCodeBench.

    Raises:
        UserError: the row has none of these data sets' columns, or one that is not in its format.
    """
    present = translated({name: value for name, value in row.items() if value is not None})
    found = _read(present)
    conventions = "judge" if present.get("judged") else found.conventions
    tolerance = present.get("tolerance")
    return replace(
        found,
        conventions=conventions,
        checker=str(present.get("checker") or ""),
        tolerance=None if tolerance is None else float(tolerance),
        ignore_case=bool(present.get("ignore_case")),
    )


def _read(present: dict[str, Any]) -> Row:
    suite = read_suite(present)
    if suite is not None:
        return Row(tests=suite[0], names=suite[1])
    if "test" in present and "entry_point" in present:
        return _humaneval(present)
    if "test_list" in present:
        return _mbpp(present)
    if "input_output" in present:
        return _apps(present)
    if "public_test_cases" in present or "private_test_cases" in present:
        return _livecodebench(present)
    raise unknown_row(present)


def unknown_row(row: Mapping[str, Any]) -> UserError:
    """Return the error for a row without tests that are known here; it names the columns that the row has."""
    found = ", ".join(sorted(name for name, value in row.items() if value is not None)) or "none of these"
    return UserError(
        "unit_tests: the row has no tests in a known format. Expected the columns test and entry_point (HumanEval), "
        "test (KodCode, BigCodeBench), test_list (MBPP), input_output (APPS, TACO), public_test_cases (LiveCodeBench), "
        "test_cases (AceCode), verification_info (SYNTHETIC-1), tests (DeepCoder), public_tests (CodeContests), "
        f"official_tests (Codeforces) or reward_model (Eurus). Found: {found}."
    )


_MARKDOWN = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def _humaneval(row: Mapping[str, Any]) -> Row:
    entry = str(row["entry_point"])
    if entry.startswith("Solution()."):  # LeetCodeDataset
        tests = AssertTests(checks=[f"{row['test']}\ncheck(candidate)\n"], entry_point=entry)
        return Row(tests=tests, names=["Solution"], conventions="judge")
    prompt = str(row.get("prompt") or "")
    if "```" in prompt:
        prompt = next((block for block in _MARKDOWN.findall(prompt) if defines(block, entry)), "")
    prompt = prompt if defines(prompt, entry) else ""
    checks = [f"{row['test']}\ncheck(candidate)\n"]
    tests = AssertTests(checks=checks, helpers=_with_body(prompt), entry_point=entry)
    return Row(tests=tests, prompt=prompt, names=[entry])


def _with_body(prompt: str) -> str:
    """Return a prompt that compiles alone: one that ends after the line of a `def`, or a comment, has no body yet."""
    try:
        ast.parse(prompt)
    except SyntaxError:
        heads = [
            line for line in prompt.split("\n") if line.rstrip().endswith(":") and not line.lstrip().startswith("#")
        ]
        if heads:
            return f"{prompt.rstrip()}\n{' ' * (len(heads[-1]) - len(heads[-1].lstrip()) + 4)}pass\n"
    return prompt


def _mbpp(row: Mapping[str, Any]) -> Row:
    checks = [str(check) for column in ("test_list", "challenge_test_list") for check in row.get(column) or []]
    setup = "\n".join([*map(str, row.get("test_imports") or []), str(row.get("test_setup_code") or "")])
    reference = str(row.get("code") or "")
    if not checks:
        return Row(tests=None)
    defined = frozenset(_top_level_names(reference))
    called = {name for check in checks for name in _called_names(check)}
    names = sorted(called & defined) or sorted(called)
    return Row(tests=AssertTests(checks=checks, setup=setup, defined=defined), names=names)


def _apps(row: Mapping[str, Any]) -> Row:
    content = row["input_output"]
    if isinstance(content, str):
        content = _json(content, "input_output") if content.strip() else {}
    inputs, outputs = content.get("inputs") or [], content.get("outputs") or []
    if len(inputs) != len(outputs):
        raise UserError(f"input_output: {len(inputs)} inputs but {len(outputs)} outputs")
    name = content.get("fn_name")
    if not inputs:
        return Row(tests=None)
    if not name:
        return Row(tests=StdinTests(inputs=[_lines(i) for i in inputs], outputs=[_lines(o) for o in outputs]))
    as_text = all(isinstance(given, str) for given in inputs)  # the arguments as JSON, one a line, and so the outputs
    calls = [_json_lines(i) if isinstance(i, str) else list(i) for i in inputs]
    if as_text:
        outputs = [_json_or_text(output) for output in outputs]
    tests = CallTests(function=name, inputs=calls, outputs=list(outputs), maybe_wrapped=not as_text)
    return Row(tests=tests, names=[name, "Solution"], conventions="judge")


def _livecodebench(row: Mapping[str, Any]) -> Row:
    cases = [case for column in ("public_test_cases", "private_test_cases") for case in _cases(row.get(column), column)]
    if not cases:
        return Row(tests=None)
    kinds = {str(case.get("testtype", "stdin")) for case in cases}
    if kinds == {"stdin"}:
        inputs, outputs = [str(case["input"]) for case in cases], [str(case["output"]) for case in cases]
        return Row(tests=StdinTests(inputs=inputs, outputs=outputs), conventions="judge")
    if kinds != {"functional"}:
        raise UserError(f"public_test_cases: testtype must be stdin or functional throughout, found {sorted(kinds)}")
    metadata = row.get("metadata") or {}
    metadata = _json(metadata, "metadata") if isinstance(metadata, str) else metadata
    name = metadata.get("func_name") or _method_name(str(row.get("starter_code") or ""))
    if not name:
        raise UserError("metadata: a functional LiveCodeBench row needs func_name (or a method in starter_code)")
    calls = [_json_lines(str(case["input"])) for case in cases]
    outputs = [_json(str(case["output"]), "public_test_cases") for case in cases]
    in_place = re.search(rf"def\s+{re.escape(name)}\s*\([^)]*\)\s*->\s*None\b", str(row.get("starter_code") or ""))
    tests = CallTests(function=name, inputs=calls, outputs=outputs, in_place=in_place is not None)
    return Row(tests=tests, names=[name, "Solution"], conventions="judge")


def broken_source(tests: AssertTests) -> str | None:
    """Return why test code does not compile, or None if all of it does."""
    for source in (tests.setup, *tests.checks):
        try:
            ast.parse(source)
        except (SyntaxError, ValueError) as error:
            line = next((line.strip() for line in source.splitlines() if line.strip()), "")
            return f"its test code does not compile ({error}): {line[:80]}"
    return None


def _cases(value: Any, column: str) -> list[dict[str, Any]]:
    """Return test cases as a list. Private ones may be JSON in a compressed pickle, from which only text is loaded."""
    if not value:
        return []
    if isinstance(value, str) and not value.lstrip().startswith("["):
        try:
            value = _TextUnpickler(io.BytesIO(zlib.decompress(base64.b64decode(value)))).load()
        except (ValueError, zlib.error, pickle.UnpicklingError, EOFError) as error:
            raise UserError(f"{column}: neither JSON nor a compressed list of test cases ({error})") from error
    return list(_json(value, column) if isinstance(value, str) else value)


class _TextUnpickler(pickle.Unpickler):
    """Loads text and refuses all objects, because unpickling an object can run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} in a test case")


def _json(text: str, column: str) -> Any:
    try:
        return _loads(text)
    except ValueError as error:
        raise UserError(f"{column}: not JSON ({error})") from error


def _loads(text: str) -> Any:
    return json.loads(text, parse_int=_integer)


def _integer(digits: str) -> int:
    """Return a whole number of any length; `int` refuses more than 4,300 digits at once."""
    if len(digits) <= 4000:
        return int(digits)
    sign, digits = (-1, digits[1:]) if digits[0] == "-" else (1, digits)
    return sign * (_integer(digits[:-4000]) * 10**4000 + int(digits[-4000:]))


def _json_or_text(output: Any) -> Any:
    try:
        return _loads(output) if isinstance(output, str) else output
    except ValueError:
        return output


def _json_lines(text: str) -> list[Any]:
    return [_json(line, "input") for line in text.split("\n") if line.strip()]


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _method_name(starter: str) -> str | None:
    found = re.findall(r"def\s+([A-Za-z]\w*)\s*\(", starter)
    return found[-1] if found else None


def _top_level_names(source: str) -> set[str]:
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return set()
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def _called_names(source: str) -> set[str]:
    """Return the names called in a test that are not built-ins, or the built-in ones if there are no others."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return set()
    called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    return {name for name in called if name not in _BUILTINS} or called


_BUILTINS = frozenset(dir(__import__("builtins")))


def definition(name: str) -> str:
    """Return a pattern for the line on which a program defines a name."""
    escaped = re.escape(name)
    return rf"^(?:async[ ]+def|def|class)[ ]+{escaped}\b|^{escaped}[ ]*(?::[^=\n]*)?=[^=]"


def defines(code: str, name: str) -> bool:
    """Return whether a program defines a name at its top level."""
    return re.search(definition(name), code, re.MULTILINE) is not None
