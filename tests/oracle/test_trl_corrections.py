"""Corrections for the sampler's mismatch against TRL's: weights made from the same log-probabilities by TRL's own path
from completions to a training batch, then losses and gradients.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from trl import GRPOTrainer

from llmrl.algo.ops.corrections import correction_weights, mismatch_metrics
from llmrl.types import Counts, Sample
from tests.oracle.test_trl_grpo import (
    BATCH,
    COMPLETION,
    Frozen,
    freeze,
    trainer,  # noqa: F401 - the fixture
)
from tests.oracle.test_trl_grpo_family import BOUNDS, LOSSES, compare, theirs, with_ratio  # noqa: F401 - the fixture

MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


def their_batch(theirs: GRPOTrainer, seed: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Tensor]:  # noqa: F811
    """TRL's batch for random completions whose sampler is about 0.4 nats off; some tokens leave the bounds."""
    random = np.random.default_rng(seed)
    frozen = freeze(seed, theirs, old=False, ref=False)
    completions = [s.input_ids[s.loss_mask].tolist() for s in frozen.samples]
    sampled = [[0.0] * len(c) for c in completions]
    monkeypatch.setattr(theirs, "_generate_single_turn", lambda *_args, **_kwargs: (completions, sampled))
    monkeypatch.setattr(theirs, "reward_funcs", [lambda completions, **_: random.standard_normal(BATCH).tolist()])
    monkeypatch.setattr(theirs, "use_vllm", True)
    defaults = {"correction": True, "clip_min": 0.6, "clip_max": 1.5}
    for name, value in (defaults | options).items():
        monkeypatch.setattr(theirs, f"vllm_importance_sampling_{name}", value)
    first = theirs._generate_and_score_completions([{"prompt": "a"}] * BATCH)
    old = first["old_per_token_logps"]
    sampled[:] = [
        (old[i, : len(c)] + torch.from_numpy(random.normal(0, 0.4, len(c)).astype(np.float32))).tolist()
        for i, c in enumerate(completions)
    ]
    return theirs._generate_and_score_completions([{"prompt": "a"}] * BATCH)


def our_batch(batch: dict[str, Tensor]) -> Frozen:
    """TRL's batch without padding."""
    samples = []
    for i in range(BATCH):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].numpy()
        length = int(batch["completion_mask"][i].sum())
        samples.append(
            Sample(
                input_ids=np.concatenate([prompt, batch["completion_ids"][i, :length].numpy()]),
                loss_mask=np.array([False] * len(prompt) + [True] * length),
                advantages=np.full(length, batch["advantages"][i], np.float32),
                rollout_logprobs=batch["sampling_per_token_logps"][i, :length].numpy(),
                group=i // 3,
                index=i % 3,
                old_logprobs=batch["old_per_token_logps"][i, :length].numpy(),
            )
        )
    total = sum(s.num_tokens for s in samples)
    counts = Counts(num_tokens=total, num_sequences=BATCH, num_groups=2, max_completion_length=COMPLETION)
    return Frozen(batch | {"num_items_in_batch": torch.tensor(total)}, samples, counts)


@pytest.mark.parametrize("bounds", [(0.6, 1.5), (0.0, 3.0)])
@pytest.mark.parametrize("mode", MODES)
def test_weights(
    theirs: GRPOTrainer,  # noqa: F811
    mode: str,
    bounds: tuple[float, float],
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"mode": mode, "clip_min": bounds[0] or None, "clip_max": bounds[1]}
    batch = their_batch(theirs, seed, monkeypatch, **options)
    mask = batch["completion_mask"].bool()
    lengths = mask.sum(1)
    ids = torch.arange(BATCH).repeat_interleave(lengths)
    old, sampled = batch["old_per_token_logps"][mask], batch["sampling_per_token_logps"][mask]
    weights, changed = correction_weights(old, sampled, ids, lengths, mode=mode, clip_min=bounds[0], clip_max=bounds[1])
    expected = batch["importance_sampling_ratio"].expand(mask.shape)[mask]
    torch.testing.assert_close(weights, expected, rtol=0, atol=2e-6)
    if bounds[0]:
        assert 0 < changed.float().mean() < 1, "an easy case"
    gaps = mismatch_metrics(old, sampled, len(old))
    logged = theirs._metrics["train"]
    assert gaps["kl/mismatch/gap"] == pytest.approx(logged["sampling/sampling_logp_difference/mean"][-1], rel=1e-4)
    assert gaps["kl/mismatch/max"] == pytest.approx(logged["sampling/sampling_logp_difference/max"][-1], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "mode"),
    # VESPO with weights of sequences is refused by both.
    [(name, mode) for name in ("grpo", "dapo", "dr_grpo", "cispo", "sapo", "sequence ratio") for mode in MODES]
    + [("vespo", "token_truncate"), ("vespo", "token_mask")],
)
def test_losses(theirs: GRPOTrainer, name: str, mode: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    level = "token"
    if name == "sequence ratio":
        name, level = "grpo", "sequence"
    loss_type, ours = LOSSES[name]
    theirs.loss_type, theirs.beta, theirs.importance_sampling_level = loss_type, 0.0, level
    frozen = our_batch(their_batch(theirs, seed, monkeypatch, mode=mode))
    if name != "vespo":
        ours = with_ratio(ours, level)
    of, outside = mode.split("_")
    sampler = {"of": of, "outside": outside, "low": 0.6, "high": 1.5}
    tolerance = 5e-6 if name == "vespo" else 1e-6  # products over sequences round more
    compare(theirs, frozen, tolerance=tolerance, **ours, sampler=sampler)


def test_the_kl_penalty_is_not_weighted(
    theirs: GRPOTrainer,  # noqa: F811
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs.loss_type, theirs.beta, theirs.importance_sampling_level = "dapo", 0.0, "token"
    frozen = our_batch(their_batch(theirs, seed, monkeypatch, mode="token_truncate"))
    theirs.beta = 0.1
    reference = frozen.trl["old_per_token_logps"] + 0.2
    frozen.trl["ref_per_token_logps"] = reference
    for i, sample in enumerate(frozen.samples):
        sample.ref_logprobs = reference[i, : sample.num_tokens].numpy()
    sampler = {"of": "token", "outside": "truncate", "low": 0.6, "high": 1.5}
    compare(theirs, frozen, aggregation="dapo", loss=BOUNDS, kl={"beta": 0.1}, sampler=sampler)
