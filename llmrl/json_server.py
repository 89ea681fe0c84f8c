"""A small server for JSON over HTTP, for sandboxes, rubrics and metrics: a JSON object in, a JSON object out.

It needs the standard library alone, because a metric's environment may not have llmrl's dependencies. Whatever a client
does (slow, huge, broken, gone, thousands at once), it gets a clean answer or none, and the others are served.
"""

from __future__ import annotations

import argparse
import contextlib
import hmac
import json
import os
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from typing import Any, cast

from llmrl.errors import UserError

Work = Callable[[dict[str, Any], "Client"], dict[str, Any]]
"""From a request's JSON object and its client to the answer's. It runs on a thread of its own."""


class Refused(Exception):
    """A request that cannot be answered; the message is for its client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(kw_only=True)
class Guard:
    """Who may ask, and how much."""

    host: str = "127.0.0.1"
    port: int = 0
    """0: any free port."""
    key: str = ""
    """What a request has to carry as its bearer token; "" asks for none."""
    max_body_bytes: int = 64 << 20
    read_s: float = 30.0
    """Seconds in which a client has to send its request."""
    max_concurrency: int = 64
    """Requests worked on at once; the next ones wait."""
    max_connections: int = 512
    """Connections at once; further ones are answered 503."""


KEY_ENV = "LLMRL_SERVER_KEY"
"""The variable that holds a server's key, for the server and for its clients."""


def key_headers() -> dict[str, str]:
    """Return the header that a client of these servers sends, where there is a key."""
    key = os.environ.get(KEY_ENV)
    return {"Authorization": f"Bearer {key}"} if key else {}


def add_arguments(parser: argparse.ArgumentParser, *, port: int, **usual: Any) -> None:
    """Add the options that every server has."""
    guard = Guard(**usual)
    parser.add_argument("--host", default=guard.host, help="beyond 127.0.0.1 a key is needed")
    parser.add_argument("--port", type=int, default=port, help="0: any free port")
    parser.add_argument("--max_body_mb", type=float, default=guard.max_body_bytes / 2**20)
    parser.add_argument("--max_concurrency", type=int, default=guard.max_concurrency)


def guard_of(arguments: argparse.Namespace) -> Guard:
    """Return what `add_arguments` has parsed.

    Raises:
        UserError: other machines could reach the server, and there is no key.
    """
    key = os.environ.get(KEY_ENV, "")
    if not key and not _is_loopback(arguments.host):
        raise UserError(
            f"--host {arguments.host}: whoever can reach this server could use it. Set a key in the environment "
            f"variable {KEY_ENV}, for the server and for its clients, or listen on 127.0.0.1"
        )
    return Guard(
        host=arguments.host,
        port=arguments.port,
        key=key,
        max_body_bytes=round(arguments.max_body_mb * 2**20),
        max_concurrency=arguments.max_concurrency,
    )


@dataclass(eq=False)
class Client:
    """One connection."""

    connection: socket.socket
    deadline: float | None = None
    """When its request has to be complete; None while it is worked on."""
    gone: threading.Event = field(default_factory=threading.Event)
    """Set when the client has left while its request was worked on."""


class JsonServer(ThreadingHTTPServer):
    """Serves `POST` routes and `GET` routes.

    Args:
        guard: who may ask, and how much.
        posts: what works on the requests to each path.
        gets: the answers of paths that take no body.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(
        self, guard: Guard, posts: Mapping[str, Work], gets: Mapping[str, Callable[[], dict[str, Any]]] | None = None
    ) -> None:
        self.guard, self.posts, self.gets = guard, posts, gets or {}
        self.clients: dict[socket.socket, Client] = {}
        self.working = threading.BoundedSemaphore(guard.max_concurrency)
        super().__init__((guard.host, guard.port), _Handler)

    def serve_forever(self, poll_interval: float = 0.2) -> None:
        """Serve until `shutdown`; look after connections every `poll_interval` seconds."""
        super().serve_forever(poll_interval)

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.guard.host in ("0.0.0.0", "::", "") else self.guard.host
        return f"http://{host}:{self.server_address[1]}"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection a thread, unless there are too many."""
        if len(self.clients) >= self.guard.max_connections:
            body = b'{"error": "too many connections"}'
            lines = ["HTTP/1.1 503 Busy", "Content-Type: application/json", f"Content-Length: {len(body)}"]
            head = "\r\n".join([*lines, "Retry-After: 1", "Connection: close", "", ""]).encode()
            with contextlib.suppress(OSError):
                request.settimeout(1.0)
                request.sendall(head + body)
            return self.shutdown_request(request)
        self.clients[request] = Client(request, deadline=time.monotonic() + self.guard.read_s)
        return super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.clients.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Close connections that are too slow, and notice those that left; called by `serve_forever`."""
        now = time.monotonic()
        for client in list(self.clients.values()):
            try:
                if client.deadline is not None and now > client.deadline:
                    client.connection.shutdown(socket.SHUT_RDWR)
                elif client.deadline is None and not client.gone.is_set() and _has_left(client.connection):
                    client.gone.set()
            except OSError:
                client.gone.set()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing about connections that broke."""
        if not isinstance(sys.exc_info()[1], OSError):
            traceback.print_exc()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "llmrl", ""

    @property
    def jsons(self) -> JsonServer:
        return cast("JsonServer", self.server)

    def do_GET(self) -> None:
        self._answer(lambda client: self._get())

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, work: Callable[[Client], dict[str, Any]]) -> None:
        client = self.jsons.clients.get(self.connection)
        if client is None:
            return
        try:
            self._check_caller()
            status, answer = 200, work(client)
        except Refused as refused:
            status, answer = refused.status, {"error": str(refused)}
        except OSError:  # the client, not the work: `_post` catches what that raises
            self.close_connection = True
            return
        if status in (401, 403, 411, 413):  # its body was not read
            self.close_connection = True
        self._send(status, answer)
        client.deadline = time.monotonic() + self.jsons.guard.read_s  # for the next request on this connection

    def _check_caller(self) -> None:
        """Refuse who has no key, and pages of the web that reach a server on this machine through a browser."""
        guard = self.jsons.guard
        if guard.key:
            scheme, _, key = self.headers.get("Authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), guard.key.encode()):
                raise Refused(401, "this server needs its key: Authorization: Bearer ...")
        host = self.headers.get("Host", "")
        if not guard.key and not _is_loopback(host.rpartition(":")[0].strip("[]") or host):
            raise Refused(403, f"Host {host[:100]!r} is not this server")
        if self.headers.get("Origin") is not None:
            raise Refused(403, "this server does not answer web pages")

    def _get(self) -> dict[str, Any]:
        if self.path not in self.jsons.gets:
            raise Refused(404, "not found")
        return self.jsons.gets[self.path]()

    def _post(self, client: Client) -> dict[str, Any]:
        work = self.jsons.posts.get(self.path)
        if work is None:
            self.close_connection = True  # its body was not read
            raise Refused(404, "not found")
        request = self._read()
        client.deadline = None
        with self.jsons.working:
            if client.gone.is_set():
                raise OSError("the client has left")
            try:
                return work(request, client)
            except Refused:
                raise
            except Exception as error:
                traceback.print_exc()
                raise Refused(500, f"{type(error).__name__}; the server's log has more") from None

    def _read(self) -> dict[str, Any]:
        kind = self.headers.get("Content-Type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json":
            self.close_connection = True
            raise Refused(415, "the body must be application/json")
        length = self.headers.get("Content-Length")
        if length is None or self.headers.get("Transfer-Encoding") is not None:
            raise Refused(411, "Content-Length is missing")
        if not (length.isascii() and length.isdigit()) or int(length) > self.jsons.guard.max_body_bytes:
            raise Refused(413, f"Content-Length must be 0 to {self.jsons.guard.max_body_bytes}")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise OSError("the client has left")
        try:
            request = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is not valid JSON: {str(error)[:200]}") from None
        if not isinstance(request, dict):
            raise Refused(400, "the body must be a JSON object")
        return request

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()  # ASCII: text from a policy may have no UTF-8 form
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if self.close_connection:
                self.send_header("Connection", "close")
            if status == 401:
                self.send_header("WWW-Authenticate", "Bearer")
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            self.close_connection = True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what http.server itself refuses (a method, a broken request line) in JSON as well."""
        self.close_connection = True
        self._send(code, {"error": message or "bad request"})

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _has_left(connection: socket.socket) -> bool:
    waiting = select.poll()
    waiting.register(connection, select.POLLIN)
    return bool(waiting.poll(0)) and connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
