"""The B-Coder recipe: all four steps at a small scale."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmrl.track.files import read_jsonl

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_four_steps(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "recipes/bcoder.py", "--config", "recipes/bcoder_tiny.yaml"]
    command += ["--train.output_dir", str(run), "--track.console", "quiet", "--num_samples", "4"]
    command += ["--made_up.num_tasks", "16", "--made_up.num_held_out", "4", "--made_up.num_examples", "64"]
    command += ["--made_up.max_steps", "4", "--value.max_steps", "2", "--policy.max_steps", "2"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    for _ in range(2):  # the second time everything is there
        found = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout + found.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert summary["num_tasks"] == 4 and summary["num_samples"] == 4
    assert set(summary["ranked"]) >= {"mean log-probability", "bcoder"}
    assert len(read_jsonl(run / "policy" / "metrics.jsonl")) == 2
    assert (run / "policy" / "model" / "bcoder" / "heads.safetensors").is_file()
