"""Kill -9 at random moments of a quickstart run, resume, and compare with an undisturbed run."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from llmrl.run.ledger import audit
from llmrl.track.files import read_jsonl

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_KILLS = int(os.environ.get("LLMRL_TEST_KILLS", "4"))
"""How often a run is killed; the test takes longer with more."""
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
    """Start the quickstart with few and small steps, in its own process group."""
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
    try:
        output, _ = process.communicate()
    except BaseException:  # pytest's time limit: leave no process behind
        kill(process)
        raise
    assert process.returncode == 0, output.decode()[-3000:]


def children_cpu_seconds() -> float:
    """Return the CPU time of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def reaches(process: subprocess.Popen[bytes], cpu_seconds: float) -> bool:
    """Wait until the process has used this much CPU time; return False if it exits before.

    Moments are counted in CPU time, so that they fall into the same parts of a run however busy the machine is.
    """
    while process.poll() is None:
        try:
            times = psutil.Process(process.pid).cpu_times()
        except psutil.NoSuchProcess:
            return False
        if times.user + times.system >= cpu_seconds:
            return True
        time.sleep(0.02)
    return False


def metrics(folder: Path) -> list[dict[str, float]]:
    """Return all metrics except those that measure time."""
    return [
        {key: value for key, value in row.items() if not key.startswith(("time/", "perf/"))}
        for row in read_jsonl(folder / "metrics.jsonl")
    ]


def compare(found: Path, expected: Path) -> None:
    """Compare weights and metrics bit for bit, and check that every task was trained exactly once."""
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
    begin = children_cpu_seconds()
    finish(start(undisturbed, seed))
    duration = children_cpu_seconds() - begin
    assert any(row["signal"] for row in read_jsonl(undisturbed / "ledger.jsonl") if row["event"] == "trained")
    draw = random.Random(seed)
    kills, runs = 0, 0
    disturbed = tmp_path / "disturbed-0"
    while kills < NUM_KILLS:
        process = start(disturbed, seed)
        if reaches(process, draw.uniform(0.1, 1.0) * duration):
            kill(process)
            kills += 1
            continue
        finish(process)
        compare(disturbed, undisturbed)
        runs += 1
        disturbed = tmp_path / f"disturbed-{runs}"
        # Only the first of these runs is also killed in its warm start; the others skip it to save time.
        shutil.copytree(undisturbed / "warm_start", disturbed / "warm_start")
    finish(start(disturbed, seed))
    compare(disturbed, undisturbed)
