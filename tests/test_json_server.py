"""Whatever a client does, it gets a clean answer or none, and the others are served."""

from __future__ import annotations

import argparse
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from llmrl.errors import UserError
from llmrl.json_server import Client, Guard, JsonServer, Refused, add_arguments, guard_of, key_headers


def echo(request: dict[str, Any], client: Client) -> dict[str, Any]:
    if request.get("fail"):
        raise RuntimeError("a secret of the server")
    if request.get("refuse"):
        raise Refused(424, "the budget is used up")
    return {"got": request}


@contextmanager
def serving(work: Any = echo, **guard: Any) -> Iterator[JsonServer]:
    server = JsonServer(Guard(**guard), {"/echo": work}, {"/health": lambda: {"fine": True}})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def server() -> Iterator[JsonServer]:
    with serving() as found:
        yield found


def post(server: JsonServer, content: Any = b"{}", path: str = "/echo", **headers: str) -> httpx.Response:
    headers = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
    return httpx.post(f"{server.url}{path}", content=content, headers=headers, trust_env=False, timeout=60)


def raw(server: JsonServer, request: bytes) -> bytes:
    """Send bytes and return all that comes back until the server closes."""
    with socket.create_connection(server.server_address[:2]) as connection:
        connection.sendall(request)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer


def test_json_in_json_out(server: JsonServer) -> None:
    with httpx.Client(base_url=server.url, trust_env=False) as client:  # one connection for all
        for text in ("é \x00", "\ud800"):
            body = json.dumps({"text": text}).encode()
            reply = client.post("/echo", content=body, headers={"Content-Type": "application/json"})
            assert reply.status_code == 200 and reply.json() == {"got": {"text": text}}
        assert client.get("/health").json() == {"fine": True}


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"null", b"[" * 100_000, b'"x"', b"\xff", b'{"a":' * 50_000])
def test_what_is_no_object_is_a_clean_400(server: JsonServer, body: bytes) -> None:
    reply = post(server, body)
    assert reply.status_code == 400 and set(reply.json()) == {"error"} and "Traceback" not in reply.text


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1", 413),
        ("POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999", 413),
        ("POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: x", 413),
        ("POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1_0", 413),
        ("POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: \u0662", 413),
        ("POST /echo HTTP/1.1\r\nHost: localhost", 411),
        ("POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked", 411),
        ("POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nContent-Length: 2", 415),
        ("POST /echo HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 2", 403),
        ("POST /echo HTTP/1.1\r\nContent-Length: 2", 403),
        ("POST /echo HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.example\r\nContent-Length: 2", 403),
        ("POST /echo HTTP/1.1\r\nHost: localhost\r\nOrigin: null\r\nContent-Length: 2", 403),
        ("POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2", 404),
        ("GET /echo HTTP/1.1\r\nHost: localhost\r\nConnection: close", 404),
        ("PUT /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2", 501),
        ("POST /echo HTTP/9.9\r\nHost: localhost", 505),
        ("nonsense", 400),
        ("POST /" + "a" * 70_000 + " HTTP/1.1", 414),
        ("GET /health HTTP/1.1\r\n" + "\r\n".join(f"h{i}: x" for i in range(200)), 431),
    ],
)
def test_a_request_that_cannot_be_read_is_refused_and_its_connection_closed(
    server: JsonServer, head: str, status: int
) -> None:
    answer = raw(server, head.encode() + b"\r\n\r\n{}")
    if status in (400, 505) and not answer.startswith(b"HTTP"):  # HTTP/0.9, for all it knows: no status line
        assert b'"error"' in answer
    else:
        assert answer.split(b" ")[1] == str(status).encode() and b'"error"' in answer
    assert post(server).status_code == 200


def test_what_goes_wrong_in_the_work_stays_in_the_log(server: JsonServer, capsys: pytest.CaptureFixture[str]) -> None:
    reply = post(server, b'{"fail": true}')
    assert reply.status_code == 500 and reply.json() == {"error": "RuntimeError; the server's log has more"}
    assert "a secret of the server" in capsys.readouterr().err
    reply = post(server, b'{"refuse": true}')
    assert (reply.status_code, reply.json()) == (424, {"error": "the budget is used up"})


def test_a_key_guards_every_route(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(key="topsecret") as server:
        for path in ("/echo", "/nothing"):
            for headers in ({}, {"Authorization": "Bearer topsecre"}, {"Authorization": "Basic topsecret"}):
                assert post(server, path=path, **headers).status_code == 401
        assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 401
        monkeypatch.setenv("LLMRL_SERVER_KEY", "topsecret")
        assert post(server, **key_headers()).status_code == 200
        assert post(server, Host="node5:8080", **key_headers()).status_code == 200


def test_beyond_this_machine_a_key_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser, port=8888)
    monkeypatch.delenv("LLMRL_SERVER_KEY", raising=False)
    with pytest.raises(UserError, match=r"--host 0\.0\.0\.0: .* in the environment variable LLMRL_SERVER_KEY"):
        guard_of(parser.parse_args(["--host", "0.0.0.0"]))
    assert guard_of(parser.parse_args([])).port == 8888
    monkeypatch.setenv("LLMRL_SERVER_KEY", "k")
    assert guard_of(parser.parse_args(["--host", "0.0.0.0", "--max_body_mb", "1"])).max_body_bytes == 2**20


def test_slow_clients_are_closed_and_the_others_served() -> None:
    with serving(read_s=0.5, max_connections=100) as server:
        slow = [socket.create_connection(server.server_address[:2]) for _ in range(60)]
        for k, connection in enumerate(slow):
            connection.sendall([b"", b"POST /echo HTTP/1.1\r\nHo", b"POST /echo HTTP/1.1\r\nHost: localhost\r\n"
                                b"Content-Length: 100\r\n\r\n{"][k % 3])  # fmt: skip
        assert post(server).status_code == 200
        for connection in slow:
            with connection:
                connection.settimeout(60)
                while connection.recv(65536):  # an answer or nothing, and then the end
                    pass
        while server.clients:  # bounded by the test's own limit
            time.sleep(0.01)
        assert post(server).status_code == 200


def test_too_many_connections_are_told_so() -> None:
    with serving(max_connections=3) as server:
        held = [socket.create_connection(server.server_address[:2]) for _ in range(3)]
        while len(server.clients) < 3:
            time.sleep(0.01)
        assert b" 503 " in raw(server, b"")
        for connection in held:
            connection.close()
        while server.clients:
            time.sleep(0.01)
        assert post(server).status_code == 200


def test_no_more_is_worked_on_at_once_than_was_said_and_who_leaves_is_noticed() -> None:
    at_once: list[int] = []
    running = 0
    lock, left = threading.Lock(), threading.Event()

    def work(request: dict[str, Any], client: Client) -> dict[str, Any]:
        nonlocal running
        with lock:
            running += 1
            at_once.append(running)
        if request.get("wait"):
            client.gone.wait(60)
            left.set()
        with lock:
            running -= 1
        return {}

    with serving(work, max_concurrency=2) as server:
        threads = [threading.Thread(target=post, args=(server,)) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(at_once) == 20 and max(at_once) <= 2
        with socket.create_connection(server.server_address[:2]) as leaving:
            head = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 14\r\n\r\n"
            leaving.sendall(head + b'{"wait": true}')
            while len(at_once) < 21:
                time.sleep(0.01)
        assert left.wait(60)


def test_a_large_body_is_refused_before_it_is_read() -> None:
    with serving(max_body_bytes=1000) as server:
        assert post(server, b'{"a": "' + b"x" * 980 + b'"}').status_code == 200
        head = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 400000000\r\n\r\n"
        assert raw(server, head).split(b" ")[1] == b"413"
