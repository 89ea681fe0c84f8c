"""The whole GRPO family against TRL's trainer on one frozen batch: every loss type, ratio level and way to scale
rewards.

`test_trl_grpo.py` freezes the batch and compares the first three loss types; here are the others and their options.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from trl import GRPOTrainer

from llmrl.algo.ops.advantages import group_advantages, multi_reward_advantages
from llmrl.train.packing import build_micro_batch
from tests.invariance.cases import grpo
from tests.oracle.test_trl_grpo import (
    COMPLETION,
    EPSILON,
    EPSILON_HIGH,
    Frozen,
    freeze,
    gradients,
    our_policy,
    trainer,  # noqa: F401 - the fixture
)

BOUNDS: dict[str, Any] = {"epsilon": EPSILON, "epsilon_high": EPSILON_HIGH}
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("grpo", {"aggregation": "grpo", "loss": BOUNDS}),
    "dapo": ("dapo", {"aggregation": "dapo", "loss": BOUNDS}),
    "dr_grpo": ("dr_grpo", {"aggregation": "dr_grpo", "loss": BOUNDS}),
    "luspo": ("luspo", {"aggregation": "sequence_sum", "loss": BOUNDS}),
    "bnpo": ("bnpo", {"aggregation": "dapo", "loss": BOUNDS}),
    "cispo": ("cispo", {"name": "cispo", "loss": {"max_ratio": EPSILON_HIGH}}),
    "sapo": ("sapo", {"name": "sapo"}),
    "vespo": ("vespo", {"name": "vespo"}),
}
"""By name: TRL's loss type, and the same choice here. (bnpo is dapo when there is one micro-batch.)"""


def with_ratio(algo: dict[str, Any], level: str) -> dict[str, Any]:
    return algo | {"loss": {**algo.get("loss", {}), "ratio": level}}


@pytest.fixture
def theirs(trainer: GRPOTrainer, monkeypatch: pytest.MonkeyPatch) -> GRPOTrainer:  # noqa: F811
    """TRL's trainer; what a test changes on it is undone."""
    for name in ("loss_type", "beta", "importance_sampling_level", "off_policy_mask_threshold", "top_entropy_quantile"):
        monkeypatch.setattr(trainer, name, getattr(trainer, name))
    for name in ("delta", "use_bias_correction_kl"):
        monkeypatch.setattr(trainer.args, name, getattr(trainer.args, name))
    monkeypatch.setattr(trainer, "_entropy_bonus_enabled", False)
    return trainer


def compare(theirs: GRPOTrainer, frozen: Frozen, *, tolerance: float = 1e-6, **algo: Any) -> None:
    """Loss and gradients of both, on the same batch."""
    loss = theirs._compute_loss(theirs.model, frozen.trl)
    expected, their_gradients = gradients(theirs, loss)
    algorithm = grpo(max_completion_length=COMPLETION, **algo)
    total, found = torch.zeros(()), None
    theirs.model.zero_grad()
    for rows in ([[0], [1, 2, 3]], [[4, 5]]):  # two micro-batches
        batch = build_micro_batch(frozen.samples, rows)
        loss, _ = algorithm.loss(our_policy(theirs).forward(batch), batch, frozen.counts)
        loss.backward()
        total = total + loss.detach()
    found = {name: p.grad.clone() for name, p in theirs.model.named_parameters() if p.grad is not None}
    assert abs(total.item() - expected) <= tolerance * max(1.0, abs(expected))
    assert found.keys() == their_gradients.keys()
    assert max(g.abs().max().item() for g in their_gradients.values()) > 1e-4
    for name, gradient in their_gradients.items():
        size = max(1.0, gradient.abs().max().item())
        assert (found[name] - gradient).abs().max().item() <= tolerance * size, name


@pytest.mark.parametrize("old", [False, True], ids=["on-policy", "old"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize(
    ("name", "level"),
    # VESPO's weight is that of the sequence whatever the level says: it has no such choice here.
    [(name, level) for name in LOSSES for level in ("token", "sequence") if (name, level) != ("vespo", "sequence")],
)
def test_every_loss(theirs: GRPOTrainer, name: str, level: str, beta: float, old: bool, seed: int) -> None:
    loss_type, ours = LOSSES[name]
    if name != "vespo":
        ours = with_ratio(ours, level)
    theirs.loss_type, theirs.beta, theirs.importance_sampling_level = loss_type, beta, level
    compare(theirs, freeze(seed, theirs, old=old, ref=beta > 0), **ours, kl={"beta": beta})


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_unbiased_penalty(theirs: GRPOTrainer, level: str, seed: int) -> None:
    theirs.loss_type, theirs.beta, theirs.importance_sampling_level = "dapo", 0.1, level
    theirs.args.use_bias_correction_kl = True
    options = {"aggregation": "dapo", "loss": BOUNDS, "kl": {"beta": 0.1, "bias_correction": True}}
    compare(theirs, freeze(seed, theirs, old=True, ref=True), **with_ratio(options, level))


def test_two_sided_clipping(theirs: GRPOTrainer, seed: int) -> None:
    theirs.loss_type, theirs.beta, theirs.args.delta = "grpo", 0.0, 1.5
    compare(theirs, freeze(seed, theirs, old=True, ref=False), loss={**BOUNDS, "delta": 1.5})


def test_off_policy_sequence_mask(theirs: GRPOTrainer, seed: int) -> None:
    theirs.loss_type, theirs.beta, theirs.off_policy_mask_threshold = "dapo", 0.0, 0.05
    frozen = freeze(seed, theirs, old=True, ref=False)
    sampler = frozen.trl["old_per_token_logps"] + 0.1 * torch.randn(frozen.trl["old_per_token_logps"].shape)
    frozen.trl["sampling_per_token_logps"] = sampler
    for i, sample in enumerate(frozen.samples):
        sample.rollout_logprobs = sampler[i, : sample.num_tokens].numpy()
    options = {"aggregation": "dapo", "loss": BOUNDS, "off_policy_mask_threshold": 0.05}
    compare(theirs, frozen, **options)
    batch = build_micro_batch(frozen.samples, [[0, 1, 2, 3, 4, 5]])
    algorithm = grpo(max_completion_length=COMPLETION, **options)
    dropped = algorithm.loss(our_policy(theirs).forward(batch), batch, frozen.counts)[1]["loss/off_policy_frac"]
    assert 0 <= dropped < 1


@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_high_entropy_mask(theirs: GRPOTrainer, fraction: float, seed: int) -> None:
    from llmrl.algo.ops.masks import high_entropy_mask

    frozen = freeze(seed, theirs, old=False, ref=False)
    mask = frozen.trl["completion_mask"]
    entropies = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) * 3
    expected = theirs.get_high_entropy_mask(entropies, mask, 1 - fraction)[mask.bool()]
    found = high_entropy_mask(entropies[mask.bool()], fraction)
    assert found.tolist() == expected.tolist()
    assert 0 < found.sum() < len(found)


def test_entropy_bonus(theirs: GRPOTrainer, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs.loss_type, theirs.beta, theirs._entropy_bonus_enabled = "dapo", 0.0, True
    monkeypatch.setattr(theirs, "entropy_coef", 0.3, raising=False)
    monkeypatch.setattr(theirs, "use_adaptive_entropy", False, raising=False)
    compare(theirs, freeze(seed, theirs, old=True, ref=False), aggregation="dapo", loss=BOUNDS, entropy_coef=0.3)


def rewards_with_gaps(seed: int) -> list[float | None]:
    rewards: list[float | None] = [float(x) for x in np.random.default_rng(seed).standard_normal(6)]
    rewards[1] = None
    return rewards


def their_advantages(theirs: GRPOTrainer, frozen: Frozen, functions: list, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    completions = [s.input_ids[s.loss_mask].tolist() for s in frozen.samples]
    monkeypatch.setattr(theirs, "_generate_single_turn", lambda *_args, **_kwargs: (completions, None))
    monkeypatch.setattr(theirs, "reward_funcs", functions)
    monkeypatch.setattr(theirs, "reward_processing_classes", [None] * len(functions))
    monkeypatch.setattr(theirs, "reward_func_names", [f"r{i}" for i in range(len(functions))])
    monkeypatch.setattr(theirs, "beta", 0.0)
    return theirs._generate_and_score_completions([{"prompt": "a"}] * 6)["advantages"]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_every_scale(theirs: GRPOTrainer, scale: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = rewards_with_gaps(seed)
    monkeypatch.setattr(theirs, "scale_rewards", scale)
    frozen = freeze(seed, theirs, old=False, ref=False)
    expected = their_advantages(theirs, frozen, [lambda completions, **_: rewards], monkeypatch)
    matrix = torch.tensor([np.nan if r is None else r for r in rewards]).view(-1, 3)
    found = group_advantages(matrix, scale=scale).flatten()  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_normalize_then_sum(theirs: GRPOTrainer, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(seed)
    first, second = rewards_with_gaps(seed), [float(x) for x in random.standard_normal(6)]
    weights = torch.tensor([1.0, 0.3])
    monkeypatch.setattr(theirs, "multi_objective_aggregation", "normalize_then_sum")
    monkeypatch.setattr(theirs, "reward_weights", weights)
    frozen = freeze(seed, theirs, old=False, ref=False)
    functions = [lambda completions, **_: first, lambda completions, **_: second]
    expected = their_advantages(theirs, frozen, functions, monkeypatch)
    parts = torch.tensor([[np.nan if r is None else r for r in row] for row in (first, second)]).view(2, -1, 3)
    torch.testing.assert_close(multi_reward_advantages(parts, weights).flatten(), expected, rtol=0, atol=1e-6)


def test_gspo_token_has_gspo_values_and_gradients_when_a_sequence_has_one_advantage(
    theirs: GRPOTrainer, seed: int
) -> None:
    theirs.loss_type, theirs.beta, theirs.importance_sampling_level = "grpo", 0.0, "sequence"
    frozen = freeze(seed, theirs, old=True, ref=False)
    compare(theirs, frozen, loss={**BOUNDS, "ratio": "sequence_token"})
    samples = [
        replace(s, advantages=s.advantages * np.linspace(0, 2, s.num_tokens, dtype=np.float32)) for s in frozen.samples
    ]
    batch = build_micro_batch(samples, [[0, 1, 2, 3, 4, 5]])
    losses = [
        grpo(max_completion_length=COMPLETION, loss={**BOUNDS, "ratio": level})
        .loss(our_policy(theirs).forward(batch), batch, frozen.counts)[0]
        .item()
        for level in ("sequence", "sequence_token")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6), "the value is that of GSPO for any advantages"
