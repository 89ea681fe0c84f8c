"""Thousands of requests at once, and many processes on the same servers: nothing is lost, doubled or herded."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from llmrl.engines.vllm import http
from llmrl.engines.vllm.http import VllmServer
from llmrl.engines.vllm.replicas import ReplicaLost, Replicas
from llmrl.errors import RunFailed
from llmrl.types import Sampling
from tests.engines.vllm.fake_vllm import FakeVllm

pytestmark = pytest.mark.slow

STUB = """
import asyncio, json, sys, uvicorn
from collections import Counter
slots, seen = asyncio.Semaphore(256), Counter()
async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    answer = {}
    if scope["path"] == "/v1/completions":
        asked = json.loads(body)
        seen[str(asked["prompt"])] += 1
        async with slots:
            await asyncio.sleep(0.2)
        answer = {"choices": [{"token_ids": asked["prompt"][:1], "finish_reason": "length",
                               "logprobs": {"token_logprobs": [-1.0]}}]}
    elif scope["path"] == "/seen":
        answer = seen
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps(answer).encode()})
uvicorn.run(app, port=int(sys.argv[1]), log_level="error", access_log=False)
"""
CLIENT = """
import asyncio, json, resource, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
from llmrl.engines.vllm.servers import VllmServerEngine
from llmrl.types import Sampling

async def main():
    said, stalls = [], []
    engine = VllmServerEngine(sys.argv[1:], most=320, say=said.append)
    engine.version, engine._check_request = 0, lambda *_: None
    async def fine(*_): return None
    engine._check_temperature = fine
    async def beat():
        while True:  # processor time of this thread between two turns of the loop: others' load does not count
            before = time.thread_time()
            await asyncio.sleep(0)
            stalls.append(time.thread_time() - before)
            await asyncio.sleep(0.01)
    heart = asyncio.create_task(beat())
    done = await asyncio.gather(*(engine.generate([i, i], Sampling(max_tokens=1, seed=i), session=f"{i // 8}/{i % 8}")
                                  for i in range(3000)))
    heart.cancel()
    await engine.replicas.close()
    print(json.dumps({"right": sum(d.token_ids == [i] for i, d in enumerate(done)), "said": said, "stall": max(stalls),
                      "moved": engine.replicas.num_moved}))

asyncio.run(main())
"""


def test_three_thousand_requests_with_few_open_files(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra serve)")
    from llmrl.engines.vllm.launch import free_ports

    ports = free_ports(4, first=0)
    servers = [subprocess.Popen([sys.executable, "-c", STUB, str(port)]) for port in ports]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    try:
        for url in urls:
            while True:
                try:
                    httpx.get(f"{url}/health", trust_env=False)
                    break
                except httpx.TransportError:
                    continue
        run = subprocess.run([sys.executable, "-c", CLIENT, *urls], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-3000:]
        found = json.loads(run.stdout)
        assert found["right"] == 3000 and found["said"] == [] and found["moved"] == 0
        assert found["stall"] < 0.3
        seen = [httpx.get(f"{url}/seen", trust_env=False).json() for url in urls]
    finally:
        for server in servers:
            server.kill()
            server.wait()
    assert sum(map(len, seen)) == 3000 and {count for each in seen for count in each.values()} == {1}
    sizes = [len(each) for each in seen]
    assert max(sizes) <= 1.3 * 750, sizes


class Silent:
    def __init__(self, name: str) -> None:
        self.name = name

    async def check(self) -> None: ...


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_processes_that_know_nothing_of_each_other_share_servers_evenly(groups: int) -> None:
    seen: Counter[str] = Counter()

    async def work(replica: Silent) -> None:
        seen[replica.name] += 1
        await asyncio.sleep(0)

    async def no_restore(replica: Silent) -> None: ...

    async def process(rank: int) -> None:
        replicas = Replicas([Silent(str(k)) for k in range(16)], restore=no_restore, first=rank)
        await asyncio.gather(
            *(replicas.call(work, session=f"{rank}/{g}/{k}", prompt=[rank, g]) for g in range(groups) for k in range(8))
        )
        await replicas.close()

    async def main() -> None:
        await asyncio.gather(*(process(rank) for rank in range(32)))

    asyncio.run(main())
    assert len(seen) == 16 and max(seen.values()) <= 1.3 * 32 * groups * 8 / 16, seen


def test_requests_wait_for_their_turn_in_order_and_those_that_leave_pass_it_on() -> None:
    async def main() -> None:
        order: list[int] = []
        under_way = most = 0
        gates = [asyncio.Event() for _ in range(12)]

        async def no_restore(replica: Silent) -> None: ...

        replicas = Replicas([Silent("a"), Silent("b")], restore=no_restore, most=2)

        def work(number: int) -> Any:
            async def run(replica: Silent) -> int:
                nonlocal under_way, most
                order.append(number)
                under_way += 1
                most = max(most, under_way)
                await gates[number].wait()
                under_way -= 1
                return number

            return run

        calls = [asyncio.ensure_future(replicas.call(work(i), session=str(i), prompt=[i])) for i in range(12)]
        while len(order) < 4:
            await asyncio.sleep(0)
        calls[5].cancel()
        for gate in gates:
            gate.set()
        done = await asyncio.gather(*calls, return_exceptions=True)
        assert [d for d in done if not isinstance(d, BaseException)] == [i for i in range(12) if i != 5]
        assert set(order[:4]) == {0, 1, 2, 3} and order[4:] == [4, 6, 7, 8, 9, 10, 11] and most == 4
        assert all(slot.load == 0 for slot in replicas.slots) and not replicas._waiting
        await replicas.close()

    asyncio.run(main())


def test_all_that_wait_move_when_a_server_is_lost_and_when_one_returns() -> None:
    async def main() -> None:
        async def no_restore(replica: Silent) -> None: ...

        replicas = Replicas([Silent("a"), Silent("b")], restore=no_restore, most=1, interval_s=0.01)
        stuck = asyncio.Event()

        async def work(replica: Silent) -> str:
            if replica.name == "a" and not stuck.is_set():
                await asyncio.Event().wait()
            return replica.name

        calls = [asyncio.ensure_future(replicas.call(work, session=str(i), prompt=[i])) for i in range(9)]
        while sum(call.done() for call in calls) < 8:
            await asyncio.sleep(0.001)
        stuck.set()
        replicas.lost(replicas.slots[0].replica, "killed")
        assert set(await asyncio.gather(*calls)) <= {"a", "b"}
        await replicas.close()

    asyncio.run(main())


def test_a_busy_server_is_not_lost_and_a_silent_one_is() -> None:
    fake, limit = FakeVllm(), 2.0
    server = VllmServer(fake.url, request_timeout_s=limit)

    def one(number: int) -> Any:
        return server.generate([number], Sampling(max_tokens=2, seed=0), session="")

    async def others(long: asyncio.Task[Any]) -> bool:
        """Complete others for longer than the limit; return whether none of them took so long (a busy machine)."""
        begin = last = time.monotonic()
        while time.monotonic() - begin < 2 * limit:
            await one(1)
            if time.monotonic() - last > limit / 2:
                return False
            last = time.monotonic()
            await asyncio.sleep(0.05)
        assert not long.done(), "others were completed all the time"
        return True

    async def main() -> None:
        await server.connect()
        while True:
            fake.fault = "stuck"
            long = asyncio.ensure_future(one(99))
            while not fake.stuck:
                await asyncio.sleep(0.01)
            fake.fault = ""
            if await others(long):
                break
            long.cancel()
            fake.stuck = 0
        fake.fault = "stuck"
        with pytest.raises(ReplicaLost, match="within 2 s, nor to any other request"):
            await one(1)
        with pytest.raises(ReplicaLost):
            await long
        await server.close()

    try:
        asyncio.run(main())
    finally:
        fake.close()


def test_the_limit_of_open_files_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        async def request(self, *_: Any, **__: Any) -> Any:
            try:
                raise OSError(24, "Too many open files")
            except OSError as error:
                raise httpx.ConnectError("All connection attempts failed") from error

    server = VllmServer("http://127.0.0.1:1")
    monkeypatch.setattr(httpx, "AsyncClient", lambda **_: Full())
    with pytest.raises(RunFailed, match=r"may open only \d+ files at once \(ulimit -n\); raise the limit, or lower"):
        asyncio.run(server.check_alive())
    assert http.open_files() > 0
