"""Kill -9 at random moments of a quickstart run, resume, and compare with the run that nobody disturbed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llmrl.run.ledger import audit
from llmrl.track.files import read_jsonl

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_KILLS = int(os.environ.get("LLMRL_TEST_KILLS", "4"))
"""Moments to be killed at; the more, the longer it takes."""
SETTINGS = {
    "warm_start.min_steps": 250,
    "warm_start.check_every": 250,
    "warm_start.target": 0,
    "warm_start.scratchpad_target": 0,
    "warm_start.max_steps": 260,
    "train.max_steps": 9,
    "train.save_steps": 2,
    "rollout.num_prompts": 8,
    "rollout.num_generations": 8,
}
SHORT = [text for name, value in SETTINGS.items() for text in (f"--{name}", str(value))]
NUM_STEPS, NUM_PROMPTS, GROUP = 9, 8, 8


def start(folder: Path, seed: int) -> subprocess.Popen[bytes]:
    """The quickstart with few and small steps, in a process group of its own."""
    command = [sys.executable, "recipes/quickstart.py", "--config", "recipes/quickstart.yaml", *SHORT]
    return subprocess.Popen(
        [*command, "--train.seed", str(seed), "--train.output_dir", str(folder)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output.decode()[-3000:]


def kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def metrics(folder: Path) -> list[dict[str, float]]:
    """All that does not measure the clock."""
    return [
        {key: value for key, value in row.items() if not key.startswith(("time/", "perf/"))}
        for row in read_jsonl(folder / "metrics.jsonl")
    ]


def compare(found: Path, expected: Path) -> None:
    """Weights and metrics bit for bit, and every task trained exactly once."""
    weights, expected_weights = (load_file(folder / "model" / "model.safetensors") for folder in (found, expected))
    assert weights.keys() == expected_weights.keys()
    assert all(expected_weights[name].equal(weights[name]) for name in weights)
    assert metrics(found) == metrics(expected)
    report = audit(found / "ledger.jsonl")
    assert report["exact"], report
    assert report["trained"] == NUM_STEPS * NUM_PROMPTS
    rollouts = [(row["step"], row["task"], row["index"]) for row in read_jsonl(found / "rollouts.jsonl")]
    assert len(rollouts) == len(set(rollouts)) == NUM_STEPS * NUM_PROMPTS * GROUP


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_at_random_moments_ends_with_the_same_bits(tmp_path: Path, seed: int) -> None:
    undisturbed = tmp_path / "undisturbed"
    begin = time.monotonic()
    finish(start(undisturbed, seed))
    duration = time.monotonic() - begin
    assert any(row["signal"] for row in read_jsonl(undisturbed / "ledger.jsonl") if row["event"] == "trained")
    draw = random.Random(seed)
    kills, runs = 0, 0
    disturbed = tmp_path / "disturbed-0"
    while kills < NUM_KILLS:
        process = start(disturbed, seed)
        try:
            process.wait(draw.uniform(0.1, 1.0) * duration)
        except subprocess.TimeoutExpired:
            kill(process)
            kills += 1
            continue
        finish(process)
        compare(disturbed, undisturbed)
        runs += 1
        disturbed = tmp_path / f"disturbed-{runs}"
        # The first of these runs was killed in its warm start too; the others save its time.
        shutil.copytree(undisturbed / "warm_start", disturbed / "warm_start")
    finish(start(disturbed, seed))
    compare(disturbed, undisturbed)
