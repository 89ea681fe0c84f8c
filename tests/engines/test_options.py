"""The engine's options: ranges are refused by their types, contradictions are listed by name."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from llmrl.engines.options import EngineConfig, staleness_findings
from llmrl.engines.vllm.options import VllmConfig, VllmServerConfig

SERVERS = ["http://node5:8000", "https://node6:8000"]


@pytest.mark.parametrize(
    "options",
    [
        EngineConfig(),
        EngineConfig(engine="vllm", vllm=VllmConfig(weight_transfer="ipc", enable_sleep_mode=True)),
        EngineConfig(engine="vllm_server"),
        EngineConfig(engine="vllm_server", vllm=VllmConfig(), server=VllmServerConfig(urls=SERVERS)),
    ],
)
def test_options_that_agree_have_no_findings(options: EngineConfig) -> None:
    assert options.findings() == []


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (EngineConfig(vllm=VllmConfig()), ["rollout.vllm is set, but rollout.engine hf"]),
        (EngineConfig(server=VllmServerConfig()), ["rollout.server is set, but rollout.engine hf"]),
        (EngineConfig(engine="vllm", server=VllmServerConfig()), ["rollout.server is set, but rollout.engine vllm "]),
        (
            EngineConfig(engine="vllm_server", vllm=VllmConfig(weight_transfer="ipc", enable_sleep_mode=True)),
            [
                "rollout.vllm.weight_transfer ipc is for engine vllm",
                "rollout.vllm.enable_sleep_mode is for engine vllm",
            ],
        ),
        (
            EngineConfig(engine="vllm_server", server=VllmServerConfig(urls=["a:1", "http://b", "http://b"])),
            ["rollout.server.urls: 'a:1' is not an address", "rollout.server.urls names http://b twice"],
        ),
    ],
)
def test_each_contradiction_is_named_with_its_option(options: EngineConfig, found: list[str]) -> None:
    lines = options.findings()
    assert [line[: len(start)] for line, start in zip(lines, found, strict=True)] == found


@pytest.mark.parametrize(
    ("vllm", "found"),
    [
        (None, []),
        (VllmConfig(), []),
        (VllmConfig(enable_sleep_mode=True), ["enable_sleep_mode"]),
        (VllmConfig(enable_sleep_mode=True, on_update="abort"), ["enable_sleep_mode", "on_update abort"]),
    ],
)
def test_generating_ahead_excludes_sleep_and_abort(vllm: VllmConfig | None, found: list[str]) -> None:
    options = EngineConfig(engine="vllm", vllm=vllm)
    assert staleness_findings(options, 0) == []
    lines = staleness_findings(options, 3)
    assert all("rollout.max_staleness 3" in line for line in lines)
    assert [line.split()[0] for line in lines] == [f"rollout.vllm.{name.split()[0]}" for name in found]


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (EngineConfig, "max_num_seqs", 0),
        (VllmConfig, "tensor_parallel_size", 0),
        (VllmConfig, "data_parallel_size", 0),
        (VllmConfig, "max_model_len", 0),
        (VllmConfig, "kv_cache_memory_bytes", 0),
        (VllmConfig, "gpu_memory_utilization", 1.5),
        (VllmConfig, "gpu_memory_utilization", 0.0),
        (VllmServerConfig, "num_replicas", 0),
        (VllmServerConfig, "request_timeout_s", 0.0),
        (VllmServerConfig, "health_timeout_s", 0.0),
        (VllmServerConfig, "return_timeout_s", 0.0),
    ],
)
def test_values_out_of_range_are_refused(kind: type[Any], name: str, value: float) -> None:
    with pytest.raises(ValidationError, match=name):
        kind(**{name: value})
