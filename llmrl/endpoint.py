"""The client for JSON over HTTP: a JSON body goes in, the server's JSON object or an EndpointError comes out.

`Endpoint` and `shared_endpoint` serve code that runs in an event loop, `post_json` serves code that does not. Both
retry only transport failures (no connection, no answer in time, an overloaded or broken server): what a server says
about the request itself (400, 401, 404 ...) is final.
"""

from __future__ import annotations

import asyncio
import email.utils
import functools
import json
import ssl
import time
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from llmrl.errors import UserError

if TYPE_CHECKING:
    import httpx
    import tenacity
else:
    try:
        import httpx
        import tenacity
    except ImportError:  # an extra: rewards that could ask a server, and do not, import this module too
        httpx = tenacity = None

MAX_WAIT_S = 60.0
"""Longest wait that a Retry-After header can ask for, in seconds."""
RETRIED_STATUS = frozenset({408, 409, 425, 429})
"""Statuses below 500 that say "not now" rather than "not this request"."""
NO_HEADERS: Mapping[str, str] = MappingProxyType({})
T = TypeVar("T")


class EndpointError(Exception):
    """A server did not give a usable answer, after all retries.

    Args:
        message: what happened, beginning with the URL.
        status: HTTP status, or None where there was no usable reply at all.
        retry_after: seconds that the server asked to wait.
    """

    def __init__(self, message: str, *, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class Endpoint:
    """One server, as seen from one event loop: a connection pool and a limit on concurrent requests.

    Args:
        url: where requests are posted.
        headers: sent with each request, such as an API key.
        timeout_s: limit of one attempt, from connecting to the last byte.
        retries: further attempts after a transport failure.
        max_concurrency: limit on concurrent requests. A request that waits for its next attempt does not count.
        on_retry: called before each further attempt.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] = NO_HEADERS,
        timeout_s: float,
        retries: int,
        max_concurrency: int,
        on_retry: Callable[[], None] = lambda: None,
    ) -> None:
        require_client()
        self.url = url
        self.timeout_s = timeout_s
        self.retries = retries
        self.on_retry = on_retry
        self._slots = asyncio.Semaphore(max_concurrency)
        limits = httpx.Limits(max_connections=max_concurrency, max_keepalive_connections=max_concurrency)
        self._client = httpx.AsyncClient(headers=_json_headers(headers), timeout=timeout_s, limits=limits)

    async def post(self, body: dict[str, Any]) -> dict[str, Any]:
        """Post `body` and return the JSON object of the reply.

        Raises:
            EndpointError: the server refuses the request; or, after all retries, it cannot be reached, is too slow, is
                overloaded or does not answer with a JSON object.
        """
        attempts = tenacity.AsyncRetrying(**_retry_policy(self.retries, RETRIED_STATUS, self.on_retry))
        return await attempts(self._attempt, _encoded(body))

    async def _attempt(self, content: bytes) -> dict[str, Any]:
        async with self._slots:
            try:
                # httpx limits each read on its own; a server that drips single bytes would never reach that limit.
                async with asyncio.timeout(self.timeout_s):
                    response = await self._client.post(self.url, content=content)
            except (TimeoutError, httpx.TransportError) as error:
                raise _transport_failure(self.url, error, self.timeout_s) from None
        return _json_object(self.url, response)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()


class PerLoop(Generic[T]):
    """One object per event loop, made on first use, because connections and locks work only in the loop that made them.

    Args:
        make: makes the object for the running loop.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._objects: dict[asyncio.AbstractEventLoop, T] = {}

    def get(self) -> T:
        """Return the running loop's object."""
        loop = asyncio.get_running_loop()
        if loop not in self._objects:
            self._objects = {old: value for old, value in self._objects.items() if not old.is_closed()}
            self._objects[loop] = self._make()
        return self._objects[loop]

    def pop(self) -> T | None:
        """Remove and return the running loop's object, or None."""
        return self._objects.pop(asyncio.get_running_loop(), None)


def require_client() -> None:
    """Raise a UserError if the packages that talk to servers are missing."""
    if httpx is None or tenacity is None:  # pyright: ignore[reportUnnecessaryComparison]
        raise UserError("asking a judge or another server needs httpx and tenacity: pip install 'llmrl[judge]'")


_shared: PerLoop[dict[str, Endpoint]] = PerLoop(dict)


def shared_endpoint(
    url: str, *, headers: Mapping[str, str] = NO_HEADERS, timeout_s: float, retries: int, max_concurrency: int
) -> Endpoint:
    """Return the running loop's one Endpoint for `url`. Headers and limits are those of the first call."""
    endpoints = _shared.get()
    if url not in endpoints:
        endpoints[url] = Endpoint(
            url, headers=headers, timeout_s=timeout_s, retries=retries, max_concurrency=max_concurrency
        )
    return endpoints[url]


def post_json(
    url: str,
    body: dict[str, Any],
    *,
    headers: Mapping[str, str] = NO_HEADERS,
    timeout_s: float,
    retries: int,
    retried_status: Collection[int] = RETRIED_STATUS,
) -> dict[str, Any]:
    """Post `body` and return the JSON object of the reply, blocking; safe in any thread and after a fork.

    Every attempt opens a connection of its own, because a pool of connections would not survive a fork.

    Args:
        url: where the request is posted.
        body: anything that JSON can hold.
        headers: sent with the request, such as an API key.
        timeout_s: limit of connecting and of each wait for data.
        retries: further attempts after a transport failure.
        retried_status: statuses below 500 that are retried too.

    Raises:
        EndpointError: as for `Endpoint.post`.
    """
    require_client()
    content = _encoded(body)

    def attempt() -> dict[str, Any]:
        try:
            response = httpx.post(
                url, content=content, headers=_json_headers(headers), timeout=timeout_s, verify=_tls_context()
            )
        except httpx.TransportError as error:
            raise _transport_failure(url, error, timeout_s) from None
        return _json_object(url, response)

    return tenacity.Retrying(**_retry_policy(retries, retried_status))(attempt)


# --- what both share --------------------------------------------------------------------------------------------------


@functools.cache
def _tls_context() -> ssl.SSLContext:
    """Return one context for all blocking requests: httpx would read the certificates again for each of them."""
    return httpx.create_ssl_context()


def _json_headers(headers: Mapping[str, str]) -> dict[str, str]:
    return {"Content-Type": "application/json", **headers}


def _encoded(body: dict[str, Any]) -> bytes:
    # As escaped ASCII, because text from a policy may hold lone surrogates, which have no UTF-8 form.
    return json.dumps(body).encode()


def _transport_failure(url: str, error: Exception, timeout_s: float) -> EndpointError:
    if isinstance(error, (TimeoutError, httpx.TimeoutException)):
        return EndpointError(f"{url}: no answer within {timeout_s:g} s")
    return EndpointError(f"{url}: {type(error).__name__} {error}")


def _json_object(url: str, response: httpx.Response) -> dict[str, Any]:
    """Return the JSON object of a reply; raise an EndpointError for any other reply."""
    if response.status_code >= 300:
        raise EndpointError(
            f"{url}: HTTP {response.status_code} {response.text[:500]}",
            status=response.status_code,
            retry_after=_retry_after(response.headers.get("retry-after")),
        )
    try:
        reply = response.json()
    except (ValueError, RecursionError):
        reply = None
    if not isinstance(reply, dict):
        raise EndpointError(f"{url}: the reply is not a JSON object: {response.text[:200]!r}")
    return reply


def is_transient(error: BaseException, retried_status: Collection[int] = RETRIED_STATUS) -> bool:
    """Return whether a failure says nothing about the request itself, so that it may succeed later."""
    if not isinstance(error, EndpointError):
        return False
    return error.status is None or error.status in retried_status or error.status >= 500


def _retry_policy(
    retries: int, retried_status: Collection[int], on_retry: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Return the arguments of tenacity's Retrying and AsyncRetrying."""
    return {
        "stop": tenacity.stop_after_attempt(retries + 1),
        "retry": tenacity.retry_if_exception(lambda error: is_transient(error, retried_status)),
        "wait": _wait,
        "before_sleep": lambda state: on_retry(),
        "reraise": True,
    }


def _backoff(state: tenacity.RetryCallState) -> float:
    return tenacity.wait_random_exponential(multiplier=0.5, max=30)(state)


def _wait(state: tenacity.RetryCallState) -> float:
    """Return the seconds until the next attempt: what the server asked for, else exponential with jitter."""
    error = state.outcome.exception() if state.outcome is not None else None
    asked = error.retry_after if isinstance(error, EndpointError) else None
    return _backoff(state) if asked is None else asked


def _retry_after(header: str | None) -> float | None:
    """Return the seconds that a Retry-After header (seconds or an HTTP date) asks for, at most MAX_WAIT_S."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    is_nan = seconds != seconds
    return None if is_nan else min(max(seconds, 0.0), MAX_WAIT_S)
