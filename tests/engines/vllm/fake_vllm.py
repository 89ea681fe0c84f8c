"""A fake vLLM server in a thread: the routes the engine uses, token ids that name their request, and faults on demand.
Also an engine on such servers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from llmrl.engines.vllm.http import VllmServer
from llmrl.engines.vllm.replicas import ReplicaLost
from llmrl.engines.vllm.servers import VllmServerEngine
from llmrl.noise import Limit
from llmrl.types import Completion, Sampling

ROUTES = (
    "/health", "/v1/models", "/v1/completions", "/weight_info", "/pause", "/resume", "/init_weight_transfer_engine",
    "/start_weight_update", "/update_weights", "/finish_weight_update", "/update_weight_version",
    "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/get_world_size",
)  # fmt: skip


class FakeVllm:
    """Serves on `url`. A completion is [prompt's last token, seed % 100]; log-probs are minus the weights' number.

    `fault` is what happens to requests for completions: "" (none), "500", "hang" (nothing is answered any more),
    "stuck" (completions wait until `released`), "400", "abort" (a finish reason), "nan".
    """

    def __init__(self, *, routes: tuple[str, ...] = ROUTES, latency: float = 0.0, model: str = "tiny") -> None:
        self.routes, self.latency, self.model = routes, latency, model
        self.fault, self.stuck = "", 0
        self.port = 0
        self.world_size = 1
        self.refuses = ""
        self.log: list[str] = []
        self.sent: dict[str, Any] = {}
        self.answered: list[dict[str, Any]] = []
        self.start()

    def start(self) -> None:
        """Start, or start again, with the weights from disk, which nobody pushed."""
        self.label, self.weights, self.adapters = "default", 0, {"": 0}
        self.released = threading.Event()
        self.server = Server(("127.0.0.1", self.port), self)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def kill(self) -> None:
        """End as kill -9 would: every connection breaks, and the port is free."""
        self.server.shutdown()
        self.server.server_close()
        for connection in list(self.server.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.released.set()

    def close(self) -> None:
        self.kill()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], fake: FakeVllm) -> None:
        self.fake = fake
        self.connections: set[socket.socket] = set()
        super().__init__(address, Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # broken connections are part of the tests


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def do_GET(self) -> None:
        fake, path = self.server.fake, self.path
        if fake.fault == "hang":
            fake.released.wait()
        if path == "/openapi.json":
            self.answer({"paths": {route: {} for route in fake.routes}})
        elif path == "/v1/models":
            self.answer({"data": [{"id": fake.model, "parent": None, "max_model_len": 64}]})
        elif path == "/weight_info":
            self.answer({"weight_version": fake.label})
        elif path.startswith("/get_world_size"):
            self.answer({"world_size": fake.world_size})
        else:
            self.answer({})

    def do_POST(self) -> None:
        fake, path = self.server.fake, self.path.partition("?")[0]
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        if fake.fault == "hang":
            fake.released.wait()
        if path == fake.refuses:
            self.answer({"error": {"message": "scripted refusal"}}, 500)
        elif path not in fake.routes:
            self.answer({"error": {"message": "Not Found"}}, 404)
        elif path == "/v1/completions":
            self.complete(fake, body)
        else:
            fake.log.append(self.path)
            fake.sent[path] = body
            if path == "/update_weights":
                fake.weights = body["update_info"].get("number", 0)
            if path == "/finish_weight_update":
                fake.label = body["weight_version"]
            if path == "/update_weight_version":
                fake.label = body["new_version"]
            if path == "/v1/load_lora_adapter":
                fake.adapters[body["lora_name"]] = int(Path(body["lora_path"]).name)
            if path == "/v1/unload_lora_adapter":
                if body["lora_name"] not in fake.adapters:
                    return self.answer({"error": {"message": "cannot be found"}}, 404)
                del fake.adapters[body["lora_name"]]
            self.answer({})
        return None

    def complete(self, fake: FakeVllm, body: dict[str, Any]) -> None:
        started_with = fake.label
        if "prompt_logprobs" not in body:
            time.sleep(fake.latency)
        if fake.fault in ("hang", "stuck"):
            fake.stuck += 1
            fake.released.wait()
        if fake.fault in ("500", "400"):
            return self.answer({"error": {"message": f"scripted {fake.fault}"}}, int(fake.fault))
        adapter = "" if body["model"] == fake.model else body["model"]
        if adapter not in fake.adapters:
            return self.answer({"error": {"message": f"The model `{adapter}` does not exist."}}, 404)
        number = -float(fake.weights + fake.adapters[adapter])
        if "prompt_logprobs" in body:
            row = [None, *({str(token): {"logprob": number}} for token in body["prompt"][1:])]
            return self.answer({"choices": [{"prompt_logprobs": row}]})
        if fake.released.is_set():
            return None
        fake.answered.append(body)
        tokens = [body["prompt"][-1], (body["seed"] or 0) % 100]
        logprob = float("nan") if fake.fault == "nan" else number
        choice = {
            "token_ids": tokens,
            "logprobs": {"token_logprobs": [logprob] * 2, "top_logprobs": [{"a": number}] * 2},
            "finish_reason": "abort" if fake.fault == "abort" else "length",
            "label": started_with,
        }
        return self.answer({"choices": [choice]})

    def answer(self, content: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(content).encode()
        with contextlib.suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


# --- an engine on such servers ---


class NumberDelivery:
    """Delivers weights that are one number; a push does not reach the servers in `misses`."""

    def __init__(self) -> None:
        self.number = 0
        self.misses: set[str] = set()

    def stage(self, source: object) -> None:
        self.number += 1

    async def deliver(self, servers: list[VllmServer], label: str) -> dict[VllmServer, str]:
        lost = {}
        for server in servers:
            try:
                if server.name in self.misses:
                    await server.set_label(label)
                else:
                    await server.update_weights({"number": self.number}, label=label)
            except ReplicaLost as error:
                lost[server] = str(error)
        return lost

    def close(self) -> None:
        pass


def engine_on(fakes: list[FakeVllm], **options: object) -> tuple[VllmServerEngine, NumberDelivery, list[str]]:
    """An engine, what delivers its weights, and the lines it reports.

    The time limits are long, so that a busy machine does not make a healthy server count as lost. A test that waits for
    a limit shortens that of the server concerned.
    """
    said: list[str] = []
    delivery = NumberDelivery()
    settings: dict = dict.fromkeys(
        ("health_timeout_s", "request_timeout_s", "return_timeout_s", "start_timeout_s"), 120
    )
    settings |= {"delivery": delivery, "say": said.append}
    engine = VllmServerEngine([f.url for f in fakes], **settings | options)
    engine.replicas.interval_s = 0.05
    engine.limit = Limit(1e-3, 1e-3)  # as the first push measures it
    return engine, delivery, said


async def draw(engine: VllmServerEngine, count: int) -> list[Completion]:
    calls = [engine.generate([1, i], Sampling(max_tokens=2, seed=i), session=str(i)) for i in range(count)]
    return list(await asyncio.gather(*calls))


def assert_each_answered_once(completions: list[Completion], version: int) -> None:
    assert [c.token_ids for c in completions] == [[i, i] for i in range(len(completions))]
    assert {c.policy_version for c in completions} == {(version, version)}


def nothing() -> list:
    return []
