"""What a program finds when it starts: what Python itself gives it, or also what LeetCode and its graders put in front.

Runs inside the box. Standard library only.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import os
import sys
from functools import cache
from types import CodeType
from typing import Any

RECURSION_LIMIT = 50_000
"""LiveCodeBench's grader sets this one."""
_STAR = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"),
    *("itertools", "functools", "operator", "io", "sys", "json", "typing"),
)
"""In the order of LiveCodeBench's grader: of two modules with a name in common, the later one gives it."""


def complete_python() -> None:
    """Add what the interpreter of the box lacks, because it starts without `site`, and lift its limit on digits."""
    import _sitebuiltins

    end_of_file = "Ctrl-D (i.e. EOF)"
    for name in ("exit", "quit"):
        setattr(builtins, name, _sitebuiltins.Quitter(name, end_of_file))
    for name, text in (("copyright", sys.copyright), ("credits", ""), ("license", "")):
        setattr(builtins, name, _sitebuiltins._Printer(name, text))
    builtins.help = _sitebuiltins._Helper()
    sys.set_int_max_str_digits(0)  # the processor time limits long numbers well enough


@cache
def judge_names() -> dict[str, Any]:
    """Return the names that programs for LeetCode use without an import."""
    names: dict[str, Any] = {}
    modules = {name: importlib.import_module(name) for name in _STAR}
    for module in modules.values():
        public = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
        names |= {name: getattr(module, name) for name in public if hasattr(module, name)}
    return {name: value for name, value in (names | modules | {"os": os}).items() if not hasattr(builtins, name)}


def use(conventions: str) -> None:
    """Prepare this process for a program.

    The names for LeetCode become built-ins, so that all names of the program itself come before them.

    Args:
        conventions: `python`, or `judge` for those of LeetCode and LiveCodeBench.
    """
    if conventions == "judge":
        for name, value in judge_names().items():
            setattr(builtins, name, value)
        sys.setrecursionlimit(RECURSION_LIMIT)


def compiled(source: str, conventions: str) -> CodeType:
    """Compile a program. With `judge`, `return` at the top level ends it, as in graders that make it a function.

    Raises:
        SyntaxError, ValueError: the source is not a program.
    """
    try:
        return compile(source, "<program>", "exec", dont_inherit=True)
    except SyntaxError as error:
        if conventions != "judge" or "'return' outside function" not in str(error):
            raise
    tree = ast.fix_missing_locations(_EndAtReturn().visit(ast.parse(source)))
    return compile(tree, "<program>", "exec", dont_inherit=True)


class _EndAtReturn(ast.NodeTransformer):
    def _unchanged(self, node: ast.AST) -> ast.AST:
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = visit_ClassDef = _unchanged

    def visit_Return(self, node: ast.Return) -> ast.AST:
        end = ast.Call(func=ast.Name(id="SystemExit", ctx=ast.Load()), args=[], keywords=[])
        return ast.copy_location(ast.Raise(exc=end), node)
