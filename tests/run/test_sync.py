"""Weight sync: every way an engine can serve the wrong weights is caught and named."""

from __future__ import annotations

import asyncio
import math

import pytest
import torch

from llmrl.engines.base import FakeEngine
from llmrl.errors import RunFailed
from llmrl.model.policy import Policy
from llmrl.noise import Limit
from llmrl.run.sync import WeightSync
from llmrl.types import Adapter, WeightSource
from tests.invariance.cases import VOCABULARY, make_lora, move, tiny_model


class ServingEngine(FakeEngine):
    """Serves a model of its own, loaded from what is pushed; `fault` says what goes wrong."""

    def __init__(self) -> None:
        super().__init__(lambda prompt_ids, sampling: [])
        self.model = tiny_model()
        self.fault = ""
        self.queued: dict[str, torch.Tensor] = self.take(lambda: self.model.state_dict().items())

    @staticmethod
    def take(source: WeightSource) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in source()}

    async def load_weights(self, source: WeightSource, *, version: int) -> None:
        await super().load_weights(source, version=version)
        weights = self.take(source)
        if self.fault == "one version behind":
            weights, self.queued = self.queued, weights
        else:
            self.queued = weights
        if self.fault == "half of the weights":
            weights = dict(list(weights.items())[: len(weights) // 2])
        if self.fault == "scrambled":
            weights = {name: tensor.flip(0) for name, tensor in weights.items()}
        if self.fault != "drops the push":
            self.model.load_state_dict(weights, strict=False)
        if self.fault == "NaN":
            next(self.model.parameters()).data.fill_(math.nan)

    async def differing(self, sent: WeightSource | Adapter) -> list[str]:
        assert not isinstance(sent, Adapter)
        held = self.model.state_dict()
        return [name for name, tensor in sent() if not torch.equal(tensor.to(held[name]), held[name])]

    async def logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        return Policy(self.model, temperature=1.0, keep_reference=False).sequence_logprobs(sequences)


def started(lora: bool = False) -> tuple[Policy, ServingEngine, WeightSync]:
    """A policy, its engine, and two good pushes behind them."""
    policy = Policy(make_lora(tiny_model()) if lora else tiny_model(), temperature=1.0, keep_reference=False)
    engine = ServingEngine()
    sync = WeightSync(policy, engine)
    for version in (0, 1):
        change(policy, seed=version)
        asyncio.run(sync.push(version))
    return policy, engine, sync


def change(policy: Policy, *, seed: int = 7) -> None:
    """Move what is trained."""
    if policy.has_adapters:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in policy.module.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    else:
        move(policy.module, seed=seed)


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_a_good_push_has_a_receipt(lora: bool) -> None:
    policy, engine, sync = started(lora)
    change(policy)
    receipt = asyncio.run(sync.push(2))
    assert receipt.version == engine.version == 2
    assert receipt.max_gap < 1e-4
    assert receipt.change > 0.01
    assert receipt.seconds > 0
    assert asyncio.run(sync.push(3)).change == 0.0, "nothing was trained in between"


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize(
    ("fault", "explanation"),
    [
        ("drops the push", r"version 2 .* match version 1 to .*: the push did not arrive"),
        ("one version behind", r"version 2 .* match version 1 to .*: the push did not arrive"),
        ("NaN", r"version 2 .* the engine computes NaN or infinity"),
        ("half of the weights", r"version 2 .* match no earlier version"),
        ("scrambled", r"version 2 .* match no earlier version"),
    ],
)
def test_every_fault_is_named(fault: str, explanation: str, lora: bool) -> None:
    policy, engine, sync = started(lora)
    change(policy)
    engine.fault = fault
    with pytest.raises(RunFailed, match=explanation):
        asyncio.run(sync.push(2))


def test_garbage_is_caught_at_the_very_first_push() -> None:
    policy = Policy(tiny_model(), temperature=1.0, keep_reference=False)
    sync = WeightSync(policy, FakeEngine(lambda prompt_ids, sampling: [], logprob=-1.0))
    with pytest.raises(RunFailed, match="match no earlier version"):
        asyncio.run(sync.push(0))


def test_the_limit_is_that_of_the_engines_type() -> None:
    policy, engine = Policy(tiny_model(), temperature=1.0, keep_reference=False), ServingEngine()
    engine.model.bfloat16()
    with pytest.raises(RunFailed, match=r"off the learner's by .* \(rounding explains \d"):
        asyncio.run(WeightSync(policy, engine).push(0))
    engine.dtype = torch.bfloat16
    receipt = asyncio.run(WeightSync(policy, engine).push(0))
    assert 1e-3 < receipt.mean_gap < receipt.limit < 0.2


def test_a_limit_that_has_become_too_small_is_measured_again() -> None:
    """Logits sharpen while a model trains, and with them grows what rounding does."""
    policy, engine = Policy(tiny_model(), temperature=1.0, keep_reference=False), ServingEngine()
    engine.model.bfloat16()
    engine.dtype = torch.bfloat16
    sync = WeightSync(policy, engine)
    sync.limit = Limit(1e-4, 1e-4)
    receipt = asyncio.run(sync.push(0))
    assert receipt.limit > receipt.mean_gap > 1e-4


def test_a_change_too_small_for_log_probabilities_is_missed_by_nothing() -> None:
    """One weight of one tensor by one bit: in bfloat16 no forward pass would show it."""
    policy, engine, sync = started()
    with torch.no_grad():
        weight = policy.module.causal_lm.get_parameter("model.layers.1.mlp.down_proj.weight")
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    asyncio.run(sync.push(2))
    engine.fault = "drops the push"
    with torch.no_grad():
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    with pytest.raises(RunFailed, match=r"version 3 .* in 1 tensors \(model.layers.1.mlp.down_proj.weight\)"):
        asyncio.run(sync.push(3))


def test_the_probe_is_the_same_in_every_run_and_stays_in_the_vocabulary() -> None:
    policies = [Policy(tiny_model(), temperature=1.0, keep_reference=False) for _ in range(2)]
    first, second = (WeightSync(policy, ServingEngine()).probes for policy in policies)
    assert first == second
    assert sum(len(set(row)) for row in first) > 64
    assert all(0 <= token < VOCABULARY for row in first for token in row)
