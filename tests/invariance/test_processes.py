"""Two processes compute the update of one: real `accelerate launch`, gloo, hard deadlines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrl.model.parallel import Parallel
from tests.invariance.launch import launch
from tests.invariance.process_worker import CASES, STEPS, run_cases

WORKER = "process_worker.py"


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    file = tmp_path_factory.mktemp("two") / "results.pt"
    code, output = launch(WORKER, str(file), os.environ.get("LLMRL_TEST_SEED", "0"))
    assert code == 0, output[-3000:]
    return torch.load(file)


@pytest.fixture(scope="module")
def one_process() -> dict[str, list[dict[str, Any]]]:
    return run_cases(int(os.environ.get("LLMRL_TEST_SEED", "0")), Parallel.alone())


@pytest.mark.slow
@pytest.mark.parametrize("case", [name for name, case in CASES.items() if "dtype" in case])
def test_two_processes_are_one_to_rounding(case: str, two_processes: dict, one_process: dict) -> None:
    """In bfloat16 another layout of the same sequences rounds differently, by 2**-9 of each number."""
    for step in range(STEPS):
        ours, alone = two_processes[case][step], one_process[case][step]
        for key in ("loss/total", "policy/grad_norm"):
            assert ours["metrics"][key] == pytest.approx(alone["metrics"][key], rel=0.02, abs=0.01), f"{step}: {key}"
        assert ours["gradients"].keys() == alone["gradients"].keys()
        found, expected = (torch.cat([g.flatten() for g in side["gradients"].values()]) for side in (ours, alone))
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.02 * expected.norm(), f"step {step}"


@pytest.mark.slow
@pytest.mark.parametrize("case", [name for name, case in CASES.items() if "dtype" not in case])
def test_two_processes_are_one(case: str, two_processes: dict, one_process: dict) -> None:
    for step in range(STEPS):
        ours, alone = two_processes[case][step], one_process[case][step]
        assert ours["metrics"].keys() == alone["metrics"].keys()
        for key, value in alone["metrics"].items():
            may_flip = alone["may_flip"].get(key, 0.0)  # the share of tokens at the edge of a clip
            expected = pytest.approx(value, abs=1e-6 + may_flip, rel=1e-5)
            assert ours["metrics"][key] == expected, f"step {step}: {key}"
        for key in ("loss/total", "policy/grad_norm"):
            assert abs(ours["metrics"][key] - alone["metrics"][key]) <= 1e-6, f"step {step}: {key}"
        assert alone["metrics"]["policy/grad_norm"] > 1e-4
        assert ours["gradients"].keys() == alone["gradients"].keys()
        for name, gradient in alone["gradients"].items():
            gap = (ours["gradients"][name] - gradient).abs().max().item()
            assert gap <= 1e-6, f"step {step}: gradient of {name} differs by {gap:.2g}"


@pytest.mark.slow
def test_a_launch_whose_processes_do_not_know_of_each_other_is_refused(tmp_path: Path) -> None:
    """On a machine without GPUs `--multi_gpu` alone gives two processes that would each train alone."""
    if torch.cuda.is_available():
        pytest.skip("with GPUs this launch is right")
    code, output = launch(WORKER, "--refused", str(tmp_path), use_cpu=False)
    assert code != 0
    assert "the launcher started 2 processes, but each sees 1" in output
    assert "ACCELERATE_USE_CPU=true" in output
    assert "exitcode  : 2" in output or "exitcode: 2" in output
