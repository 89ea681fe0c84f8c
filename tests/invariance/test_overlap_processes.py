"""Two processes that draw the next batch while the learner updates: same groups, same weights, no task lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from llmrl.run.checkpoint import list_checkpoints
from llmrl.run.ledger import audit
from llmrl.track.files import read_jsonl
from tests.invariance.launch import launch

WORKER = "overlap_worker.py"


@pytest.mark.slow
def test_two_processes_work_ahead_and_resume(tmp_path: Path) -> None:
    code, output = launch(WORKER, str(tmp_path), "6")
    assert code == 0, output[-3000:]
    *_, middle, last = list_checkpoints(tmp_path)
    assert json.loads((middle / "state.json").read_text())["step"] == 4, "with the batch of step 5 under way"
    shutil.rmtree(last)  # as if the run had been killed before it
    code, output = launch(WORKER, str(tmp_path), "9", "last")
    assert code == 0, output[-3000:]
    one, other = (torch.load(tmp_path / f"weights_{rank}.pt") for rank in range(2))
    assert torch.equal(one, other)
    metrics = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, 10))
    ages = [row["rollout/staleness/max"] for row in metrics]
    assert max(ages) == 1
    assert max(row["sync/max_gap"] for row in metrics) < 1e-4
    assert all(row["loss/sampler_weight"] > 0 for row in metrics), "weights are truncated by default"
    assert audit(tmp_path / "ledger.jsonl") == {"issued": 36, "trained": 36, "lost": [], "doubled": [], "exact": True}
    rollouts = [(row["step"], row["task"], row["index"]) for row in read_jsonl(tmp_path / "rollouts.jsonl")]
    assert len(rollouts) == len(set(rollouts)) == 9 * 4 * 4
