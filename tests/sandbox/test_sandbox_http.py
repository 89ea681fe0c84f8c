"""The box behind an HTTP server: it gives the same verdicts, and a failure of the server is not a verdict."""

from __future__ import annotations

import functools
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from llmrl.sandbox import ProgramEnded, Raised, SandboxUnavailable, open_sandbox, serve
from llmrl.sandbox.http import HttpSandbox
from llmrl.sandbox.serve import make_server
from tests.sandbox.sandboxes import LIMITS, SHORT, any_box, same

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def remote() -> Iterator[HttpSandbox]:
    sandbox = any_box(packages=())
    server = make_server(sandbox, "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield HttpSandbox(f"http://127.0.0.1:{server.server_address[1]}")
    server.shutdown()
    server.server_close()
    sandbox.close()


def test_the_remote_box_runs_scripts_and_functions(remote: HttpSandbox) -> None:
    end = remote.run("print(input()[::-1])", "abc\n", LIMITS)
    assert (end.status, end.stdout) == ("ok", "cba\n")
    for source, status in (("print(", "compile_error"), ("1 / 0", "error")):
        assert remote.run(source, "", LIMITS).status == status
    assert remote.run("while 1: pass", "", SHORT).status == "timeout"
    source = "class Box:\n    def __init__(self): self.n = 0\ndef f(x): return (x, {1})\ndef boom(): raise KeyError(1)"
    with remote.open(source, LIMITS) as session:
        session.load(source)
        assert same(session.name("f")([1.0]), ([1.0], {1}))
        item = session.name("Box")()
        item.n = 5
        assert item.n == 5
        with pytest.raises(Raised):
            session.name("boom")()
    for source, kind in (("def f(:", "compile_error"), ("import os; os._exit(0)", "error")):
        with remote.open(source, LIMITS) as session, pytest.raises(ProgramEnded) as ended:
            session.load(source)
        assert ended.value.kind == kind


def test_a_remote_failure_is_not_a_verdict() -> None:
    answers: list[tuple[int, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert request["language"] == "python" and request["code"] and request["run_timeout"] > 0
            code, body = answers.pop(0) if answers else (500, None)
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    result = {"status": "Finished", "return_code": 0, "execution_time": 0.01, "stdout": "42\n", "stderr": ""}
    good = (200, {"status": "Success", "message": "", "run_result": result})
    answers += [(503, None), good]
    box = HttpSandbox(f"http://127.0.0.1:{server.server_address[1]}/run_code")
    assert box.describe() == f"sandbox http: programs run on {box.url}, under the limits of that server"
    for bad, message in (
        ([(400, None)], "HTTP 400"),
        ([(429, None)], "HTTP 429"),
        ([(200, {"status": "SandboxError", "message": "no pod"})], "SandboxError: no pod"),
        ([(500, None)] * 3, "HTTP 500"),
    ):
        answers[:] = bad
        with pytest.raises(SandboxUnavailable, match=message):
            box.run("print(1)", "", LIMITS)
    server.shutdown()
    server.server_close()


def test_an_address_without_a_server_is_unavailable() -> None:
    with socket.socket() as silent:  # bound, so that no other process takes the port meanwhile
        silent.bind(("127.0.0.1", 0))
        with pytest.raises(SandboxUnavailable, match="does not answer"):
            open_sandbox(f"http://127.0.0.1:{silent.getsockname()[1]}")


@pytest.mark.parametrize(
    "request_",
    [
        {"run_timeout": -1}, {"run_timeout": "x"}, {"run_timeout": True}, {"memory_limit_MB": -5}, {"code": None},
        {"code": 5}, {"stdin": 5},
    ],
)  # fmt: skip
def test_absurd_parameters_are_refused(remote: HttpSandbox, request_: dict[str, Any]) -> None:
    reply = httpx.post(remote.url, json={"code": "print(1)", "language": "python"} | request_, trust_env=False)
    assert reply.status_code == 422 and "not a run_code request" in reply.json()["error"]


def test_limits_beyond_those_of_the_server_are_lowered(remote: HttpSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "MAX_SECONDS", 1.0)
    for limit in (b"1e6", b"1e300"):
        body = b'{"code": "while 1: pass", "memory_limit_MB": 1e300, "run_timeout": ' + limit + b"}"
        reply = httpx.post(remote.url, content=body, headers={"Content-Type": "application/json"}, timeout=120)
        assert reply.json()["run_result"]["status"] == "TimeLimitExceeded"
    reply = httpx.post(remote.url, content=b'{"code": "1", "run_timeout": 1e999}', timeout=60,
                       headers={"Content-Type": "application/json"})  # fmt: skip
    assert reply.status_code == 422


def test_the_server_script_serves() -> None:
    any_box(packages=()).close()
    command = [sys.executable, str(ROOT / "scripts" / "serve_sandbox"), "--port", "0"]
    # A shell ignores SIGINT for what it runs in the background; if that is these tests, the child would inherit it.
    heed_sigint = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/", preexec_fn=heed_sigint)
    try:
        assert server.stdout is not None
        assert server.stdout.readline().startswith("sandbox ")
        address = server.stdout.readline().split()[-1]
        assert open_sandbox(address).run("print(input())", "7\n", LIMITS).stdout == "7\n"
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=120) == 0
        server.stdout.close()
