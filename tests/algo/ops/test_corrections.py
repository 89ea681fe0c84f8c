"""Corrections for the sampler's mismatch: constants by hand, a plain loop, and whole updates."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmrl.algo.ops.corrections import correction_weights, finish_metrics, mismatch_metrics, of_batch
from llmrl.algo.policy_gradient.options import Correction, PolicyGradient
from llmrl.config import Config, RolloutConfig, complete, findings, preset, to_dict
from llmrl.config.describe import describe
from llmrl.errors import UserError
from llmrl.train.packing import build_micro_batch
from llmrl.types import Counts
from tests.invariance.cases import (
    grpo,
    make_config,
    make_learner,
    make_ppo_learner,
    make_samples,
    scored_groups,
    tiny_model,
    train_batch,
    update_and_look,
)

KAPPA = [0.25, 2.0, 1.0, 4.0, 0.5]
"""Two sequences: [0.25, 2, 1] with product 0.5, and [4, 0.5] with product 2."""


def sampler(mode: str) -> dict[str, Any]:
    """`algo.sampler` of a mode such as token_mask, or none."""
    of, _, outside = mode.partition("_")
    return {"kind": "weights", "of": of, "outside": outside} if outside else {"kind": mode}


@pytest.mark.parametrize(
    ("mode", "bounds", "expected", "changed"),
    [
        ("token_truncate", (0.0, 2.0), [0.25, 2.0, 1.0, 2.0, 0.5], [0, 0, 0, 1, 0]),
        ("token_truncate", (0.4, 1.5), [0.4, 1.5, 1.0, 1.5, 0.5], [1, 1, 0, 1, 0]),
        ("token_mask", (0.3, 3.0), [0.0, 2.0, 1.0, 0.0, 0.5], [1, 0, 0, 1, 0]),
        ("sequence_truncate", (0.0, 1.5), [0.5, 0.5, 0.5, 1.5, 1.5], [0, 0, 0, 1, 1]),
        ("sequence_mask", (0.6, 3.0), [0.0, 0.0, 0.0, 2.0, 2.0], [1, 1, 1, 0, 0]),
    ],
)
def test_weights_by_hand(mode: str, bounds: tuple[float, float], expected: list[float], changed: list[int]) -> None:
    old = torch.tensor([-1.0, -2.0, -0.5, -3.0, -1.5], requires_grad=True)
    sampled = old.detach() - torch.tensor(KAPPA).log()
    weights, outside = correction_weights(
        old,
        sampled,
        torch.tensor([0, 0, 0, 1, 1]),
        torch.tensor([3, 2]),
        mode=mode,
        clip_min=bounds[0],
        clip_max=bounds[1],
    )
    torch.testing.assert_close(weights, torch.tensor(expected))
    assert outside.tolist() == [bool(c) for c in changed]
    assert not weights.requires_grad


def test_icepop_by_its_default_bounds() -> None:
    """Tokens with 0.5 <= kappa <= 5 are kept with the weight kappa; the others get 0."""
    kappa = torch.tensor([0.49, 0.51, 1.0, 4.9, 5.1])
    old = torch.full((5,), -1.0)
    batch = build_micro_batch(make_samples(0)[:1], [[0]])
    batch.rollout_logprobs, batch.sequence_ids = old - kappa.log(), torch.zeros(5, dtype=torch.long)
    batch.sequence_lengths = torch.tensor([5])
    counts = Counts(num_tokens=10, num_sequences=2, num_groups=1, max_completion_length=5)
    weights, metrics = of_batch("token_mask", Correction(outside="mask").bounds, old, batch, counts)
    torch.testing.assert_close(weights, torch.tensor([0.0, 0.51, 1.0, 4.9, 0.0]))
    assert metrics["loss/sampler_masked_frac"].item() == pytest.approx(0.2)
    assert metrics["loss/sampler_weight"].item() == pytest.approx(0.641)


def test_a_token_without_a_sampler_logprob_is_not_corrected() -> None:
    sampled = torch.tensor([float("nan"), -1.0])
    weights, _ = correction_weights(
        torch.tensor([-3.0, -1.0]),
        sampled,
        torch.tensor([0, 0]),
        torch.tensor([2]),
        mode="sequence_truncate",
        clip_min=0.0,
        clip_max=3.0,
    )
    assert weights.tolist() == [1.0, 1.0]


def test_mismatch_metrics_by_hand() -> None:
    kappa = torch.tensor(KAPPA)
    shares = [mismatch_metrics(part.log(), torch.zeros(len(part)), 5) for part in (kappa[:2], kappa[2:])]
    together = {key: max(s[key].item() for s in shares) if key.endswith("/max") else sum(s[key].item() for s in shares)
                for key in shares[0]}  # fmt: skip
    logs = [math.log(k) for k in KAPPA]
    assert finish_metrics(together) == pytest.approx(
        {
            "kl/mismatch": (sum(KAPPA) - 5 - sum(logs)) / 5,
            "kl/mismatch/gap": sum(map(abs, logs)) / 5,
            "kl/mismatch/max": math.log(4.0),
            "kl/mismatch/ratio/max": 4.0,
            "kl/mismatch/ess": 7.75**2 / (5 * (0.0625 + 4 + 1 + 16 + 0.25)),
        },
        rel=1e-5,
    )
    equal = mismatch_metrics(torch.zeros(4), torch.zeros(4), 4)
    assert finish_metrics({k: v.item() for k, v in equal.items()})["kl/mismatch/ess"] == 1.0


@pytest.mark.parametrize("name", ["grpo", "gspo", "gspo_token", "gmpo", "cispo", "sapo", "clip_cov", "kl_cov", "rloo"])
@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_weights_multiply_the_loss_of_every_algorithm(name: str, mode: str, seed: int) -> None:
    """With the same weight for all tokens the gradient is that of the uncorrected loss times the weight."""
    kappa = 1.01 if mode == "sequence_mask" else 1.5
    samples = [s for s in make_samples(seed) if s.advantages.any()]
    for sample in samples:
        sample.old_logprobs = sample.rollout_logprobs + np.float32(math.log(kappa))
        sample.ref_logprobs = sample.old_logprobs
    if mode == "sequence_mask":  # the product over a sequence is the same for sequences of one length
        samples = [s for s in samples if s.num_tokens == samples[0].num_tokens]
    expected = kappa ** samples[0].num_tokens if mode == "sequence_mask" else kappa
    counts = Counts(num_tokens=99, num_sequences=9, num_groups=3, max_completion_length=16)
    losses = {}
    for given in ("none", mode):
        options: dict[str, Any] = {"name": name, "sampler": sampler(given)}
        batch = build_micro_batch(samples, [[k] for k in range(len(samples))])
        learner, _ = make_learner(tiny_model(), make_config())
        loss, _ = grpo(**options).loss(learner.policy.forward(batch), batch, counts)
        loss.backward()
        losses[given] = (loss.item(), [p.grad.clone() for p in learner.parameters if p.grad is not None])
    assert losses[mode][0] == pytest.approx(expected * losses["none"][0], rel=1e-4, abs=1e-7)
    for corrected, plain in zip(losses[mode][1], losses["none"][1], strict=True):
        torch.testing.assert_close(corrected, expected * plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_a_critics_advantages_are_weighted_and_its_own_error_is_not(mode: str, seed: int) -> None:
    """A step of PPO: the policy's gradient is that of the mean of -w A log pi, w by its definition."""
    found: dict[str, Any] = {}
    for given in ("none", mode):
        options: dict[str, Any] = {"sampler": sampler(given), "num_mini_batches": 1}
        learner, algorithm = make_ppo_learner("separate", algo=options)
        groups = scored_groups(seed)
        for turn in [turn for rollout in groups[0].rollouts for turn in rollout.turns]:  # far off, beyond all bounds
            turn.rollout_logprobs = [logprob - 3.0 for logprob in turn.rollout_logprobs]
        batch = algorithm.prepare(groups, policy_version=0)
        found[given] = update_and_look(learner, algorithm, batch)
    model, total, num_tokens = tiny_model(), torch.zeros(()), 0
    low, high = {"token_truncate": (0.0, 2.0), "token_mask": (0.5, 5.0)}.get(mode, (0.0, 3.0))
    for sample in batch.samples:
        ids, mask = torch.tensor(sample.input_ids), torch.tensor(sample.loss_mask)
        rows = model(ids[None]).logits[0, :-1].log_softmax(-1)
        logprobs = rows[range(len(ids) - 1), ids[1:]][mask[1:]]
        kappa = (logprobs.detach() - torch.tensor(sample.rollout_logprobs)).exp()
        kappa = kappa.prod().expand(len(kappa)) if mode.startswith("sequence") else kappa
        weights = kappa * ((kappa >= low) & (kappa <= high)) if mode.endswith("mask") else kappa.clamp(low, high)
        total = total - (weights * torch.tensor(sample.advantages) * logprobs).sum()
        num_tokens += len(logprobs)
    (total / num_tokens).backward()
    assert any(name.startswith("critic.") for name in found[mode].gradients)
    for name, gradient in found[mode].gradients.items():
        if name.startswith("critic."):
            torch.testing.assert_close(gradient, found["none"].gradients[name], rtol=0, atol=0)
        else:
            torch.testing.assert_close(
                gradient, model.get_parameter(name.removeprefix("model.")).grad, rtol=1e-4, atol=1e-6
            )
    key = "loss/sampler_masked_frac" if mode.endswith("mask") else "loss/sampler_truncated_frac"
    assert 0 < found[mode].metrics[key] < 1


def test_a_preference_is_no_estimate_under_the_sampler_so_corrections_are_refused() -> None:
    with pytest.raises(UserError, match="algo.sampler: not read by what was chosen, but by algo.name grpo"):
        preset("online_dpo", sampler=sampler("token_mask"))


def test_without_old_logprobs_the_policy_itself_is_compared_with_the_sampler(seed: int) -> None:
    """One step per batch: the same update as with old_logprobs computed by a pass of their own."""
    updates = []
    for compute_old in (False, True):
        learner, algorithm = make_learner(
            tiny_model(), make_config(algo={"sampler": sampler("token_mask") | {"low": 0.2, "high": 9.0}})
        )
        algorithm.needs = replace(algorithm.needs, old_logprobs=compute_old)
        batch = train_batch(make_samples(seed))
        updates.append(learner.update(batch, algorithm))
        assert (batch.samples[0].old_logprobs is not None) == compute_old
    assert updates[0]["loss/sampler_masked_frac"] > 0
    for key in ("loss/sampler_masked_frac", "loss/sampler_weight", "loss/total", "policy/grad_norm"):
        assert updates[0][key] == pytest.approx(updates[1][key], rel=1e-4)


@pytest.mark.parametrize("steps", [1, 2])
def test_bypass_takes_the_samplers_for_old_and_computes_none(steps: int, seed: int, tmp_path: Path) -> None:
    learner, algorithm = make_learner(
        tiny_model(),
        make_config(tmp_path, algo={"sampler": "bypass", "num_iterations": steps, "loss": {"epsilon": 0.5}}),
    )
    learner._old_streams = None  # type: ignore[assignment] - calling it would fail
    batch = train_batch(make_samples(seed))
    learner.update(batch, algorithm)
    for sample in batch.samples:
        if sample.advantages.any():
            assert sample.old_logprobs is sample.rollout_logprobs
    # The ratio of the clipped loss is policy over sampler.
    micro_batch = build_micro_batch(batch.samples, [[0, 1, 2]])
    outputs = learner.policy.forward(micro_batch)
    counts = Counts(num_tokens=99, num_sequences=9, num_groups=3, max_completion_length=16)
    found = algorithm.loss(outputs, micro_batch, counts)[1]["loss/ratio/max"]
    expected = (outputs.logprobs - micro_batch.rollout_logprobs).max().exp()
    torch.testing.assert_close(found, expected.detach())


def test_bypass_serves_what_reads_old_logprobs_between_the_stages(seed: int, tmp_path: Path) -> None:
    algo = {"name": "clip_cov", "sampler": "bypass", "top_entropy_quantile": 0.5}
    learner, algorithm = make_learner(tiny_model(), make_config(tmp_path, algo=algo))
    metrics = learner.update(train_batch(make_samples(seed)), algorithm)
    assert math.isfinite(metrics["loss/total"])


def test_stale_rollouts_are_corrected_unless_told_otherwise() -> None:
    def completed(**algo: Any) -> PolicyGradient:
        config = complete(Config(algo=preset("grpo", **algo), rollout=RolloutConfig(max_staleness=1)))
        assert complete(config) == config and not any("algo." in line for line in findings(config))
        assert isinstance(config.algo, PolicyGradient)
        return config.algo

    weights = completed().sampler
    assert weights == Correction(of="token", outside="truncate") and weights.bounds == (0.0, 2.0)
    given = completed(sampler={"high": 1.5}).sampler
    assert isinstance(given, Correction) and given.bounds == (0.0, 1.5)
    assert to_dict(completed(sampler="none"))["sampler"] == {"kind": "none"}
    with pytest.raises(UserError, match="algo.sampler.high: not read by what was chosen, but by kind weights"):
        completed(sampler={"kind": "none", "high": 1.5})
    assert "sampler.outside mask" in describe(Config(algo=preset("grpo", sampler=sampler("token_mask"))))[0]
    assert complete(Config()).algo.sampler is None, "rollouts that are not stale are not corrected"  # pyright: ignore
