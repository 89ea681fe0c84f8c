"""Test files (pytest and unittest) run beside the program, never with it: verdicts, and what the mode refuses."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from llmrl.sandbox import Limits
from llmrl.sandbox.local import LocalSandbox
from llmrl.verify.code.check import UnusableRow, run_tests
from llmrl.verify.code.rows import read_row
from llmrl.verify.code.suite import unsupported
from tests.sandbox.sandboxes import any_box

pytestmark = pytest.mark.slow

LIMITS = Limits(cpu_seconds=60, wall_seconds=300.0, memory_mb=256, output_mb=2)


@pytest.fixture(scope="module")
def box() -> Iterator[LocalSandbox]:
    sandbox = any_box(max_servers=1)  # one is enough: the tests run in the twin's
    yield sandbox
    sandbox.close()


def verdicts(box: Any, program: str, *, stop_early: bool = False, limits: Limits = LIMITS, **row: Any) -> list[str]:
    results = run_tests(program, read_row(row), box, limits, stop_early=stop_early, total_seconds=600.0)
    return [result.verdict for result in results]


KODCODE = """
import math
import pytest
from solution import BadInput, Stack, mean

def test_mean():
    assert mean([1, 2, 3]) == 2

@pytest.mark.parametrize("values, expected", [([1], 1), pytest.param([1, 2], 1.5), ([0.1, 0.2], 0.15)], ids=str)
def test_many(values, expected):
    assert mean(values) == pytest.approx(expected)

def test_errors():
    with pytest.raises(ZeroDivisionError):
        mean([])
    with pytest.raises(BadInput, match="^not a list"):
        mean("text")
    with pytest.raises(ValueError) as caught:
        mean("text")
    assert str(caught.value) == "not a list: text"

@pytest.fixture(params=[1, 5])
def full(request):
    stack = Stack()
    stack.push(request.param)
    yield stack
    assert stack.items == []

class TestStack:
    def setup_method(self):
        self.seen = []

    def test_pop(self, full):
        self.seen.append(full.pop())
        assert self.seen in ([1], [5])

@pytest.mark.skip(reason="later")
def test_later():
    assert False
"""
KODCODE_PROGRAM = '''
class BadInput(ValueError):
    pass
def mean(values):
    if isinstance(values, str):
        raise BadInput(f"not a list: {values}")
    return sum(values) / len(values)
class Stack:
    def __init__(self): self.items = []
    def push(self, item): self.items.append(item)
    def pop(self): return self.items.pop()
'''  # fmt: skip
BIGCODEBENCH = {
    "entry_point": "task_func",
    "code_prompt": "import random\nTEAMS = ['a', 'b']\ndef task_func(goals):\n",
    "test": """
import unittest
class TestCases(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        random.seed(1)
        cls.goals = {team: random.randint(0, 9) for team in TEAMS}
    def test_total(self):
        self.assertEqual(task_func(self.goals), sum(self.goals.values()))
    def test_each(self):
        for team in TEAMS:
            with self.subTest(team=team):
                self.assertEqual(task_func({team: 3}), 3)
    def test_error(self):
        with self.assertRaisesRegex(TypeError, "goals"):
            task_func(None)
""",
}
BIGCODEBENCH_PROGRAM = """
def task_func(goals):
    if goals is None:
        raise TypeError("no goals")
    return sum(goals.values())
"""


def test_a_pytest_file_is_judged(box: LocalSandbox) -> None:
    row = {"test": KODCODE, "question": "q", "solution": KODCODE_PROGRAM}
    assert verdicts(box, KODCODE_PROGRAM, **row) == ["passed"] * 7
    wrong = KODCODE_PROGRAM.replace("/ len(values)", "/ (len(values) or 1)")
    assert verdicts(box, wrong, **row) == ["passed"] * 4 + ["wrong", "passed", "passed"]
    assert (
        verdicts(box, KODCODE_PROGRAM.replace("pop(self): return", "pop(self): return 1 +"), **row)[-2:]
        == ["wrong"] * 2
    )
    assert verdicts(box, wrong.replace("def mean", "def other"), **row) == ["error"]
    assert verdicts(box, "def mean(:", **row) == ["compile_error"]


def test_a_unittest_class_is_judged(box: LocalSandbox) -> None:
    assert read_row(BIGCODEBENCH).names == ["task_func"]
    assert verdicts(box, BIGCODEBENCH_PROGRAM, **BIGCODEBENCH) == ["passed"] * 3
    wrong = BIGCODEBENCH_PROGRAM.replace("sum(", "max(")
    assert verdicts(box, wrong, **BIGCODEBENCH) == ["passed", "passed", "wrong"]
    no_error = BIGCODEBENCH_PROGRAM.replace("raise TypeError", "return str")
    assert verdicts(box, no_error, **BIGCODEBENCH) == ["passed", "wrong", "passed"]
    other = "def other(): pass"
    assert verdicts(box, other, **BIGCODEBENCH) == ["error"] * 3


def test_functions_of_the_tests_can_be_called_by_the_program(box: LocalSandbox) -> None:
    test = "from solution import f\ndef test_it():\n    assert f(lambda x: x + 1) == 3\n"
    assert verdicts(box, "def f(g): return g(2)", test=test) == ["passed"]
    inside = "from solution import f\ndef test_it():\n    def g(x):\n        assert x == 3\n    f(g)\n"
    swallowing = "def f(g):\n    try: g(2)\n    except BaseException: pass"
    assert verdicts(box, swallowing, test=inside) == ["wrong"]


def test_the_limits_are_those_of_each_test(box: LocalSandbox) -> None:
    test = "from solution import f\n" + "".join(f"def test_{n}():\n    f()\n" for n in range(3))
    program = (
        "import time\ndef f():\n    start = time.process_time()\n    while time.process_time() < start + 0.7: pass"
    )
    limits = Limits(cpu_seconds=1, wall_seconds=60.0, memory_mb=256)
    assert verdicts(box, program, test=test, limits=limits) == ["passed"] * 3


def test_a_check_function_is_still_a_check_function(box: LocalSandbox) -> None:
    row = {"test": "def check(candidate):\n    assert candidate(1) == 2\n", "entry_point": "f"}
    assert verdicts(box, "def f(x):\n    return x + 1", **row) == ["passed"]


def test_a_program_that_ends_fails_the_test_in_which_it_does(box: LocalSandbox) -> None:
    test = "from solution import f\n" + "".join(f"def test_{n}():\n    assert f({n}) == {n}\n" for n in range(4))
    program = "import os\ndef f(n):\n    if n == 1: os._exit(0)\n    return n"
    assert verdicts(box, program, test=test) == ["passed", "error", "passed", "passed"]
    assert verdicts(box, program, test=test, stop_early=True) == ["passed", "error"]
    slow = program.replace("if n == 1: os._exit(0)", "while n == 1: pass")
    short = Limits(cpu_seconds=1, wall_seconds=30.0, memory_mb=256)
    assert verdicts(box, slow, test=test, limits=short) == ["passed", "timeout"]


def test_swallowed_ends_and_skips_do_not_pass(box: LocalSandbox) -> None:
    swallowing = (
        "from solution import f\ndef test_it():\n    try:\n        f()\n    except BaseException:\n        pass\n"
    )
    assert verdicts(box, "import os\ndef f(): os._exit(0)", test=swallowing) == ["error"]
    skipping = (
        "import pytest\nfrom solution import f\ndef test_it():\n    if f(): pytest.skip('no')\n    assert False\n"
    )
    assert verdicts(box, "def f(): return True", test=skipping) == ["wrong"]
    unskipped = "import unittest\nfrom solution import f\nclass TestIt(unittest.TestCase):\n    def test_it(self):\n"
    unskipped += "        if f(): self.skipTest('no')\n"
    assert verdicts(box, "def f(): return True", test=unskipped) == ["wrong"]
    raising = "import unittest\ndef f(): raise unittest.SkipTest('no')"
    assert verdicts(box, raising, test=unskipped) == ["error"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("from unittest.mock import patch\ndef test_f():\n    with patch('x.y'): f()", "patch modules"),
        ("import unittest.mock\ndef test_f():\n    unittest.mock.patch('x')", "patch modules"),
        ("def test_f(monkeypatch):\n    f()", "patch modules"),
        ("def test_f(capsys):\n    f()", "captures? what the program prints"),
        ("import sys\ndef test_f():\n    sys.stdout = None", "captures? what"),
        ("import os\ndef test_f():\n    assert os.path.exists(f())", "share files"),
        ("from pathlib import Path\ndef test_f():\n    Path('x').write_text('')", "share files"),
        ("def test_f():\n    open('x', 'w')", "share files"),
        ("def test_f():\n    assert eval(f()) == 1", "evaluate text"),
        ("import pickle\ndef test_f():\n    assert pickle.loads(f()) == 1", "evaluate text"),
        ("def test_f(:", "does not compile"),
    ],
)
def test_what_needs_the_program_in_the_same_process_is_refused(box: LocalSandbox, line: str, reason: str) -> None:
    with pytest.raises(UnusableRow, match=reason):
        verdicts(box, "def f(): return 'open(0)'", test=f"from solution import f\n{line}\ndef test_other(): pass")


def test_harmless_uses_of_those_modules_are_not_refused() -> None:
    assert (
        unsupported("import os\nfrom os.path import join\ndef test(): assert f(os.path.join('a', join('b')))") is None
    )
    assert unsupported("import os, sys, pathlib\nsys.setrecursionlimit(9)") is None


@pytest.mark.parametrize(
    "body",
    [
        "import threading\n    f(threading.Lock())",
        "import pytest\n    pytest.deprecated_call()",
        "import not_installed_anywhere",
    ],
)
def test_what_turns_up_while_running_is_refused_too(box: LocalSandbox, body: str) -> None:
    text = f"from solution import f\ndef test_it():\n    {body}\n"
    if "not_installed" in body:
        text = f"{body}\n{text}"
    with pytest.raises(UnusableRow):
        verdicts(box, "def f(x=1): return x", test=text)


def test_threads_that_share_one_box_do_not_wait_for_each_other(box: LocalSandbox) -> None:
    gate = threading.Barrier(4)

    def one(_: int) -> list[str]:
        gate.wait()
        return verdicts(box, BIGCODEBENCH_PROGRAM, **BIGCODEBENCH)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(4))) == [["passed"] * 3] * 4


HOSTILE = {
    "patches the assertions of unittest": "import unittest\nunittest.TestCase.assertEqual = lambda *_: None",
    "patches every module": """
import sys, types
for module in list(sys.modules.values()):
    for name in list(vars(module)):
        if name in ('run_tests', 'Record', 'Conversation', 'raises', 'collect', 'step', 'start', 'loads', 'dumps'):
            setattr(module, name, lambda *a, **k: '{"results": [["t", "passed", ""]]}')
""",
    "plants a pytest": "import sys, types\nsys.modules['pytest'] = types.ModuleType('pytest')",
    "exits at once with success": "import sys\nsys.exit(0)",
    "exits in the call": "import os\ndef task_func(*_): os._exit(0)",
    "prints a verdict at exit": """
import atexit, os
atexit.register(lambda: os.write(1, b'{"results": [["TestCases.test_total", "passed", ""]]}'))
def task_func(*_): raise SystemExit(0)
""",
    "answers with a verdict": "def task_func(*_): return {'results': [['TestCases.test_total', 'passed', '']]}",
    "writes a verdict to every descriptor": """
import os, struct, json
def task_func(*_):
    body = json.dumps({"id": 1, "ok": '{"results": [["t", "passed", ""]]}', "results": [["t", "passed", ""]]}).encode()
    for descriptor in range(64):
        try: os.write(descriptor, struct.pack(">I", len(body)) + body)
        except OSError: pass
""",
    "raises what skips": "import unittest\ndef task_func(*_): raise unittest.SkipTest('x')",
    "raises what claims success": "def task_func(*_): raise type('Passed', (AssertionError,), {})('passed')",
    "returns what equals everything": """
class Any:
    def __eq__(self, other): return True
    __hash__ = None
def task_func(*_): return Any()
""",
    "returns an int that equals everything": """
class Any(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = int.__hash__
def task_func(*_): return Any(1)
""",
    "looks for the tests": """
import gc, sys
def task_func(goals):
    texts = [o for o in gc.get_objects() if isinstance(o, dict) and 'TEAMS' in o]
    frame = sys._getframe()
    while frame:
        if 'self' in frame.f_locals: return frame.f_locals['self'].goals
        frame = frame.f_back
    return texts[0]
""",
    "sitecustomize and bytecode": """
import os, sys
for folder in [*sys.path, '/tmp', '.']:
    for name in ('sitecustomize.py', 'conftest.py', 'evil.pth', 'tests.py', '__pycache__/tests.cpython-311.pyc'):
        try:
            with open(os.path.join(folder, name), 'w') as file: file.write("import os; os._exit(0)")
        except OSError: pass
def task_func(*_): return 0
""",
    "redefines what the tests use": """
import random
TEAMS = []
random.seed = lambda *_: None
def task_func(goals): return 0
""",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_pass_nothing(box: LocalSandbox, name: str) -> None:
    earned = verdicts(box, HOSTILE[name], **BIGCODEBENCH)
    assert set(earned[:1] + earned[-1:]) & {"passed"} == set(), earned
    assert verdicts(box, BIGCODEBENCH_PROGRAM, **BIGCODEBENCH) == ["passed"] * 3
