"""The door to distribution, in one process; `tests/invariance` runs the same calls on two."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from llmrl.errors import UserError
from llmrl.model.parallel import Parallel, make_parallel
from llmrl.model.policy import Policy
from tests.invariance.cases import make_config, make_learner, make_lora, tiny_model


def test_one_process_is_all_of_them() -> None:
    parallel = Parallel.alone()
    assert (parallel.rank, parallel.world, parallel.is_main) == (0, 1, True)
    assert parallel.device.type == "cpu" and parallel.kind == "NO"
    numbers = {"a": torch.tensor(2.0), "b/max": torch.tensor(3.0)}
    assert parallel.reduce(numbers, largest={"b/max"}) == numbers
    assert parallel.gather(torch.arange(3)).tolist() == [0, 1, 2]
    assert parallel.gather_objects(["x", 1]) == ["x", 1]
    assert parallel.broadcast({"port": 5}) == {"port": 5}
    parallel.barrier()


def test_a_step_through_the_door_is_a_plain_step() -> None:
    parallel = Parallel.alone()
    module, plain = (torch.nn.Linear(3, 1), torch.nn.Linear(3, 1))
    plain.load_state_dict(module.state_dict())
    wrapped, optimizer = parallel.wrap(module, torch.optim.SGD(module.parameters(), lr=0.5))
    other = torch.optim.SGD(plain.parameters(), lr=0.5)
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    with parallel.no_sync(wrapped):
        parallel.backward(wrapped(inputs).sum())
    parallel.backward(wrapped(inputs).square().sum())
    (plain(inputs).sum() + plain(inputs).square().sum()).backward()
    norm = parallel.clip(module.parameters(), 0.1)
    expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1).item()
    assert norm == pytest.approx(expected, rel=1e-6) and norm > 0.1
    optimizer.step()
    other.step()
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_trained_parameters_come_back(lora: bool) -> None:
    model = make_lora(tiny_model()) if lora else tiny_model()
    learner, _ = make_learner(model, make_config())
    policy = learner.policy
    saved = {name: tensor.clone() for name, tensor in policy.trained_parameters().items()}
    assert all("lora_" in name for name in saved) is lora
    with torch.no_grad():
        for parameter in learner.parameters:
            parameter.add_(1.0)
    assert not any(torch.equal(tensor, saved[name]) for name, tensor in policy.trained_parameters().items())
    policy.load_trained_parameters(saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in policy.trained_parameters().items())
    fresh = Policy(make_lora(tiny_model()) if lora else tiny_model(), temperature=1.0, keep_reference=False)
    fresh.load_trained_parameters(saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in fresh.trained_parameters().items())


@pytest.fixture
def fresh_accelerate() -> object:
    """accelerate keeps its configuration in singletons; they are put back afterwards."""
    states = (AcceleratorState, GradientState, PartialState)
    for state in states:
        state._reset_state()
    yield
    for state in states:
        state._reset_state()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("WORLD_SIZE", "2", "the launcher started 2 processes, but each sees 1"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps 4, which would scale the loss"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "fp16"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "bf16, but model.dtype is float32: set --model.dtype bfloat16"),
    ],
)
def test_a_launch_that_would_train_wrong_is_refused(
    variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch, fresh_accelerate: None
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    if variable != "WORLD_SIZE":
        monkeypatch.setenv(variable, value)
    else:  # accelerate alone would take the variable for a real launch and wait for the other process
        Accelerator(cpu=True)
        monkeypatch.setenv(variable, value)
    with pytest.raises((UserError, ValueError), match=message):
        make_parallel(seed=0)


def test_mixed_precision_means_model_dtype_and_no_autocast(
    monkeypatch: pytest.MonkeyPatch, fresh_accelerate: None
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    parallel = make_parallel(seed=0, dtype="bfloat16")
    module = torch.nn.Linear(3, 1)
    wrapped, _ = parallel.wrap(module, torch.optim.SGD(module.parameters(), lr=0.5))
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(wrapped(inputs), torch.nn.functional.linear(inputs, module.weight, module.bias))
