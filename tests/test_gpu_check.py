"""scripts/gpu_check: its arithmetic, what it does with failures and with time, and the whole of it at tiny shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "scripts"))

from benchmarks import gpu  # noqa: E402
from benchmarks.gpu_work import TINY, NotMeasured, Shape  # noqa: E402


def test_operations_of_a_small_shape_by_hand() -> None:
    shape = Shape(
        name="", hidden=8, intermediate=16, layers=2, heads=2, kv_heads=1, vocabulary=100, num_prompts=3,
        num_generations=2, prompt_length=4, completion_length=6,
    )  # fmt: skip
    per_layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16  # queries, keys and values, outputs, MLP
    tokens, trained = 3 * (4 + 2 * 6), 3 * 2 * 6
    seen = 3 * 4 * (4 / 2) + trained * (4 + 6 / 2)
    forward = 2 * 2 * per_layer * tokens + 2 * 100 * 8 * trained + 4 * 2 * 8 * seen
    assert shape.operations() == pytest.approx(3 * forward)
    samples = shape.samples()
    assert len(samples) == 6 and sum(sample.num_tokens for sample in samples) == trained
    model = TINY.model(dtype=torch.float32, device=torch.device("cpu"))
    layers = sum(p.numel() for name, p in model.named_parameters() if "_proj.weight" in name)
    attention = 2 * TINY.hidden**2 * (1 + TINY.kv_heads / TINY.heads)
    assert layers == TINY.layers * (attention + 3 * TINY.hidden * TINY.intermediate)


def test_failures_are_rows_and_late_work_is_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    report = gpu.Report(torch.device("cpu"))

    def broken() -> dict[str, object]:
        raise ValueError("two\nlines")

    def missing() -> dict[str, object]:
        raise NotMeasured("no such thing here")

    report.run("good", lambda: {"ok": True})
    report.run("broken", broken)
    report.run("missing", missing)
    report.run("late", lambda: {"ok": False}, seconds=gpu.TIME_LIMIT_S + 1)
    assert [row.get("ok") for row in report.rows] == [True, False, None, None]
    assert report.table().splitlines()[2:] == [
        "| good | pass |  |  |  |  |  |",
        "| broken | FAIL |  |  |  |  | ValueError: two lines |",
        "| missing |  |  |  |  |  | no such thing here |",
        "| late |  |  |  |  |  | skipped: no time left |",
    ]


@pytest.mark.slow
def test_all_of_it_at_tiny_shapes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts" / "gpu_check"), "--tiny"],
        env=os.environ | {"OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = {row["name"]: row for row in json.loads((tmp_path / "gpu_check.json").read_text())["rows"]}
    for name in ("output head in bfloat16", "layouts, sdpa", "weight sync and its proof"):
        assert rows[name]["ok"] is True
    for name in ("update tiny", "update tiny, LoRA", "update tiny, TRL", "generation tiny, hf engine"):
        assert rows[name]["ms"] > 0
    assert "a dropped push was noticed" in done.stdout and "| update tiny |" in done.stdout
