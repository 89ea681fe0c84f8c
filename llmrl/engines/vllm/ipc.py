"""vLLM's own CUDA IPC transfer: the learner's tensors are mapped into vLLM's process on the same GPU, without a copy.

Needs a GPU; nothing here is covered by the tests, which have none. The receipt after each push is what vouches for it.
"""

# pyright: reportMissingImports=false
# (vLLM is an extra)
from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any

from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    WeightSource,
    WeightTransferInitRequest,
    WeightTransferUpdateRequest,
)
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.v1.engine.async_llm import AsyncLLM

    from llmrl import types


def send_by_ipc(llm: AsyncLLM, run: Callable[[Coroutine[Any, Any, Any]], Any], source: types.WeightSource) -> None:
    """One push, whole: blocks until vLLM has loaded the weights.

    Args:
        llm: the engine, paused.
        run: runs a coroutine on the engine's event loop and waits for it; not to be called from that loop.
        source: the learner's weights, on the GPU.
    """
    sender = WeightTransferTrainerFactory.trainer_init(
        IPCTrainerInitInfo(rank=0, packed=True), client=_Client(llm, run), source=_Source(source)
    )
    sender.send_weights()


class _Source(WeightSource):
    def __init__(self, source: types.WeightSource) -> None:
        self.source = source

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.source()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.source())


class _Client:
    """vLLM's four-method protocol, on an AsyncLLM that lives on another thread's event loop."""

    def __init__(self, llm: AsyncLLM, run: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        self.llm, self.run = llm, run

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.run(self.llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info)))

    def start_weight_update(self) -> None:
        self.run(self.llm.start_weight_update())

    def update_weights(self, update_info: Any) -> None:
        self.run(self.llm.update_weights(WeightTransferUpdateRequest(update_info=update_info)))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.run(self.llm.finish_weight_update(weight_version))
