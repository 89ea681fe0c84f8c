"""Inside a vLLM worker: receives the weights that `llmrl.engines.vllm.transfer` staged in shared memory.

vLLM imports this module because `worker_extension_cls` names `WeightReceiver`; the import registers the backend in
vLLM's own factory. Everything after that is vLLM's protocol (init_weight_transfer_engine, start_weight_update,
update_weights, finish_weight_update), the same in process and over HTTP.
"""

# pyright: reportMissingImports=false
# (vLLM is an extra)
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from llmrl.engines.vllm.digests import digest, loaded_digest
from llmrl.engines.vllm.lifetime import end_with_trainer
from llmrl.engines.vllm.transfer import (
    BACKEND,
    NOTED_LOADING,
    REFUSED,
    check_names_and_shapes,
    read_staged,
    remove_files_of,
)
from llmrl.model.weights import checkpoint_shapes

end_with_trainer(remove_files_of)


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
    shapes: dict[str, list[int]]
    """Their shapes."""
    packed: dict[str, dict[str, str]]
    """What `_by_part` gave for parameters whose kernels use packed copies, at the moment when they were packed."""

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
        self.received, self.shapes = {}, dict(zip(update_info.names, update_info.shapes, strict=True))
        self.packed = getattr(self, "packed", {})
        with self._noting_packed() if self.device.type == "cpu" else contextlib.nullcontext():
            self.model.load_weights(self._noted(asdict(update_info)))  # pyright: ignore[reportCallIssue]
            finalize_layerwise_reload(self.model, self.model_config)
            prepare_heads(self.model)

    def _noted(self, staged: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
        assert self.received is not None
        for name, tensor in read_staged(staged):
            self.received[name] = digest(tensor)
            yield name, tensor

    @contextlib.contextmanager
    def _noting_packed(self) -> Iterator[None]:
        """Note what every weight is that is packed inside the block, because it cannot be read afterwards."""
        names = {id(module): name for name, module in self.model.named_modules()}
        methods = {id(m): m for m in (getattr(module, "quant_method", None) for module in self.model.modules())}
        packing: list[Any] = [m for m in methods.values() if hasattr(m, "process_weights_after_loading")]
        joined = getattr(self.model, "packed_modules_mapping", {})

        def noted(pack: Any, layer: torch.nn.Module) -> None:
            weight = getattr(layer, "weight", None)
            pack(layer)
            if weight is not None and getattr(layer, "cpu_linear", None) is not None and id(layer) in names:
                name = f"{names[id(layer)]}.weight"
                self.packed[name] = _by_part(name, weight.data, joined, self.shapes)

        for method in packing:
            method.process_weights_after_loading = partial(noted, method.process_weights_after_loading)
        try:
            yield
        finally:
            for method in packing:
                del method.process_weights_after_loading

    def finish_weight_update(self) -> None:
        """Do nothing: `receive_weights` has finished the update."""

    def shutdown(self) -> None:
        """Do nothing: there is nothing to release."""


class WeightReceiver:
    """The worker extension that vLLM looks for: a part of every worker, which answers what the worker holds."""

    def llmrl_held(self) -> dict[str, Any]:
        """Return digests of what this worker holds.

        received: of each tensor that was loaded last, by name; None if they came by another way than ours.
        served: of all parameters, under the names of a checkpoint where they consist of its tensors, else under their
            own; None if some lie in a form that only their kernels read, and were not seen on their way there.
        outdated: names of parameters whose kernels use a copy of other numbers.
        joined: names of modules that vLLM makes of several, and of what.
        base: of each tensor that the model was loaded from at the start, if `NotedLoader` did it.
        adapters: of each adapter, by its number, the tensors by their names in peft.
        """
        worker: Any = self
        model: Any = worker.model_runner.get_model()
        joined = getattr(model, "packed_modules_mapping", {})
        answer = {"received": None, "served": None, "outdated": [], "joined": joined, "adapters": {}}
        answer["base"] = getattr(model, "llmrl_base", None)
        if (of_worker := getattr(worker.model_runner, "lora_manager", None)) is not None:
            manager = of_worker._adapter_manager
            adapters = {str(n): _adapter_digests(each, manager, joined) for n, each in manager.list_adapters().items()}
            return answer | {"adapters": adapters}
        receiver = worker.weight_transfer_engine
        packed: dict[str, dict[str, str]] = getattr(receiver, "packed", {})
        served: dict[str, str] | None = {}
        outdated: list[str] = []
        for name, parameter in model.named_parameters(remove_duplicate=False):
            readable = parameter.numel() > 0
            shapes = getattr(receiver, "shapes", {})
            found = _by_part(name, parameter.data, joined, shapes) if readable else packed.get(name)
            served = None if found is None or served is None else served | found
            if found is not None and packed.get(name, found) != found:
                outdated.append(name)
        return answer | {"received": getattr(receiver, "received", None), "served": served, "outdated": outdated}


def _adapter_digests(adapter: Any, manager: Any, joined: dict[str, list[str]]) -> dict[str, str]:
    """Return digests of an adapter's tensors as they are used; those of a joined module are a list, one for each part.

    What no module uses is left out: vLLM ignores it silently.
    """
    found: dict[str, str] = {}
    slots: list[int | None] = manager.lora_index_to_id
    slot = slots.index(adapter.id) if adapter.id in slots else None
    for name, layer in adapter.loras.items():
        module = manager.modules.get(name)
        if module is None:
            continue
        parent, _, own = name.rpartition(".")
        for kind, tensors, stacked in (
            ("lora_A", layer.lora_a, getattr(module, "lora_a_stacked", ())),
            ("lora_B", layer.lora_b, getattr(module, "lora_b_stacked", ())),
        ):
            if not isinstance(tensors, list):
                found[f"{name}.{kind}"] = digest(_in_slot(stacked, 0, slot, tensors))
                continue
            names = joined.get(own, [])
            names = names if len(names) == len(tensors) else [f"{own}.{i}" for i in range(len(tensors))]
            for i, (part, tensor) in enumerate(zip(names, tensors, strict=True)):
                if tensor is not None:
                    found[f"{parent}.{part}.{kind}"] = digest(_in_slot(stacked, i, slot, tensor))
    return found


def _in_slot(stacked: Any, part: int, slot: int | None, tensor: torch.Tensor) -> torch.Tensor:
    """Return the copy of a tensor that requests use; itself if it is not in use, or is divided among workers."""
    if slot is None or part >= len(stacked) or stacked[part].ndim != 4 or tensor.ndim != 2:
        return tensor
    copy = stacked[part][slot, 0, : tensor.shape[0], : tensor.shape[1]]
    return copy if copy.shape == tensor.shape and copy.dtype == tensor.dtype else tensor


def _by_part(
    name: str, tensor: torch.Tensor, joined: dict[str, list[str]], shapes: dict[str, list[int]]
) -> dict[str, str]:
    """Return digests of a parameter under the names of a checkpoint, one for each tensor whose rows it consists of."""
    parent, _, kind = name.rpartition(".")
    outer, _, own = parent.rpartition(".")
    names = [f"{outer}.{part}.{kind}" for part in joined.get(own, [])]
    rows = [shapes[part][0] for part in names if shapes.get(part)]
    if len(rows) == len(names) > 0 and sum(rows) == len(tensor):
        return {part: digest(piece) for part, piece in zip(names, tensor.split(rows), strict=True)}
    return {name: digest(tensor)}


@register_model_loader(NOTED_LOADING)
class NotedLoader(DefaultModelLoader):
    """Loads the base under adapters from its files as vLLM does by default, and notes what it was loaded from."""

    def __init__(self, load_config: Any) -> None:
        super().__init__(replace(load_config, load_format="auto"))

    def load_model(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """Load the model, and have vLLM leave embedding and head without adapters, as ours always are.

        On a CPU its head with room for an adapter fails at the log-probabilities of a prompt.
        """
        model = super().load_model(*args, **kwargs)
        for module in model.modules():
            if getattr(module, "embedding_modules", None):
                cast("Any", module).embedding_modules = {}
        return model

    def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of the files."""
        model.llmrl_base = {}
        for name, tensor in super().get_all_weights(model_config, model):
            model.llmrl_base[name] = loaded_digest(tensor, model_config.dtype)
            yield name, tensor


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
