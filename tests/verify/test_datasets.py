from __future__ import annotations

import json
from typing import Any

import pytest

from llmrl.errors import UserError
from llmrl.verify.code.rows import AssertTests, CallTests, StdinTests, read_row
from llmrl.verify.code.suite import SuiteTests
from llmrl.verify.spec import find

SQUARE = StdinTests(inputs=["3\n"], outputs=["9\n"])
ADD = CallTests(function="add", inputs=[[1, 2]], outputs=[3], maybe_wrapped=True)
CASE = {"input": "3\n", "output": "9\n"}
CALL = {"type": "function_call", "fn_name": "add", "input": [1, 2], "output": 3}
PLAIN = {"inputs": ["3\n"], "outputs": ["9\n"]}
ONE = {"input": ["3\n"], "output": ["9\n"]}
NONE: dict[str, list[str]] = {"input": [], "output": []}


@pytest.mark.parametrize(
    ("row", "tests"),
    [
        ({"verification_info": {"language": "python", "test_cases": [CASE | {"type": "stdin_stdout"}]}}, SQUARE),
        ({"verification_info": json.dumps({"test_cases": [CASE | {"type": "stdin_stdout", "fn_name": None}]})}, SQUARE),
        ({"verification_info": str({"language": "python", "test_cases": [CASE | {"fn_name": None}]})}, SQUARE),
        ({"verification_info": {"test_cases": [CALL]}}, ADD),
        ({"tests": json.dumps([CASE | {"type": "stdin"}])}, SQUARE),
        ({"tests": json.dumps([CASE | {"testtype": "stdin"}])}, SQUARE),
        ({"tests": json.dumps(PLAIN)}, SQUARE),
        ({"tests": [CALL]}, ADD),
        (
            {"tests": [{"input": "1\n2", "output": "3", "testtype": "functional"}], "metadata": {"func_name": "add"}},
            CallTests(function="add", inputs=[[1, 2]], outputs=[3]),
        ),
        (
            {"tests": [{"input": "1\n2", "output": "3", "testtype": "functional", "metadata": {"func_name": "add"}}]},
            CallTests(function="add", inputs=[[1, 2]], outputs=[3]),
        ),
        (
            {"public_tests": ONE, "private_tests": NONE, "generated_tests": NONE},
            SQUARE,
        ),
        ({"public_tests": NONE, "private_tests": ONE}, SQUARE),
        ({"reward_model": {"style": "rule", "ground_truth": json.dumps(PLAIN)}}, SQUARE),
        ({"reward_model": {"ground_truth": json.dumps(PLAIN | {"fn_name": "f"})}}, None),
        ({"official_tests": [CASE], "generated_tests": 12, "generated_checker": None, "input_mode": "stdio"}, SQUARE),
    ],
)
def test_tests_of_many_data_sets_are_read(row: dict[str, Any], tests: Any) -> None:
    found = read_row(row)
    assert found.conventions == "judge"
    if tests is None:
        assert isinstance(found.tests, CallTests)
    else:
        assert found.tests == tests


def test_assertions_and_test_files_are_read() -> None:
    line = "assert f(1) == 2"
    rows = [{"test_cases": [line]}, {"reward_model": {"ground_truth": json.dumps([line])}}, {"tests": line}]
    for row in rows:
        tests = read_row(row).tests
        assert isinstance(tests, AssertTests) and tests.checks == [line]
    suite = "from solution import f\n\ndef test_a():\n    assert f(1) == 2\n"
    for row in ({"test": suite}, {"reward_model": {"ground_truth": suite}}, {"tests": {"functional": suite}}):
        assert isinstance(read_row(row).tests, SuiteTests)


def test_a_codeforces_row_brings_its_checker() -> None:
    row = {"official_tests": [CASE], "generated_checker": "print(1)"}
    assert read_row(row).checker == "print(1)"
    assert read_row(row | {"checker": "print(0)"}).checker == "print(0)"
    own = read_row({"input_output": PLAIN, "tolerance": "1e-4", "ignore_case": True})
    assert (own.tolerance, own.ignore_case, own.conventions) == (1e-4, True, "python")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"verification_info": {"tests": []}},
            "verification_info: .* test_cases, found an object with tests",
        ),
        ({"verification_info": {"language": "cpp", "test_cases": []}}, "verification_info: .* cpp"),
        ({"reward_model": {"style": "rule"}}, "reward_model: expected an object with ground_truth"),
        ({"reward_model": {"ground_truth": "42"}}, r"reward_model.ground_truth: expected assertions, .*; found 42"),
        ({"tests": "not ["}, "tests: neither JSON nor a Python literal: 'not \\['"),
        ({"tests": [CASE | {"type": "stdin"}, CALL]}, "tests: a row's tests must be of one kind"),
        ({"tests": [{"input": "1", "output": "2", "type": "functional"}]}, "tests: functional tests need fn_name"),
        ({"official_tests": [CASE], "input_mode": "file"}, "input_mode: 'file'"),
    ],
)
def test_a_column_in_another_form_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_row(row)


def test_the_check_of_a_row_names_the_columns_that_it_has() -> None:
    check = find("unit_tests")[1].check
    with pytest.raises(UserError, match=r"Expected .*official_tests \(Codeforces\).*Found: answer, question\."):
        check({"question": "q", "answer": "a", "unset": None})
    assert check({"tests": json.dumps(PLAIN)}) is None
