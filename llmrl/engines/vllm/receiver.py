"""Inside a vLLM worker: receives the weights that `llmrl.engines.vllm.transfer` staged in shared memory.

vLLM imports this module because `worker_extension_cls` names `WeightReceiver`; importing it registers the backend in
vLLM's own factory. From there on everything is vLLM's protocol (init_weight_transfer_engine, start_weight_update,
update_weights, finish_weight_update), in process and over HTTP alike.
"""

# pyright: reportMissingImports=false
# (vLLM is an extra)
from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from llmrl.engines.vllm.transfer import BACKEND, REFUSED, check_names_and_shapes, read_staged

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass
class NoInit(WeightTransferInitInfo):
    """Nothing has to be agreed on beforehand."""


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

    Names and shapes are compared with the architecture's before anything is touched, because vLLM cannot go back: its
    loader puts the parameters on the meta device first, and the next forward pass after a failure kills the engine.
    """

    init_info_cls = NoInit
    update_info_cls = StagedInfo
    wanted: dict[str, tuple[int, ...]] | None = None

    def init_transfer_engine(self, init_info: NoInit) -> None:
        """Learn what the architecture's checkpoint holds.

        Raises:
            ValueError: this vLLM would die over the first seeded request whose prompt is computed in parts.
        """
        if self.device.type == "cpu" and self.vllm_config.scheduler_config.enable_chunked_prefill:
            raise ValueError(
                f"{REFUSED}: on a CPU vLLM dies over a request with a seed whose prompt it computes in parts; start it "
                "with --no-enable-chunked-prefill"
            )
        self.wanted = checkpoint_shapes(self.model_config.hf_config)

    def start_weight_update(self) -> None:
        """Nothing yet: the old weights stay until the new ones have been checked."""

    def receive_weights(self, update_info: StagedInfo) -> None:
        """Check, load, and let every layer prepare its weights for its kernels again.

        Raises:
            ValueError: names or shapes are not the architecture's; the old weights are still served.
        """
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        if self.wanted is not None:
            given = zip(update_info.names, update_info.shapes, strict=True)
            if wrong := check_names_and_shapes(given, self.wanted):
                raise ValueError(f"{REFUSED}:\n  {wrong}")
        initialize_layerwise_reload(self.model)
        self.model.load_weights(read_staged(asdict(update_info)))  # pyright: ignore[reportCallIssue]
        finalize_layerwise_reload(self.model, self.model_config)
        prepare_heads(self.model)

    def finish_weight_update(self) -> None:
        """Nothing left to do."""

    def shutdown(self) -> None:
        """Nothing is held."""


class WeightReceiver:
    """The worker extension; its methods can be called with `collective_rpc`."""


def checkpoint_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes of the tensors a checkpoint of this architecture holds, tied ones once.

    None for an architecture that transformers does not know by itself.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    except (ValueError, ImportError, KeyError, AttributeError):
        return None
    model.tie_weights()
    shapes: dict[str, tuple[int, ...]] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            shapes[name] = tuple(tensor.shape)
    return shapes


def prepare_heads(model: torch.nn.Module) -> None:
    """Let output heads pack their weights again: with tied embeddings they would keep the old ones, silently."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if isinstance(module, ParallelLMHead) and method is not None:
            method.process_weights_after_loading(module)


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryReceiver)
