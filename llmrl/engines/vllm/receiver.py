"""Inside a vLLM worker: receives the weights that `llmrl.engines.vllm.transfer` staged in shared memory.

vLLM imports this module because `worker_extension_cls` names `WeightReceiver`; the import registers the backend in
vLLM's own factory. Everything after that is vLLM's protocol (init_weight_transfer_engine, start_weight_update,
update_weights, finish_weight_update), the same in process and over HTTP.
"""

# pyright: reportMissingImports=false
# (vLLM is an extra)
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from llmrl.engines.vllm.digests import combined, digest, digests
from llmrl.engines.vllm.transfer import BACKEND, REFUSED, check_names_and_shapes, read_staged
from llmrl.model.weights import checkpoint_shapes


@dataclass
class NoInit(WeightTransferInitInfo):
    """An empty message: both sides need to agree on nothing beforehand."""


@dataclass
class StagedInfo(WeightTransferUpdateInfo):
    """What `StagedWeights.stage` returned."""

    path: str
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    offsets: list[int]


class SharedMemoryReceiver(WeightTransferEngine[NoInit, StagedInfo]):
    """Replaces all weights of a worker's model, or none.

    Names and shapes are compared with the architecture's before anything changes, because vLLM cannot undo a load: its
    loader first puts the parameters on the meta device, and after a failure the next forward pass kills the engine.
    """

    init_info_cls = NoInit
    update_info_cls = StagedInfo
    wanted: list[dict[str, tuple[int, ...]]] | None = None
    received: dict[str, str] | None = None
    """Digests of what was loaded last, by name."""

    def init_transfer_engine(self, init_info: NoInit) -> None:
        """Note which tensors a checkpoint of the architecture holds.

        Raises:
            ValueError: this vLLM would crash at the first seeded request whose prompt it computes in parts.
        """
        if self.device.type == "cpu" and self.vllm_config.scheduler_config.enable_chunked_prefill:
            raise ValueError(
                f"{REFUSED}: on a CPU vLLM crashes at a request with a seed whose prompt it computes in parts; start "
                "it with --no-enable-chunked-prefill"
            )
        self.wanted = checkpoint_shapes(self.model_config.hf_config)

    def start_weight_update(self) -> None:
        """Keep the old weights: `receive_weights` replaces them once it has checked the new ones."""

    def receive_weights(self, update_info: StagedInfo) -> None:
        """Check the weights, load them, and have every layer prepare them for its kernels again.

        Raises:
            ValueError: names or shapes are not those of the architecture; the old weights are still served.
        """
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        if self.wanted is not None:
            given = list(zip(update_info.names, update_info.shapes, strict=True))
            findings = [check_names_and_shapes(given, wanted) for wanted in self.wanted]
            if all(findings):
                raise ValueError(f"{REFUSED}:\n  {findings[0]}")
        if self.device.type == "cpu":
            forget_expert_kernels(self.model)
        initialize_layerwise_reload(self.model)
        self.received = {}
        self.model.load_weights(self._noted(asdict(update_info)))  # pyright: ignore[reportCallIssue]
        finalize_layerwise_reload(self.model, self.model_config)
        prepare_heads(self.model)

    def _noted(self, staged: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
        assert self.received is not None
        for name, tensor in read_staged(staged):
            self.received[name] = digest(tensor)
            yield name, tensor

    def finish_weight_update(self) -> None:
        """Do nothing: `receive_weights` has finished the update."""

    def shutdown(self) -> None:
        """Do nothing: there is nothing to release."""


class WeightReceiver:
    """The worker extension that vLLM looks for: a part of every worker, which answers what the worker holds."""

    def llmrl_held(self) -> dict[str, Any]:
        """Return digests of what this worker holds.

        received: of each tensor that was loaded last, by name; None if they came by another way than ours.
        served: of all parameters; None if some lie in a form that only their kernels read (on a CPU, after packing).
        adapters: of each adapter, by its number.
        """
        worker: Any = self
        parameters = dict(worker.model_runner.get_model().named_parameters())
        readable = all(parameter.numel() for parameter in parameters.values())
        tensors = ((name, parameter.data) for name, parameter in parameters.items())
        manager = getattr(worker.model_runner, "lora_manager", None)
        adapters = {} if manager is None else manager._adapter_manager.list_adapters()
        return {
            "received": getattr(worker.weight_transfer_engine, "received", None),
            "served": combined(digests(tensors)) if readable else None,
            "adapters": {str(number): _adapter_digest(adapter) for number, adapter in adapters.items()},
        }


def _adapter_digest(adapter: Any) -> str:
    found: dict[str, str] = {}
    for name, layer in adapter.loras.items():
        for kind in ("lora_a", "lora_b"):
            tensors = getattr(layer, kind)
            parts = tensors if isinstance(tensors, list) else [tensors]
            found |= digests((f"{name}.{kind}.{i}", part) for i, part in enumerate(parts) if part is not None)
    return combined(found)


def forget_expert_kernels(model: torch.nn.Module) -> None:
    """Have experts build their kernels again: on a CPU vLLM packs their weights only then, and not at a reload."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def prepare_heads(model: torch.nn.Module) -> None:
    """Have output heads pack their weights again; with tied embeddings they would silently keep the old ones."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if isinstance(module, ParallelLMHead) and method is not None:
            method.process_weights_after_loading(module)


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryReceiver)
