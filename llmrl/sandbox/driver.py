"""Runs one untrusted program inside the box: as a script, or as a set of functions that are called from outside.

The program's source and requests come in as frames of `wire`; plain values go out as frames, or the script's exit code.
This process decides nothing: expected values, tests and verdicts stay outside. Standard library only.
"""

from __future__ import annotations

import atexit
import builtins
import copy
import json
import operator
import os
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

from llmrl.sandbox import conventions, wire

MAX_ITEMS = 200_000
_EXCEPTIONS = {item for item in vars(builtins).values() if isinstance(item, type) and issubclass(item, BaseException)}


class Program:
    """The loaded program and the objects for which handles went out."""

    def __init__(self, module_name: str) -> None:
        self.module = types.ModuleType(module_name)
        self.module.__file__ = "program.py"
        sys.modules[module_name] = self.module
        self.handles: dict[int, Any] = {}
        self.classes: dict[type, int] = {}
        self.outside: Callable[[dict[str, Any]], dict[str, Any]] | None = None
        """Sends a call of a function of the test code out and returns the answer; None where that is impossible."""

    def run(self, request: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> bool:
        """Compile and execute `source`. Report a compile error and return False; other exceptions are raised."""
        try:
            code = conventions.compiled(request["source"], request["conventions"])
        except BaseException as error:
            report({"compile_error": describe(error)})
            return False
        conventions.use(request["conventions"])
        exec(code, self.module.__dict__)
        return True

    def lookup(self, name: str) -> Any:
        """Return the value of a top-level name, or else a method of a new object of the class `Solution`."""
        namespace = self.module.__dict__
        if name in namespace:
            return namespace[name]
        if "Solution" in namespace and hasattr(namespace["Solution"], name):
            return getattr(namespace["Solution"](), name)
        raise LookupError(f"the program does not define {name!r}")

    def tree_of_object(self, value: Any) -> Any:
        """Return the tree of a numpy number as a plain one, or a handle by which later requests can name the object."""
        if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
            return wire.encode(value.item(), self.tree_of_object)
        if isinstance(value, type) and issubclass(value, BaseException):
            number = self.number_of_class(value)
            return {"h": [number, "type", self.lineage(value)]}
        number = len(self.handles)
        self.handles[number] = value
        return {"h": [number, str(type(value).__name__)[:100]]}

    def number_of_class(self, kind: type) -> int:
        """Return the handle of a class, which is always the same one."""
        if kind not in self.classes:
            self.classes[kind] = len(self.handles)
            self.handles[self.classes[kind]] = kind
        return self.classes[kind]

    def lineage(self, kind: type) -> list[Any]:
        """Return [number, name] of an exception class and its bases up to the nearest built-in one, and its name.

        A built-in one that the program has given out counts as its own too.
        """
        own: list[Any] = []
        for base in type.mro(kind):
            built_in = base in _EXCEPTIONS
            if issubclass(base, BaseException) and (not built_in or base in self.classes):
                own.append([self.number_of_class(base), str(base.__name__)[:100]])
            if built_in:
                return [*own, base.__name__]
        return [*own, "Exception"]

    def description(self, error: BaseException) -> list[Any]:
        """Return `describe(error)`, the handle of the exception and the lineage of its class."""
        number = len(self.handles)
        self.handles[number] = error
        try:
            return [*describe(error), number, self.lineage(type(error))]
        except BaseException:
            return describe(error)

    def resolve(self, number: int, _: str) -> Any:
        """Return the object of a handle; negative numbers mean functions of the test code."""
        return self.handles[number] if number >= 0 else _Outside(self, number)

    def answer(self, do: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Carry out one request. `do` is `name`, `call` or a key of `_ACTIONS`."""
        if do == "name":
            return self.lookup(*args)
        if do in ("call", "run"):
            return args[0](*args[1:], **kwargs)
        return _ACTIONS[do](*args)


class _Outside:
    """A function of the test code, called from the program."""

    def __init__(self, program: Program, number: int) -> None:
        self.program, self.number = program, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        program = self.program
        if program.outside is None:
            raise RuntimeError("the test is over")
        answer = program.outside(
            {
                "callback": -1 - self.number,
                "args": [wire.encode(item, program.tree_of_object) for item in args],
                "kwargs": {key: wire.encode(item, program.tree_of_object) for key, item in kwargs.items()},
            }
        )
        if "error" in answer:
            name, text = answer["error"]
            raise next((kind for kind in _EXCEPTIONS if kind.__name__ == name), Exception)(text)
        return wire.decode(answer["ok"], program.resolve)


def _items(value: Any) -> list[Any]:
    items: list[Any] = []
    for item in value:
        items.append(item)
        if len(items) > MAX_ITEMS:
            raise OverflowError(f"more than {MAX_ITEMS} items")
    return items


def _exit(context: Any, error: BaseException | None, name: str | None) -> bool:
    """Leave a context: with the program's exception, with one like that of the test code, or without any."""
    if error is None and name is not None:
        error = next((kind for kind in _EXCEPTIONS if kind.__name__ == name), Exception)("raised by the test")
    return bool(type(context).__exit__(context, type(error) if error is not None else None, error, None))


def _await(value: Any) -> Any:
    import asyncio

    async def finish() -> Any:
        return await value

    return asyncio.run(finish())


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name)
    for name in (
        *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor", "lshift", "rshift"),
        *("neg", "pos", "abs", "invert", "index", "lt", "le", "gt", "ge", "eq", "ne", "delitem"),
    )
} | {
    function.__name__: function
    for function in (
        *(round, int, float, complex, repr, format, hash, reversed, isinstance, issubclass, delattr),
        *(copy.copy, copy.deepcopy),
    )
}
_ACTIONS: dict[str, Callable[..., Any]] = {
    "getattr": getattr,
    "setattr": setattr,
    "getitem": lambda value, key: value[key],
    "setitem": lambda value, key, item: value.__setitem__(key, item),
    "iter": _items,
    "next": next,
    "in_place": lambda function, *args: result if (result := function(*args)) is not None else args[0],
    "len": len,
    "apply": lambda name, *args: _FUNCTIONS[name](*args),
    "await": _await,
    "bool": bool,
    "enter": lambda value: type(value).__enter__(value),
    "exit": _exit,
    "str": str,
}


def describe(error: BaseException) -> list[str]:
    """Return [class name, nearest built-in class, text] of an exception whose own methods may be hostile."""
    kinds = type.mro(type(error))
    nearest = next((kind.__name__ for kind in kinds if kind in _EXCEPTIONS), "Exception")
    try:
        text = str.__str__(str(error))[:500]
    except BaseException:
        text = ""
    return [str(type(error).__name__)[:100], nearest, text]


def serve(channel: int) -> None:
    """Answer requests on `channel` until it closes. The first request holds the program."""
    read, write = os.read, os.write

    def send(message: dict[str, Any]) -> None:
        data = memoryview(wire.dump(message))
        while data:
            data = data[write(channel, data) :]

    def receive(count: int) -> bytes:
        data = b""
        while len(data) < count:
            chunk = read(channel, min(count - len(data), 1 << 20))
            if not chunk:
                os._exit(0)
            data += chunk
        return data

    def next_request() -> dict[str, Any]:
        return wire.load(receive(wire.HEADER.unpack(receive(wire.HEADER.size))[0]))

    lock = threading.Lock()

    def outside(message: dict[str, Any]) -> dict[str, Any]:
        with lock:
            send(message)
            return next_request()

    program = Program("solution")
    send(_load(program, next_request()))
    while True:
        request = next_request()
        program.outside = outside
        answer = _reply(program, request)
        with lock:  # a thread of the program may be waiting for an answer to a call
            program.outside = None
            send(answer)


def replay() -> None:
    """Answer a list of requests from standard input, the first of which holds the program; print the last answer."""
    requests = json.load(sys.stdin)
    conventions.complete_python()
    out, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(null, descriptor)
    program = Program("solution")
    answer = _load(program, requests[0])
    for request in requests[1:]:
        answer = _reply(program, request)
    data = wire.dump(answer)[wire.HEADER.size :]
    while data:
        data = data[os.write(out, data) :]
    os._exit(0)


def _load(program: Program, request: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {"id": request["id"], "ok": None}
    try:
        program.run(request, answer.update)
    except BaseException as error:
        answer = {"id": request["id"], "error": describe(error)}
    return answer


def _reply(program: Program, request: dict[str, Any]) -> dict[str, Any]:
    try:
        args = [wire.decode(item, program.resolve) for item in request["args"]]
        kwargs = {key: wire.decode(item, program.resolve) for key, item in request["kwargs"].items()}
        result = program.answer(request["do"], args, kwargs)
        answer = {"id": request["id"], "ok": wire.encode(result, program.tree_of_object)}
        if request["do"] == "run" or (request["do"] == "call" and result is None):
            changed = [wire.encode(item, program.tree_of_object) if _is_mutable(item) else None for item in args[1:]]
            answer |= {"changed": changed} if any(tree is not None for tree in changed) else {}
        return answer
    except BaseException as error:
        return {"id": request["id"], "error": program.description(error)}


def _is_mutable(value: Any) -> bool:
    return type(value) in (list, dict, set) or type(value).__name__ == "ndarray"


def run_script(request: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> int:
    """Run a program from standard input to standard output, as `python program.py` would; return its exit code."""
    program = Program("__main__")
    try:
        code = 0 if program.run(request, report) else 1
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        report({"error": describe(error)})
        code = 1
    for finish in (threading._shutdown, atexit._run_exitfuncs, sys.stdout.flush):  # type: ignore[attr-defined]
        try:
            finish()
        except BaseException as error:
            report({"error": describe(error)})
            code = code or 1
    return code & 0xFF
