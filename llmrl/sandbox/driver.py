"""Runs one untrusted program inside the box: as a script, or as a set of functions that are called from outside.

The program's source and requests come in as frames of `wire`; plain values go out as frames, or the script's exit code.
This process decides nothing: expected values, tests and verdicts stay outside. Standard library only.
"""

from __future__ import annotations

import atexit
import builtins
import json
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
        number = len(self.handles)
        self.handles[number] = value
        return {"h": [number, str(type(value).__name__)[:100]]}

    def answer(self, do: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Carry out one request. `do` is `name`, `call` or a key of `_ACTIONS`."""
        if do == "name":
            return self.lookup(*args)
        if do == "call":
            return args[0](*args[1:], **kwargs)
        return _ACTIONS[do](*args)


def _items(value: Any) -> list[Any]:
    items: list[Any] = []
    for item in value:
        items.append(item)
        if len(items) > MAX_ITEMS:
            raise OverflowError(f"more than {MAX_ITEMS} items")
    return items


_ACTIONS: dict[str, Callable[..., Any]] = {
    "getattr": getattr,
    "setattr": setattr,
    "getitem": lambda value, key: value[key],
    "setitem": lambda value, key, item: value.__setitem__(key, item),
    "iter": _items,
    "next": next,
    "in_place": lambda function, *args: result if (result := function(*args)) is not None else args[0],
    "len": len,
    "bool": bool,
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

    program = Program("solution")
    send(_load(program, next_request()))
    while True:
        request = next_request()
        send(_reply(program, request))


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
    def resolve(number: int, _: str) -> Any:
        return program.handles[number]

    try:
        args = [wire.decode(item, resolve) for item in request["args"]]
        kwargs = {key: wire.decode(item, resolve) for key, item in request["kwargs"].items()}
        result = program.answer(request["do"], args, kwargs)
        return {"id": request["id"], "ok": wire.encode(result, program.tree_of_object)}
    except BaseException as error:
        return {"id": request["id"], "error": describe(error)}


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
