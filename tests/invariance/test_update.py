"""One update does not depend on how its sequences are laid out; and it is the update of a literal loop."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmrl.algo.base import Algorithm, Needs
from llmrl.errors import RunFailed
from llmrl.model.policy import Policy
from llmrl.train.learner import Learner
from llmrl.train.packing import build_micro_batch
from llmrl.train.selfcheck import check_forward
from llmrl.types import ForwardOutputs, MicroBatch, Sample
from tests.invariance.cases import (
    MAX_COMPLETION_LENGTH,
    Outcome,
    assert_same,
    make_config,
    make_learner,
    make_lora,
    make_samples,
    tiny_model,
    train_batch,
    trained_parameters,
    update_and_look,
)

pytestmark = pytest.mark.slow

ARCHS = ["qwen2", "qwen3", "llama", "gemma"]
CASES = [
    *(("qwen2", aggregation, beta) for aggregation in ("grpo", "dapo", "dr_grpo") for beta in (0.0, 0.1)),
    *((arch, *rest) for arch in ARCHS[1:] for rest in (("grpo", 0.1), ("dapo", 0.0))),
]
LAYOUTS = {
    "packed": {"packing": True},
    "one sequence at a time": {"max_tokens_per_micro_batch": 1},
    "a few at a time": {"max_tokens_per_micro_batch": 45},
}


def run(arch: str, lora: bool, algo: dict, samples: list[Sample], **train: object) -> Outcome:
    model = make_lora(tiny_model(arch)) if lora else tiny_model(arch)
    learner, algorithm = make_learner(model, make_config(algo=algo, train=train), temperature=0.9)
    return update_and_look(learner, algorithm, samples)


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize(("arch", "aggregation", "beta"), CASES)
def test_layout_changes_nothing(arch: str, aggregation: str, beta: float, lora: bool, seed: int) -> None:
    samples, algo = make_samples(seed), {"aggregation": aggregation, "kl": {"beta": beta}}
    padded = run(arch, lora, algo, samples, packing=False)
    assert padded.metrics["policy/grad_norm"] > 1e-3, "a zero gradient would agree with anything"
    for name, layout in LAYOUTS.items():
        found = run(arch, lora, algo, samples, **layout)
        try:
            assert_same(found, padded)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    shuffled = [samples[i] for i in np.random.default_rng(seed + 1).permutation(len(samples))]
    assert_same(run(arch, lora, algo, shuffled), padded)


@pytest.mark.parametrize("algo", [{}, {"kl": {"beta": 0.1}}, {"entropy_coef": 0.1}], ids=str)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(number=st.integers(0, 10**6), max_tokens=st.integers(10, 80), packing=st.booleans())
def test_nan_outside_the_mask_changes_nothing(algo: dict, number: int, max_tokens: int, packing: bool) -> None:
    """Hidden states that predict no trained token are NaN, padding holds any tokens; and where nothing but the policy
    loss reads them, streams of samples without signal are NaN."""
    outcomes = []
    for poisoned in (False, True):
        samples = make_samples(number)
        train = {"packing": packing, "max_tokens_per_micro_batch": max_tokens}
        learner, algorithm = make_learner(tiny_model(), make_config(algo=algo, train=train))
        if poisoned:
            poison(learner, number)
            for sample in samples if not algo else ():
                if not sample.advantages.any():
                    sample.rollout_logprobs = np.full_like(sample.rollout_logprobs, math.nan)
        outcomes.append(update_and_look(learner, algorithm, samples))
    assert_same(outcomes[1], outcomes[0])
    assert outcomes[1].metrics == pytest.approx(outcomes[0].metrics, rel=1e-5, abs=1e-6)


def poison(learner: Learner, number: int) -> None:
    """Replace everything in a forward pass that the loss must not see."""
    policy, generator = learner.policy, torch.Generator().manual_seed(number)
    forward, hidden_states = policy.forward, policy.module.hidden_states

    def spoilt(batch: MicroBatch, **options: Any) -> ForwardOutputs:
        noise = torch.randint(0, 61, batch.input_ids.shape, generator=generator)
        batch = replace(batch, input_ids=torch.where(batch.segment_ids == 0, noise, batch.input_ids))
        read = torch.zeros(batch.input_ids.numel(), dtype=torch.bool)
        read[batch.predict_from] = True

        def hidden(*inputs: Any) -> Tensor:
            return torch.where(read.view(*batch.input_ids.shape, 1), hidden_states(*inputs), math.nan)

        policy.module.hidden_states = hidden  # pyright: ignore
        return forward(batch, **options)

    policy.forward = spoilt  # pyright: ignore


@pytest.mark.parametrize("share_prefixes", [False, True])
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("arch", ["qwen2", "gemma2"])
def test_exact_divergence_against_dense_logits(arch: str, lora: bool, share_prefixes: bool, seed: int) -> None:
    """`algo.kl.estimator full`: the loss and its gradient from whole logits of both models, one sequence at a time."""
    samples, beta, temperature = make_samples(seed), 0.3, 0.9
    algo = {"aggregation": "dapo", "kl": {"beta": beta, "estimator": "full"}}
    train = {"share_prefixes": share_prefixes, "max_tokens_per_micro_batch": 60}
    model, reference = (tiny_model(arch) for _ in range(2))
    model, reference = (make_lora(m) if lora else m for m in (model, reference))
    learner, algorithm = make_learner(model, make_config(algo=algo, train=train), temperature=temperature)
    check_forward(learner.policy)
    assert learner.policy.can_share_prefixes
    total = torch.zeros(())
    for sample in samples:
        logprobs, everything = dense_logprobs(model, sample, temperature)
        other = dense_logprobs(reference, sample, temperature)[1].detach()
        ratio = (logprobs - logprobs.detach()).exp()
        divergence = (everything.exp() * (everything - other)).sum(-1)
        total = total + (beta * divergence - ratio * torch.from_numpy(sample.advantages)).sum()
    total = total / sum(sample.num_tokens for sample in samples)
    trained = {name: p for name, p in learner.policy.module.named_parameters() if p.requires_grad}
    expected = dict(zip(trained, torch.autograd.grad(total, list(trained.values())), strict=True))
    found = update_and_look(learner, algorithm, samples)
    assert found.metrics["loss/total"] == pytest.approx(total.item(), rel=1e-5, abs=1e-6)
    assert found.metrics["kl/ref"] > 1e-4, "a divergence of zero would agree with anything"
    for name, gradient in expected.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-4, atol=2e-6)


def dense_logprobs(model: torch.nn.Module, sample: Sample, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the trained tokens, and of the whole vocabulary in their places."""
    ids, trained = torch.from_numpy(sample.input_ids), torch.from_numpy(np.flatnonzero(sample.loss_mask))
    everything = (model(input_ids=ids[None]).logits[0].float() / temperature).log_softmax(-1)[trained - 1]
    return everything.gather(1, ids[trained][:, None])[:, 0], everything


@pytest.mark.parametrize("arch", [*ARCHS, "mistral", "gemma2"])
def test_packed_logprobs_are_each_sequences_own(arch: str, seed: int) -> None:
    """Through the plain transformers forward pass, one sequence at a time, temperature and all."""
    model, samples = tiny_model(arch), make_samples(seed)
    policy = Policy(model, temperature=0.8, keep_reference=False)
    rows = [[0, 1, 2], [3], [4, 5, 6, 7], [8]]
    batch = build_micro_batch(samples, rows)
    outputs = policy.forward(batch)
    expected, entropies = zip(*[plain_logprobs(model, sample, 0.8) for sample in samples], strict=True)
    torch.testing.assert_close(outputs.logprobs, torch.cat(expected), rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs.entropy, torch.cat(entropies), rtol=0, atol=1e-5)


def plain_logprobs(model: torch.nn.Module, sample: Sample, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies at the trained tokens of one sequence, from the model's own logits."""
    ids = torch.from_numpy(sample.input_ids)
    everything = (model(input_ids=ids[None]).logits[0].float() / temperature).log_softmax(-1)
    trained = [t for t in range(len(ids)) if sample.loss_mask[t]]
    logprobs = torch.stack([everything[t - 1, ids[t]] for t in trained])
    entropies = torch.stack([-(everything[t - 1].exp() * everything[t - 1]).sum() for t in trained])
    return logprobs, entropies


def test_samples_without_signal_are_skipped_and_change_nothing(seed: int) -> None:
    samples = make_samples(seed)
    assert sum(not sample.advantages.any() for sample in samples) == 2
    skipping = run("qwen2", False, {"aggregation": "dapo"}, samples)
    assert skipping.metrics["train/computed_frac"] == pytest.approx(7 / 9)
    learner, algorithm = make_learner(tiny_model(), make_config(algo={"aggregation": "dapo"}), temperature=0.9)
    algorithm.needs = Needs(every_sample=True)
    computing = update_and_look(learner, algorithm, samples)
    assert computing.metrics["train/computed_frac"] == 1.0
    assert_same(skipping, computing)
    without = run("qwen2", False, {"aggregation": "dapo"}, [sample for sample in samples if sample.advantages.any()])
    assert abs(without.metrics["loss/total"] - skipping.metrics["loss/total"]) > 1e-4, "they stay in the denominator"


def test_a_batch_without_any_signal_has_a_gradient_of_zero(seed: int) -> None:
    samples = make_samples(seed)
    for sample in samples:
        sample.advantages[:] = 0.0
    outcome = run("qwen2", False, {}, samples)
    assert outcome.metrics["loss/total"] == 0.0
    assert outcome.metrics["policy/grad_norm"] == 0.0
    assert all(not gradient.any() for gradient in outcome.gradients.values())


@pytest.mark.parametrize(("num_iterations", "num_mini_batches"), [(1, 2), (2, 1), (2, 3)])
@pytest.mark.parametrize(("aggregation", "beta"), [("grpo", 0.0), ("dapo", 0.1)])
def test_several_steps_per_batch_against_a_literal_loop(
    num_iterations: int, num_mini_batches: int, aggregation: str, beta: float, seed: int
) -> None:
    samples, groups = make_samples(seed, groups=5, size=2), set(range(5))
    algo = {
        "aggregation": aggregation,
        "kl": {"beta": beta},
        "num_iterations": num_iterations,
        "num_mini_batches": num_mini_batches,
        "loss": {"epsilon": 0.005},  # so small that some tokens are clipped after the first step
    }
    config = make_config(algo=algo, train={"max_grad_norm": 0.05, "weight_decay": 0.1, "warmup_steps": 2})
    learner, algorithm = make_learner(tiny_model(), config)
    reference = tiny_model()
    model = tiny_model()
    model.load_state_dict(learner.policy.module.causal_lm.state_dict())
    dealt = spy_on_mini_batches(learner)
    metrics = learner.update(train_batch(samples), algorithm)

    assert len(dealt) == num_iterations * num_mini_batches
    for start in range(0, len(dealt), num_mini_batches):
        passed = [group for mini_batch in dealt[start : start + num_mini_batches] for group in sorted(mini_batch)]
        assert sorted(passed) == sorted(groups), "every group exactly once per pass"
    if (num_iterations, num_mini_batches) != (1, 2):
        assert metrics["loss/clip_high_frac"] + metrics["loss/clip_low_frac"] > 0

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, eps=1.0, weight_decay=0.1)
    with torch.no_grad():
        old = [plain_logprobs(model, sample, 1.0)[0] for sample in samples]
        ref = [plain_logprobs(reference, sample, 1.0)[0] for sample in samples]
    for number, mini_batch in enumerate(dealt):
        chosen = [i for i, sample in enumerate(samples) if sample.group in mini_batch]
        loss = literal_loss(model, samples, chosen, old, ref, algo)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        for options in optimizer.param_groups:
            options["lr"] = 0.1 * min(1.0, (number + 1) / 2)
        optimizer.step()
    expected = dict(model.named_parameters())
    for name, parameter in learner.policy.module.causal_lm.named_parameters():
        torch.testing.assert_close(
            parameter, expected[name], rtol=0, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def spy_on_mini_batches(learner: Learner) -> list[set[int]]:
    """The groups of each mini-batch that the learner steps on, as it goes."""
    dealt: list[set[int]] = []
    step = learner._step

    def remember(samples, *rest):
        dealt.append({sample.group for sample in samples})
        return step(samples, *rest)

    learner._step = remember  # pyright: ignore
    return dealt


def literal_loss(
    model: torch.nn.Module, samples: list[Sample], chosen: list[int], old: list[Tensor], ref: list[Tensor], algo: dict
) -> Tensor:
    """GRPO's loss as it stands in the papers, one token after the other."""
    total = torch.zeros(())
    num_tokens = sum(samples[i].num_tokens for i in chosen)
    for i in chosen:
        logprobs, _ = plain_logprobs(model, samples[i], 1.0)
        for t in range(len(logprobs)):
            advantage = float(samples[i].advantages[t])
            ratio = torch.exp(logprobs[t] - old[i][t])
            clipped = torch.clamp(ratio, 1 - algo["loss"]["epsilon"], 1 + algo["loss"]["epsilon"])
            token_loss = -torch.min(ratio * advantage, clipped * advantage)
            gap = ref[i][t] - logprobs[t]
            token_loss = token_loss + algo["kl"]["beta"] * (torch.exp(gap) - gap - 1)
            if algo["aggregation"] == "dapo":
                total = total + token_loss / num_tokens
            else:
                total = total + token_loss / len(logprobs) / len(chosen)
    return total


def test_passes_are_dealt_in_fresh_orders() -> None:
    """No two passes of several batches share an order (40 groups halve in 10^11 ways)."""
    algo = {"num_iterations": 3, "num_mini_batches": 2}
    learner, algorithm = make_learner(tiny_model(), make_config(algo=algo))
    dealt = spy_on_mini_batches(learner)
    samples = make_samples(0, groups=40, size=1)
    for _ in range(2):
        learner.update(train_batch(samples), algorithm)
    orders = [tuple(sorted(mini_batch)) for mini_batch in dealt[::2]]
    assert len(orders) == 6
    assert len(set(orders)) == 6


def test_old_logprobs_are_filled_only_when_needed(seed: int) -> None:
    for algo, wanted in (({}, False), ({"num_iterations": 2}, True)):
        learner, algorithm = make_learner(tiny_model(), make_config(algo=algo))
        before = [plain_logprobs(learner.policy.module.causal_lm, s, 1.0)[0].detach() for s in make_samples(seed)]
        batch = train_batch(make_samples(seed))
        learner.update(batch, algorithm)
        for sample, expected in zip(batch.samples, before, strict=True):
            if wanted and sample.advantages.any():
                np.testing.assert_allclose(sample.old_logprobs, expected.numpy(), rtol=0, atol=1e-5)
            else:
                assert sample.old_logprobs is None


def test_metrics_against_a_literal_loop(seed: int) -> None:
    samples = make_samples(seed)
    model = tiny_model()
    logprobs, entropies = zip(*[plain_logprobs(model, s, 1.0) for s in samples if s.advantages.any()], strict=True)
    sampled = torch.cat([torch.from_numpy(s.rollout_logprobs) for s in samples if s.advantages.any()])
    learner, algorithm = make_learner(model, make_config(train={"max_tokens_per_micro_batch": 30}))
    metrics = learner.update(train_batch(samples), algorithm)
    gap = (torch.cat(logprobs) - sampled).detach()
    assert metrics["kl/mismatch"] == pytest.approx((gap.exp() - 1 - gap).mean().item(), rel=1e-4)
    assert metrics["kl/mismatch/gap"] == pytest.approx(gap.abs().mean().item(), rel=1e-4)
    assert metrics["kl/mismatch/ratio/max"] == pytest.approx(gap.max().exp().item(), rel=1e-4)
    size = gap.exp().sum().item() ** 2 / gap.exp().square().sum().item() / len(gap)
    assert metrics["kl/mismatch/ess"] == pytest.approx(size, rel=1e-4)
    assert metrics["kl/mismatch/max"] == pytest.approx(gap.abs().max().item(), rel=1e-4)
    assert metrics["policy/entropy"] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-4)
    assert metrics["loss/ratio/max"] == 1.0
    assert metrics["policy/lr"] == pytest.approx(0.1)


class InfiniteGradient(Algorithm):
    """A loss that is finite and has no finite gradient."""

    needs = Needs()

    def loss(self, outputs, batch, counts):
        zero = (outputs.logprobs - outputs.logprobs.detach()).sum()
        return torch.sqrt(zero), {}


@pytest.mark.parametrize("how", ["NaN advantage", "infinite gradient"])
def test_a_step_without_a_finite_gradient_is_skipped_and_recorded(tmp_path: Path, how: str, seed: int) -> None:
    samples = make_samples(seed)
    learner, algorithm = make_learner(tiny_model(), make_config(tmp_path, train={"max_skipped_steps": 1}))
    learner.update(train_batch(samples), algorithm)
    before = trained_parameters(learner)
    moments = {k: {n: v.clone() for n, v in s.items()} for k, s in learner.optimizer.state_dict()["state"].items()}
    bad = train_batch(samples)
    if how == "NaN advantage":
        bad.samples[0].advantages = np.full_like(bad.samples[0].advantages, math.nan)
    else:
        algorithm = InfiniteGradient()
    metrics = learner.update(bad, algorithm)

    assert metrics["policy/skipped_updates"] == 1
    assert not (math.isfinite(metrics["loss/total"]) and math.isfinite(metrics["policy/grad_norm"]))
    for name, parameter in trained_parameters(learner).items():
        assert torch.equal(parameter, before[name]), name
    for key, state in learner.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(value, moments[key][name]), "the optimizer's averages must not see it either"
    (record,) = (tmp_path / "skipped").iterdir()
    kept = torch.load(record, weights_only=False)
    assert [s.input_ids.tolist() for s in kept["samples"]] == [s.input_ids.tolist() for s in samples]
    assert kept["report"].keys() >= {"loss/total", "policy/grad_norm"}

    with pytest.raises(RunFailed, match=r"2 optimizer steps.*max_skipped_steps 1"):
        learner.update(bad, algorithm)
    for name, parameter in trained_parameters(learner).items():
        assert torch.equal(parameter, before[name]), name


def test_after_a_skipped_step_training_goes_on_as_if_it_had_not_been(tmp_path: Path, seed: int) -> None:
    samples = make_samples(seed)
    outcomes = []
    for with_bad_step in (False, True):
        learner, algorithm = make_learner(tiny_model(), make_config(tmp_path))
        learner.update(train_batch(samples), algorithm)
        if with_bad_step:
            bad = train_batch(samples)
            bad.samples[0].advantages = np.full_like(bad.samples[0].advantages, math.inf)
            learner.update(bad, algorithm)
        outcomes.append(update_and_look(learner, algorithm, samples))
    assert_same(outcomes[1], outcomes[0], tolerance=0.0)


def test_gradient_norm_is_clipped_and_the_unclipped_norm_reported(seed: int) -> None:
    samples = make_samples(seed)
    free, clipped = run("qwen2", False, {}, samples), run("qwen2", False, {}, samples, max_grad_norm=1e-3)
    assert free.metrics["policy/grad_norm"] == pytest.approx(clipped.metrics["policy/grad_norm"], rel=1e-6)
    norm = torch.stack([g.norm() for g in free.gradients.values()]).norm().item()
    assert free.metrics["policy/grad_norm"] == pytest.approx(norm, rel=1e-5)
    start = trained_parameters(make_learner(tiny_model(), make_config())[0])
    moved = {name: (p - start[name]).abs().max().item() for name, p in clipped.parameters.items()}
    assert 0 < max(moved.values()) < 0.1 * max((p - start[n]).abs().max().item() for n, p in free.parameters.items())


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_learning_rate_of_each_step(kind: str, expected: list[float], seed: int) -> None:
    train = {"lr_scheduler_type": kind, "warmup_steps": 2, "max_steps": 6, "learning_rate": 0.2}
    learner, algorithm = make_learner(tiny_model(), make_config(train=train))
    used = [learner.update(train_batch(make_samples(seed)), algorithm)["policy/lr"] for _ in range(6)]
    assert used == pytest.approx([0.2 * factor for factor in expected])


def test_dr_grpos_constant_is_the_configured_length(seed: int) -> None:
    samples = make_samples(seed)
    dapo, dr_grpo = (
        run("qwen2", False, {"aggregation": kind}, samples).metrics["loss/total"] for kind in ("dapo", "dr_grpo")
    )
    tokens = sum(sample.num_tokens for sample in samples)
    assert dr_grpo == pytest.approx(dapo * tokens / (len(samples) * MAX_COMPLETION_LENGTH), rel=1e-5)
