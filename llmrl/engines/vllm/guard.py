"""In front of a vLLM server: no request without the key gets through, on any route.

vLLM's own key guards its inference routes. The routes that replace the model, stop it, or call any method of a worker
stay open, and the trainer needs them.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

KEY = "VLLM_API_KEY"
MIDDLEWARE = "llmrl.engines.vllm.guard.KeyGuard"
"""What `vllm serve --middleware` is given."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class KeyGuard:
    """ASGI middleware that answers 401 unless a request carries the key of `$VLLM_API_KEY` as its bearer token."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.key = os.environ.get(KEY, "").encode()
        if not self.key:
            raise ValueError(f"{MIDDLEWARE} guards with the key in the environment variable {KEY}, which is not set")

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._has_key(scope):
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        body = b'{"error": "this server needs its key: Authorization: Bearer ..."}'
        headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _has_key(self, scope: Message) -> bool:
        given = [value for name, value in scope.get("headers", ()) if name.lower() == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, key = given[0].partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.key)
