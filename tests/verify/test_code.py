from __future__ import annotations

import base64
import importlib.util
import json
import pickle
import random
import re
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llmrl.errors import UserError
from llmrl.sandbox import Limits, Sandbox, SandboxUnavailable, open_sandbox
from llmrl.types import Score
from llmrl.verify.code import check as check_module
from llmrl.verify.code.check import TestResult as Result
from llmrl.verify.code.check import reward_of, run_tests, same_output, same_value
from llmrl.verify.code.extract import extract_program
from llmrl.verify.code.rows import AssertTests, CallTests, StdinTests, read_row

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data" / "code"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the data sets are not beside the repository")
SLOW = Limits(cpu_seconds=60, wall_seconds=300.0)
"""One MBPP reference counts divisors up to 9999 in pure Python, which takes seconds."""
LIMITS = Limits(cpu_seconds=1, wall_seconds=300.0)
"""Processor time alone ends a program here: it does not depend on how busy the machine is, as real time does."""
PATIENT = {"wall_seconds": 300.0, "total_seconds": 3000.0}
"""The same for `unit_tests`."""


def load_reward() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reward_unit_tests", ROOT / "rewards" / "unit_tests.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reward = load_reward()


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    try:
        sandbox = open_sandbox()
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    yield sandbox
    sandbox.close()


def verdicts(program: str, box: Sandbox, limits: Limits | None = None, **row: Any) -> list[str]:
    results = run_tests(program, read_row(row), box, limits or LIMITS, stop_early=False)
    return [result.verdict for result in results]


# --- the program in an answer -----------------------------------------------------------------------------------------

ADD = read_row({"test_list": ["assert add(1, 2) == 3"]})
UP = read_row(
    {
        "prompt": "import math\ndef half(x):\n    return x / 2\ndef up(x: int) -> int:\n    '''Next.'''\n",
        "entry_point": "up",
        "test": "def check(candidate): assert candidate(1) == 2",
    }
)


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("def add(a, b): return a", "def add(a, b): return a"),
        ("Sure:\n```python\nA\n```\nbye", "A\n"),
        ("```\nA\n```", "A\n"),
        ("```py\nA\n```\ntext\n```\nB\n```", "A\n"),
        ("```bash\npip\n```\n```python\nA\n```\n```text\n3\n```", "A\n"),
        ("```python\ndef add(a, b): pass\n```\nUse:\n```python\nprint(add(1, 2))\n```", "def add(a, b): pass\n"),
        ("```python\ndef add(a, b): 1\n```\nBetter:\n```python\ndef add(a, b): 2\n```", "def add(a, b): 2\n"),
        ("```python\nadd = lambda a, b: a\n```\n```python\nadd(1, 2) == 3\n```", "add = lambda a, b: a\n"),
        ("~~~python\nA\n~~~", "A\n"),
        ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''\n"),
        ("  ```python\nA\n  ```", "A\n"),
        ("```python\ncut off here", "cut off here\n"),
        ("<think>```python\nX\n```</think>```python\nA\n```", "A\n"),
        ("<think>never ends ```python\ndef add(a, b): 1\n```", ""),
        ("", ""),
        ("```python\n```", ""),
        # What stands beside the fences on their lines.
        ("<answer>\n```python\nA\n```</answer>", "A\n"),
        ("<answer>```python\nA\n```\n</answer>", "A\n"),
        ("Code: ```python\nA\n```", "A\n"),
        ("- ```python\nA\n```", "A\n"),
        ("- ```python\n  if 1:\n      A\n  ```", "if 1:\n    A\n"),
        ("1. Code:\n\n   ```python\n   if 1:\n\n       A\n   ```", "if 1:\n\n    A\n"),
        ("```python\nA```", "A\n"),
        ("```python\nA\n``` This is it.\nIt uses ``` and `x`.", "A\n"),
        ("```python\nA\n```<|im_end|>", "A\n"),
        ("```python\ncut off here<|im_end|>", "cut off here\n"),
        ("A<|im_end|>", "A"),
        ("<answer>\nA\n</answer>", "A"),
        ("```python\r\nA\r\nB\r\n```\r\n", "A\nB\n"),
        ("\ufeffA", "A"),
        # The prompt opened the first block.
        ("print(1)\n```", "print(1)\n"),
        ("print(1)```", "print(1)"),
        ("print(1)\n```\nThis prints.", "print(1)\n"),
        ("print(1)\n``` This prints.", "print(1)\n"),
        ("print(1)\n```\nBetter:\n```python\nprint(2)\n```", "print(2)\n"),
        ("Solution\n```\nA\n```\nDone", "A\n"),
        ("x = 5\n```\nprint(1)\n```", "print(1)\n"),
        ("print(1)\n```\nUse:\n```python\nadd(1", "add(1\n"),
        ("x is 1.\n```\nA\n", "A\n"),
        # Labels.
        ("```python3.11\nA\n```\n```\n9\n```", "A\n"),
        ("```{python}\nA\n```\n```text\n9\n```", "A\n"),
        ('```python title="a.py"\nA\n```', "A\n"),
        ("```\nA\n```\n```json\n{}\n```", "A\n"),
        ("```cpp\nA\n```", "A\n"),
        ("```python\nA\n```\n```python\n>>> main()\n9\n```", "A\n"),
        # Fences in strings of the program; a string that a broken draft leaves open does not reach the next block.
        ("```python\nprint('```')\n```", "print('```')\n"),
        ('```python\ndef f():\n    """\n    ```\n    f()\n    ```\n    """\n```', None),
        ('```python\nx = """\n```\nFixed:\n```python\nx = """y"""\n```', 'x = """y"""\n'),
    ],
)
def test_the_program_is_found_in_an_answer(answer: str, program: str | None) -> None:
    if program is None:  # all that is between the outermost fences
        program = answer.removeprefix("```python\n").removesuffix("```")
    assert extract_program(answer, ADD) == program


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("```python\nn = input()\n```\nWith n = 3:\n```python\nprint(3 ** 2)\n```", "n = input()\n"),
        ("```\nn = int(open(0).read())\n```\nOutput:\n```\n9\n```", "n = int(open(0).read())\n"),
        (
            "```python\nn = input()\n```\nFaster:\n```python\nimport sys\nn = sys.stdin\n```",
            "import sys\nn = sys.stdin\n",
        ),
        ("```python\nA\n```\n```python\nB\n```", "B\n"),
        ("```python\n    A\n    B\n```", "A\nB\n"),
    ],
)
def test_the_program_for_a_row_with_input_is_the_one_that_reads_it(answer: str, program: str) -> None:
    assert extract_program(answer, read_row({"input_output": {"inputs": ["3"], "outputs": ["9"]}})) == program


@pytest.mark.parametrize(
    ("answer", "tail"),
    [
        ("    return x + 1\n", "'''Next.'''\n    return x + 1\n"),
        ("return x + 1", "'''Next.'''\n    return x + 1"),
        ("y = x\n    return y + 1", "'''Next.'''\n    y = x\n    return y + 1"),
        ("if x:\n    return 2\nreturn 1", "'''Next.'''\n    if x:\n        return 2\n    return 1"),
        ("```python\n    return x + 1\n```", "'''Next.'''\n    return x + 1\n"),
        ("def up(x):\n    return 2", "    return x / 2\ndef up(x):\n    return 2"),
        ("```python\nimport os\nasync def up(x): 1\n```", "    return x / 2\nimport os\nasync def up(x): 1\n"),
    ],
)
def test_a_body_continues_the_prompt_and_a_function_follows_its_helpers(answer: str, tail: str) -> None:
    program = extract_program(answer, UP)
    assert program.startswith("import math\ndef half(x):") and program.endswith(tail)
    compile(program, "program", "exec")


def test_a_future_import_stays_first() -> None:
    answer = "from __future__ import annotations\ndef up(x): return x + 1"
    assert extract_program(answer, UP) == answer


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_are_recognized_by_their_columns() -> None:
    checks = {"test_list": ["assert add(sum([1]), 2) == 3"], "challenge_test_list": ["assert add(0, 0) == 0"]}
    mbpp = read_row(checks | {"test": None})
    assert isinstance(mbpp.tests, AssertTests) and len(mbpp.tests.checks) == 2 and mbpp.names == ["add"]
    calls = read_row({"input_output": json.dumps({"fn_name": "f", "inputs": [[1, [2]]], "outputs": [[3]]})})
    assert calls.tests == CallTests(function="f", inputs=[[1, [2]]], outputs=[[3]], maybe_wrapped=True)
    lines = read_row({"input_output": {"inputs": [["1", "2"], "x\n"], "outputs": [["3"], "y"]}})
    assert lines.tests == StdinTests(inputs=["1\n2", "x\n"], outputs=["3", "y"])
    for empty in ({"test_list": []}, {"input_output": ""}, {"input_output": "{}"}, {"public_test_cases": "[]"}):
        assert read_row(empty).tests is None


def test_livecodebench_rows_with_packed_private_cases() -> None:
    def case(given: str, wanted: str, kind: str) -> dict[str, str]:
        return {"input": given, "output": wanted, "testtype": kind}

    private = base64.b64encode(
        zlib.compress(pickle.dumps(json.dumps([case('[1, 2]\n"x"', "3", "functional")])))
    ).decode()
    row = read_row(
        {
            "public_test_cases": json.dumps([case('[0]\n""', "0", "functional")]),
            "private_test_cases": private,
            "metadata": '{"func_name": "total"}',
        }
    )
    assert row.tests == CallTests(function="total", inputs=[[[0], ""], [[1, 2], "x"]], outputs=[0, 3])
    stdin = read_row({"public_test_cases": [case("1\n", "2\n", "stdin")]})
    assert stdin.tests == StdinTests(inputs=["1\n"], outputs=["2\n"])


def test_a_pickled_object_in_a_row_is_refused() -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return (exec, ("raise SystemError('ran')",))

    packed = base64.b64encode(zlib.compress(pickle.dumps(Attack()))).decode()
    with pytest.raises(UserError, match=r"private_test_cases.*builtins\.exec"):
        read_row({"private_test_cases": packed})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?", "prompt": None}, "no tests in a known format.*Found: question"),
        ({"input_output": "{"}, "input_output: not JSON"),
        ({"input_output": {"inputs": ["1"], "outputs": []}}, "1 inputs but 0 outputs"),
        ({"public_test_cases": [{"input": "", "output": "", "testtype": "other"}]}, "testtype must be"),
        ({"public_test_cases": [{"input": "", "output": "", "testtype": "functional"}]}, "needs func_name"),
    ],
)
def test_a_row_in_another_format_is_a_user_error(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_row(row)


# --- comparison -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("1 2\n3\n", "1 2\n3", True),
        ("1  2 \n3\n\n\n", "1 2\n3\n", True),
        ("1\r\n2\r\n", "1\n2\n", True),
        ("", "\n", True),
        ("1 2 3", "1 2\n3", False),
        ("12", "1 2", False),
        ("0.3333333", "0.33333333333", True),
        ("0.33333", "0.33333333333", False),
        ("1000000.5", "1000000.9", True),
        ("3", "3.0", True),
        ("3", "03", False),
        ("10000000000000000001", "10000000000000000002", False),
        ("1e3", "1000", True),
        ("nan", "NaN", False),
        ("inf", "1e999", False),
        ("1_0.0", "10.0", False),
        ("YES", "yes", False),
        ("", "1", False),
        ("1\n", "", False),
    ],
)
def test_printed_output_is_compared_by_lines_and_tokens(printed: str, expected: str, same: bool) -> None:
    assert same_output(printed, expected) is same


@pytest.mark.parametrize(
    ("given", "expected", "same"),
    [
        (1, 1, True), (True, 1, False), (1, True, False), (1.0, 1, True), (0.1 + 0.2, 0.3, True), (0.3001, 0.3, False),
        (float("nan"), float("nan"), False), ("1", 1, False), ("", None, False), (None, None, True), (None, "", False),
        ((1, [2]), [1, [2]], True), ([1], [1, 1], False), ({1: "a"}, {"1": "a"}, True), ({1}, [1], False),
        (float("inf"), float("inf"), True), (10**400, 1.0, False),
    ],
    ids=repr,
)  # fmt: skip
def test_returned_values_are_compared_with_types(given: Any, expected: Any, same: bool) -> None:
    assert same_value(given, expected) is same


@pytest.mark.parametrize(
    ("results", "all_", "fraction", "bcoder"),
    [
        (["passed", "passed"], 1.0, 1.0, 1.0),
        (["passed", "wrong"], 0.0, 0.5, -0.3),
        (["wrong", "error", "passed", "passed"], 0.0, 0.5, -0.6),
        (["passed", "timeout", "not_run"], 0.0, 1 / 3, -0.6),
        (["compile_error", "compile_error"], 0.0, 0.0, -1.0),
    ],
)
def test_outcomes_become_one_number(results: list[Any], all_: float, fraction: float, bcoder: float) -> None:
    outcome = [Result(verdict=verdict) for verdict in results]
    assert reward_of(outcome, "all") == all_
    assert reward_of(outcome, "fraction") == pytest.approx(fraction, abs=1e-12)
    assert reward_of(outcome, "bcoder") == bcoder


# --- tests outside, program in the box --------------------------------------------------------------------------------


def test_each_test_has_its_own_verdict(box: Sandbox) -> None:
    program = """
import os
def f(x):
    if x == 1: return 1 / 0
    if x == 2: os._exit(0)
    while x == 3: pass
    return x
"""
    checks = [f"assert f({x}) == {x}" for x in (0, 1, 2, 5, 6)]
    assert verdicts(program, box, test_list=checks) == ["passed", "error", "error", "passed", "passed"]
    endless = [checks[0], "assert f(3) == 3", checks[0]]
    assert verdicts(program, box, test_list=endless) == ["passed", "timeout", "not_run"]
    assert verdicts("def f(x", box, test_list=checks) == ["compile_error"] * 5
    assert verdicts("", box, test_list=checks) == ["compile_error"] * 5
    assert verdicts("x = " + "1" * 2_000_000, box, test_list=checks) == ["compile_error"] * 5
    assert verdicts("def g(x): return x", box, test_list=["assert f(0) == 0"]) == ["error"]


def test_a_program_that_sleeps_runs_into_the_limit_on_real_time(box: Sandbox) -> None:
    sleeps, short = "import time\ndef f(x): time.sleep(1000)", Limits(cpu_seconds=60, wall_seconds=1.0)
    assert verdicts(sleeps, box, short, test_list=["assert f(3) == 3"]) == ["timeout"]


def test_a_raising_function_never_returns_what_is_expected(box: Sandbox) -> None:
    program = "def f(x): raise ValueError"
    for expected in ("None", "''", "False", "[]"):
        assert verdicts(program, box, test_list=[f"assert f(1) == {expected}"]) == ["error"]
    caught = "try:\n    f(1)\n    raise AssertionError\nexcept ValueError:\n    pass"
    assert verdicts(program, box, test_list=[caught]) == ["passed"]
    assert verdicts("def f(x): return 1", box, test_list=[caught]) == ["wrong"]


def test_a_test_that_catches_everything_cannot_pass_a_program_that_ended(box: Sandbox) -> None:
    check = "try:\n    f(1)\nexcept:\n    pass"
    assert verdicts("import os\ndef f(x): os._exit(0)", box, test_list=[check]) == ["error"]
    assert verdicts("def f(x):\n    while True: pass", box, test_list=[check]) == ["timeout"]


def test_a_program_cannot_redefine_what_the_tests_use(box: Sandbox) -> None:
    program = """
class Same:
    def __eq__(self, other): return True
set = sorted = abs = len = isinstance = lambda *args: Same()
class math: isclose = staticmethod(lambda *args: True)
def f(x): return [9]
"""
    checks = [
        "assert set(f(1)) == {1}",
        "assert sorted(f(1)) == [1]",
        "assert abs(f(1)[0]) == 1",
        "assert len(f(1)) == 2",
    ]
    checks += ["assert isinstance(f(1), tuple)", "assert math.isclose(f(1)[0], 1)"]
    assert verdicts(program, box, test_list=checks) == ["wrong"] * 6
    good = "def f(x): return (1,)"
    checks = ["assert set(f(1)) == {1}", "assert isinstance(f(1), tuple)", "assert math.isclose(f(1)[0], 1)"]
    assert verdicts(good, box, test_list=checks) == ["passed"] * 3


def test_membership_is_decided_outside_the_box(box: Sandbox) -> None:
    program = """
class All:
    def __contains__(self, item): return True
    def __iter__(self): return iter([1])
def f(x): return All()
"""
    assert verdicts(program, box, test_list=["assert 7 in f(0)", "assert 1 in f(0)"]) == ["wrong", "passed"]


def test_a_built_in_that_the_reference_defines_is_the_programs(box: Sandbox) -> None:
    checks = ["assert sum(10, 15) == 6"]
    assert verdicts("def sum(a, b): return 6", box, test_list=checks, code="def sum(a, b): return 0") == ["passed"]
    assert verdicts("def sum(a, b): return 6", box, test_list=checks) == ["passed"]
    assert verdicts("def sum(a, b): return 5", box, test_list=checks) == ["wrong"]


def test_setup_may_build_objects_of_the_programs_classes(box: Sandbox) -> None:
    row = {
        "test_setup_code": "root = Node(1)\nroot.left = Node(2)\nroot.left.left = Node(4)",
        "test_list": ["assert depth(root) == 3", "assert root.left.value == 2"],
    }
    program = """
class Node:
    def __init__(self, value): self.value, self.left = value, None
def depth(node): return 0 if node is None else 1 + depth(node.left)
"""
    assert verdicts(program, box, **row) == ["passed", "passed"]
    assert verdicts(program.replace("1 + depth", "2 + depth"), box, **row) == ["wrong", "passed"]
    assert verdicts("def depth(node): return 3", box, **row) == ["error", "error"]


def test_humaneval_helpers_are_the_prompts_not_the_programs(box: Sandbox) -> None:
    row = {
        "prompt": "def encode(s):\n    return s[::-1]\n\ndef decode(s):\n    '''Undo.'''\n",
        "entry_point": "decode",
        "test": "def check(candidate):\n    from random import choice\n    for _ in range(5):\n"
        "        text = ''.join(choice('abc') for _ in range(9))\n        assert candidate(encode(text)) == text\n",
    }
    assert verdicts("def decode(s): return s[::-1]", box, **row) == ["passed"]
    assert verdicts("def encode(s): return s\ndef decode(s): return s", box, **row) == ["wrong"]
    state = random.getstate()
    verdicts("def decode(s): return s[::-1]", box, **row)
    assert random.getstate() == state


def test_call_rows_reach_functions_and_methods(box: Sandbox) -> None:
    row = {"input_output": {"fn_name": "add", "inputs": [[1, 2], [0.1, 0.2]], "outputs": [3, [0.3]]}}
    assert verdicts("def add(a, b): return a + b", box, **row) == ["passed", "passed"]
    assert verdicts("class Solution:\n    def add(self, a, b): return a + b", box, **row) == ["passed", "passed"]
    assert verdicts("class Solution:\n    def add(self, a, b): return str(a + b)", box, **row) == ["wrong", "wrong"]
    assert verdicts("def plus(a, b): return a + b", box, **row) == ["error", "error"]


def test_an_apps_output_may_be_wrapped_in_a_list_or_be_one(box: Sandbox) -> None:
    row = {"input_output": {"fn_name": "f", "inputs": [[1], [2], [3]], "outputs": [[1], [[2]], [3, 3]]}}
    assert verdicts("def f(x): return [x] if x < 3 else [x] * 2", box, **row) == ["passed"] * 3
    assert verdicts("def f(x): return x", box, **row) == ["passed", "wrong", "wrong"]
    assert verdicts("def f(x): return [[x]]", box, **row) == ["wrong", "passed", "wrong"]
    case = {"input": "1", "output": "[1]", "testtype": "functional"}
    livecodebench = {"public_test_cases": [case], "metadata": '{"func_name": "f"}'}
    assert verdicts("def f(x): return x", box, **livecodebench) == ["wrong"]


def test_stdin_rows_run_the_program_once_per_input(box: Sandbox) -> None:
    row = {"input_output": {"inputs": ["1", "2", "0"], "outputs": ["1.0", "0.5", "x"]}}
    assert verdicts("print(1 / int(input()))", box, **row) == ["passed", "passed", "error"]
    assert verdicts("print('1.0')", box, **row) == ["passed", "wrong", "wrong"]
    assert verdicts("print(", box, **row) == ["compile_error"] * 3
    assert verdicts("if input() != '1':\n    while True: pass\nprint(1)", box, **row) == [
        "passed",
        "timeout",
        "not_run",
    ]


class SlowBox:
    """A box in which each run, or each session, has taken 400 seconds."""

    def __init__(self, box: Any) -> None:
        self.box = box

    def run(self, *args: Any) -> Any:
        return replace(self.box.run(*args), seconds=400.0)

    def open(self, *args: Any) -> Any:
        session = self.box.open(*args)
        session._exchange = SlowExchange(session._exchange)
        return session


class SlowExchange:
    def __init__(self, exchange: Any) -> None:
        self.exchange, self.seconds = exchange, 0.0

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        return self.exchange(request)

    def next_test(self) -> None:
        self.seconds += 400.0
        self.exchange.next_test()


def test_all_runs_together_have_a_limit(box: Sandbox) -> None:
    rows = [
        ({"input_output": {"inputs": ["x"] * 9, "outputs": ["1"] * 9}}, "input()\nprint(1)", "passed"),
        ({"test_list": ["assert f(1) == 1"] * 9}, "def f(x): return 1", "passed"),
    ]
    for row, program, verdict in rows:
        slow: Any = SlowBox(box)
        results = run_tests(program, read_row(row), slow, LIMITS, stop_early=False, total_seconds=1000.0)
        assert [r.verdict for r in results] == [verdict] * 3 + ["timeout"] + ["not_run"] * 5


def test_each_test_has_the_processor_time_of_one(box: Sandbox) -> None:
    spin = """
import time
def f(x):
    start = time.process_time()
    while time.process_time() - start < 0.7: pass
    return 1
"""
    row = read_row({"test_list": ["assert f(1) == 1"] * 3})
    results = run_tests(spin, row, box, LIMITS, stop_early=False, total_seconds=60.0)
    assert [r.verdict for r in results] == ["passed"] * 3


def test_a_run_may_take_what_is_left_of_the_time_for_all(box: Sandbox) -> None:
    row = read_row({"input_output": {"inputs": ["x"] * 3, "outputs": ["1"] * 3}})
    endless = "import time\ntime.sleep(1000)"
    results = run_tests(endless, row, box, Limits(wall_seconds=900.0), stop_early=False, total_seconds=1.0)
    assert [r.verdict for r in results] == ["timeout", "not_run", "not_run"]


# --- the reward -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(reward.EXAMPLES)))
def test_examples_get_their_reward(number: int, box: Sandbox) -> None:
    example = dict(reward.EXAMPLES[number])
    expected = example.pop("reward")
    assert reward.unit_tests(**example, **PATIENT, sandbox=box).reward == expected


def test_messages_are_read_too(box: Sandbox) -> None:
    messages = [{"role": "user", "content": "add"}, {"role": "assistant", "content": "def add(a, b): return a + b"}]
    assert reward.unit_tests(messages, test_list=["assert add(1, 2) == 3"], **PATIENT, sandbox=box).reward == 1.0


def test_the_score_shows_verdicts_but_no_expected_value(box: Sandbox) -> None:
    row = {"test_list": ["assert f(1) == 'sesame-open', 'wanted sesame-open'", "assert f(2) == 2"]}
    score = reward.unit_tests("def f(x): return x", **row, outcome="fraction", **PATIENT, sandbox=box)
    assert score.reward == 0.5 and score.error is None
    assert score.info["tests"] == ["wrong", "passed"] and score.info["counts"] == {"wrong": 1, "passed": 1}
    assert "sesame" not in repr(score)
    stopped = reward.unit_tests("def f(x): return x", **row, **PATIENT, sandbox=box)
    assert stopped.reward == 0.0 and stopped.info["tests"] == ["wrong", "not_run"]


def test_an_unusable_row_is_an_abstention(box: Sandbox) -> None:
    for row in ({"test_list": []}, {"test_list": ["assert f(1 =="]}, {"test_list": ["assert f(open) == 1"]}):
        score = reward.unit_tests("def f(x): return 1", **row, **PATIENT, sandbox=box)
        assert (score.reward, score.error) == (None, None) and score.info["reason"]


def test_a_box_that_cannot_start_is_an_error_and_not_a_zero() -> None:
    class Broken:
        def open(self, source: str, limits: Limits) -> Any:
            raise SandboxUnavailable("no box today")

        run = open

    score: Score = reward.unit_tests("def f(x): return 1", test_list=["assert f(1) == 1"], sandbox=Broken())
    assert score.reward is None and score.error is not None and "no box today" in score.error


def test_error_messages_name_the_mistake() -> None:
    with pytest.raises(UserError, match="outcome 'most' is unknown: use all, fraction, bcoder"):
        reward.unit_tests("x", test_list=["assert f(1)"], outcome="most")
    with pytest.raises(UserError, match="Expected the columns"):
        reward.unit_tests("x")


# --- data sets --------------------------------------------------------------------------------------------------------


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


NEGATE = """
def _negated(function):
    def wrong(*args, **kwargs):
        result = function(*args, **kwargs)
        if isinstance(result, bool):
            return not result
        if isinstance(result, (int, float, complex)):
            return result + 1
        if isinstance(result, str):
            return result + "x"
        if isinstance(result, (list, tuple)):
            return result + type(result)([None])
        return "wrong" if result is None else None
    return wrong
_original = {"__name__": "original"}
exec(SOURCE, _original)
for _name, _value in _original.items():
    if not _name.startswith("__"):
        globals()[_name] = _negated(_value) if _name in NAMES and not isinstance(_value, type) else _value
"""


def negated(program: str, names: list[str]) -> str:
    """Return the program with a wrapper that spoils what its functions return, except in recursive calls."""
    return f"SOURCE, NAMES = {program!r}, {names!r}\n{NEGATE}"


@needs_data
@pytest.mark.timeout(3000)
def test_humaneval_solutions_pass_and_their_negations_do_not(box: Sandbox) -> None:
    rows = rows_of("HumanEval.jsonl")
    assert len(rows) == 164
    for columns in rows:
        row = read_row(columns)
        program = extract_program(columns["canonical_solution"], row)
        assert set(verdicts(program, box, SLOW, **columns)) == {"passed"}, columns["task_id"]
        assert set(verdicts(negated(program, row.names), box, SLOW, **columns)) != {"passed"}, columns["task_id"]


@needs_data
@pytest.mark.timeout(3000)
def test_mbpp_solutions_pass_and_their_negations_do_not(box: Sandbox) -> None:
    rows = rows_of("mbpp_first600.jsonl")
    assert len(rows) == 600

    def judge(columns: dict[str, Any]) -> tuple[set[str], set[str]]:
        wrong = negated(columns["code"], read_row(columns).names)
        return set(verdicts(columns["code"], box, SLOW, **columns)), set(verdicts(wrong, box, SLOW, **columns))

    with ThreadPoolExecutor(max_workers=2) as pool:
        for columns, (right, wrong) in zip(rows, pool.map(judge, rows), strict=True):
            assert right == {"passed"}, columns["task_id"]
            assert "passed" not in wrong, (columns["task_id"], wrong)


CODES = {True: 1.0, False: -0.3, -1: -0.6, -2: -1.0}
"""APPS's result codes as B-Coder's outcome."""


def apps_rows() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each row, and the columns of it that the reward takes."""
    for columns in rows_of("apps_sample_2.jsonl"):
        yield columns, {"input_output": columns["input_output"]}


@needs_data
@pytest.mark.timeout(3000)
def test_apps_solutions_pass_and_spoilt_ones_do_not(box: Sandbox) -> None:
    for columns, tests in apps_rows():
        for program in columns["solutions"]:
            assert reward.unit_tests(f"```python\n{program}\n```", **tests, **PATIENT, sandbox=box).reward == 1.0
            wrong = re.sub(r"\bprint\(", "print('?', ", program) + "\nprint('?')"
            assert reward.unit_tests(f"```python\n{wrong}\n```", **tests, **PATIENT, sandbox=box).reward == 0.0


@needs_data
@pytest.mark.timeout(3000)
def test_apps_programs_get_the_result_codes_they_carry(box: Sandbox) -> None:
    contradictions = []
    for columns, tests in apps_rows():
        carried = {source_lines(entry["code"]): entry["result"] for entry in columns["gen_solutions"]}
        for entry in columns["gen_solutions"] + columns["baseline_solutions"]:
            score = reward.unit_tests(entry["code"], **tests, outcome="bcoder", **PATIENT, sandbox=box)
            # Some rows have two codes for one program; no grader can give both.
            code = carried.get(source_lines(entry["code"]), entry["result"])
            assert score.reward == CODES[code], (columns["id"], entry, score.info)
            if code != entry["result"]:
                contradictions.append((columns["id"], code, entry["result"]))
    assert contradictions == [("0001", True, -1)]


def source_lines(program: str) -> tuple[str, ...]:
    """Return the lines of a program; if it has the form of APPS's grader, those inside the grader's function."""
    _, harness, body = program.partition("\nstdout = sys.stdout\ndef code():\n")
    lines = (body if harness else program).strip("\n").split("\n")
    return tuple(line.removeprefix("\t" if harness else "").rstrip() for line in lines if line.strip())


def test_a_program_in_the_form_of_the_apps_grader_is_called(box: Sandbox) -> None:
    row = {"input_output": {"inputs": ["3\n"], "outputs": ["9\n"]}}
    stored = "import sys\nstdin = sys.stdin\nstdout = sys.stdout\ndef code():\n\tprint(int(input()) ** 2)\n\t\n"
    assert extract_program(stored, read_row(row)).endswith("\ncode()\n")
    for program, verdict in (
        (stored, 1.0),
        (stored.replace("** 2", "** 3"), -0.3),
        (stored.replace("int(", "unknown("), -0.6),
    ):
        assert reward.unit_tests(program, **row, outcome="bcoder", **PATIENT, sandbox=box).reward == verdict
    uncalled = "def code():\n    print(int(input()) ** 2)\n"
    assert reward.unit_tests(uncalled, **row, outcome="bcoder", **PATIENT, sandbox=box).reward == -0.3


# --- the conventions of judges ----------------------------------------------------------------------------------------


def test_a_judges_names_are_not_the_programs(box: Sandbox) -> None:
    # Otherwise an empty answer would pass every row whose function has the name of one in the standard library.
    row = {"input_output": {"fn_name": "gcd", "inputs": [[4, 6]], "outputs": [2]}}
    assert verdicts("pass", box, **row) == ["error"]
    assert verdicts("class Solution:\n    def gcd(self, a, b): return math.gcd(a, b)", box, **row) == ["passed"]


def test_each_call_has_a_new_solution(box: Sandbox) -> None:
    row = {"input_output": {"fn_name": "f", "inputs": [[1], [1]], "outputs": [[1], [1]]}}
    program = """
class Solution:
    def __init__(self): self.n = 0
    def f(self, x):
        self.n += 1
        return [self.n]
"""
    assert verdicts(program, box, **row) == ["passed", "passed"]


def test_calls_as_json_text_have_outputs_as_json_text(box: Sandbox) -> None:
    row = {"input_output": {"inputs": ["[2, 7]\n9"], "outputs": ["[0, 1]"], "fn_name": "f"}}
    assert verdicts("def f(a, b): return [0, 1] if b == 9 else a", box, **row) == ["passed"]
    assert verdicts("def f(a, b): return '[0, 1]'", box, **row) == ["wrong"]
    text = {"input_output": {"inputs": [["ab"]], "outputs": ["12"], "fn_name": "f"}}
    assert verdicts("def f(s): return '12'", box, **text) == ["passed"]
    long = {"input_output": {"inputs": ["1"], "outputs": ["1" + "0" * 9000], "fn_name": "f"}}
    assert verdicts("def f(n): return 10 ** 9000", box, **long) == ["passed"]


def test_a_function_that_returns_nothing_changes_its_argument(box: Sandbox) -> None:
    cases = json.dumps([{"input": "[1, 2]", "output": "[2, 1]", "testtype": "functional"}])
    starter = "class Solution:\n    def rev(self, a: List[int]) -> None:\n"
    row = {"public_test_cases": cases, "starter_code": starter}
    program = "class Solution:\n    def rev(self, a: List[int]) -> None:\n        "
    assert verdicts(program + "a.reverse()", box, **row) == ["passed"]
    assert verdicts(program + "pass", box, **row) == ["wrong"]
    assert verdicts(program + "a.reverse()", box, **row | {"starter_code": starter.replace("None", "list")}) == [
        "wrong"
    ]


@pytest.mark.parametrize(
    ("setup", "check", "program"),
    [
        ("xs = make(3)\nx = xs[0]", "assert x == 3", "def make(n): return []"),
        ("d = make(3)\nx = d['a']", "assert x == 3", "def make(n): return {}"),
        ("a, b = make(3)", "assert a == 3", "def make(n): return 1, 2, 3"),
    ],
)
def test_an_exception_in_the_setup_that_uses_the_program_is_the_programs(
    box: Sandbox, setup: str, check: str, program: str
) -> None:
    row = {"test_setup_code": setup, "test_list": [check], "code": "def make(n): return [n]"}
    assert verdicts(program, box, **row) == ["wrong"]
    with pytest.raises(check_module.UnusableRow, match="setup: IndexError"):
        verdicts(program, box, **row | {"test_setup_code": "x = [][0]"})


@pytest.mark.parametrize(
    "head", ["def g(x):\n", "def g(x):\n    # Returns x.\n", "import math\n\ndef g(x: int) -> int:"]
)
def test_a_prompt_without_a_body_is_completed(box: Sandbox, head: str) -> None:
    row = {"prompt": head, "entry_point": "g", "test": "def check(candidate):\n    assert candidate(1) == 1\n"}
    program = extract_program("    return x\n", read_row(row))
    assert verdicts(program, box, **row) == ["passed"]


def test_outputs_are_stripped_where_the_judge_strips_them(box: Sandbox) -> None:
    cases = json.dumps([{"input": "x", "output": "1", "testtype": "stdin"}])
    assert verdicts("print()\nprint(1)\nreturn", box, public_test_cases=cases) == ["passed"]
    assert verdicts("print()\nprint(1)", box, input_output={"inputs": ["x"], "outputs": ["1"]}) == ["wrong"]


def test_the_limit_on_output_grows_with_what_is_expected(box: Sandbox) -> None:
    row = {"input_output": {"inputs": ["x"], "outputs": ["a" * 9_000_000]}}
    assert verdicts("print('a' * 9_000_000)", box, SLOW, **row) == ["passed"]
    assert verdicts("print('a' * 90_000_000)", box, SLOW, **row) == ["wrong"]


def test_a_method_of_solution_may_be_the_entry_point(box: Sandbox) -> None:
    row = {"entry_point": "Solution().f", "test": "def check(candidate):\n    assert candidate(x=[1, 2]) == 3\n"}
    program = "class Solution:\n    def f(self, x: List[int]) -> int: return "
    assert verdicts(program + "sum(x)", box, **row) == ["passed"]
    assert verdicts(program + "4", box, **row) == ["wrong"]
    assert verdicts("pass", box, **row) == ["error"]
