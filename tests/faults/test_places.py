"""Kill -9 wherever a run changes its files: resumed, it ends like an undisturbed one, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_PLACES = int(os.environ.get("LLMRL_TEST_PLACES", "40"))
"""Of about 120, evenly spread; the test takes longer with more."""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_at_any_place_ends_with_the_same_bits_and_files(tmp_path: Path, seed: int) -> None:
    script = REPOSITORY / "tests" / "faults" / "places.py"
    alone = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(REPOSITORY)}
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(seed), str(NUM_PLACES)],
        env=os.environ | alone,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    assert found["wrong"] == {}
    assert found["places"] > 100 and found["kills"] >= 0.9 * min(NUM_PLACES, found["places"])
    kinds = "append ledger, append rollouts, replace_text config.yaml, save_file, save learner.pt, rename, _evaluate"
    for kind in [*kinds.split(", "), "update", "rmtree .deleting", "rmtree .writing-model", "best.json", "SHA256SUMS"]:
        assert any(kind in name for name in found["names"]), kind
