"""What an update reports, against a literal count; and which of its options a resumed run takes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmrl.types import Sample
from tests.invariance.cases import make_config, make_learner, make_ppo_learner, make_samples, tiny_model, train_batch

LOW, HIGH, CAP, THRESHOLD, BETA = 0.02, 0.03, 1.2, 2.6, 0.05


class Watched:
    """A learner whose model is looked at before every optimizer step, with plain forward passes."""

    def __init__(self, learner: Any) -> None:
        self.learner, self.steps = learner, list[tuple[list[Sample], list[np.ndarray], list[float]]]()
        self.take_step = learner._step
        learner._step = self.look_and_step

    def look_and_step(self, samples: list[Sample], *rest: Any) -> dict[str, float]:
        pairs = [token_numbers(self.learner.policy.module.causal_lm, s) for s in samples]
        self.steps.append((samples, [p[0] for p in pairs], [e for _, entropies in pairs for e in entropies]))
        return self.take_step(samples, *rest)


@torch.no_grad()
def token_numbers(model: Any, sample: Sample) -> tuple[np.ndarray, list[float]]:
    """Return log-probabilities and entropies (if it has an advantage) at the trained tokens of one sequence."""
    ids = torch.from_numpy(sample.input_ids)
    rows = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    places = np.flatnonzero(sample.loss_mask)
    entropies = [-(rows[t - 1].exp() * rows[t - 1]).sum().item() for t in places] if sample.advantages.any() else []
    return np.array([rows[t - 1, ids[t]].item() for t in places]), entropies


def silence(samples: list[Sample], *groups: int) -> list[Sample]:
    return [replace(s, advantages=s.advantages * (s.group not in groups)) for s in samples]


@pytest.mark.parametrize("silent", [(), (2,), (1, 2)], ids=["some sequences skipped", "one group", "two groups"])
def test_metrics_of_two_passes_over_mini_batches(silent: tuple[int, ...], seed: int) -> None:
    """Means over the computed tokens of each step, then over the steps that computed any; maxima stay maxima."""
    algo = {
        "loss": {"epsilon": LOW, "epsilon_high": HIGH},
        "sampler": {"of": "token", "outside": "truncate", "high": CAP},
        "off_policy_mask_threshold": THRESHOLD,
        "num_mini_batches": 3 if silent else 2,
        "num_iterations": 2,
    }
    learner, algorithm = make_learner(tiny_model(), make_config(algo=algo, train={"max_tokens_per_micro_batch": 40}))
    watched = Watched(learner)
    samples = silence(make_samples(seed), *silent)
    batch = train_batch(samples)
    metrics = learner.update(batch, algorithm)
    expected: dict[str, list[float]] = {}
    for part, logprobs, entropies in watched.steps:
        rows = [(s, now) for s, now in zip(part, logprobs, strict=True) if s.advantages.any()]
        if not rows:
            continue
        ratio = np.concatenate([np.exp(now - s.old_logprobs) for s, now in rows])
        kappa = np.concatenate([np.exp(s.old_logprobs - s.rollout_logprobs) for s, _ in rows])
        sign = np.concatenate([s.advantages for s, _ in rows])
        far = [s.advantages[0] < 0 and (s.rollout_logprobs - now).mean() > THRESHOLD for s, now in rows]
        for key, value in {
            "loss/ratio/max": ratio.max(),
            "loss/clip_low_frac": ((ratio < 1 - LOW) & (sign < 0)).mean(),
            "loss/clip_high_frac": ((ratio > 1 + HIGH) & (sign > 0)).mean(),
            "loss/sampler_weight": np.minimum(kappa, CAP).mean(),
            "loss/sampler_truncated_frac": (kappa > CAP).mean(),
            "loss/off_policy_frac": np.repeat(far, [s.num_tokens for s, _ in rows]).mean(),
            "policy/entropy": np.mean(entropies),
        }.items():
            expected.setdefault(key, []).append(float(value))
    assert len(watched.steps) == 2 * algo["num_mini_batches"]
    assert len(expected["policy/entropy"]) == len(watched.steps) - 2 * len(silent)
    for key, values in expected.items():
        combined = max(values) if key.endswith("/max") else np.mean(values)
        assert metrics[key] == pytest.approx(combined, rel=1e-4, abs=1e-6), key
    assert metrics["loss/clip_low_frac"] + metrics["loss/clip_high_frac"] > 0, "an easy case"
    assert 0 < metrics["loss/sampler_truncated_frac"] < 1, "an easy case"
    computed = [s for s in batch.samples if s.advantages.any()]
    gap = np.concatenate([s.old_logprobs - s.rollout_logprobs for s in computed])  # pyright: ignore
    assert metrics["kl/mismatch"] == pytest.approx((np.exp(gap) - 1 - gap).mean(), rel=1e-4)
    assert metrics["kl/mismatch/max"] == pytest.approx(np.abs(gap).max(), rel=1e-4)
    assert metrics["train/computed_frac"] == pytest.approx(len(computed) / len(samples))


def test_weights_of_one_are_one_on_average(seed: int) -> None:
    """Skipped sequences have no weight, so they are not counted as weights of 0."""
    learner, algorithm = make_learner(tiny_model(), make_config(algo={"sampler": {"of": "token"}}))
    samples = make_samples(seed)
    for s in samples:
        s.rollout_logprobs = token_numbers(learner.policy.module.causal_lm, s)[0].astype(np.float32)
    metrics = learner.update(train_batch(samples), algorithm)
    assert metrics["train/computed_frac"] < 1
    assert metrics["loss/sampler_weight"] == pytest.approx(1, abs=1e-4)


def test_a_step_that_computes_nothing_reports_nothing(seed: int) -> None:
    learner, algorithm = make_learner(
        tiny_model(), make_config(algo={"num_mini_batches": 3, "sampler": {"of": "token"}})
    )
    metrics = learner.update(train_batch(silence(make_samples(seed), 0, 1, 2)), algorithm)
    known = {"loss/total": 0.0, "policy/grad_norm": 0.0, "policy/lr": 0.1, "policy/skipped_updates": 0}
    assert metrics == pytest.approx(known | {"train/computed_frac": 0.0})


@pytest.mark.parametrize("estimator", ["k3", "full"])
def test_the_divergence_is_a_mean_over_all_tokens(estimator: str, seed: int) -> None:
    """A penalty gives every sequence a gradient, so none is skipped."""
    algo = {"kl": {"beta": BETA, "estimator": estimator}}
    learner, algorithm = make_learner(tiny_model(), make_config(algo=algo))
    samples, reference = make_samples(seed), learner.policy._reference
    assert reference is not None
    gaps, exact = list[float](), list[float]()
    for s in samples:
        ids, places = torch.from_numpy(s.input_ids), np.flatnonzero(s.loss_mask) - 1
        with torch.no_grad():
            ours, theirs = (
                m(input_ids=ids[None]).logits[0].log_softmax(-1)[places]  # pyright: ignore
                for m in (learner.policy.module.causal_lm, reference.causal_lm)
            )
        exact += (ours.exp() * (ours - theirs)).sum(-1).tolist()
        gaps += (ours - theirs).gather(1, ids[places + 1, None])[:, 0].tolist()
    metrics = learner.update(train_batch(samples), algorithm)
    k3 = np.mean([math.exp(-d) - 1 + d for d in gaps])
    assert metrics["kl/ref"] == pytest.approx(k3 if estimator == "k3" else np.mean(exact), rel=1e-3)


@pytest.mark.parametrize("critic", [False, True])
def test_a_resumed_run_takes_the_options_it_was_given(critic: bool, seed: int, tmp_path: Path) -> None:
    """The step after resuming is AdamW's with the new options on the old moments."""

    def make(**train: Any) -> Any:
        if critic:
            return make_ppo_learner("separate", algo={"num_mini_batches": 1}, train=train)[0]
        return make_learner(tiny_model(), make_config(train=train))[0]

    new = {"learning_rate": 0.03, "adam_beta1": 0.5, "adam_beta2": 0.7, "adam_epsilon": 0.02, "weight_decay": 0.1}
    first, second = make(), make(**new)
    plain = torch.optim.AdamW([torch.nn.Parameter(p.detach().clone()) for p in first.parameters], lr=1.0)
    generator = torch.Generator().manual_seed(seed)
    gradients = [[torch.randn(p.shape, generator=generator) for p in first.parameters] for _ in range(2)]
    given = [{"lr": 0.1, "betas": (0.9, 0.999), "eps": 1.0, "weight_decay": 0.0}]
    given += [{"lr": 0.03, "betas": (0.5, 0.7), "eps": 0.02, "weight_decay": 0.1}]
    for learner, step, options in zip((first, second), gradients, given, strict=True):
        if learner is second:
            second.policy.load_trained_parameters(first.policy.trained_parameters())
            torch.save(first.state_dict(), tmp_path / "learner.pt")
            second.load_state_dict(torch.load(tmp_path / "learner.pt", weights_only=True))
        for parameter, twin, gradient in zip(learner.parameters, plain.param_groups[0]["params"], step, strict=True):
            parameter.grad, twin.grad = gradient.clone(), gradient.clone()
        for group, rate in zip(learner.optimizer.param_groups, learner.learning_rates, strict=True):
            group["lr"] = rate if not critic else options["lr"]
        plain.param_groups[0].update(options)
        learner.optimizer.step()
        plain.step()
    for found, expected in zip(second.parameters, plain.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
