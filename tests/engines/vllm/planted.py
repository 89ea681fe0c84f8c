"""Faults inside a vLLM worker: it is given the right weights and serves other ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from llmrl.engines.vllm import receiver


class Planted(receiver.WeightReceiver):
    """The worker extension that vLLM is started with. `plant` says what goes wrong from now on."""

    def plant(self, fault: str, module: str) -> None:
        """Plant a fault; "" ends it.

        Args:
            fault: one of those that the tests name.
            module: name of the projection that is concerned.
        """
        worker: Any = self
        if getattr(worker, "planted", None) is None:
            worker.planted = _Faults(worker)
        worker.planted.fault, worker.planted.module = fault, module


class _Faults:
    def __init__(self, worker: Any) -> None:
        self.fault, self.module = "", ""
        self.before: dict[str, torch.Tensor] = {}
        self.model = worker.model_runner.get_model()
        self.load, self.prepare_heads = self.model.load_weights, receiver.prepare_heads
        self.model.load_weights = self.load_weights
        receiver.prepare_heads = self.heads
        manager = getattr(worker.model_runner, "lora_manager", None)
        if manager is not None:
            self.manager = manager._adapter_manager
            self.add, self.activate = self.manager.add_adapter, self.manager.activate_adapter
            self.manager.add_adapter, self.manager.activate_adapter = self.add_adapter, self.activate_adapter
            self.adapters: list[Any] = []

    def load_weights(self, weights: Any) -> Any:
        given = {name: tensor.clone() for name, tensor in weights}
        old, self.before = self.before, given
        if self.fault != "dropped":
            return self.load(self.changed(given, old))
        return set()

    def changed(self, given: dict[str, torch.Tensor], old: dict[str, torch.Tensor]) -> Iterator[Any]:
        for name, tensor in given.items():
            concerned = name == f"{self.module}.weight"
            if self.fault == "one version old" or (self.fault == "one module stale" and concerned):
                yield name, old[name]
            elif self.fault == "one module permuted" and concerned:
                yield name, tensor.flip(0)
            elif self.fault == "two rows swapped" and concerned:
                yield name, torch.cat([tensor[1:2], tensor[:1], tensor[2:]])
            else:
                yield name, tensor

    def heads(self, model: Any) -> None:
        if self.fault != "head stale":
            self.prepare_heads(model)

    def add_adapter(self, adapter: Any) -> Any:
        """Register an adapter; those before stay in `adapters`, since registering changes them in place."""
        self.adapters.append(adapter)
        added = self.add(adapter)
        if self.fault in ("dropped", "one version old"):
            adapter.loras = self.adapters[-2].loras
        elif self.fault == "counted twice":
            for layer in adapter.loras.values():
                for tensor in layer.lora_b if isinstance(layer.lora_b, list) else [layer.lora_b]:
                    tensor *= 2
        elif self.fault == "one module permuted":
            name = self.module.replace("q_proj", "qkv_proj").replace("up_proj", "gate_up_proj")
            layer = adapter.loras[name]
            part = layer.lora_b[0] if isinstance(layer.lora_b, list) else layer.lora_b
            part.copy_(part.flip(0))
        return added

    def activate_adapter(self, number: int) -> Any:
        activated = self.activate(number)
        if self.fault == "not used":
            slot = self.manager.lora_index_to_id.index(number)
            for module in self.manager.modules.values():
                module.reset_lora(slot)
        return activated
