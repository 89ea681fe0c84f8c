"""Runs the test file of a row, in a box of its own, against a program in another box.

This text is the "program" of the test box. The program under test is never here: its functions are handles of
a `Session` whose requests leave through `step` and whose answers come back through it. So nothing that the program does
to its own process (patched assertions, exits, frames, hooks) reaches the tests or their verdict. Standard library only.
"""

from __future__ import annotations

import fnmatch
import inspect
import itertools
import json
import queue
import sys
import threading
import time
import types
import unittest
from collections.abc import Callable
from typing import Any

from llmrl.sandbox.session import CannotTravel, Handle, ProgramEnded, Raised, Session
from llmrl.verify.code.suite_pytest import Fixture, Function, PytestModule, Skipped, Unsupported, functions_of, used_by

_START_SECONDS = 30.0
_PROGRAM_MODULES = ("solution", "main", "program")
"""Names under which test files import the program."""


# --- the conversation with the program --------------------------------------------------------------------------------


class Conversation:
    """Runs `body` on a thread. Its requests are what `step` returns; the argument of `step` is the answer."""

    def __init__(self, body: Callable[[Conversation], dict[str, Any]]) -> None:
        self.body = body
        self.calls_back = True
        self.begins_test = False
        self.requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.count = 0
        self.unusable = ""

    def step(self, answer: str) -> str:
        if answer:
            self.answers.put(json.loads(answer))
        else:
            self.start()
        return json.dumps(self.requests.get())

    def start(self) -> None:
        """Start the thread. Another box can use up the threads of the user for as long as its program may run."""
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                threading.Thread(target=self.run, daemon=True).start()
                return
            except RuntimeError as error:
                if time.monotonic() > deadline:
                    self.requests.put({"unavailable": str(error)})
                    return
                time.sleep(0.05)

    def run(self) -> None:
        try:
            message = self.body(self)
        except BaseException as error:
            message = {"unusable": f"the test code does not run: {type(error).__name__}: {error}"}
        if self.unusable:
            message = {"unusable": self.unusable}
        self.requests.put(message)

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request of the session and wait for its answer."""
        self.count += 1
        self.requests.put(request | {"next_test": self.begins_test})
        self.begins_test = False
        answer = self.answers.get()
        if "ended" in answer:
            raise ProgramEnded(*answer["ended"])
        return answer

    def next_test(self) -> None:
        """Let the program's limits of one test begin again with the next request."""
        self.begins_test = True

    @property
    def seconds(self) -> float:
        """Not measured here."""
        return 0.0


class Program(Session):
    """The program under test."""

    def __init__(self, talk: Conversation) -> None:
        super().__init__(talk, lambda: None)
        self.talk = talk
        self.missing: set[str] = set()

    def request(self, do: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().request(do, *args, **kwargs)
        except CannotTravel as error:
            self.talk.unusable = str(error)
            raise

    def lookup(self, name: str) -> Any:
        """Return what a name means in the program.

        Raises:
            AttributeError: the program does not define it.
        """
        try:
            return self.name(name)
        except Raised as error:
            self.missing.add(name)
            raise AttributeError(error.detail) from None


class ProgramModule(types.ModuleType):
    """`solution`, as the test file imports it: every attribute is looked up in the program."""

    def __init__(self, name: str, program: Program) -> None:
        super().__init__(name)
        self.__dict__["_program"] = program
        self.__dict__["__all__"] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.__dict__["_program"].lookup(name)


# --- collecting and running -------------------------------------------------------------------------------------------


class Record:
    """The verdicts so far."""

    def __init__(self, talk: Conversation, program: Program, config: dict[str, Any]) -> None:
        self.talk, self.program = talk, program
        self.done: set[str] = set(config["done"])
        self.stop_early: bool = config["stop_early"]
        self.results: list[list[str]] = []
        self.calls = 0

    @property
    def stopped(self) -> bool:
        failed = self.stop_early and any(verdict != "passed" for _, verdict, _ in self.results)
        return bool(self.talk.unusable) or self.program.ended is not None or failed

    def wants(self, name: str) -> bool:
        return name not in self.done and not self.stopped

    def begin(self) -> None:
        """Note that a test begins."""
        self.calls = self.talk.count
        self.program.failed = None
        self.program.next_test()

    def add(self, name: str, error: BaseException | None) -> None:
        """Note how a test ended. If the program ended during it, it failed, even if the test caught that."""
        ended = self.program.ended
        if isinstance(error, Unsupported):
            self.talk.unusable = str(error)
        elif ended is not None:
            self.results.append([name, "timeout" if ended.kind == "timeout" else "error", ended.detail])
        elif error is None and self.program.failed is None:
            self.results.append([name, "passed", ""])
        elif error is None:
            self.results.append([name, "wrong", "AssertionError in what the test gave the program to call"])
        elif isinstance(error, Raised):
            self.results.append([name, "error", error.detail])
        elif isinstance(error, NameError) or (isinstance(error, ImportError) and self.program.missing):
            self.results.append([name, "error", f"{type(error).__name__}: {error}"])
        else:
            self.results.append([name, "wrong", type(error).__name__])

    def skipped(self, name: str) -> None:
        """Note a test that was skipped: one that looked at the program first was made to skip by it, and failed."""
        if self.talk.count != self.calls:
            self.results.append([name, "wrong", "skipped after calling the program"])


class Result(unittest.TestResult):
    """Passes what unittest finds on to the record."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record
        self.errors_of_test: list[BaseException] = []
        self.left_out = False

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self.errors_of_test, self.left_out = [], False

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
        if not self.left_out or self.errors_of_test:
            self.record.add(_name(test), self.errors_of_test[0] if self.errors_of_test else None)
        self.shouldStop = self.record.stopped

    def addError(self, test: Any, err: Any) -> None:
        self.errors_of_test.append(err[1])
        if not isinstance(test, unittest.TestCase):  # setUpClass, setUpModule
            self.record.add(str(test), err[1])

    addFailure = addError

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            self.errors_of_test.append(err[1])

    def addSkip(self, test: Any, reason: str) -> None:
        self.left_out = True
        self.record.skipped(_name(test) if isinstance(test, unittest.TestCase) else str(test))

    def addExpectedFailure(self, test: Any, err: Any) -> None:
        self.left_out = True

    def addUnexpectedSuccess(self, test: Any) -> None:
        self.left_out = True


def _name(test: unittest.TestCase) -> str:
    return f"{type(test).__name__}.{test._testMethodName}"


def run_unittest(cases: list[type[unittest.TestCase]], record: Record) -> None:
    loader = unittest.TestLoader()
    suite = unittest.TestSuite()
    for case in cases:
        tests = (case(name) for name in loader.getTestCaseNames(case))
        suite.addTests(test for test in tests if record.wants(_name(test)))
    _Counting(record).watch(suite)
    suite.run(Result(record))


class _Counting:
    """Notes before each test how many requests there were, to know whether a skipped one looked at the program."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def watch(self, suite: unittest.TestSuite) -> None:
        for test in suite:
            run = test.run

            def counted(result: Any = None, run: Any = run) -> Any:
                self.record.begin()
                return run(result)

            test.run = counted  # type: ignore[method-assign]


def collect(namespace: dict[str, Any]) -> tuple[list[type[unittest.TestCase]], list[Function], dict[str, Fixture]]:
    cases: list[type[unittest.TestCase]] = []
    functions: list[Function] = []
    fixtures = {item.name: item for item in namespace.values() if isinstance(item, Fixture)}
    for name, item in list(namespace.items()):
        if getattr(item, "__left_out__", False) is True or type(item) is Handle:
            continue
        if isinstance(item, type) and issubclass(item, unittest.TestCase) and item.__module__ == "tests":
            cases.append(item)
        elif isinstance(item, type) and fnmatch.fnmatchcase(name, "Test*") and item.__module__ == "tests":
            for inner, method in inspect.getmembers(item, inspect.isfunction):
                if inner.startswith("test") and not getattr(method, "__left_out__", False):
                    functions += functions_of(f"{name}.{inner}", method, item)
        elif inspect.isfunction(item) and name.startswith("test"):
            functions += functions_of(name, item, None)
    return cases, functions, fixtures


def run_functions(functions: list[Function], fixtures: dict[str, Fixture], record: Record) -> None:
    for test in functions:
        used = [(name, fixtures[name].options.get("params")) for name in used_by(test.function, fixtures)]
        varied = [(name, list(params)) for name, params in used if params]
        for index, chosen in enumerate(itertools.product(*(values for _, values in varied))):
            name = f"{test.name}<{index}>" if varied else test.name
            if not record.wants(name):
                continue
            record.begin()
            try:
                test.run(fixtures, dict(zip((name for name, _ in varied), chosen, strict=True)))
            except (Skipped, unittest.SkipTest):
                record.skipped(name)
            except BaseException as error:
                record.add(name, error)
            else:
                record.add(name, None)


def run_tests(talk: Conversation, config: dict[str, Any]) -> dict[str, Any]:
    """Execute the test file and run what it defines; return the message for the trusted process."""
    program = Program(talk)
    sys.modules["pytest"] = PytestModule()
    for name in (*_PROGRAM_MODULES, *config["modules"]):
        sys.modules[name] = ProgramModule(name, program)
    module = sys.modules["tests"] = types.ModuleType("tests")
    namespace = module.__dict__
    record = Record(talk, program, config)
    exec(compile(config["helpers"], "<row>", "exec", dont_inherit=True), namespace)
    for name in config["names"]:
        try:
            namespace[name] = program.lookup(name)
        except AttributeError:
            namespace.pop(name, None)
    try:
        exec(compile(config["source"], "<tests>", "exec", dont_inherit=True), namespace)
    except (Raised, ProgramEnded, NameError) as error:
        record.add("the test file", error)
    except ImportError as error:
        if not program.missing:
            raise
        record.add("the test file", error)
    else:
        cases, functions, fixtures = collect(namespace)
        run_unittest(cases, record)
        run_functions(functions, fixtures, record)
    return {"results": record.results}


def start(config: str) -> Callable[[str], str]:
    """Return `step`, which starts the tests with "" and then passes answers in and requests out."""
    settings = json.loads(config)
    return Conversation(lambda talk: run_tests(talk, settings)).step
