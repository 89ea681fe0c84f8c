"""Nothing in the learner waits for the device in the middle of a step: what it reads back does not grow with the work.

On a GPU each such wait leaves the device idle until the next kernels are queued. Here they are counted on the CPU, as
the calls that would wait on a GPU. What transformers reads by itself (whether positions restart, where a row has no
mask) is left out.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.invariance.cases import (
    make_config,
    make_learner,
    make_ppo_learner,
    make_samples,
    scored_groups,
    tiny_model,
    train_batch,
)

READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"}
"""Methods of a tensor that hand its contents to Python."""
SIZES = {
    "nonzero", "masked_select", "_local_scalar_dense", "is_nonzero", "equal", "bincount",
    "_unique", "_unique2", "unique_dim", "unique_consecutive",
}  # fmt: skip
"""Operations of aten whose result's size (or value) the host has to know."""


def is_ours() -> bool:
    """Whether the nearest caller outside torch is not transformers."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/torch/" not in file and file != __file__:
            return "/transformers/" not in file
        frame = frame.f_back
    return True


class Reads(TorchFunctionMode):
    """Counts the calls that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.operations = Operations(self.calls)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS and is_ours():
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Reads:
        super().__enter__()
        self.operations.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.operations.__exit__(*exception)
        super().__exit__(*exception)


class Operations(TorchDispatchMode):
    """The part that Python's calls do not show: what operations do inside."""

    def __init__(self, calls: Counter[str]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)
        repeats = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if (by_mask or repeats or name in SIZES) and is_ours():
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def test_the_counter_counts() -> None:
    values = torch.arange(4.0)
    for number, use in enumerate(
        (
            lambda: values.sum().item(),
            lambda: values.tolist(),
            lambda: values[values > 1],
            lambda: torch.nonzero(values),
            lambda: values.cpu().numpy(),
            lambda: bool(values.sum() > 1),
            lambda: values.split(torch.tensor([1, 3]).tolist()),
            lambda: values.repeat_interleave(torch.tensor([1, 0, 0, 1])),
            lambda: float(values.max()),
            lambda: values.unique(),
        )
    ):
        with Reads() as reads:
            use()
        assert reads.calls, f"use {number} was not seen"
    with Reads() as reads:
        torch.where(values > 1, values, 0.0)[torch.tensor([0, 1])].sum().clamp(min=1).log()
    assert not reads.calls


ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "grpo with everything": {
        "kl": {"beta": 0.1}, "entropy_coef": 0.01, "num_iterations": 2, "num_mini_batches": 1,
        "sampler": {"of": "sequence", "outside": "mask"},
    },
    "full kl": {"kl": {"beta": 0.1, "estimator": "full"}},
    "gspo": {"name": "gspo"},
    "dapo": {"name": "dapo"},
}  # fmt: skip


def reads_of(max_tokens: int, **algo: Any) -> tuple[Counter[str], int]:
    """Return what an update read, and the number of its micro-batches."""
    train = {"max_tokens_per_micro_batch": max_tokens, "max_grad_norm": 1.0}
    learner, algorithm = make_learner(tiny_model(), make_config(algo=algo, train=train))
    learner.policy.can_share_prefixes = True  # as after `check_forward`: every micro-batch has a mask
    samples = make_samples(0, groups=4, size=4)
    batch = train_batch(samples)
    with Reads() as reads:
        learner.update(batch, algorithm)
    return reads.calls, len(list(learner.layout.micro_batches(samples)))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_reads_do_not_grow_with_the_number_of_micro_batches(name: str) -> None:
    few, num_few = reads_of(10_000, **ALGORITHMS[name])
    many, num_many = reads_of(24, **ALGORITHMS[name])
    assert num_few == 1 and num_many >= 5
    assert few == many and few


def test_reads_of_value_pre_training_do_not_either() -> None:
    found = []
    for max_tokens in (10_000, 24):
        learner, algorithm = make_ppo_learner(
            "separate", algo={"warmup": {"steps": 1}}, train={"max_tokens_per_micro_batch": max_tokens}
        )
        batch = algorithm.prepare(scored_groups(0), policy_version=0)
        with Reads() as reads:
            learner.update(batch, algorithm)
        found.append(reads.calls)
    assert found[0] == found[1]
