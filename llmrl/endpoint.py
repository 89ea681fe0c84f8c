"""JSON over HTTP with transport retries: a body goes in, the server's JSON object or an EndpointError comes out.

Used for judges, translation metrics and reward servers. Only failures of the transport are tried again: what a server
says about the request itself (400, 401, 404 ...) is final.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import httpx
import tenacity

MAX_WAIT_S = 60.0
RETRIED_STATUS = {408, 409, 425, 429}
T = TypeVar("T")


class EndpointError(Exception):
    """A server did not answer as it should, after all retries. The sample that asked is unscored, not wrong."""

    def __init__(self, message: str, *, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after

    @property
    def is_transient(self) -> bool:
        return self.status is None or self.status in RETRIED_STATUS or self.status >= 500


class Endpoint:
    """One server, as seen from one event loop: a connection pool and a limit on the requests under way.

    Args:
        url: where requests are posted.
        headers: sent with each.
        timeout_s: limit of one attempt, from connecting to the last byte.
        retries: further attempts after a transport failure.
        max_concurrency: requests under way at once; waiting for a retry does not count.
        on_retry: called before each further attempt.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: dict[str, str],
        timeout_s: float,
        retries: int,
        max_concurrency: int,
        on_retry: Callable[[], None] = lambda: None,
    ) -> None:
        self.url = url
        self.timeout_s = timeout_s
        self.retries = retries
        self.on_retry = on_retry
        self._slots = asyncio.Semaphore(max_concurrency)
        limits = httpx.Limits(max_connections=max_concurrency, max_keepalive_connections=max_concurrency)
        headers = {"Content-Type": "application/json", **headers}
        self._client = httpx.AsyncClient(headers=headers, timeout=timeout_s, limits=limits)

    async def post(self, body: dict[str, Any]) -> dict[str, Any]:
        """Post `body` and return the JSON object of the reply.

        Raises:
            EndpointError: not reachable, too slow, not JSON or overloaded after all retries; or a final refusal.
        """
        attempts = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self.retries + 1),
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, EndpointError) and error.is_transient),
            wait=_wait,
            before_sleep=lambda state: self.on_retry(),
            reraise=True,
        )
        # Escaped ASCII: text of a policy may hold lone surrogates, which have no UTF-8 form.
        return await attempts(self._attempt, json.dumps(body).encode())

    async def _attempt(self, content: bytes) -> dict[str, Any]:
        async with self._slots:
            try:
                # httpx limits each read; only this limits a server that drips one byte at a time.
                async with asyncio.timeout(self.timeout_s):
                    response = await self._client.post(self.url, content=content)
            except (TimeoutError, httpx.TimeoutException):
                raise EndpointError(f"{self.url}: no answer within {self.timeout_s:g} s") from None
            except httpx.TransportError as error:
                raise EndpointError(f"{self.url}: {type(error).__name__} {error}") from None
        if response.status_code >= 300:
            raise EndpointError(
                f"{self.url}: HTTP {response.status_code} {response.text[:500]}",
                status=response.status_code,
                retry_after=_retry_after(response.headers.get("retry-after")),
            )
        try:
            reply = response.json()
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            raise EndpointError(f"{self.url}: the reply is not a JSON object: {response.text[:200]!r}")
        return reply

    async def close(self) -> None:
        await self._client.aclose()


class PerLoop(Generic[T]):
    """One object per event loop, made when first asked for: connections and locks belong to the loop they were made in.

    Args:
        make: makes the object of the running loop.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._objects: dict[asyncio.AbstractEventLoop, T] = {}

    def get(self) -> T:
        loop = asyncio.get_running_loop()
        if loop not in self._objects:
            self._objects = {old: value for old, value in self._objects.items() if not old.is_closed()}
            self._objects[loop] = self._make()
        return self._objects[loop]

    def pop(self) -> T | None:
        """Forget and return the running loop's object."""
        return self._objects.pop(asyncio.get_running_loop(), None)


_shared: PerLoop[dict[str, Endpoint]] = PerLoop(dict)


def shared_endpoint(url: str, *, timeout_s: float, retries: int, max_concurrency: int) -> Endpoint:
    """The running loop's one Endpoint of `url` without headers; the first caller's limits hold."""
    endpoints = _shared.get()
    if url not in endpoints:
        endpoints[url] = Endpoint(
            url, headers={}, timeout_s=timeout_s, retries=retries, max_concurrency=max_concurrency
        )
    return endpoints[url]


_backoff = tenacity.wait_random_exponential(multiplier=0.5, max=30)


def _wait(state: tenacity.RetryCallState) -> float:
    """Seconds until the next attempt: what the server asked for, else exponential with jitter."""
    error = state.outcome.exception() if state.outcome is not None else None
    asked = error.retry_after if isinstance(error, EndpointError) else None
    return _backoff(state) if asked is None else asked


def _retry_after(header: str | None) -> float | None:
    """Seconds that a Retry-After header (seconds or an HTTP date) asks for, at most a minute."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return min(max(seconds, 0.0), MAX_WAIT_S) if seconds == seconds else None
