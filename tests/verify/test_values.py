"""Tests with more than plain values: judged as in one process, but a program still cannot claim to be right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from llmrl.sandbox import Limits, Sandbox, SandboxUnavailable, open_sandbox
from llmrl.verify.code.check import UnusableRow, run_tests
from llmrl.verify.code.rows import read_row

LIMITS = Limits(cpu_seconds=60, wall_seconds=300.0)
ALWAYS = """
class Always:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __contains__ = __bool__ = __lt__
    def __sub__(self, other): return self
    __rsub__ = __add__ = __abs__ = __getitem__ = __round__ = __call__ = lambda self, *_: self
    def __getattr__(self, name): return self
    def __exit__(self, *_): return True
    def __enter__(self): return self
    def __hash__(self): return 0
    def __iter__(self): return iter([self])
    def __float__(self): return 0.0
"""
"""An object that agrees with everything."""


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    try:
        sandbox = open_sandbox()
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    yield sandbox
    sandbox.close()


def verdict(program: str, check: str, box: Sandbox, code: str = "def f(): pass") -> str:
    row = read_row({"test_list": [check], "code": code})
    return run_tests(program, row, box, LIMITS, stop_early=False)[0].verdict


VALUES = [
    ("import datetime", "datetime.date(2020, 1, 31)", "datetime.date(2020, 1, 30)"),
    ("import datetime", "datetime.datetime(2020, 1, 31, 5, 6, 7, 8)", "datetime.datetime(2020, 1, 31)"),
    ("import datetime as d", "d.datetime(2020, 1, 1, tzinfo=d.timezone.utc)", "d.datetime(2020, 1, 1)"),
    ("import datetime", "datetime.timedelta(days=-1, seconds=5)", "datetime.timedelta(5)"),
    ("import datetime", "datetime.time(5, 6)", "datetime.time(6, 5)"),
    ("from decimal import Decimal", "Decimal('1.10')", "Decimal('1.11')"),
    ("from fractions import Fraction", "Fraction(1, 3)", "Fraction(2, 3)"),
    ("from collections import deque", "deque([1, 2])", "[1, 2]"),
    ("from collections import Counter", "Counter('aab')", "Counter('abb')"),
    ("from collections import OrderedDict", "OrderedDict([('a', 1), ('b', 2)])", "OrderedDict([('b', 2), ('a', 1)])"),
    ("", "range(3)", "range(4)"),
    ("from collections import namedtuple", "namedtuple('P', 'a b')(1, 2)", "namedtuple('P', 'a b')(2, 1)"),
    ("import datetime", "{'a': [datetime.date(2020, 1, 1)]}", "{'a': [datetime.date(2020, 1, 2)]}"),
]


@pytest.mark.parametrize(("imports", "right", "wrong"), VALUES)
def test_values_are_compared_outside(box: Sandbox, imports: str, right: str, wrong: str) -> None:
    check = f"{imports}\nassert f() == {right}"
    assert verdict(f"{imports}\ndef f(): return {right}", check, box) == "passed"
    assert verdict(f"{imports}\ndef f(): return {wrong}", check, box) == "wrong"
    assert verdict(f"{ALWAYS}\ndef f(): return Always()", check, box) == "wrong"
    argument = f"{imports}\nassert f({right}) is True"
    assert verdict(f"{imports}\ndef f(x): return x == {right} and type(x) is not str", argument, box) == "passed"


def test_arrays_are_compared_outside(box: Sandbox) -> None:
    pytest.importorskip("numpy")
    check = "import numpy as np\nassert (f() == np.array([[1, 2]])).all() and f().shape == (1, 2)"
    assert verdict("import numpy as np\ndef f(): return np.array([[1, 2]])", check, box) == "passed"
    assert verdict("import numpy as np\ndef f(): return np.array([[1, 3]])", check, box) == "wrong"
    assert verdict(f"{ALWAYS}\ndef f(): return Always()", check, box) == "wrong"
    argument = "import numpy as np\nassert f(np.array([1.5, 2])) == 3.5"
    assert verdict("def f(a): return float(a.sum())", argument, box) == "passed"
    changed = "import numpy as np\na = np.array([2, 1])\nf(a)\nassert a.tolist() == [1, 2]"
    assert verdict("def f(a): a.sort()", changed, box) == "passed"


OBJECTS = """
from dataclasses import dataclass
@dataclass(frozen=True)
class V:
    x: int
    def __add__(self, other): return V(self.x + getattr(other, "x", other))
    def __lt__(self, other): return self.x < other.x
    def __len__(self): return self.x
    def __repr__(self): return f"V<{self.x}>"
    def __enter__(self): return self.x
    def __exit__(self, *_): return False
    def __format__(self, how): return f"{self.x:{how}}"
class Mine(ValueError): pass
class Other(Mine):
    def __init__(self, text, code=0):
        super().__init__(text)
        self.code = code
async def later(x): return x + 1
def fail(): raise Other("bad", 7)
def f(): pass
"""


@pytest.mark.parametrize(
    ("check", "expected"),
    [
        ("assert V(1) == V(1) and V(1) != V(2)", "passed"),
        ("assert V(1) == V(2)", "wrong"),
        ("assert V(1) == 1", "wrong"),
        ("assert V(1) + V(2) == V(3) and (V(1) + 4).x == 5", "passed"),
        ("assert V(1) < V(2) and sorted([V(2), V(1)]) == [V(1), V(2)]", "passed"),
        ("assert V(1) < 2", "wrong"),
        ("assert repr(V(3)) == 'V<3>' and f'{V(3):03d}' == '003' and len(V(4)) == 4", "passed"),
        ("assert len({V(1), V(1), V(2)}) == 2 and isinstance(V(1), V) and not isinstance(1, V)", "passed"),
        ("with V(4) as x:\n    assert x == 4", "passed"),
        ("with V(4) as x:\n    assert x == 5", "wrong"),
        ("import asyncio\nassert asyncio.run(later(1)) == 2", "passed"),
        (
            "import asyncio\nasync def go(): return await later(1) + await later(2)\nassert asyncio.run(go()) == 5",
            "passed",
        ),
        (
            "try:\n    fail()\n    ok = False\nexcept Mine as e:\n    ok = str(e) == 'bad' and e.code == 7\nassert ok",
            "passed",
        ),
        ("try:\n    fail()\n    ok = False\nexcept ValueError:\n    ok = True\nassert ok", "passed"),
        ("try:\n    fail()\n    ok = False\nexcept KeyError:\n    ok = True\nassert ok", "error"),
        ("import copy\nassert copy.deepcopy(V(1)) == V(1)", "passed"),
    ],
)
def test_objects_of_the_program_follow_its_own_rules(box: Sandbox, check: str, expected: str) -> None:
    assert verdict(OBJECTS, check, box, OBJECTS) == expected


@pytest.mark.parametrize(
    ("program", "check", "expected"),
    [
        ("def f(g, x): return g(x)", "assert f(lambda v: v + 1, 2) == 3", "passed"),
        ("def f(g, x): return g", "assert f(lambda v: v + 1, 2) == 3", "wrong"),
        ("def f(g, x): return sorted(x, key=g)", "assert f(len, ['aa', 'b']) == ['b', 'aa']", "passed"),
        ("def f(g): return [g(i) for i in range(3)]", "seen = []\nf(seen.append)\nassert seen == [0, 1, 2]", "passed"),
        (
            "def f(g):\n    try: g()\n    except ValueError: return 1",
            "def bad(): raise ValueError\nassert f(bad) == 1",
            "passed",
        ),
        ("def f(g):\n    try: g(0)\n    except AssertionError: pass", "def ok(v): assert v == 1\nf(ok)", "wrong"),
        ("def f(x): return sum(x)", "assert f(iter([1, 2])) == 3 and f(v for v in (4, 5)) == 9", "passed"),
        ("def f(x): return next(x)", "assert f({1: 2}.items().__iter__()) == (1, 2)", "passed"),
        # What is changed in place is seen where the result is not used, or is None.
        ("def f(a): a.sort()", "a = [3, 1, 2]\nf(a)\nassert a == [1, 2, 3]", "passed"),
        ("def f(a):\n    a.sort()\n    return a", "a = [3, 1, 2]\nf(a)\nassert a == [1, 2, 3]", "passed"),
        ("def f(a): a.sort()", "a = [3, 1, 2]\nassert f(a) is None and a == [1, 2, 3]", "passed"),
        ("def f(a): a[0]['k'] = 1", "d = {}\nf([d])\nassert d == {'k': 1}", "passed"),
        ("def f(a): a.update(b=2)", "a = {}\nf(a)\nassert a == {'b': 2}", "passed"),
        ("def f(a):\n    a.clear()\n    return []", "a = [2, 1]\nassert f(a) == sorted(a)", "wrong"),
    ],
)
def test_functions_iterators_and_changes_travel(box: Sandbox, program: str, check: str, expected: str) -> None:
    assert verdict(program, check, box) == expected


@pytest.mark.parametrize(
    "check",
    [
        "assert f() == 3",
        "assert f() < 3",
        "assert 2 < f()",
        "assert abs(f() - 1.41) < 0.01",
        "assert round(f(), 2) == 1.41",
        "assert 3 in f()",
        "assert f() in [1, 2]",
        "assert f() == [1, 2]",
        "import math\nassert math.isclose(f(), 3)",
        "with f():\n    assert False",
        "assert f().x.y == 3",
    ],
)
def test_an_object_that_agrees_with_everything_is_wrong(box: Sandbox, check: str) -> None:
    assert verdict(f"{ALWAYS}\ndef f(): return Always()", check, box) in ("wrong", "error")


@pytest.mark.parametrize("kind", ["AssertionError", "Exception", "BaseException", "type('E', (AssertionError,), {})"])
def test_an_exception_class_of_the_program_does_not_catch_the_tests_own(box: Sandbox, kind: str) -> None:
    check = "ok = False\ntry:\n    f(-1)\n    assert False\nexcept E:\n    ok = True\nassert ok"
    reference = "class E(Exception): pass\ndef f(x): raise E"
    assert verdict(f"E = {kind}\ndef f(x): return 1", check, box, reference) == "wrong"
    assert verdict(reference, check, box, reference) == "passed"


@pytest.mark.parametrize(
    "argument",
    ["open", "object()", "lambda s: open(s)", "lambda s: s.format(1)", "os.remove", "os", "lambda s: s.__class__"],
)
def test_what_must_not_reach_a_program_makes_the_row_unusable(box: Sandbox, argument: str) -> None:
    with pytest.raises(UnusableRow, match="the test passes a"):
        verdict("def f(g): return 1", f"import os\nassert f({argument}) == 1", box)


def test_a_program_cannot_change_what_its_result_is_compared_with(box: Sandbox) -> None:
    # It knows the protocol and answers for the driver: the result [] and the argument changed to [].
    forger = """
import json, os, struct, sys
def f(a):
    frame = sys._getframe()
    while "request" not in frame.f_locals: frame = frame.f_back
    body = json.dumps({"id": frame.f_locals["request"]["id"], "ok": [], "changed": [[]]}).encode()
    for descriptor in range(3, 64):
        try: os.write(descriptor, struct.pack(">I", len(body)) + body)
        except OSError: pass
    os._exit(0)
"""
    assert verdict(forger, "a = [2, 1]\nassert f(a) == sorted(a)", box) in ("wrong", "error")


@pytest.mark.parametrize("name", ["eval", "exec"])
def test_tests_that_evaluate_text_are_unusable(box: Sandbox, name: str) -> None:
    with pytest.raises(UnusableRow, match="evaluate text"):
        verdict("def f(): return '3'", f"assert {name}(f()) == 3", box)


@pytest.mark.parametrize(
    "forged",
    [
        {"v": ["Decimal", "1e999999999"]},
        {"v": ["Fraction", [1, 0]]},
        {"v": ["range", [0, 10**12]]},
        {"v": ["ndarray", ["|O", [1], [1]]]},
        {"v": ["ndarray", ["<f8", [10**9], [1.0]]]},
        {"v": ["namedtuple", ["P", ["__class__"], [1]]]},
        {"v": ["datetime", [2020, 13, 1, [0, 0, 0, 0, None, 0]]]},
        {"v": ["nothing", 1]},
    ],
)
def test_a_forged_value_is_refused(forged: Any) -> None:
    from llmrl.sandbox import wire

    with pytest.raises(wire.BadValue):
        wire.decode(forged, lambda *_: None)
