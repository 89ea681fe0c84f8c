"""Which functions of the test code a program may call. The arguments are the program's, so only harmless ones."""

from __future__ import annotations

import types
from collections import deque
from typing import Any

TEST_FILE = "<tests>"
"""The file name of compiled test code."""
_BUILT_IN = (len, sum, max, min, abs, sorted, any, all, round, divmod, pow, ord, chr, hex, bin, oct, print, isinstance)
_MODULES = ("math", "_operator")
_OF_TYPES = (str, bytes, list, tuple, dict, set, frozenset, int, float, deque)
_DANGEROUS = frozenset(
    {
        *("eval", "exec", "compile", "open", "getattr", "setattr", "delattr", "vars", "globals", "locals", "input"),
        *("format", "format_map", "breakpoint", "help", "exit", "quit", "os", "sys", "subprocess", "shutil", "pathlib"),
        *("pickle", "marshal", "importlib", "builtins", "socket", "ctypes", "tempfile", "yaml", "dill", "shelve"),
    }
)


def may_be_called(value: Any) -> bool:
    """Return whether a program may call this: a function that the test code defines, or a harmless built-in one."""
    if isinstance(value, types.FunctionType):
        return value.__code__.co_filename == TEST_FILE and not _names(value.__code__) & _DANGEROUS
    if isinstance(value, types.MethodDescriptorType):
        return value.__objclass__ in _OF_TYPES and value.__name__ not in _DANGEROUS
    if isinstance(value, types.BuiltinFunctionType):  # methods of built-in objects too
        owner = value.__self__
        if isinstance(owner, types.ModuleType) or owner is None:
            return value in _BUILT_IN or value.__module__ in _MODULES
        return type(owner) in _OF_TYPES and value.__name__ not in _DANGEROUS
    return False


def _names(code: types.CodeType) -> set[str]:
    """Return the names that code uses, with the functions inside it; names with underscores lead everywhere."""
    names = {*code.co_names}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return {"eval" if name.startswith("__") else name for name in names}
