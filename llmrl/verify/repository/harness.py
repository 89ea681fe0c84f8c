"""Runs tests with pytest inside the box and writes what happened, one JSON object per line.

It shares its process with the program under test, which can write anything there. So it decides nothing: the values
that the tests expect are outside, and so is the verdict. Runs on the repository's own Python, 3.8 or newer.
"""

from __future__ import annotations

import builtins
import json
import os
import sys

_MAX_PARTS = 100000


class Tree:
    """The JSON tree of a plain value, as `llmrl.sandbox.wire` reads it; other objects become handles."""

    def __init__(self):
        self.parts = 0

    def of(self, value, depth=0):
        self.parts += 1
        kind = type(value)
        if kind.__module__ == "numpy" and getattr(value, "shape", None) == ():
            return self.of(value.item(), depth)
        if depth > 50 or self.parts > _MAX_PARTS:
            return {"h": [0, kind.__name__]}
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
            return self.scalar(value)
        if isinstance(value, dict):
            return {"d": [[self.of(key, depth + 1), self.of(item, depth + 1)] for key, item in dict.items(value)]}
        for base, tag in ((list, None), (tuple, "t"), (set, "s"), (frozenset, "z")):
            if isinstance(value, base):
                items = [self.of(item, depth + 1) for item in base.__iter__(value)]  # pyright: ignore[reportArgumentType]
                return items if tag is None else {tag: items}
        return {"h": [0, kind.__name__[:100]]}

    def scalar(self, value):
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            number = int(value)
            return number if abs(number) < 2**62 else {"i": format(number, "x")}
        if isinstance(value, float):
            number = float(value)
            return number if number - number == 0.0 else {"f": repr(number)}
        if isinstance(value, complex):
            return {"c": [self.scalar(value.real), self.scalar(value.imag)]}
        return str.__str__(value) if isinstance(value, str) else {"b": bytes.hex(value)}


class Token:
    """Stands for an expected value that is not here."""

    def __init__(self, name):
        self.name = name
        self.__name__ = f"<{name}>"

    def __repr__(self):
        return self.__name__


class Recorder:
    """A pytest plugin that records how tests ended, and the values that they compared."""

    def __init__(self, path):
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.node = ""

    def record(self, **what):
        os.write(self.file, json.dumps(what).encode("ascii") + b"\n")

    def pytest_runtest_logstart(self, nodeid, location):
        self.node = nodeid

    def pytest_runtest_logreport(self, report):
        xfail = hasattr(report, "wasxfail")
        self.record(node=report.nodeid, when=report.when, outcome="xfailed" if xfail else report.outcome)

    def pytest_collectreport(self, report):
        if report.failed:
            self.record(problem=str(report.longrepr)[-2000:])

    def witness(self, site, value, token=None):
        try:
            tree = Tree().of(value)
        except Exception as error:
            tree = {"h": [0, type(error).__name__]}
        name = token.name if isinstance(token, Token) else None
        self.record(node=self.node, site=site, token=name, value=tree)
        return True


def main():
    settings = json.loads(sys.argv[1])
    import pytest

    recorder = Recorder(settings["results"])
    recorder.record(ready=True)
    vars(builtins).update(__witness__=recorder.witness, __withheld__=Token)  # pyright: ignore[reportAttributeAccessIssue]
    root = settings["root"]
    source = os.path.join(root, "src")
    sys.path[:0] = [root] + ([source] if os.path.isdir(source) else [])
    arguments = ["-p", "no:cacheprovider", "-q", "--tb=short", "--rootdir", root, "-o", "addopts="]
    sys.exit(pytest.main(arguments + settings["files"], plugins=[recorder]))


if __name__ == "__main__":
    main()
