"""What workers answer, compared with what they were sent; needs no vLLM."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llmrl.engines.vllm.digests import Held, digest, digests, sent_adapter, sent_base, sent_weights
from llmrl.types import Adapter

BF16 = torch.bfloat16
JOINED = {"qkv": ["q", "k"]}


def weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layer.{name}.weight": torch.randn(4, 6, generator=generator).to(BF16) for name in ("q", "k", "o")}


def answer(given: dict[str, Tensor], held: dict[str, Tensor], **more: Any) -> dict[str, Any]:
    """What a worker answers that was given some tensors and holds others."""
    empty = {"outdated": [], "joined": JOINED, "base": None, "adapters": {}}
    return empty | {"received": dict(digests(given.items())), "served": digests(held.items())} | more


def compare(held: Held, given: dict[str, Tensor], **more: Any) -> list[str]:
    served = more.pop("served", given)
    return held.weights(sent_weights(given.items(), BF16, quantized=False), [answer(given, served, **more)])


def test_what_was_once_held_as_it_was_sent_must_be_held_so_again() -> None:
    held, first, second = Held(), weights(0), weights(1)
    assert compare(held, first) == []
    swapped = second | {"layer.q.weight": second["layer.q.weight"].flip(0)}
    assert compare(held, second, served=swapped) == ["layer.q.weight"]
    assert compare(held, second) == []


def test_what_was_not_received_or_is_used_in_an_old_copy_is_named() -> None:
    held, first, second = Held(), weights(0), weights(1)
    assert compare(held, first) == []
    assert compare(held, second, received=digests((first | {"layer.o.weight": second["layer.o.weight"]}).items())) == [
        "layer.q.weight",
        "layer.k.weight",
    ]
    assert compare(held, second, outdated=["head.weight"]) == ["head.weight"]


def fused(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Joined and transformed, so that nothing is alike."""
    joined = torch.cat([given["layer.q.weight"], given["layer.k.weight"]])
    return {"layer.qkv.weight": joined.T.contiguous(), "layer.o.weight": given["layer.o.weight"].T.contiguous()}


def test_what_holds_a_changed_tensor_must_have_changed() -> None:
    held, first, second = Held(), weights(0), weights(1)
    assert compare(held, first, served=fused(first)) == []
    stale = fused(second) | {"layer.qkv.weight": fused(first)["layer.qkv.weight"]}
    assert compare(held, second, served=stale) == ["layer.q.weight", "layer.k.weight"]
    only_k = second | {"layer.q.weight": first["layer.q.weight"]}
    fresh = Held()
    assert compare(fresh, first, served=fused(first)) == []
    assert compare(fresh, only_k, served=fused(only_k)) == []
    assert compare(fresh, only_k, served=fused(only_k)) == [], "nothing was sent that is new"


def test_weights_of_before_the_last_push_are_stale() -> None:
    held = Held()
    for seed in (0, 1):
        assert compare(held, weights(seed), served=fused(weights(seed))) == []
    assert len(compare(held, weights(2), served=fused(weights(0)))) == 3


def test_nothing_is_said_of_weights_that_nobody_can_read() -> None:
    held = Held()
    for seed in (0, 1):
        sent = sent_weights(weights(seed).items(), torch.float32, quantized=False)
        assert sent.as_served is None and held.weights(sent, [answer(weights(seed), weights(5))]) == []
        sent = sent_weights(weights(seed).items(), BF16, quantized=False)
        assert held.weights(sent, [answer(weights(seed), {}) | {"served": None}]) == []


PREFIX = "base_model.model.layer.q"


def adapter(*, rslora: bool = False, name: str = PREFIX) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    config = {"r": 4, "lora_alpha": 6.0, "use_rslora": rslora}
    shapes = {"lora_A": (4, 6), "lora_B": (8, 4)}
    tensors = {f"{name}.{kind}.weight": torch.randn(shape, generator=generator) for kind, shape in shapes.items()}
    return Adapter(config=config, tensors=tensors)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_is_held_times_its_scaling(rslora: bool) -> None:
    given = adapter(rslora=rslora)
    scaling = 6 / math.sqrt(4) if rslora else 6 / 4
    low, up = (given.tensors[f"{PREFIX}.{kind}.weight"].to(BF16) for kind in ("lora_A", "lora_B"))
    parts = {"layer.q.lora_A": digest(low), "layer.q.lora_B": digest(up * scaling)}
    sent = sent_adapter(given, BF16)
    assert Held().adapter(sent, [{"adapters": {"1": {}, "2": parts}}]) == []
    assert Held().adapter(sent, [{"adapters": {"1": parts, "2": {}}}]) != [], "the newest counts"
    twice = parts | {"layer.q.lora_B": digest(up * scaling * 2)}
    assert Held().adapter(sent, [{"adapters": {"1": twice}}]) == ["layer.q.lora_B"]
    assert Held().adapter(sent, [{"adapters": {}}]) == ["the adapter itself"]
    # vLLM may call the modules of an architecture otherwise.
    renamed = {f"other.{name}": part for name, part in parts.items()}
    assert Held().adapter(sent, [{"adapters": {"1": renamed}}]) == []
    assert len(Held().adapter(sent, [{"adapters": {"1": renamed | {"other.layer.q.lora_A": "0"}}}])) == 2


def test_experts_are_compared_with_earlier_ones() -> None:
    held, given = Held(), adapter(name="base_model.model.layer.experts.0.up")
    later = Adapter(config=given.config, tensors={name: 2 * tensor for name, tensor in given.tensors.items()})
    first, second = (sent_adapter(each, BF16) for each in (given, later))
    assert held.adapter(first, [{"adapters": {"1": {"layer.experts.lora_A": "joined"}}}]) == []
    assert held.adapter(second, [{"adapters": {"1": {"layer.experts.lora_A": "joined again"}}}]) == []
    assert held.adapter(second, [{"adapters": {"1": {"layer.experts.lora_A": "joined"}}}]) != []


def test_the_base_is_compared_in_the_type_that_is_served() -> None:
    base = {name: tensor.float() + 1e-4 for name, tensor in weights().items()}
    sent = sent_base(base.items(), BF16)
    loaded = {name: digest(tensor.to(BF16)) for name, tensor in base.items()} | {"lm_head.weight": "a tied copy"}
    assert Held().base(sent, [{"base": loaded}, {"base": None}]) == []
    assert Held().base(sent, [{"base": loaded | {"layer.k.weight": "0"}}]) == ["layer.k.weight"]
    assert sent_base(weights().items(), torch.float32) == {}, "the learner has rounded what its engine has not"
