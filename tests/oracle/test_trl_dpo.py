"""The DPO family against TRL's trainers on one frozen batch: every loss and option, value and gradient.

TRL sees padded rows, chosen above rejected; this project sees the same token ids packed, prompts shared, in several
micro-batches.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from llmrl.algo.preference import options
from llmrl.algo.preference.dpo import DPO
from llmrl.algo.preference.kto import KTO
from llmrl.algo.preference.pairs import count_pairs
from llmrl.model.policy import Policy
from llmrl.tiny import build_tiny_model, byte_tokenizer
from llmrl.train.packing import build_micro_batch
from llmrl.train.prefixes import Tree
from llmrl.types import Counts, MicroBatch, RolloutGroup, Sample
from tests.algo.preference.preference_cases import dataset_group

pytestmark = pytest.mark.slow

PAIRS = 5
TOLERANCE = 1e-5
TRL_LOSSES = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
OF_DIFFERENCE = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"]


def perturbed(model: torch.nn.Module, seed: int, size: float) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    return model


def tiny(seed: int) -> Any:
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48}
    model = build_tiny_model("qwen2", vocab_size=len(tokenizer), **sizes, eos_token_id=257, pad_token_id=256)
    model = perturbed(model, 1, 0.1)
    return perturbed(model, 2, 0.02) if seed else model


def arguments(kind: Any, folder: Any, **more: Any) -> Any:
    return kind(
        output_dir=str(folder),
        bf16=False,
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=False,
        per_device_train_batch_size=PAIRS,
        **more,
    )


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    rows = [{"prompt": "Say", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(PAIRS)]
    built = DPOTrainer(
        model=tiny(0),
        ref_model=tiny(1),
        args=arguments(DPOConfig, tmp_path_factory.mktemp("dpo"), use_weighting=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=byte_tokenizer(),
    )
    built.model.train()
    return built


def rows_of(seed: int) -> list[dict[str, list[int]]]:
    """Random ids of different lengths; in the first row chosen and rejected begin with the same ids."""
    random = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[int]:
        return random.integers(0, 256, random.integers(low, high)).tolist()

    rows = [{"prompt_ids": ids(1, 8), "chosen_ids": ids(1, 12), "rejected_ids": ids(1, 12)} for _ in range(PAIRS)]
    rows[0]["rejected_ids"] = rows[0]["chosen_ids"][:2] + rows[0]["rejected_ids"]
    return rows


def groups_of(rows: list[dict[str, list[int]]]) -> list[RolloutGroup]:
    return [
        dataset_group(str(i), row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]], [1.0, 0.0])
        for i, row in enumerate(rows)
    ]


def micro_batches(samples: list[Sample]) -> list[MicroBatch]:
    """Two micro-batches; each pair is in one row behind one copy of its prompt."""
    by_group: dict[int, list[int]] = {}
    for i, sample in enumerate(samples):
        by_group.setdefault(sample.group, []).append(i)
    trees = []
    for members in by_group.values():
        prefix = int(np.argmax(samples[members[0]].loss_mask)) if len(members) > 1 else 0
        length = prefix + sum(len(samples[i].input_ids) - prefix for i in members)
        trees.append(Tree(samples=tuple(members), prefix=prefix, length=length))
    places = list(range(len(trees)))
    return [build_micro_batch(samples, [[i] for i in part], trees=trees) for part in (places[:2], places[2:])]


def counts_of(samples: list[Sample]) -> Counts:
    pairs, tokens = count_pairs(samples)
    total = sum(s.num_tokens for s in samples)
    return Counts(
        num_tokens=total,
        num_sequences=len(samples),
        num_groups=PAIRS,
        max_completion_length=1,
        num_pairs=max(1, pairs),
        num_preferred_tokens=max(1, tokens),
    )


def fill(samples: list[Sample], theirs: Any, algorithm: Any) -> None:
    """Set what the learner computes before the loss."""
    now, ref = (Policy(model, temperature=1.0, keep_reference=False) for model in (theirs.model, theirs.ref_model))
    for i, sample in enumerate(samples):
        batch = build_micro_batch(samples, [[i]])
        with torch.no_grad():
            if algorithm.needs.ref_logprobs:
                sample.ref_logprobs = ref.forward(batch).logprobs.numpy()
            sample.old_logprobs = now.forward(batch).logprobs.numpy()
            sample.extras["collisions"] = now.collisions(batch).numpy()
    if algorithm.needs.old_logprobs is False and not any(s.probe for s in samples):
        for sample in samples:
            sample.old_logprobs = None


def our_gradients(algorithm: Any, groups: list[RolloutGroup], theirs: Any) -> tuple[float, dict[str, Tensor], dict]:
    batch = algorithm.prepare(groups, policy_version=0)
    fill(batch.samples, theirs, algorithm)
    if algorithm.needs.refine:
        algorithm.refine(batch)
    counts = counts_of(batch.samples)
    policy = Policy(theirs.model, temperature=1.0, keep_reference=False)
    theirs.model.zero_grad()
    total, metrics = 0.0, {}
    for micro_batch in micro_batches(batch.samples):
        loss, found = algorithm.loss(policy.forward(micro_batch), micro_batch, counts)
        loss.backward()
        total += loss.item()
        for key, value in found.items():
            metrics[key] = metrics.get(key, 0.0) + value.item()
    return total, gradients(theirs.model), metrics


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(theirs: Any, groups: list[RolloutGroup], inputs: dict[str, Any], algorithm: Any) -> dict[str, float]:
    theirs.model.zero_grad()
    loss = theirs._compute_loss(theirs.model, inputs, False)
    loss.backward()
    expected = gradients(theirs.model)
    ours, found, metrics = our_gradients(algorithm, groups, theirs)
    assert abs(ours - loss.item()) <= TOLERANCE * max(1.0, abs(loss.item()))
    assert found.keys() == expected.keys()
    largest = max(g.abs().max().item() for g in expected.values())
    assert largest > 1e-4, "an easy case: no gradient"
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max().item() <= TOLERANCE * max(1.0, largest), name
    return metrics


def check(theirs: Any, seed: int, monkeypatch: pytest.MonkeyPatch, **given: Any) -> dict[str, float]:
    config = options.DPO(**given)
    assert not config.findings()
    changes = {
        "loss_types": [term.kind for term in config.terms],
        "loss_weights": [term.weight for term in config.terms],
        "beta": next((term.beta for term in config.terms if hasattr(term, "beta")), 0.1),
        "label_smoothing": max(getattr(term, "label_smoothing", 0.0) for term in config.terms),
        "f_divergence_type": config.divergence.kind,
        "f_alpha_divergence_coef": getattr(config.divergence, "coef", 0.5),
        "ld_alpha": config.ld_alpha,
        "use_weighting": config.use_weighting,
    }
    for name, value in changes.items():
        monkeypatch.setattr(theirs, name, value)
    rows = rows_of(seed)
    return compare(theirs, groups_of(rows), theirs.data_collator(rows), DPO(config))


def loss_of(kind: str, **given: Any) -> dict[str, Any]:
    smoothing = {"label_smoothing": 0.1} if kind in ("exo_pair", "robust") else {}
    return {"kind": kind, **smoothing, **given}


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("loss", TRL_LOSSES)
def test_every_loss(trainer: Any, loss: str, beta: float, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(trainer, seed, monkeypatch, loss=loss_of(loss) if loss == "sft" else loss_of(loss, beta=beta))


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired"])
def test_smoothed_sorted_losses(trainer: Any, loss: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(trainer, seed, monkeypatch, loss=loss_of(loss, label_smoothing=0.2))


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("loss", OF_DIFFERENCE)
def test_divergences(trainer: Any, loss: str, divergence: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(trainer, seed, monkeypatch, loss=loss_of(loss), divergence={"kind": divergence})


def test_alpha_divergence_at_one_is_the_reverse_kl(trainer: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(trainer, seed, monkeypatch, divergence={"kind": "alpha_divergence", "coef": 1.0})


@pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "apo_down"])
def test_length_desensitised(
    trainer: Any, loss: str, ld_alpha: float, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(trainer, seed, monkeypatch, loss=loss_of(loss), ld_alpha=ld_alpha)


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "nca_pair"])  # TRL cannot differentiate a weighted hinge
def test_weighted_by_the_policy(trainer: Any, loss: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(trainer, seed, monkeypatch, loss=loss_of(loss), use_weighting=True)


def test_a_weighted_sum(trainer: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """MPO's sum; the reported metrics equal TRL's."""
    trainer._metrics["train"].clear()
    terms = [{"kind": "sigmoid", "weight": 0.8}, {"kind": "bco_pair", "weight": 0.2}, {"kind": "sft"}]
    found = check(trainer, seed, monkeypatch, loss={"kind": "sum", "terms": terms})
    reported = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    pairs = {"accuracy": "accuracies", "margin": "margins", "chosen_reward": "chosen", "rejected_reward": "rejected"}
    for ours, theirs in pairs.items():
        assert found[f"preference/{ours}"] == pytest.approx(reported[f"rewards/{theirs}"], abs=TOLERANCE)


# --- losses of TRL's other trainers -----------------------------------------------------------------------------------


def logps(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return -3 * torch.rand(7, generator=generator) - 0.01, -3 * torch.rand(7, generator=generator) - 0.01


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo(smoothing: float, seed: int) -> None:
    from trl.experimental.cpo import CPOTrainer

    from llmrl.algo.ops.preference_losses import simpo_loss

    made = SimpleNamespace(
        alpha=0.0, beta=2.0, simpo_gamma=0.6, loss_type="simpo", label_smoothing=smoothing,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    chosen, rejected = logps(seed)
    expected, *_ = CPOTrainer.cpo_loss(made, chosen, rejected)
    found = simpo_loss(chosen, rejected, beta=2.0, gamma=0.6, label_smoothing=smoothing)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_orpo(seed: int) -> None:
    from trl.experimental.orpo import ORPOTrainer

    from llmrl.algo.ops.preference_losses import odds_ratio_loss

    made = SimpleNamespace(beta=1.0, accelerator=SimpleNamespace(device="cpu"))
    chosen, rejected = (x.requires_grad_() for x in logps(seed))
    expected = -ORPOTrainer.odds_ratio_loss(made, chosen, rejected)[0]
    found = odds_ratio_loss(chosen, rejected)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for ours, theirs in zip(
        *(torch.autograd.grad(x.sum(), (chosen, rejected)) for x in (found, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def kto_trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    rows = [{"prompt": "Say", "completion": f" {i}", "label": i % 2 == 0} for i in range(PAIRS)]
    built = KTOTrainer(
        model=tiny(0),
        ref_model=tiny(1),
        args=arguments(KTOConfig, tmp_path_factory.mktemp("kto")),
        train_dataset=Dataset.from_list(rows),
        processing_class=byte_tokenizer(),
    )
    built.model.train()
    return built


@pytest.mark.parametrize("towards", [1.0, -1.0], ids=["kl above 0", "kl at 0"])
@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_single_completions(
    kto_trainer: Any, loss: str, towards: float, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL takes the whole batch as one micro-batch; we take two."""
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.7}
    rows = [
        {"prompt_ids": row["prompt_ids"], "completion_ids": row["chosen_ids"], "label": i % 2 == 0}
        for i, row in enumerate(rows_of(seed))
    ]
    before = [rows[-1], *rows[:-1]]
    for row, other in zip(rows, before, strict=True):
        row["KL_completion_ids"] = other["completion_ids"]
    if towards < 0:  # swapping the two models changes the sign of the estimate
        monkeypatch.setattr(kto_trainer, "ref_model", kto_trainer.model)
        monkeypatch.setattr(kto_trainer, "model", kto_trainer.ref_model)
    changes = {"loss_type": loss, "calculate_KL": loss == "kto", "beta": 0.3, **weights}
    for name, value in changes.items():
        monkeypatch.setattr(kto_trainer, name, value)
    groups = [
        dataset_group(str(i), row["prompt_ids"], [row["completion_ids"]], [float(row["label"])])
        for i, row in enumerate(rows)
    ]
    config = options.KTO(**{"loss": {"kind": loss, "beta": 0.3, **weights}})
    inputs = kto_trainer.data_collator(rows)
    compare(kto_trainer, groups, inputs, KTO(config))
