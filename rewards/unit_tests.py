"""Reward for code: run the program in the completion against the unit tests of its row, in a sandbox.
In: a completion and a row of a code data set (docs/sandbox.md lists them). Out: a Score with one verdict per test.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from llmrl.errors import UserError
from llmrl.sandbox import DEFAULT_PACKAGES, BoxDied, Limits, Sandbox, SandboxUnavailable, default_sandbox
from llmrl.sandbox.languages import language
from llmrl.sandbox.native import native_sandbox
from llmrl.sandbox.packages import check_installed
from llmrl.types import Message, Score
from llmrl.verify.checks.answers import completion_text
from llmrl.verify.code.answers import labelled_program, language_of
from llmrl.verify.code.check import Outcome, TestResult, UnusableRow, reward_of, run_tests
from llmrl.verify.code.datasets import COLUMNS, READ_FURTHER
from llmrl.verify.code.extract import extract_program
from llmrl.verify.code.rows import AssertTests, Row, StdinTests, broken_source, read_row, unknown_row
from llmrl.verify.code.suite import SuiteTests, unsupported

POOL = True
"""Some programs take seconds to judge, so this runs in the pool's worker processes, each with a sandbox of its own."""
_OUTCOMES = ("all", "fraction", "bcoder")


def unit_tests(
    completion: str | list[Message],
    prompt: Any = None,
    test: str | None = None,
    entry_point: str | None = None,
    code_prompt: str | None = None,
    test_list: list[str] | None = None,
    test_setup_code: str | None = None,
    test_imports: list[str] | None = None,
    challenge_test_list: list[str] | None = None,
    code: str | None = None,
    input_output: Any = None,
    public_test_cases: Any = None,
    private_test_cases: Any = None,
    starter_code: str | None = None,
    metadata: Any = None,
    test_cases: Any = None,
    verification_info: Any = None,
    tests: Any = None,
    public_tests: Any = None,
    private_tests: Any = None,
    generated_tests: Any = None,
    official_tests: Any = None,
    generated_checker: str | None = None,
    input_mode: str | None = None,
    reward_model: Any = None,
    checker: str | None = None,
    tolerance: float | None = None,
    ignore_case: bool | None = None,
    prefilled: str = "",
    *,
    outcome: Outcome = "all",
    code_language: str = "python",
    cpu_seconds: int = 10,
    wall_seconds: float = 20.0,
    total_seconds: float = 60.0,
    memory_mb: int = 1024,
    packages: Sequence[str] = DEFAULT_PACKAGES,
    sandbox: Sandbox | None = None,
) -> Score:
    """Run the program of a completion against its row's tests. Columns are named as in their data sets.

    Args:
        completion: text or messages; the program is taken from its code blocks.
        prompt: HumanEval; a completion that is only a function body continues it.
        test: HumanEval: defines check(candidate). KodCode, BigCodeBench: a test file for pytest or unittest.
        entry_point: HumanEval, BigCodeBench: name of the function.
        code_prompt: BigCodeBench: its imports and constants, which the tests use too.
        test_list: MBPP: assertions.
        test_setup_code: MBPP: runs before them.
        test_imports: MBPP: import statements for them.
        challenge_test_list: MBPP: more assertions.
        code: MBPP: the reference solution, read for the names it defines; it is not run.
        input_output: APPS: inputs, outputs and, for calls, fn_name.
        public_test_cases: LiveCodeBench: input, output, testtype.
        private_test_cases: LiveCodeBench: more of them.
        starter_code: LiveCodeBench: names the method if metadata does not.
        metadata: LiveCodeBench, DeepCoder: func_name.
        test_cases: AceCode: assertions; or a list of cases with input and output.
        verification_info: SYNTHETIC-1, open-r1 verifiable-coding: test_cases with type, input, output, fn_name.
        tests: DeepCoder: a list of cases, or inputs and outputs.
        public_tests: CodeContests: input, output.
        private_tests: CodeContests: more of them.
        generated_tests: CodeContests: more of them.
        official_tests: open-r1 Codeforces: a list of cases with input and output.
        generated_checker: open-r1 Codeforces: a checker, see `checker`.
        input_mode: open-r1 Codeforces: only `stdio` is judged.
        reward_model: Eurus, verl: tests in ground_truth, in any of these forms.
        checker: Python program that decides about an output: `checker.py input.txt correct_output.txt
            solution_output.txt` prints 1 for a right one.
        tolerance: relative or absolute, for numbers in printed outputs. Default: 1e-6.
        ignore_case: whether letter case in printed outputs does not matter.
        prefilled: how the prompt already begins the completion's message, such as `<think>`.
        outcome: `all` (1 or 0), `fraction` (share of tests passed) or `bcoder` (+1, -0.3 wrong, -0.6 run-time error or
            time-out, -1 does not compile).
        code_language: `python`, `cpp`, `java`, `javascript`, `rust`, `go`, or `auto`: that of the answer's last code
            block with a label. Programs that are not Python read standard input.
        cpu_seconds: processor time of one test: an assertion, a call or one input.
        wall_seconds: real time of one test, without waiting for a processor: the limit of programs that sleep.
        total_seconds: the same for all tests of one completion together.
        memory_mb: memory of the program, in addition to the interpreter's own.
        packages: installed packages that Python programs may import, such as scipy, pandas or sortedcontainers.
        sandbox: where programs run; default: the process's sandbox, chosen by LLMRL_SANDBOX.

    Returns:
        A Score: an abstention if the row's tests cannot be used, an error if no sandbox is available.

    Raises:
        UserError: unknown outcome, or a row with the columns of none of these data sets.
    """
    if outcome not in _OUTCOMES:
        raise UserError(f"unit_tests: outcome {outcome!r} is unknown: use {', '.join(_OUTCOMES)}")
    given = locals()
    columns = {name: given[name] for name in _TEST_COLUMNS}
    row = read_row(columns | {"prompt": prompt if isinstance(prompt, str) else None})
    limits = Limits(cpu_seconds=cpu_seconds, wall_seconds=wall_seconds, memory_mb=memory_mb)
    answer = prefilled + completion_text(completion)
    name = language_of(answer) if code_language == "auto" else code_language
    if name != "python":
        return _run_native(answer, row, outcome, limits, total_seconds, language(name).labels[0])
    return _run(
        extract_program(answer, row),
        row,
        outcome,
        limits,
        total_seconds,
        lambda: sandbox or default_sandbox(tuple(packages)),
    )


def seconds_needed(total_seconds: float = 60.0, **_: Any) -> float:
    """Return how long a call may take on an idle machine: its tests, and the start of a box."""
    return total_seconds + 5.0


def check(row: dict[str, Any]) -> str | None:
    """Say that the row has no tests, or tests that cannot be read. Tests in a large archive are not unpacked for it."""
    if row.get("outcome", "all") not in _OUTCOMES:
        return f"outcome {row['outcome']!r} is unknown: use {', '.join(_OUTCOMES)}"
    if (packages := tuple(row.get("packages", DEFAULT_PACKAGES))) != DEFAULT_PACKAGES:
        check_installed(packages)
    prompt = row.get("prompt")
    columns = {name: row[name] for name in _TEST_COLUMNS if name in row}
    packed = columns.get("private_test_cases")
    if isinstance(packed, str) and len(packed) > _LARGE_ARCHIVE:
        del columns["private_test_cases"]
        if not columns.get("public_test_cases"):
            return None
    if not columns.keys() & set(_TESTS):
        raise unknown_row(row)
    tests = read_row(columns | {"prompt": prompt if isinstance(prompt, str) else None}).tests
    if tests is None:
        return "the row has no tests"
    if isinstance(tests, SuiteTests):
        return unsupported(tests.source)
    return broken_source(tests) if isinstance(tests, AssertTests) else None


_TEST_COLUMNS = (
    *("test", "entry_point", "code_prompt", "test_list", "test_setup_code", "test_imports", "challenge_test_list"),
    *("code", "input_output", "public_test_cases", "private_test_cases", "starter_code", "metadata", *COLUMNS),
)
_TESTS = ("test", "test_list", "input_output", "public_test_cases", "private_test_cases", *READ_FURTHER)
_LARGE_ARCHIVE = 100_000
"""Characters; unpacking more takes too long to do for every row before the first step."""


def _run_native(answer: str, row: Row, outcome: Outcome, limits: Limits, total_seconds: float, name: str) -> Score:
    """Run a program in another language than Python; compiling it takes no time of its runs."""
    if row.tests is not None and not isinstance(row.tests, StdinTests):
        return Score(
            reward=None, info={"reason": f"the row's tests call functions, which {name} programs cannot answer"}
        )
    labelled = labelled_program(answer, name)
    program = extract_program(answer, row) if labelled is None else labelled

    def compiled() -> Sandbox:
        box = native_sandbox(name)
        if program.strip():
            with contextlib.suppress(BoxDied):  # the run tries again, and decides whose fault it is
                box.prepare(program)
        return box

    # These boxes do not tell waiting for a processor from sleeping, so only a machine that is very busy ends a run.
    limits = replace(limits, wall_seconds=max(limits.wall_seconds, 10.0 * limits.cpu_seconds))
    return _run(program, row, outcome, limits, total_seconds, compiled)


def _run(
    program: str,
    row: Row,
    outcome: Outcome,
    limits: Limits,
    total_seconds: float,
    sandbox: Callable[[], Sandbox],
) -> Score:
    if row.tests is None:
        return Score(reward=None, info={"reason": "the row has no tests"})
    try:
        box = sandbox()
        results = run_tests(program, row, box, limits, stop_early=outcome == "all", total_seconds=total_seconds)
    except UnusableRow as error:
        return Score(reward=None, info={"reason": str(error)})
    except SandboxUnavailable:
        return Score(reward=None, error=traceback.format_exc())
    return Score(reward=reward_of(results, outcome), info=_shown(program, results))


def _shown(program: str, results: list[TestResult]) -> dict[str, Any]:
    """Return the program, the verdicts and the first failure, for display."""
    verdicts = [result.verdict for result in results]
    info = {"program": program[:4000], "tests": verdicts, "counts": dict(Counter(verdicts))}
    failure = next((result for result in results if result.verdict != "passed"), None)
    if failure is not None:
        info["first_failure"] = f"{failure.verdict}: {failure.detail}".rstrip(": ")
    return info


_ADD = {"test_list": ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]}
_PYTEST = {"test": "from solution import add\n\ndef test_add():\n    assert add(1, 2) == 3\n"}
_PATCHED = {"test": _PYTEST["test"] + "\ndef test_it(monkeypatch):\n    monkeypatch.setattr('solution.x', 1)\n"}
_ECHO = {"input_output": {"inputs": ["3\n", "4\n"], "outputs": ["9\n", "16\n"]}}
EXAMPLES: list[dict[str, Any]] = [
    {"completion": "```python\ndef add(a, b):\n    return a + b\n```", **_ADD, "reward": 1.0},
    {"completion": "<think>def add(a, b): return 0</think>def add(a, b):\n    return a + b", **_ADD, "reward": 1.0},
    {"completion": "```python\ndef add(a, b):\n    return a - b\n```", **_ADD, "reward": 0.0},
    {"completion": "```python\ndef add(a, b):\n    return 3\n```", **_ADD, "outcome": "fraction", "reward": 0.5},
    {"completion": "def add(a, b:", **_ADD, "outcome": "bcoder", "reward": -1.0},
    {"completion": "def add(a, b):\n    return a / 0", **_ADD, "outcome": "bcoder", "reward": -0.6},
    {"completion": "def add(a, b):\n    return 0", **_ADD, "outcome": "bcoder", "reward": -0.3},
    {"completion": "I would add the two numbers.", **_ADD, "reward": 0.0},
    {"completion": "", **_ADD, "reward": 0.0},
    {"completion": "```python\nprint(int(input()) ** 2)\n```", **_ECHO, "reward": 1.0},
    {"completion": "```python\nprint(9)\n```", **_ECHO, "reward": 0.0},
    {
        "completion": "    return x + 1\n",
        "prompt": "def up(x):\n    '''Next number.'''\n",
        "test": "def check(candidate):\n    assert candidate(1) == 2\n",
        "entry_point": "up",
        "reward": 1.0,
    },
    {"completion": "def add(a, b):\n    return a + b", **_PYTEST, "reward": 1.0},
    {"completion": "import pytest\ndef add(a, b):\n    pytest.exit('passed', 0)", **_PYTEST, "reward": 0.0},
    {"completion": "def add(a, b):\n    return a + b", **_PATCHED, "reward": None},
    {"completion": "def add(a, b):\n    return a + b", "test_list": [], "reward": None},
    # Hostile: exits before it can be judged, claims success, returns an object that equals everything.
    {"completion": "import os\nos._exit(0)", **_ADD, "reward": 0.0},
    {"completion": "print('ALL TESTS PASSED')\nimport sys\nsys.exit(0)", **_ADD, "reward": 0.0},
    {
        "completion": "class Any:\n    def __eq__(self, other):\n        return True\ndef add(a, b):\n    return Any()",
        **_ADD,
        "reward": 0.0,
    },
    {
        "completion": "import builtins\nbuiltins.AssertionError = ValueError\ndef add(a, b):\n    raise AssertionError",
        **_ADD,
        "reward": 0.0,
    },
]
