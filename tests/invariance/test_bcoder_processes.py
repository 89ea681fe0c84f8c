"""B-Coder's stages on two processes end with the weights of one; the recipe around them says that it is one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.invariance.bcoder_worker import train
from tests.invariance.launch import ROOT, launch

pytestmark = pytest.mark.slow


def test_two_processes_are_one(tmp_path: Path) -> None:
    for stage in ("value", "policy"):
        code, output = launch("bcoder_worker.py", stage, str(tmp_path / "two"))
        assert code == 0, output[-3000:]
        alone, together = train(stage, tmp_path / "one"), tmp_path / "two" / stage / "model"
        for file in ("model.safetensors", "bcoder/heads.safetensors"):
            expected, found = load_file(alone / file), load_file(together / file)
            assert expected.keys() == found.keys()
            for name, tensor in expected.items():
                gap = (found[name] - tensor).abs().max().item()
                assert gap <= 2e-6, f"{stage}, {name} differs by {gap:.2g}"


def test_the_recipe_refuses_several_processes(tmp_path: Path) -> None:
    command = [sys.executable, "recipes/bcoder.py", "--config", "recipes/bcoder_tiny.yaml"]
    command += ["--train.output_dir", str(tmp_path / "run")]
    found = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"WORLD_SIZE": "2"}, capture_output=True, text=True, timeout=200
    )
    assert found.returncode == 2
    assert "runs in one process: start it with python" in found.stderr + found.stdout
    assert not (tmp_path / "run").exists()
