"""Calling functions of a program in the box from test code outside it.

A program and calls with plain values go in; plain values, handles for objects that stay in the box, or the exception
come out. Operations on a handle happen inside the box, except its comparison with values from outside.
"""

from __future__ import annotations

import itertools
import select
import socket
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from typing import Any, Protocol

from llmrl.sandbox import wire
from llmrl.sandbox.callbacks import may_be_called
from llmrl.sandbox.handles import (
    Awaitable,
    CannotTravel,
    Handle,
    ProgramClass,
    Raised,
    exception_of,
    exception_text,
    raised_class,
)
from llmrl.sandbox.limits import Conventions, Limits
from llmrl.sandbox.rich import MAX_ITEMS
from llmrl.sandbox.watch import Stopwatch


class ProgramEnded(BaseException):
    """The program cannot answer any more. Not an `Exception`, because test code must not catch it.

    `kind` is compile_error, error or timeout.
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail


class Exchange(Protocol):
    """One request to the program and its answer."""

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]: ...

    calls_back: bool
    """Whether the program can call functions of the test code."""

    @property
    def seconds(self) -> float:
        """The time of all tests so far."""
        ...

    def next_test(self) -> None:
        """Let the limits of one test begin again."""
        ...


class Session:
    """The functions of one loaded program.

    Args:
        exchange: sends a request and returns the answer; raises ProgramEnded.
        on_close: called at the end, to free the program.
    """

    def __init__(self, exchange: Exchange, on_close: Callable[[], None]) -> None:
        self._exchange = exchange
        self._on_close = on_close
        self._count = 0
        self._callbacks: list[Callable[..., Any]] = []
        self._classes: dict[int, type[Raised]] = {}
        self.ended: ProgramEnded | None = None
        self.failed: AssertionError | None = None
        """An assertion that failed in test code which the program called; the program must not swallow it."""

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._on_close()

    def load(self, source: str, conventions: Conventions = "python") -> None:
        """Compile and execute the program.

        Raises:
            ProgramEnded: the program does not compile, raised an exception, exceeded a limit or ended.
        """
        self._count += 1
        answer = self._ask({"id": self._count, "source": source, "conventions": conventions})
        if "compile_error" in answer:
            raise self._end("compile_error", exception_text(answer["compile_error"]))
        if "error" in answer:
            raise self._end("error", exception_text(answer["error"]))

    @property
    def num_requests(self) -> int:
        """How often the program was asked for something."""
        return self._count

    def name(self, name: str) -> Any:
        """Return the value of a top-level name of the program; for a function, a handle that can be called."""
        return self.request("name", name)

    def request(self, do: str, *args: Any, **kwargs: Any) -> Any:
        """Make the driver do something with values or handles and return the result.

        Args:
            do: see `driver.Program.answer`.
            args: plain values or handles of this session.
            kwargs: likewise.

        Raises:
            Raised: the program raised an exception.
            ProgramEnded: the program has ended.
            CannotTravel: an argument is not a plain value.
        """
        self._count += 1
        request = {
            "id": self._count,
            "do": do,
            "args": [wire.encode(item, self._tree_of_argument) for item in args],
            "kwargs": {key: wire.encode(item, self._tree_of_argument) for key, item in kwargs.items()},
        }
        answer = self._ask(request)
        while "callback" in answer:
            answer = self._ask({"id": request["id"]} | self._called_back(answer))
        try:
            if "error" in answer:
                raise self._exception(answer["error"])
            result = self._decoded(answer["ok"])
            # For other calls the program could change what its result is compared with.
            if do == "run" or (do == "call" and result is None):
                for local, tree in zip(args[1:], answer.get("changed") or [], strict=False):
                    if tree is not None:
                        _change(local, self._decoded(tree))
            return result
        except (ValueError, KeyError, TypeError, IndexError) as error:
            if isinstance(error, Raised):
                raise
            raise self._end("error", f"the answer is not a value: {error}") from None

    def _decoded(self, tree: Any) -> Any:
        return wire.decode(tree, self._object)

    def _object(self, number: int, name: str, lineage: Any = None) -> Any:
        if lineage is not None:
            return self._class(lineage)
        return (Awaitable if name == "coroutine" else Handle)(self, number, name)

    def _class(self, lineage: Any) -> type[Raised] | None:
        """Return what stands for an exception class of the program.

        Args:
            lineage: [number, name] of the class and of its bases, and at last the name of the nearest built-in one.
        """
        *own, nearest = lineage
        kind: type[Raised] | None = None
        for number, name in reversed(own):
            if number not in self._classes:
                bases = (kind or raised_class(nearest),)
                attributes = {"_handle": Handle(self, int(number), "type")}
                self._classes[number] = ProgramClass(str(name)[:100], bases, attributes)
            kind = self._classes[number]
        return kind

    def _exception(self, description: Any) -> Exception:
        if type(description) is not list or len(description) != 5:
            return exception_of(description, None, None)
        *_, number, lineage = description
        return exception_of(description, self._class(lineage), Handle(self, int(number), str(description[0])[:100]))

    def _called_back(self, call: dict[str, Any]) -> dict[str, Any]:
        """Call a function of the test code for the program; return its result, or what it raised, for the box."""
        try:
            function = dict(enumerate(self._callbacks))[call["callback"]]
            args = [self._decoded(item) for item in call["args"]]
            kwargs = {str(key): self._decoded(item) for key, item in call["kwargs"].items()}
        except (wire.BadValue, KeyError, TypeError, IndexError, AttributeError) as error:
            raise self._end("error", f"not a call: {error}") from None
        try:
            return {"ok": wire.encode(function(*args, **kwargs), self._tree_of_argument)}
        except Exception as error:
            if isinstance(error, AssertionError):
                self.failed = error
            return {"error": [type(error).__name__, str(error)[:500]]}

    def forward(self, request: dict[str, Any]) -> dict[str, Any]:
        """Pass on a request that a session elsewhere made (tests in a box of their own), and return the raw answer.

        Raises:
            ProgramEnded: the program has ended.
        """
        return self._ask(request)

    def run(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function whose result is not used: what the program changes in the arguments is changed here too."""
        if isinstance(function, Handle) and function._session is self:
            return self.request("run", function, *args, **kwargs)
        return function(*args, **kwargs)

    def next_test(self) -> None:
        """Let the limits of one test begin again."""
        self._exchange.next_test()

    @property
    def seconds(self) -> float:
        """The time of all tests so far, without waiting for a processor; tests of less than half a second are free."""
        return self._exchange.seconds

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.ended is not None:
            raise self.ended
        try:
            answer = self._exchange(request)
        except ProgramEnded as ended:
            self.ended = ended
            raise
        if not {"compile_error", "callback"} & answer.keys() and answer.get("id") != request["id"]:
            raise self._end("error", "the program's answer does not belong to the request")
        return answer

    def _end(self, kind: str, detail: str) -> ProgramEnded:
        self.ended = ProgramEnded(kind, detail)
        return self.ended

    def _tree_of_argument(self, value: Any) -> Any:
        if isinstance(value, ProgramClass):
            value = value.__dict__.get("_handle", value)
        if isinstance(value, Handle) and value._session is self:
            return {"h": [value._number, value._type]}
        if isinstance(value, (KeysView, ValuesView, ItemsView)):
            return [wire.encode(item, self._tree_of_argument) for item in value]
        if isinstance(value, Iterator):
            items = list(itertools.islice(value, MAX_ITEMS + 1))
            if len(items) > MAX_ITEMS:
                raise CannotTravel(f"the test passes an iterator over more than {MAX_ITEMS} items to the program")
            return {"v": ["iterator", [wire.encode(item, self._tree_of_argument) for item in items]]}
        if self._exchange.calls_back and may_be_called(value):
            self._callbacks.append(value)
            return {"h": [-len(self._callbacks), type(value).__name__]}
        raise CannotTravel(f"the test passes a {type(value).__name__} to the program")


def _change(local: Any, new: Any) -> None:
    """Give an argument of the test the content that the program has left in it."""
    if type(local) is not type(new):
        return
    if isinstance(local, list):
        pairs = zip(local, new, strict=False)
        for old, item in pairs if len(local) == len(new) else ():
            _change(old, item)
        kept = len(local) == len(new) and all(old == item for old, item in zip(local, new, strict=True))
        if not kept:
            local[:] = new
    elif isinstance(local, (dict, set)):
        local.clear()
        local.update(new)
    elif isinstance(local, bytearray) or type(local).__name__ == "ndarray":
        local[:] = new


class SocketExchange:
    """Exchanges frames with a program in a local box, until its time is over.

    Args:
        channel: socket to the program.
        limits: give the largest answer.
        stopwatch: the time of the program.
        how_it_ended: called when the program stops answering, with True after a timeout; returns (kind, detail).
    """

    calls_back = True

    def __init__(
        self,
        channel: socket.socket,
        limits: Limits,
        stopwatch: Stopwatch,
        how_it_ended: Callable[[bool], tuple[str, str]],
    ) -> None:
        self.channel = channel
        self.limits = limits
        self.stopwatch = stopwatch
        self.how_it_ended = how_it_ended

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            self.stopwatch.resume()
            self._send(memoryview(wire.dump(request)))
            (size,) = wire.HEADER.unpack(self._read(wire.HEADER.size))
            if size > self.limits.output_mb << 20:
                raise ProgramEnded("error", f"an answer of {size} bytes")
            body = self._read(size)
            self.stopwatch.pause()
            if self.stopwatch.over:
                raise TimeoutError
            return wire.load(body)
        except wire.BadValue as error:
            raise ProgramEnded("error", f"the answer is not a frame: {error}") from None
        except TimeoutError:
            raise ProgramEnded(*self.how_it_ended(True)) from None
        except OSError:
            raise ProgramEnded(*self.how_it_ended(False)) from None

    def next_test(self) -> None:
        """Let the limits of one test begin again."""
        self.stopwatch.restart()

    @property
    def seconds(self) -> float:
        """The time of all tests so far."""
        return self.stopwatch.seconds

    def _send(self, data: memoryview) -> None:
        while data:
            self._wait(select.POLLOUT)
            data = data[self.channel.send(data) :]

    def _read(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            self._wait(select.POLLIN)
            part = self.channel.recv(min(size - len(parts), 1 << 20))
            if not part:
                raise ConnectionResetError
            parts += part
        return bytes(parts)

    def _wait(self, event: int) -> None:
        """Wait until the channel is ready.

        Raises:
            TimeoutError: the program's time is over.
        """
        poll = select.poll()
        poll.register(self.channel, event)
        while not poll.poll(1000 * (left := self.stopwatch.next_wait())):
            if left <= 0:
                raise TimeoutError
