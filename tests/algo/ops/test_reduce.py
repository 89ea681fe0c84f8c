"""Aggregation: hand-computed constants; shares sum to the loss however the batch is split."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmrl.algo.ops.reduce import aggregate
from llmrl.train.packing import build_micro_batch
from llmrl.types import Counts, Sample

COUNTS = Counts(num_tokens=8, num_sequences=4, num_groups=2, max_completion_length=10)


def sample(num_tokens: int) -> Sample:
    mask = np.array([False] + [True] * num_tokens)
    zeros = np.zeros(num_tokens, np.float32)
    return Sample(
        input_ids=np.ones(num_tokens + 1, np.int64),
        loss_mask=mask,
        advantages=zeros,
        rollout_logprobs=zeros,
        group=0,
        index=0,
    )


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("dapo", (1 + 2 + 3 + 6) / 8),
        ("grpo", (1 + (2 + 3 + 6) / 3) / 4),
        ("dr_grpo", (1 + 2 + 3 + 6) / (4 * 10)),
    ],
)
def test_constants(loss_type: str, expected: float) -> None:
    batch = build_micro_batch([sample(1), sample(3)], [[0], [1]])
    total = aggregate(torch.tensor([1.0, 2.0, 3.0, 6.0]), batch, COUNTS, loss_type)  # pyright: ignore
    assert total.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_shares_add_up_for_any_split(loss_type: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 9, 12).tolist()
    samples = [sample(n) for n in lengths]
    losses = [torch.from_numpy(random.standard_normal(n)) for n in lengths]
    counts = Counts(num_tokens=sum(lengths), num_sequences=12, num_groups=3, max_completion_length=9)

    def share(chosen: list[int]) -> float:
        batch = build_micro_batch(samples, [[i] for i in chosen])
        tokens = torch.cat([losses[i] for i in chosen])
        return aggregate(tokens, batch, counts, loss_type).item()  # pyright: ignore

    order = random.permutation(12).tolist()
    whole = share(list(range(12)))
    for pieces in ([order[:1], order[1:]], [order[:5], order[5:7], order[7:]], [[i] for i in order]):
        assert sum(share(piece) for piece in pieces) == pytest.approx(whole, abs=1e-12)


def test_an_empty_micro_batch_has_a_share_of_zero() -> None:
    for loss_type in ("dapo", "grpo", "dr_grpo"):
        assert aggregate(torch.zeros(0), build_micro_batch([], []), COUNTS, loss_type).item() == 0.0  # pyright: ignore


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(ValueError, match="bnpo"):
        aggregate(torch.zeros(0), build_micro_batch([], []), COUNTS, "bnpo")  # pyright: ignore
