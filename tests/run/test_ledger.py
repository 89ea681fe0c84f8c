"""The ledger: what it writes, and what its audit makes of hand-made cases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmrl.run.ledger import Ledger, audit
from llmrl.types import Rollout, RolloutGroup, Score, Task


def task(name: str) -> Task:
    return Task(id=name, messages=[])


def group(name: str, *rewards: float | None, advantages: list[float] | None = None, position: int = 0) -> RolloutGroup:
    rollouts = []
    for index, reward in enumerate(rewards):
        advantage = advantages[index] if advantages else 0.0
        rollouts.append(Rollout(task=task(name), index=index, score=Score(reward=reward), advantage=advantage))
    return RolloutGroup(task=task(name), rollouts=rollouts, position=position)


def write(path: Path, *events: tuple[str, int]) -> None:
    path.write_text("".join(json.dumps({"event": kind, "position": position}) + "\n" for kind, position in events))


def test_lines(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.issued(4, 10, [task("a"), task("b")])
    failed = group("b", 1.0, None, advantages=[0.0, 0.0], position=11)
    failed.rollouts[0].score = None
    ledger.trained(4, [group("a", 1.0, 0.0, None, advantages=[1.0, -1.0, 0.0], position=10), failed])
    rows = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert rows == [
        {"event": "issued", "step": 4, "position": 10, "task": "a"},
        {"event": "issued", "step": 4, "position": 11, "task": "b"},
        {"event": "trained", "step": 4, "position": 10, "task": "a", "rollouts": 3, "scored": 2, "signal": True},
        {"event": "trained", "step": 4, "position": 11, "task": "b", "rollouts": 2, "scored": 0, "signal": False},
    ]
    assert audit(tmp_path / "ledger.jsonl")["exact"] is True


def test_token_advantages_that_are_all_zero_are_no_signal(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    quiet, loud = group("a", 1.0), group("b", 1.0)
    quiet.rollouts[0].advantage, loud.rollouts[0].advantage = [0.0, 0.0], [0.0, 0.5]
    ledger.trained(1, [quiet, loud])
    rows = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [row["signal"] for row in rows] == [False, True]


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([("issued", 0), ("issued", 1), ("trained", 1), ("trained", 0)], {"lost": [], "doubled": [], "exact": True}),
        ([("issued", 0), ("issued", 1), ("trained", 1)], {"lost": [0], "doubled": [], "exact": False}),
        ([("issued", 0), ("trained", 0), ("trained", 0)], {"lost": [], "doubled": [0], "exact": False}),
        ([("issued", 3), ("issued", 3), ("trained", 3)], {"lost": [], "doubled": [3], "exact": False}),
        ([("issued", 0), ("trained", 0), ("trained", 1)], {"lost": [], "doubled": [], "exact": False}),
        ([], {"lost": [], "doubled": [], "exact": True}),
    ],
)
def test_audit(tmp_path: Path, events: list[tuple[str, int]], expected: dict[str, object]) -> None:
    write(tmp_path / "ledger.jsonl", *events)
    counts = {kind: sum(event == kind for event, _ in events) for kind in ("issued", "trained")}
    assert audit(tmp_path / "ledger.jsonl") == counts | expected


def test_a_resumed_run_is_exact_once_its_ledger_is_cut_back(tmp_path: Path) -> None:
    """Step 2 was under way when the run was killed; the resumed run cuts the ledger to the checkpoint and redoes it."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.issued(1, 0, [task("a")])
    ledger.trained(1, [group("a", 1.0)])
    length = ledger.file.sync()
    ledger.issued(2, 1, [task("b")])
    ledger.file.close()
    assert audit(tmp_path / "ledger.jsonl")["lost"] == [1]
    resumed = Ledger(tmp_path / "ledger.jsonl")
    resumed.file.truncate(length)
    resumed.issued(2, 1, [task("b")])
    resumed.trained(2, [group("b", 0.0, position=1)])
    expected = {"issued": 2, "trained": 2, "lost": [], "doubled": [], "exact": True}
    assert audit(tmp_path / "ledger.jsonl") == expected
