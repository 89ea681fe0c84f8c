"""One vLLM server over HTTP: token ids in, token ids and log-probabilities out; pause, weights, adapters, resume.

It uses only vLLM's own routes (0.32: `vllm/entrypoints`), so any `vllm serve` with the right flags will do.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import resource
import ssl
import time
from collections.abc import Coroutine, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from llmrl.engines.vllm.digests import Held
from llmrl.engines.vllm.replicas import ReplicaFailed, ReplicaLost
from llmrl.errors import RunFailed, UserError
from llmrl.types import Completion, Sampling

if TYPE_CHECKING:
    import httpx

GENERATE = "/inference/v1/generate"
COMPLETIONS = "/v1/completions"
WEIGHT_ROUTES = (
    "/pause",
    "/resume",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/weight_info",
)
ADAPTER_ROUTES = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/weight_info")
WORKER_CALL = "/collective_rpc"
CONNECT_TIMEOUT_S = 10.0
PROBE_TEMPERATURE = 0.5
RUN_PREFIX = "llmrl-"
"""How the names of runs begin that `VllmServerEngine` gives to weights."""
MAX_INTRUSIONS = 3
"""Another run that pushes once by mistake costs a push; one that keeps pushing ends this run."""
PER_CLIENT = 32
"""Requests that one client of httpx has at once."""
KEPT_S = 3.0
"""Idle connections are closed after this long, before a server does it (uvicorn: 5 s)."""
FILES = 65_536
"""Files that this process wants to open at once, where it may."""
LOOP_STALL_S = 2.0
"""If a limit is overrun by this much, our own event loop stood still: it does not mean that the server was silent."""


class VllmServer:
    """A client of one server; a replica in `Replicas`.

    Args:
        url: such as http://127.0.0.1:8000 (a trailing /v1 is dropped).
        api_key: sent as a bearer token, if the server requires one.
        health_timeout_s: a server that takes longer to answer /health or /weight_info counts as lost.
        request_timeout_s: a server that has completed nothing for so long counts as lost; so does one that takes
            longer to answer anything else.

    Attributes:
        version: the policy version it serves, as far as this process knows.
        adapter: name of the adapter that requests ask for; None asks for the model itself.
        label: name that the server should give to the weights it serves, RUN/VERSION; None while that is unknown.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, health_timeout_s: float = 30.0, request_timeout_s: float = 1800.0
    ) -> None:
        self.name = url.rstrip("/").removesuffix("/v1")
        self.health_timeout_s, self.request_timeout_s = health_timeout_s, request_timeout_s
        self.version = 0
        self.run = ""
        self.label: str | None = None
        self.adapter: str | None = None
        self.held = Held()
        self._intrusions = 0
        """How often another run's weights were found."""
        self.ready_to_receive = False
        self.routes: frozenset[str] = frozenset()
        self.model = ""
        self.max_model_len: int | None = None
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._clients: dict[httpx.AsyncClient, int] = {}
        """Clients of this event loop, and how many requests each has under way."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._answered_at = 0.0
        """When it last completed something."""

    # --- what it is -----------------------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Learn which model and which routes the server has.

        Raises:
            ReplicaLost: nothing answers there.
            UserError: what answers is not a vLLM server.
        """
        paths = (await self._json("GET", "/openapi.json", timeout=self.health_timeout_s)).get("paths", {})
        self.routes = frozenset(paths)
        if COMPLETIONS not in self.routes:
            raise UserError(f"{self.name} has no {COMPLETIONS}: it is not a vLLM server that generates text")
        models = (await self._json("GET", "/v1/models", timeout=self.health_timeout_s))["data"]
        base = next(model for model in models if not model.get("parent"))
        self.model, self.max_model_len = base["id"], base.get("max_model_len")
        self.label = self.adapter = None
        self.ready_to_receive = False

    def require(self, routes: tuple[str, ...], fix: str) -> None:
        """Refuse a server that lacks routes; the error says how to start it (`fix`).

        Raises:
            UserError: some of `routes` are missing.
        """
        missing = [route for route in routes if route not in self.routes]
        if missing:
            raise UserError(
                f"the vLLM server {self.name} has no {', '.join(missing)}: start it {fix}; `llmrl serve RECIPE.yaml "
                "--print_command` shows the whole command"
            )

    async def check(self) -> None:
        """Raise ReplicaLost unless the server is healthy and serves the weights it last got, or newer ones of this run.

        It can serve newer ones if another process of the run pushes, before this process learns of the push.

        Raises:
            RunFailed: another run keeps pushing to it.
        """
        await self.check_alive()
        if self.label is None:
            return
        serves = await self.served_label()
        run, _, version = serves.rpartition("/")
        if self.label is None or (run == self.run and int(version) >= self.version):
            return
        if run.startswith(RUN_PREFIX) and run != self.run:
            self._intrusions += 1
            why = "another run pushes to it"
            if self._intrusions >= MAX_INTRUSIONS:
                raise RunFailed(
                    f"{self.name} got weights of another run ({run}) {self._intrusions} times: two runs share it, and "
                    "each takes it from the other. Give each run servers of its own (rollout.server.urls)"
                )
        else:
            why = "it was restarted"
        raise ReplicaLost(f"serves weights {serves!r} instead of {self.label!r}: {why}")

    async def check_alive(self) -> None:
        """Raise ReplicaFailed unless the server reports that it is healthy."""
        await self._send("GET", "/health", timeout=self.health_timeout_s)

    async def served_label(self) -> str:
        """Return the server's name for the weights it serves; `default` before the first push."""
        answer = await self._json("GET", "/weight_info", timeout=self.health_timeout_s)
        return str(answer["weight_version"])

    async def world_size(self) -> int:
        """Return the number of the server's workers, over all its GPUs."""
        return (await self._json("GET", "/get_world_size", timeout=self.health_timeout_s))["world_size"]

    # --- sampling -------------------------------------------------------------------------------------------------

    async def generate(self, prompt_ids: list[int], sampling: Sampling, *, session: str) -> Completion:
        """Draw one completion.

        Every sampling parameter is sent, because a server takes missing ones from the model's generation_config. The
        versions are vLLM's own record if it has the token route (`--enable-scale-out`); otherwise the versions served
        when the request was sent and when it returned, which span at least the true ones.
        """
        settings: dict[str, Any] = {
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": 0.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
            "seed": sampling.seed,
            "stop_token_ids": list(sampling.stop_token_ids),
            "ignore_eos": True,
            "logprobs": 0,
        }
        sent_to, model, adapter = self.version, self.adapter or self.model, self.adapter
        if GENERATE in self.routes:
            body = {"token_ids": prompt_ids, "model": model, "sampling_params": settings | {"detokenize": False}}
            choice = (await self._json("POST", GENERATE, body))["choices"][0]
            logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"] or []]
        else:
            body = {"prompt": prompt_ids, "model": model, "return_token_ids": True} | settings
            choice = (await self._json("POST", COMPLETIONS, body))["choices"][0]
            logprobs = choice["logprobs"]["token_logprobs"]
        if len(logprobs) != len(choice["token_ids"]):
            raise RunFailed(f"{self.name} returned {len(choice['token_ids'])} tokens and {len(logprobs)} log-probs")
        if adapter is not None:  # the request names its adapter, so it runs under that one to its end
            spans = [(sent_to, len(logprobs))]
        else:
            spans = self._version_spans(choice.get("weight_versions") or [])
        versions = [version for version, _ in spans] or [sent_to, self.version]
        return Completion(
            token_ids=choice["token_ids"],
            logprobs=logprobs,
            finish=choice["finish_reason"],
            policy_version=(min(versions), max(versions)),
            version_spans=spans,
        )

    def _version_spans(self, recorded: list[dict[str, Any]]) -> list[tuple[int, int]]:
        """Return (version, number of tokens) in order, from the labels that vLLM recorded."""
        spans = []
        for span in recorded:
            run, _, version = span["version"].rpartition("/")
            if run != self.run:
                raise ReplicaLost(f"generated with weights {span['version']!r}, not with those of {self.run!r}")
            spans.append((int(version), span["end"] - span["start"]))
        return spans

    async def logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        """Return the log-probabilities (temperature 1) of each token after the first."""

        async def one(sequence: list[int]) -> list[float]:
            body = {
                "prompt": sequence,
                "model": self.adapter or self.model,
                "max_tokens": 1,
                "temperature": 0.0,
                "prompt_logprobs": 0,
            }
            entries = (await self._json("POST", COMPLETIONS, body))["choices"][0]["prompt_logprobs"]
            return [entry[str(token)]["logprob"] for token, entry in zip(sequence[1:], entries[1:], strict=True)]

        return list(await asyncio.gather(*(one(sequence) for sequence in sequences)))

    async def applies_temperature_to_logprobs(self) -> bool:
        """Return whether reported log-probabilities are those of the distribution that is sampled from.

        If they are not, the most probable token has the same log-probability at two temperatures.
        """

        async def top(temperature: float) -> float:
            body = {"prompt": [0], "model": self.model, "max_tokens": 1, "seed": 0, "logprobs": 1}
            body |= {"temperature": temperature, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
            choice = (await self._json("POST", COMPLETIONS, body))["choices"][0]
            return max(choice["logprobs"]["top_logprobs"][0].values())

        return abs(await top(1.0) - await top(PROBE_TEMPERATURE)) > 1e-4

    async def holds(self) -> list[dict[str, Any]] | None:
        """Return what `WeightReceiver.llmrl_held` returns on each worker, or None for a server started without it."""
        if WORKER_CALL not in self.routes:
            return None
        try:
            return (await self._json("POST", WORKER_CALL, {"method": "llmrl_held"}))["results"]
        except ReplicaLost:
            raise
        except (ReplicaFailed, RunFailed):
            return None

    # --- weights --------------------------------------------------------------------------------------------------

    async def pause(self, mode: str) -> None:
        """Stop generating and drop caches; `mode` (wait, abort, keep) decides what happens to running requests."""
        await self._send("POST", "/pause", params={"mode": mode})

    async def resume(self) -> None:
        await self._send("POST", "/resume")

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        await self._send("POST", "/init_weight_transfer_engine", {"init_info": init_info})

    async def update_weights(self, update_info: dict[str, Any], *, label: str) -> None:
        """Replace all weights of a paused server, which names them `label` afterwards."""
        self.label = None
        await self._send("POST", "/start_weight_update")
        try:
            await self._send("POST", "/update_weights", {"update_info": update_info})
        except ReplicaFailed:
            with contextlib.suppress(ReplicaFailed):  # an open update would keep the server from starting another one
                await self._send("POST", "/finish_weight_update")
            raise
        await self._send("POST", "/finish_weight_update", {"weight_version": label})
        self.note_label(label)

    async def set_label(self, label: str) -> None:
        """Have the server name the weights it serves `label`."""
        self.label = None
        await self._send("POST", "/update_weight_version", {"new_version": label})
        self.note_label(label)

    def note_label(self, label: str) -> None:
        """Note that the server serves `label`."""
        self.label = label
        self.run, _, version = label.rpartition("/")
        self.version = int(version)

    async def load_adapter(self, name: str, path: str) -> None:
        """Serve the adapter in folder `path` as model `name`."""
        await self._send("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        self.adapter = name

    async def unload_adapters(self, names: list[str]) -> None:
        """Remove adapters. Names that the server does not have are ignored."""
        for name in names:
            with contextlib.suppress(RunFailed):
                await self._send("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    # --- HTTP -----------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Close connections. Safe to call twice."""
        clients, self._clients = self._clients, {}
        if self._loop is asyncio.get_running_loop():
            for client in clients:
                await client.aclose()

    @contextlib.contextmanager
    def _http(self) -> Iterator[httpx.AsyncClient]:
        """Hold a client for one request. Connections belong to an event loop, so a new loop gets new clients.

        Each has few requests at once: httpx looks at all of a client's connections whenever one of them is needed.
        """
        import httpx

        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._clients, self._loop = {}, loop
        client = next((client for client, count in self._clients.items() if count < PER_CLIENT), None)
        if client is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=PER_CLIENT, keepalive_expiry=KEPT_S)
            timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
            client = httpx.AsyncClient(
                base_url=self.name, headers=self._headers, limits=limits, timeout=timeout, trust_env=False,
                verify=_tls_context(),
            )  # fmt: skip
            self._clients[client] = 0
        self._clients[client] += 1
        try:
            yield client
        finally:
            self._clients[client] -= 1

    async def _answer(self, request: Coroutine[Any, Any, httpx.Response]) -> httpx.Response:
        """Wait for a completion as long as the server completes anything: a busy one is not lost.

        Raises:
            TimeoutError: it has completed nothing for `request_timeout_s`.
        """
        task, started = asyncio.ensure_future(request), time.monotonic()
        try:
            while True:
                left = max(started, self._answered_at) + self.request_timeout_s - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                done, _ = await asyncio.wait({task}, timeout=left)
                if done:
                    self._answered_at = time.monotonic()
                    return task.result()
        finally:
            task.cancel()

    async def _json(self, method: str, path: str, body: Any = None, *, timeout: float | None = None) -> dict[str, Any]:
        response = await self._send(method, path, body, timeout=timeout)
        try:
            return response.json()
        except ValueError:
            raise ReplicaFailed(f"{method} {path} did not answer with JSON: {response.text[:200]!r}") from None

    async def _send(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        timeout: float | None = None,
        params: Any = None,
        again: bool = False,
    ) -> httpx.Response:
        """Send one request, within its time limit. `again` marks a second attempt.

        Raises:
            ReplicaLost: no connection, no answer in time, or a proxy's answer for a server that is not there.
            ReplicaFailed: status 500 or above.
            UserError: the server refuses the key.
            RunFailed: another status of 400 or above, since every server would refuse this request.
        """
        import httpx

        limit, samples = timeout or self.request_timeout_s, path in (GENERATE, COMPLETIONS)
        started = time.monotonic()
        try:
            with self._http() as client:
                request = client.request(method, path, json=body, params=params)
                response = await (self._answer(request) if samples else asyncio.wait_for(request, limit))
        except TimeoutError:
            if method == "GET" and time.monotonic() - started > limit + LOOP_STALL_S:
                return await self._send(method, path, body, timeout=timeout, params=params)
            silent = ", nor to any other request" if samples else ""
            raise ReplicaLost(f"no answer to {method} {path} within {limit:g} s{silent}") from None
        except httpx.TransportError as error:
            if _out_of_files(error):
                raise RunFailed(
                    f"no further connection to {self.name}: this process may open only {open_files()} files at once "
                    "(ulimit -n); raise the limit, or lower rollout.max_num_seqs"
                ) from None
            if (method == "GET" or samples) and not again:  # the server has closed a connection that was kept open
                return await self._send(method, path, body, timeout=timeout, params=params, again=True)
            raise ReplicaLost(f"{type(error).__name__} at {method} {path}: {error}") from None
        status = response.status_code
        if status in (502, 503, 504):
            raise ReplicaLost(f"{method} {path} answered {status}: {_message(response)}")
        if status >= 500:
            raise ReplicaFailed(f"{method} {path} answered {status}: {_message(response)}")
        if status in (401, 403):
            raise UserError(
                f"{self.name} answered {status} to {method} {path}: set the environment variable that "
                "rollout.server.api_key_env names to the key the server was started with"
            )
        if status == 404 and self.adapter is not None and path in (GENERATE, COMPLETIONS):
            raise ReplicaLost(f"it no longer has adapter {self.adapter!r}: it was restarted")
        if status >= 400:
            raise RunFailed(f"{self.name} answered {status} to {method} {path}: {_message(response)}")
        return response


def _out_of_files(error: BaseException | None) -> bool:
    """Return whether an error goes back to the limit of open files."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            return True
        error = error.__cause__ or error.__context__
    return False


def open_files() -> int:
    """Raise the number of files that this process may open as far as it may, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return soft


@cache
def _tls_context() -> ssl.SSLContext:
    return ssl.create_default_context()  # one for all clients: reading the certificates takes a while


def _message(response: httpx.Response) -> str:
    """Return the server's own error message."""
    try:
        content = response.json()
    except ValueError:
        return response.text[:500]
    error = content.get("error", content) if isinstance(content, dict) else content
    return str(error.get("message", error) if isinstance(error, dict) else error)[:2000]
