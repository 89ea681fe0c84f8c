"""Special judges: a row's own program that decides whether an output is right, where several outputs are.

It is called as in open-r1's Codeforces rows: `checker.py input.txt correct_output.txt solution_output.txt`, and prints
1 (or a number of at least 1) for a right output. One that prints nothing tells by its exit code. It runs in a box of
its own and sees the output of the judged program as text.
"""

from __future__ import annotations

import json

from llmrl.sandbox import Limits, RunResult, Sandbox

_FILES = ("input.txt", "correct_output.txt", "solution_output.txt")
_GLUE = """
import builtins, io, json, sys
files = json.load(sys.stdin)
sys.stdin = io.StringIO(files["solution_output.txt"])
sys.argv = ["checker.py", *files]
def _open(name, mode="r", *args, _real=open, **kwargs):
    if name not in files:
        return _real(name, mode, *args, **kwargs)
    text = files[name]
    return io.BytesIO(text.encode()) if "b" in mode else io.StringIO(text)
builtins.open = io.open = _open
"""


class BrokenChecker(Exception):
    """The checker does not even accept the expected output."""


class Checker:
    """Decides about outputs with a row's checker program.

    Args:
        source: Python, trusted, but run in a box because outputs that it reads are not.
        box: where it runs.
        limits: of one run.
    """

    def __init__(self, source: str, box: Sandbox, limits: Limits) -> None:
        self.source = f"{_GLUE}exec(compile({source!r}, 'checker.py', 'exec'), {{'__name__': '__main__'}})\n"
        self.box, self.limits = box, limits

    def __call__(self, given: str, printed: str, expected: str) -> bool:
        """Return whether an output is right.

        Raises:
            BrokenChecker: the checker fails, and not because of the output.
        """
        right = _verdict(self._run(given, expected, printed))
        if right is None and _verdict(self._run(given, expected, expected)) is not True:
            raise BrokenChecker("the row's checker does not accept the row's own output")
        return right is True

    def _run(self, given: str, expected: str, printed: str) -> RunResult:
        files = dict(zip(_FILES, (given, expected, printed), strict=True))
        return self.box.run(self.source, json.dumps(files), self.limits)


def _verdict(end: RunResult) -> bool | None:
    """Return what a checker said, or None if it failed."""
    word = (end.stdout.split() or [""])[0].lower()
    try:
        return float(word) >= 1.0
    except ValueError:
        pass
    if word in ("ok", "accepted", "true", "yes", "correct"):
        return True
    if word in ("wrong", "false", "no", "incorrect"):
        return False
    if word or not (end.status == "ok" or end.detail.startswith("exit code")):
        return None
    return end.status == "ok"
