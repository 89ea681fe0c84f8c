"""The log-prob head against log_softmax over full logits: values, gradients, and that full logits never exist."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmrl.model import logprob_head
from llmrl.model.logprob_head import (
    Head,
    ReferenceHead,
    greedy_tokens,
    restricted_probabilities,
    token_collisions,
    token_logprobs,
    token_logprobs_and_kl,
)

ROWS, HIDDEN, VOCABULARY = 37, 12, 101


def inputs(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden": torch.randn(ROWS, HIDDEN, generator=generator).to(dtype).requires_grad_(),
        "weight": torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype).requires_grad_(),
        "bias": torch.randn(VOCABULARY, generator=generator).to(dtype).requires_grad_(),
        "targets": torch.randint(VOCABULARY, (ROWS,), generator=generator),
    }


def literal(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    everything = (logits / temperature).log_softmax(-1)
    return everything.gather(1, targets[:, None])[:, 0], -(everything.exp() * everything).sum(-1)


VARIANTS = {
    "plain": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.6},
    "softcap": {"softcap": 5.0},
    "softcap, cold, scale": {"softcap": 4.0, "temperature": 0.7, "scale": 0.5},
    "scale": {"scale": 0.25},
    "bias": {"bias": True},
    "bias, all": {"bias": True, "softcap": 6.0, "temperature": 1.3, "scale": 2.0},
}


@pytest.mark.parametrize("rows_at_once", [16, 20, 10**6])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("weights", ["log-prob", "entropy", "both"])
def test_values_and_gradients(
    variant: str, weights: str, rows_at_once: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprob_head, "MAX_LOGITS", rows_at_once * VOCABULARY)
    options = dict(VARIANTS[variant])
    tensors = inputs(seed)
    if options.get("bias"):
        options["bias"] = tensors["bias"]
    trained = [tensors[name] for name in ("hidden", "weight", *(["bias"] if "bias" in options else []))]
    generator = torch.Generator().manual_seed(seed + 1)
    factors = torch.randn(2, ROWS, generator=generator).double()
    factors[0] *= weights != "entropy"
    factors[1] *= weights != "log-prob"

    def objective(pair: tuple[Tensor, Tensor]) -> Tensor:
        logprobs, entropies = pair
        total = torch.zeros((), dtype=torch.float64)
        if weights != "entropy":
            total = total + (factors[0] * logprobs).sum()
        if weights != "log-prob":
            total = total + (factors[1] * entropies).sum()
        return total

    ours = token_logprobs(tensors["hidden"], Head(weight=tensors["weight"], **options), tensors["targets"])
    reference = literal(tensors["hidden"], tensors["weight"], tensors["targets"], **options)
    for value, expected in zip(ours, reference, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    ours_gradients = torch.autograd.grad(objective(ours), trained)
    for value, expected in zip(ours_gradients, torch.autograd.grad(objective(reference), trained), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_probabilities_of_some_tokens_and_collisions(variant: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprob_head, "MAX_LOGITS", 16 * VOCABULARY)
    options, tensors = dict(VARIANTS[variant]), inputs(seed)
    if options.get("bias"):
        options["bias"] = tensors["bias"]
    hidden, weight, targets = tensors["hidden"], tensors["weight"], tensors["targets"]
    every = torch.arange(VOCABULARY).repeat(ROWS, 1)
    expected = torch.stack([literal(hidden, weight, column, **options)[0].exp() for column in every.T], dim=1)
    vocabulary, columns = targets.unique(return_inverse=True)
    logprobs = literal(hidden, weight, targets, **options)[0].float()
    head = Head(weight=weight, **options)
    found = restricted_probabilities(hidden, head, logprobs, vocabulary, columns)
    assert not found.requires_grad
    torch.testing.assert_close(found.double(), expected[:, vocabulary], rtol=1e-4, atol=1e-6)
    collisions = token_collisions(hidden, head)
    torch.testing.assert_close(collisions.double(), expected.square().sum(1), rtol=1e-4, atol=1e-6)
    highest = expected.gather(1, greedy_tokens(hidden, head)[:, None])[:, 0]
    torch.testing.assert_close(highest, expected.amax(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows_at_once", [16, 10**6])
@pytest.mark.parametrize("variant", VARIANTS)
def test_divergence_of_whole_distributions(
    variant: str, rows_at_once: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With log-probabilities and entropies in the same objective, against dense logits of both models."""
    monkeypatch.setattr(logprob_head, "MAX_LOGITS", rows_at_once * VOCABULARY)
    options, tensors, other = dict(VARIANTS[variant]), inputs(seed), inputs(seed + 10)
    other = {name: value.detach() if name == "bias" else value for name, value in other.items()}
    reference_options, reference_bias = dict(options), None
    if options.get("bias"):
        options["bias"], reference_bias = tensors["bias"], other["bias"]
        reference_options["bias"] = reference_bias
    hidden, weight, targets = tensors["hidden"], tensors["weight"], tensors["targets"]
    trained = [hidden, weight, *([tensors["bias"]] if "bias" in options else [])]
    reference_head = Head(**{**options, "weight": other["weight"], "bias": reference_bias})
    there = ReferenceHead(hidden=other["hidden"], head=reference_head)
    ours = token_logprobs_and_kl(hidden, Head(weight=weight, **options), targets, there)
    columns = torch.arange(VOCABULARY).repeat(ROWS, 1).T
    dense = torch.stack([literal(hidden, weight, column, **options)[0] for column in columns], 1)
    reference = torch.stack(
        [literal(other["hidden"], other["weight"], column, **reference_options)[0] for column in columns], 1
    )
    expected = (*literal(hidden, weight, targets, **options), (dense.exp() * (dense - reference.detach())).sum(1))
    for value, correct in zip(ours, expected, strict=True):
        torch.testing.assert_close(value.double(), correct, rtol=1e-4, atol=1e-4)
    for chosen in ((0, 0, 1), (1, 0, 1), (1, 1, 1)):
        factors = torch.randn(3, ROWS, generator=torch.Generator().manual_seed(seed + 1)).double()
        found, correct = (
            sum((factors[i] * values[i]).sum() for i in range(3) if chosen[i]) for values in (ours, expected)
        )
        pairs = zip(
            torch.autograd.grad(found, trained, retain_graph=True),  # pyright: ignore
            torch.autograd.grad(correct, trained, retain_graph=True),  # pyright: ignore
            strict=True,
        )
        for gradient, literal_gradient in pairs:
            torch.testing.assert_close(gradient, literal_gradient, rtol=1e-3, atol=5e-4)
    ours[2].sum().backward()
    assert other["hidden"].grad is None and other["weight"].grad is None, "the reference gets no gradient"


def test_finite_differences_of_one_logprob_and_entropy(seed: int) -> None:
    """Against the function itself, not against another derivation of the gradient."""
    tensors = inputs(seed)
    direction = torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(seed + 2))
    head = Head(weight=tensors["weight"], temperature=0.8, softcap=8.0, bias=tensors["bias"])

    def total(hidden: Tensor) -> Tensor:
        logprobs, entropies = token_logprobs(hidden, head, tensors["targets"])
        return logprobs.sum() + 2 * entropies.sum()

    (gradient,) = torch.autograd.grad(total(tensors["hidden"]), tensors["hidden"])
    step = 1e-2
    with torch.no_grad():
        ahead, behind = (total(tensors["hidden"] + sign * step * direction) for sign in (1, -1))
    difference = ((ahead - behind) / (2 * step)).item()
    assert (gradient * direction).sum().item() == pytest.approx(difference, rel=2e-2, abs=0.2)


def test_frozen_head_gets_no_gradient() -> None:
    tensors = inputs(0)
    weight, bias = tensors["weight"].detach(), tensors["bias"].detach()
    logprobs, entropies = token_logprobs(tensors["hidden"], Head(weight=weight, bias=bias), tensors["targets"])
    (logprobs.sum() + entropies.sum()).backward()
    assert weight.grad is None
    assert bias.grad is None
    assert tensors["hidden"].grad is not None
    assert tensors["hidden"].grad.abs().sum() > 0


def test_frozen_body_still_trains_the_head() -> None:
    tensors = inputs(0)
    token_logprobs(tensors["hidden"].detach(), Head(weight=tensors["weight"]), tensors["targets"])[0].sum().backward()
    expected = inputs(0)
    literal(expected["hidden"].detach(), expected["weight"], expected["targets"])[0].sum().backward()
    torch.testing.assert_close(tensors["weight"].grad, expected["weight"].grad, rtol=1e-4, atol=1e-5)


def test_no_rows() -> None:
    tensors = inputs(0)
    head = Head(weight=tensors["weight"], bias=tensors["bias"])
    logprobs, entropies = token_logprobs(tensors["hidden"][:0], head, tensors["targets"][:0])
    assert logprobs.shape == entropies.shape == (0,)
    (logprobs.sum() + entropies.sum()).backward()
    for name in ("hidden", "weight", "bias"):
        assert torch.equal(tensors[name].grad, torch.zeros_like(tensors[name]))


@pytest.mark.parametrize("with_bias", [False, True])
def test_bfloat16_is_within_its_rounding(with_bias: bool, seed: int) -> None:
    """bfloat16 rounds each logit (here up to about 10 in size) by up to 2**-9 of itself; gradients to 2**-8."""
    tensors = inputs(seed, torch.bfloat16)
    bias = tensors["bias"] if with_bias else None
    trained = [tensors["hidden"], tensors["weight"], *([bias] if bias is not None else [])]
    ours = token_logprobs(tensors["hidden"], Head(weight=tensors["weight"], bias=bias), tensors["targets"])
    reference = literal(tensors["hidden"], tensors["weight"], tensors["targets"], bias=bias)
    for value, expected in zip(ours, reference, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=0.06)
    gradients = torch.autograd.grad(ours[0].sum(), trained)
    expected_gradients = torch.autograd.grad(reference[0].sum(), trained)
    for value, expected in zip(gradients, expected_gradients, strict=True):
        assert value.dtype == torch.bfloat16
        assert (value - expected).float().norm() <= 0.02 * expected.float().norm()


def test_under_autocast_forward_and_backward_use_the_same_logits(seed: int) -> None:
    """The gradient of a log-probability over the logits sums to zero, so a bias added to all logits gets none.

    With logits recomputed in another precision than the normaliser's, it would not sum to zero any more.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = (4 * torch.randn(200, 64, generator=generator)).requires_grad_()
    weight = torch.randn(50, 64, generator=generator).requires_grad_()
    bias = torch.zeros(50, requires_grad=True)
    targets = torch.randint(50, (200,), generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs, entropies = token_logprobs(hidden, Head(weight=weight, bias=bias), targets)
    assert logprobs.dtype == torch.float32
    for row in (0, 100):
        (slope,) = torch.autograd.grad(logprobs[row], bias, retain_graph=True)
        assert slope.sum().abs().item() < 1e-4
    (grad_hidden,) = torch.autograd.grad(logprobs.sum(), hidden)
    reference = hidden.detach().bfloat16().requires_grad_()
    expected, expected_entropies = token_logprobs(reference, Head(weight=weight, bias=bias), targets)
    assert torch.equal(logprobs, expected)
    assert torch.equal(entropies, expected_entropies), "the reductions stay in float32"
    expected.sum().backward()
    torch.testing.assert_close(grad_hidden, reference.grad.float(), rtol=0, atol=0)


FLOAT32_VARIANTS = {"plain": {}, "softcap, cold, scale": {"softcap": 4.0, "temperature": 0.7, "scale": 0.5}}


class ProductsIntoFloat32(TorchDispatchMode):
    """Stands in for a GPU: products of bfloat16 matrices with a float32 result, which CPUs do not have."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.dtype:
            self.calls += 1
            return args[0].float() @ args[1].float()
        if func is torch.ops.aten.addmm.dtype_out:
            self.calls += 1
            return kwargs["out"].copy_(args[0] + args[1].float() @ args[2].float())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("variant", FLOAT32_VARIANTS)
def test_float32_head_does_not_round_logits(
    variant: str, on_gpu: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the same bfloat16 operands: everything that reads logits is as exact as in float32."""
    monkeypatch.setattr(logprob_head, "MAX_LOGITS", 16 * VOCABULARY)
    monkeypatch.setattr(logprob_head, "_multiplies_into_float32", lambda _: on_gpu)
    options, tensors, other = FLOAT32_VARIANTS[variant], inputs(seed, torch.bfloat16), inputs(seed + 1, torch.bfloat16)
    hidden, weight, targets = tensors["hidden"], tensors["weight"], tensors["targets"]
    head = Head(weight=weight, float32=True, **options)
    reference = ReferenceHead(
        hidden=other["hidden"].detach(), head=Head(weight=other["weight"].detach(), float32=True, **options)
    )
    exact = [x[name].detach().double().requires_grad_() for x in (tensors, other) for name in ("hidden", "weight")]
    columns = torch.arange(VOCABULARY).repeat(ROWS, 1).T
    dense, theirs = (
        torch.stack([literal(*pair, column, **options)[0] for column in columns], 1) for pair in (exact[:2], exact[2:])
    )
    expected = (*literal(exact[0], exact[1], targets, **options), (dense.exp() * (dense - theirs.detach())).sum(1))
    with ProductsIntoFloat32() as products:
        ours = token_logprobs_and_kl(hidden, head, targets, reference)
        vocabulary, places = targets.unique(return_inverse=True)
        some = restricted_probabilities(hidden, head, ours[0].detach(), vocabulary, places)
        collisions, greedy = token_collisions(hidden, head), greedy_tokens(hidden, head)
        gradients = torch.autograd.grad(sum(value.sum() for value in ours), [hidden, weight])  # pyright: ignore
    assert (products.calls > 0) == on_gpu
    for value, correct in zip(ours, expected, strict=True):
        torch.testing.assert_close(value.double(), correct, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(some.double(), dense.exp()[:, vocabulary], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(collisions.double(), dense.exp().square().sum(1), rtol=1e-4, atol=1e-6)
    assert torch.equal(greedy, dense.argmax(1))
    correct = torch.autograd.grad(sum(value.sum() for value in expected), exact[:2])  # pyright: ignore
    for value, slope in zip(gradients, correct, strict=True):
        assert value.dtype == torch.bfloat16
        assert (value - slope).norm() <= 0.005 * slope.norm(), "rounded like any number in bfloat16, and no more"
    rounded = token_logprobs(hidden, Head(weight=weight, **options), targets)[0]
    assert (rounded - expected[0]).abs().max() > 1e-3, "without the option logits are rounded"


def test_weight_gradient_of_many_chunks_adds_up_in_float32_on_a_gpu(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three chunks of float32 master weights under autocast: nothing is rounded to bfloat16 but the operands."""
    monkeypatch.setattr(logprob_head, "MAX_LOGITS", 16 * VOCABULARY)
    monkeypatch.setattr(logprob_head, "_multiplies_into_float32", lambda _: True)
    tensors = inputs(seed)
    hidden, weight, targets = tensors["hidden"], tensors["weight"], tensors["targets"]
    with ProductsIntoFloat32() as products, torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs, _ = token_logprobs(hidden, Head(weight=weight), targets)
        (gradient,) = torch.autograd.grad(logprobs.sum(), weight)
    assert products.calls == 3
    rounded = hidden.detach().bfloat16()
    logits = (rounded @ weight.detach().bfloat16().T).float()
    errors = (torch.nn.functional.one_hot(targets, VOCABULARY) - logits.softmax(1)).bfloat16()
    torch.testing.assert_close(gradient.double(), errors.double().T @ rounded.double(), rtol=1e-5, atol=1e-5)


class Made(TorchDispatchMode):
    """Counts the tensors of one shape that operations make (not views), by type."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.storages = shape, dict[torch.dtype, set[int]]()
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.shape == self.shape:
                place = leaf.untyped_storage().data_ptr()
                if place not in known:
                    self.storages.setdefault(leaf.dtype, set()).add(place)
                    self.kept.append(leaf)  # or its memory could be used again and count as the same
        return out


@pytest.mark.parametrize("trained", [True, False])
def test_weight_is_cast_once_per_pass_whatever_the_number_of_chunks(
    trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprob_head, "MAX_LOGITS", 16 * VOCABULARY)
    monkeypatch.setattr(logprob_head, "_multiplies_into_float32", lambda _: True)
    tensors = inputs(0)
    weight = tensors["weight"].requires_grad_(trained)
    other = ReferenceHead(hidden=tensors["hidden"].detach(), head=Head(weight=weight.detach().clone()))
    made = Made(tuple(weight.shape))
    with ProductsIntoFloat32(), made, torch.autocast("cpu", dtype=torch.bfloat16):
        parts = token_logprobs_and_kl(tensors["hidden"], Head(weight=weight), tensors["targets"], other)
        assert {dtype: len(found) for dtype, found in made.storages.items()} == {torch.bfloat16: 2}
        sum(part.sum() for part in parts).backward()  # pyright: ignore
    assert len(made.storages[torch.bfloat16]) == 4, "policy and reference, forward and backward"
    assert len(made.storages.get(torch.float32, ())) == trained, "one sum of the gradient; a frozen head needs none"


def test_gpus_compute_more_at_once_but_never_much_of_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = {"cuda:0": 80 * 2**30, "cuda:1": 24 * 2**30, "cuda:2": 2 * 2**30}

    class Properties:
        def __init__(self, device: torch.device) -> None:
            self.total_memory = memory[str(device)]

    monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)
    sizes = [logprob_head.max_logits(torch.device(name)) for name in memory]
    assert sizes == [2**28, 24 * 2**22, 2**24]
    assert logprob_head.max_logits(torch.device("cpu")) == 2**24


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return out


def test_full_logits_are_never_allocated() -> None:
    rows, vocabulary = 4096, 8192  # twice MAX_LOGITS
    hidden = torch.randn(rows, 4, requires_grad=True)
    weight = torch.randn(vocabulary, 4, requires_grad=True)
    targets = torch.randint(vocabulary, (rows,))
    assert rows * vocabulary > logprob_head.MAX_LOGITS
    with LargestTensor() as seen:
        logprobs, entropies = token_logprobs(hidden, Head(weight=weight), targets)
        (logprobs.sum() + entropies.sum()).backward()
        reference = ReferenceHead(hidden=torch.randn(rows, 4), head=Head(weight=torch.randn(vocabulary, 4)))
        token_logprobs_and_kl(hidden, Head(weight=weight), targets, reference)[2].sum().backward()
    assert weight.numel() <= seen.largest <= logprob_head.MAX_LOGITS
    with LargestTensor() as seen:
        (hidden @ weight.T).log_softmax(-1)
    assert seen.largest == rows * vocabulary, "the recorder must see what it is there to see"
