"""Two processes compute the whole-batch quantities of the GRPO family like one: token scores, masks, KL in reward."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

from llmrl.model.parallel import Parallel
from tests.invariance.family_worker import CASES, CRITICS, run_cases
from tests.invariance.launch import launch

SEED = os.environ.get("LLMRL_TEST_SEED", "0")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    file = tmp_path_factory.mktemp("two") / "results.pt"
    code, output = launch("family_worker.py", str(file), SEED)
    assert code == 0, output[-3000:]
    return torch.load(file, weights_only=False)


@pytest.fixture(scope="module")
def one_process() -> dict[str, dict[str, Any]]:
    return run_cases(int(SEED), Parallel.alone())


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, *CRITICS])
def test_two_processes_are_one(case: str, two_processes: dict, one_process: dict) -> None:
    ours, alone = two_processes[case], one_process[case]
    assert ours["metrics"].keys() == alone["metrics"].keys()
    for key, value in alone["metrics"].items():
        may_flip = alone["may_flip"].get(key, 0.0)  # the share of tokens at the edge of a clip
        assert ours["metrics"][key] == pytest.approx(value, abs=1e-5 + may_flip, rel=1e-4), key
    for found, expected in zip(ours["advantages"], alone["advantages"], strict=True):
        np.testing.assert_allclose(np.asarray(found, float), np.asarray(expected, float), atol=1e-5)
    for found, expected in zip(ours["scores"], alone["scores"], strict=True):
        assert found.keys() == expected.keys()
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5)
    for name, value in alone["parameters"].items():
        gap = (ours["parameters"][name] - value).abs().max().item()
        assert gap <= 2e-6, f"{name} differs by {gap:.2g}"
