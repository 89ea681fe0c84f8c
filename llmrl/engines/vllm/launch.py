"""Starts and stops vLLM servers: options of model and engine in, processes that serve the model out.

`llmrl serve` runs them in the foreground; the `vllm_server` engine without `rollout.server.urls` runs them beside the
training. No server outlives the process that started it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrl.engines.vllm.guard import KEY, MIDDLEWARE
from llmrl.engines.vllm.lifetime import TRAINER
from llmrl.engines.vllm.options import VllmConfig, VllmServerConfig
from llmrl.errors import RunFailed, UserError
from llmrl.model.logprob_head import HEAD_DTYPE

if TYPE_CHECKING:
    from llmrl.engines.options import EngineConfig
    from llmrl.model.options import ModelConfig

MODULE = "vllm.entrypoints.openai.api_server"
END_WITH_PARENT = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); "
    "os.getppid() == int(sys.argv[1]) or sys.exit(1); os.execvp(sys.argv[2], sys.argv[2:])"
)
"""The child runs this before it becomes the server. The kernel then ends it when the parent is gone, for any reason."""
STOP_TIMEOUT_S = 15.0
"""How long servers may take to end before they are killed."""
LOG_TAIL = 25
"""Lines of a server's log to show when it fails."""


@dataclass(kw_only=True)
class Launch:
    """How to start one server."""

    command: list[str]
    env: dict[str, str]
    """Added to the environment of the starting process."""
    url: str
    key_env: str = KEY
    """The variable of the starting process that holds the key, which no printed line does."""

    def shell(self) -> str:
        """Return the same as a line for a shell."""
        values = {name: shlex.quote(value) for name, value in self.env.items()}
        if KEY in values:
            values[KEY] = f'"${self.key_env}"'
        settings = " ".join(f"{name}={value}" for name, value in values.items())
        return f"{settings} {shlex.join(['python', *self.command[1:]])}"


def plan(
    model: ModelConfig, options: EngineConfig, *, lora_rank: int | None = None, while_training: bool = False
) -> list[Launch]:
    """Return how to start the servers that `options` describes.

    Args:
        model: what the servers load; where that is an adapter, its base.
        options: reads `server`, `vllm` and `max_num_seqs`.
        lora_rank: serve adapters of this rank on top of the model. Default: that of the policy's, if a run with these
            options would push only the adapter.
        while_training: a training run starts the servers on its own machine, so they may not take its GPUs.

    Raises:
        UserError: no model, or not enough GPUs or ports.
    """
    import torch

    from llmrl.engines.vllm.start import engine_arguments, vllm_environment
    from llmrl.model.load import base_of

    server, vllm = options.server or VllmServerConfig(), options.vllm or VllmConfig()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    served = base_of(model)
    arguments = engine_arguments(
        vllm,
        served.path,
        dtype=model.dtype,
        device=device,
        max_num_seqs=options.max_num_seqs,
        lora_rank=_lora_rank(model, vllm, device) if lora_rank is None else lora_rank,
    )
    # These are for an engine beside its trainer.
    for name in ("skip_tokenizer_init", "enable_sleep_mode"):
        arguments.pop(name, None)
    if arguments["load_format"] == "dummy":
        del arguments["load_format"]
    if vllm.gpu_memory_utilization is None:
        arguments.pop("gpu_memory_utilization", None)
    if server.weight_transfer == "nccl" or (server.weight_transfer == "auto" and device == "cuda"):
        arguments["weight_transfer_config"] = {"backend": "nccl"}
    arguments |= {
        "revision": served.revision,
        "tokenizer": served.tokenizer,
        "trust_remote_code": model.trust_remote_code or None,
        "enable_scale_out": True,
        "disable_uvicorn_access_log": True,
        "host": server.host,
    }
    if model.float32_head:
        arguments["hf_overrides"] = {HEAD_DTYPE: "float32"}
    env = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} | vllm_environment(device)
    key = os.environ.get(server.api_key_env)
    if key:
        arguments["middleware"] = MIDDLEWARE
        if server.api_key_env != KEY:
            env[KEY] = key
    elif not is_loopback(server.host):
        raise UserError(
            f"rollout.server.host {server.host}: other machines could replace or stop the model. Set a key in the "
            f"environment variable {server.api_key_env}, for the servers and for the trainer, or listen on 127.0.0.1"
        )
    ports = free_ports(server.num_replicas, first=server.port, host=server.host)
    reachable = "127.0.0.1" if server.host in ("0.0.0.0", "::") else server.host
    gpus_per_server = vllm.tensor_parallel_size * vllm.data_parallel_size
    gpus = [""] * len(ports)
    if device == "cuda":
        gpus = deal_gpus(server, gpus_per_server, while_training=while_training)
    return [
        Launch(
            command=[sys.executable, "-m", MODULE, *flags(arguments | {"port": port})],
            env=env | ({"CUDA_VISIBLE_DEVICES": devices} if devices else {}),
            url=f"http://{reachable}:{port}",
            key_env=server.api_key_env,
        )
        for port, devices in zip(ports, gpus, strict=True)
    ]


def start_servers(
    model: ModelConfig, options: EngineConfig, log_dir: Path, *, say: Callable[[str], None]
) -> ServerProcesses:
    """Start the servers of a training run on its machine. They need a while before they answer.

    Raises:
        UserError: the model is neither in a folder nor on the hub, vLLM cannot serve it here, or GPUs or ports are
            missing.
    """
    if not Path(model.path).is_dir() and (":" in model.path or "(" in model.path):
        raise UserError(
            f"vLLM servers load the model themselves, and cannot load {model.path}: save it in a folder "
            "(model.save_pretrained, tokenizer.save_pretrained) and give that as model.path"
        )
    check_model(model)
    launches = plan(model, options, while_training=True)
    server = options.server or VllmServerConfig()
    return ServerProcesses(launches, log_dir, max_restarts=server.max_restarts, say=say).start()


def check_model(model: ModelConfig) -> None:
    """Check, before servers start, that vLLM has attention for the model's heads on this machine.

    Raises:
        UserError: it has none, or there is no such model.
    """
    import torch
    from transformers import AutoConfig

    from llmrl.engines.vllm.start import check_head_dim, process_state_kept, vllm_environment
    from llmrl.model.load import base_of

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        loaded = base_of(model)
        served = AutoConfig.from_pretrained(
            loaded.path, revision=loaded.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(f"model {model.path!r}: no configuration can be loaded from it ({error})") from error
    with process_state_kept({**vllm_environment(device)}):
        check_head_dim(served, on_cpu=device == "cpu")


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def flags(arguments: dict[str, Any]) -> list[str]:
    """Return `vllm serve` flags for arguments of `EngineArgs`. None leaves a flag out; False gives `--no-...`."""
    words: list[str] = []
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if value is None:
            continue
        if value is True:
            words.append(flag)
        elif value is False:
            words.append("--no-" + flag[2:])
        else:
            words += [flag, json.dumps(value) if isinstance(value, (dict, list)) else str(value)]
    return words


def _lora_rank(model: ModelConfig, options: VllmConfig, device: str) -> int | None:
    """Return the rank of adapters that a run pushes by themselves, or None if it pushes merged weights.

    It must decide as `llmrl.run.engines.serves_adapters_apart` does for the trainer's side.
    """
    from llmrl.model.adapter_folder import find_adapter
    from llmrl.model.adapters import configured_obstacle
    from llmrl.model.load import adapter_config

    wanted, saved = options.lora_sync, find_adapter(model)
    if model.adapter == "merge" or wanted == "merged" or (wanted == "auto" and device == "cpu"):
        return None
    fresh = model.fresh_adapters
    trained = saved.config if saved is not None else None if fresh is None else adapter_config(fresh)
    return None if trained is None or configured_obstacle(trained) else trained.r


def deal_gpus(server: VllmServerConfig, gpus_per_server: int, *, while_training: bool) -> list[str]:
    """Return CUDA_VISIBLE_DEVICES for each server to start.

    Args:
        server: reads `gpus` and `num_replicas`.
        gpus_per_server: GPUs each of them needs.
        while_training: take only the GPUs that `server` names, since a trainer uses the others.

    Raises:
        UserError: not enough GPUs.
    """
    import torch

    gpus = [str(gpu) for gpu in server.gpus]
    if not gpus and not while_training:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        gpus = [gpu for gpu in visible.split(",") if gpu] or [str(i) for i in range(torch.cuda.device_count())]
    wanted = gpus_per_server * server.num_replicas
    if len(gpus) < wanted:
        raise UserError(
            f"{server.num_replicas} vLLM server(s) of {gpus_per_server} GPU(s) each need {wanted} GPUs, there are "
            f"{len(gpus)}: name more in rollout.server.gpus, or start fewer or smaller servers"
            + (" (they may not take the GPUs you train on; run the trainer on the others)" if while_training else "")
        )
    return [",".join(gpus[first : first + gpus_per_server]) for first in range(0, wanted, gpus_per_server)]


def free_ports(count: int, *, first: int, host: str = "127.0.0.1") -> list[int]:
    """Return `count` ports that nobody listens on: `first` and the following ones, or any if `first` is 0.

    Raises:
        UserError: one of these ports is taken.
    """
    bind_to = "" if host in ("0.0.0.0", "::") else host
    ports = []
    with contextlib.ExitStack() as stack:
        for i in range(count):
            found = stack.enter_context(socket.socket())
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                found.bind((bind_to, first + i if first else 0))
            except OSError as error:
                raise UserError(
                    f"port {first + i} for a vLLM server cannot be used ({error.strerror}): is one running already? "
                    "Choose others with --rollout.server.port, or name the running ones in rollout.server.urls"
                ) from None
            ports.append(found.getsockname()[1])
    return ports


@dataclass
class Process:
    """One started server."""

    launch: Launch
    log: Path
    popen: subprocess.Popen[bytes]
    restarts: int = 0


@dataclass
class ServerProcesses:
    """Running servers. `close` ends them, and so does the end of this process, for any reason."""

    launches: list[Launch]
    log_dir: Path
    max_restarts: int = 0
    say: Callable[[str], None] = print
    processes: list[Process] = field(default_factory=list)

    def start(self) -> ServerProcesses:
        """Start all servers. They need some time before they answer."""
        self.log_dir.mkdir(parents=True, exist_ok=True)
        atexit.register(self.close)
        for launch in self.launches:
            log = self.log_dir / f"vllm_{launch.url.rpartition(':')[2]}.log"
            self.processes.append(Process(launch, log, _spawn(launch, log)))
            self.say(f"starting the vLLM server {launch.url}, log in {log}")
        return self

    @property
    def urls(self) -> list[str]:
        return [process.launch.url for process in self.processes]

    def check(self) -> None:
        """Raise RunFailed if a server has ended; the message shows the end of its log."""
        for process in self.processes:
            code = process.popen.poll()
            if code is not None:
                raise RunFailed(
                    f"the vLLM server {process.launch.url} ended with exit code {code}; the end of {process.log}:\n"
                    f"{log_tail(process.log)}"
                )

    def revive(self, url: str) -> None:
        """Restart the server at `url` if it has ended.

        Raises:
            RunFailed: it has been restarted too often.
        """
        process = next((p for p in self.processes if p.launch.url == url), None)
        if process is None or process.popen.poll() is None:
            return
        if process.restarts >= self.max_restarts:
            self.check()
        _kill_group(process.popen, signal.SIGKILL)  # its helpers may still hold memory and the port
        process.restarts += 1
        process.popen = _spawn(process.launch, process.log)
        self.say(f"the vLLM server {url} had ended; restarting it (restart {process.restarts})")

    def wait_until_ready(self, timeout_s: float) -> None:
        """Block until all servers answer, and report progress.

        Raises:
            RunFailed: a server ended, or did not answer in time.
        """
        import httpx

        key = {**os.environ, **(self.launches[0].env if self.launches else {})}.get(KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        started = last_report = time.monotonic()
        waiting = list(self.processes)
        while waiting:
            self.check()
            for process in list(waiting):
                with contextlib.suppress(httpx.TransportError):
                    url = f"{process.launch.url}/health"
                    if httpx.get(url, headers=headers, timeout=5, trust_env=False).status_code == 200:
                        waiting.remove(process)
                        seconds = time.monotonic() - started
                        self.say(f"vLLM server {process.launch.url} is ready after {seconds:.0f} s")
            now = time.monotonic()
            if waiting and now - started > timeout_s:
                process = waiting[0]
                raise RunFailed(
                    f"the vLLM server {process.launch.url} does not answer after {timeout_s:g} s "
                    f"(rollout.vllm.start_timeout_s); the end of {process.log}:\n{log_tail(process.log)}"
                )
            if waiting and now - last_report > 10:
                last_report = now
                last = log_tail(waiting[0].log, 1).strip()[-120:]
                self.say(f"waiting for {len(waiting)} vLLM server(s), {now - started:.0f} s so far: {last}")
            time.sleep(0.5 if waiting else 0)

    def close(self) -> None:
        """Terminate all servers, then kill those that do not end. Safe to call twice."""
        atexit.unregister(self.close)
        for process in self.processes:
            _kill_group(process.popen, signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.popen.wait(max(0.0, deadline - time.monotonic()))
            _kill_group(process.popen, signal.SIGKILL)
            process.popen.wait()


def log_tail(log: Path, lines: int = LOG_TAIL) -> str:
    """Return the last `lines` of a log file; "" if it cannot be read."""
    with contextlib.suppress(OSError):
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    return ""


def _spawn(launch: Launch, log: Path) -> subprocess.Popen[bytes]:
    """Start a server in its own process group, so that its helpers can be ended with it."""
    from llmrl.engines.vllm.start import LAUNCHER_VARIABLES

    inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    inherited[TRAINER] = str(os.getpid())
    command = [sys.executable, "-c", END_WITH_PARENT, str(os.getpid()), *launch.command]
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            env=inherited | launch.env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _kill_group(popen: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(popen.pid, number)
