"""Calling functions of a program in the box from test code outside it.

A program and calls with plain values go in; plain values, handles for objects that stay in the box, or the exception
come out. A handle equals nothing; every other operation on it happens inside the box.
"""

from __future__ import annotations

import builtins
import select
import socket
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from llmrl.sandbox import wire
from llmrl.sandbox.limits import Conventions, Limits
from llmrl.sandbox.watch import Stopwatch


class ProgramEnded(BaseException):
    """The program cannot answer any more. Not an `Exception`, because test code must not catch it.

    `kind` is compile_error, error or timeout.
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail


class CannotTravel(BaseException):
    """A test passes something other than a plain value to the program: the row is unusable, the program not wrong."""


class Raised(Exception):
    """The program raised. The class actually raised here also derives from the nearest built-in exception."""

    detail = ""


class Exchange(Protocol):
    """One request to the program and its answer."""

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]: ...

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
        self.ended: ProgramEnded | None = None

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
        if "error" in answer:
            raise _exception(answer["error"])
        try:
            return wire.decode(answer["ok"], lambda number, name: Handle(self, number, name))
        except (wire.BadValue, KeyError) as error:
            raise self._end("error", f"the answer is not a value: {error}") from None

    def forward(self, request: dict[str, Any]) -> dict[str, Any]:
        """Pass on a request that a session elsewhere made (tests in a box of their own), and return the raw answer.

        Raises:
            ProgramEnded: the program has ended.
        """
        return self._ask(request)

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
        if "compile_error" not in answer and answer.get("id") != request["id"]:
            raise self._end("error", "the program's answer does not belong to the request")
        return answer

    def _end(self, kind: str, detail: str) -> ProgramEnded:
        self.ended = ProgramEnded(kind, detail)
        return self.ended

    def _tree_of_argument(self, value: Any) -> Any:
        if type(value) is Handle and value._session is self:
            return {"h": [value._number, value._type]}
        if isinstance(value, (range, map, filter, zip)):
            return [wire.encode(item, self._tree_of_argument) for item in value]
        raise CannotTravel(f"the test passes a {type(value).__name__} to the program")


class Handle:
    """An object that stays in the box. It equals nothing, not even itself, because a program could fake equality.

    Attributes, calls, items, iteration, length, truth and text are evaluated inside the box.
    """

    __slots__ = ("_number", "_session", "_type")

    def __init__(self, session: Session, number: int, type_name: str) -> None:
        object.__setattr__(self, "_session", session)
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_type", type_name)

    def __repr__(self) -> str:
        return f"<{self._type} in the sandbox>"

    def __eq__(self, other: object) -> bool:
        return False

    def __ne__(self, other: object) -> bool:
        return True

    __hash__ = object.__hash__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._session.request("call", self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._session.request("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._session.request("setattr", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._session.request("getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._session.request("setitem", self, key, value)

    def __iter__(self) -> Iterator[Any]:
        items = self._session.request("iter", self)
        return iter(items if type(items) is list else [])

    def __next__(self) -> Any:
        return self._session.request("next", self)

    def __len__(self) -> int:
        size = self._session.request("len", self)
        return size if type(size) is int else -1

    def __bool__(self) -> bool:
        return self._session.request("bool", self) is True

    def __str__(self) -> str:
        text = self._session.request("str", self)
        return text if type(text) is str else ""


def _exception(description: Any) -> Exception:
    """Return an exception for one raised in the program, which `except` for its nearest built-in class catches."""
    nearest = description[1] if type(description) is list and len(description) == 3 else "Exception"
    base = getattr(builtins, nearest, Exception) if type(nearest) is str else Exception
    if not (isinstance(base, type) and issubclass(base, Exception)):
        base = Exception
    try:
        error = type("Raised", (Raised, base), {})("raised in the program")
    except TypeError:  # a class that requires other arguments
        error = Raised("raised in the program")
    error.detail = exception_text(description)
    return error


def exception_text(description: Any) -> str:
    """Return an exception's description as `Name: text`, shortened, for people."""
    if type(description) is not list or len(description) != 3:
        return "an exception"
    return f"{str(description[0])[:100]}: {str(description[2])[:500]}"


class SocketExchange:
    """Exchanges frames with a program in a local box, until its time is over.

    Args:
        channel: socket to the program.
        limits: give the largest answer.
        stopwatch: the time of the program.
        how_it_ended: called when the program stops answering, with True after a timeout; returns (kind, detail).
    """

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
