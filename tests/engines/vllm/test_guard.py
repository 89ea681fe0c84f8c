"""The key guards every route of a server, and nothing else gets in."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from llmrl.engines.vllm.guard import KeyGuard

ROUTES = ["/health", "/v1/models", "/update_weights", "/collective_rpc", "/metrics", "/openapi.json", "/", "//v1"]


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"in"})


def answer(path: str, method: str = "GET", **headers: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(KeyGuard(app)), base_url="http://server") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(ask())


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "topsecret")


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD"])
def test_every_route_asks_for_the_key(path: str, method: str) -> None:
    refused = answer(path, method)
    assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
    assert answer(path, method, Authorization="Bearer topsecret").status_code == 200


@pytest.mark.parametrize(
    "given",
    ["", "Bearer", "Bearer ", "Bearer topsecre", "Bearer topsecret2", "Basic topsecret", "topsecret"],
)
def test_what_is_not_the_key_is_refused(given: str) -> None:
    assert answer("/health", Authorization=given).status_code == 401


def test_the_scheme_is_written_as_anybody_likes() -> None:
    assert answer("/health", authorization="bearer topsecret").status_code == 200


def test_two_keys_are_none() -> None:
    scope = {"type": "http", "headers": [(b"authorization", b"Bearer topsecret"), (b"authorization", b"Bearer x")]}
    assert not KeyGuard(app)._has_key(scope)
    assert not KeyGuard(app)._has_key({"type": "http", "headers": [(b"authorization", "Bearer ä".encode())]})


def test_websockets_are_closed_and_the_lifespan_is_left_alone() -> None:
    seen: list[Any] = []

    async def send(message: Any) -> None:
        seen.append(message)

    async def nothing() -> Any: ...

    asyncio.run(KeyGuard(app)({"type": "websocket", "headers": []}, nothing, send))
    assert seen == [{"type": "websocket.close", "code": 1008}]
    asyncio.run(KeyGuard(app)({"type": "lifespan"}, nothing, send))
    assert seen[-1]["body"] == b"in"


def test_a_guard_without_a_key_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "")
    with pytest.raises(ValueError, match="VLLM_API_KEY, which is not set"):
        KeyGuard(app)
