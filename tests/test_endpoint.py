"""The HTTP client: what is retried and what is final, with and without an event loop."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from llmrl import endpoint
from llmrl.endpoint import Endpoint, EndpointError, post_json


class ScriptedServer(ThreadingHTTPServer):
    """Answers with the scripted (status, body) pairs, in order; None: never answers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"
        self.script: list[tuple[int, str] | None] = []
        self.requests: list[tuple[Any, str | None]] = []
        self.closing = threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: ScriptedServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((body, self.headers["X-Key"]))
        answer = self.server.script.pop(0)
        if answer is None:
            self.server.closing.wait()
            return
        self.send_response(answer[0])
        self.end_headers()
        self.wfile.write(answer[1].encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedServer]:
    monkeypatch.setattr(endpoint, "_backoff", lambda state: 0.0)
    server = ScriptedServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


def post_blocking(url: str, **options: Any) -> dict[str, Any]:
    return post_json(url, {"text": "\ud800"}, headers={"X-Key": "k"}, **options)


def post_in_loop(url: str, **options: Any) -> dict[str, Any]:
    async def main() -> dict[str, Any]:
        client = Endpoint(url, headers={"X-Key": "k"}, max_concurrency=1, **options)
        try:
            return await client.post({"text": "\ud800"})
        finally:
            await client.close()

    return asyncio.run(main())


both = pytest.mark.parametrize("post", [post_blocking, post_in_loop])


@both
def test_transport_failures_are_retried(server: ScriptedServer, post: Any) -> None:
    server.script = [(500, ""), (503, ""), (429, ""), (200, "[1]"), (200, "not json"), (200, '{"a": 1}')]
    assert post(server.url, timeout_s=60, retries=5) == {"a": 1}
    assert server.requests == [({"text": "\ud800"}, "k")] * 6


@both
@pytest.mark.parametrize("status", [301, 400, 401, 404])
def test_what_the_server_says_about_the_request_is_final(server: ScriptedServer, post: Any, status: int) -> None:
    server.script = [(status, "the reason")]
    with pytest.raises(EndpointError, match=f"HTTP {status} the reason") as caught:
        post(server.url, timeout_s=60, retries=5)
    assert caught.value.status == status


@both
def test_the_last_failure_is_reported_after_all_retries(server: ScriptedServer, post: Any) -> None:
    server.script = [(500, ""), (200, "[1]")]
    with pytest.raises(EndpointError, match="not a JSON object"):
        post(server.url, timeout_s=60, retries=1)
    assert server.script == []


@both
def test_a_server_that_does_not_answer_in_time_is_an_error(server: ScriptedServer, post: Any) -> None:
    server.script = [None]
    with pytest.raises(EndpointError, match=r"no answer within 0\.2 s"):
        post(server.url, timeout_s=0.2, retries=0)


@both
def test_an_address_where_nobody_listens_is_an_error(post: Any) -> None:
    with socket.socket() as silent:  # bound, so that no other process takes the port meanwhile
        silent.bind(("127.0.0.1", 0))
        with pytest.raises(EndpointError, match="ConnectError"):
            post(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=60, retries=0)


def test_which_statuses_are_retried_can_be_chosen(server: ScriptedServer) -> None:
    server.script = [(500, ""), (429, "")]
    with pytest.raises(EndpointError, match="HTTP 429"):
        post_json(server.url, {}, timeout_s=60, retries=5, retried_status=())
    assert len(server.requests) == 2
