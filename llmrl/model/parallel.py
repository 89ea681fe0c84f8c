"""The one door to distribution: which processes train together, and everything they do to each other's tensors.

Today that is one process, or data parallelism (DDP) through accelerate. Another kind (FSDP2, DeepSpeed ZeRO) changes
this file alone, because callers use no more than what `Parallel` promises.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from llmrl.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn

T = TypeVar("T")

PROCESS_TIMEOUT = timedelta(minutes=30)
"""How long a process waits for another before it gives up."""


class Parallel:
    """The processes that train one model together, and this one's place among them.

    A method that is marked as collective has to be called by every process, in the same order.

    Args:
        accelerator: what accelerate knows of the launch.

    Attributes:
        rank: the number of this process, from 0.
        world: how many processes there are.
        is_main: whether this process is the one that writes files and speaks to the user.
        device: where this process computes.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator: Any = accelerator  # its own annotations are incomplete
        self.rank: int = accelerator.process_index
        self.world: int = accelerator.num_processes
        self.is_main: bool = accelerator.is_main_process
        self.device: torch.device = accelerator.device

    @classmethod
    def alone(cls) -> Parallel:
        """Make the door of a single process on the CPU, as tests and studies need it."""
        from accelerate import Accelerator

        return cls(Accelerator(cpu=True))

    @property
    def kind(self) -> str:
        """How the processes share the work, by accelerate's name (`NO`, `MULTI_CPU`, `MULTI_GPU`)."""
        return self.accelerator.distributed_type.value

    # --- a training step ---

    def wrap(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Spread a module and its optimizer over the processes.

        Returns:
            What forward passes with a gradient must call in place of `module`, and the optimizer to step. `module`
            stays valid; calling it directly goes past the wrapper, so processes need not do so equally often.
        """
        return self.accelerator.prepare(module, optimizer)

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """Keep gradients on this process inside the block: only the last backward pass of a step adds them up."""
        return self.accelerator.no_sync(wrapped)

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of this process's share of the loss; gradients add up over processes (collective)."""
        # DDP averages gradients over processes. The shares are to be added, so each is scaled up first.
        self.accelerator.backward(loss * self.world)

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Do what `backward` does for passes that went past the wrapper: add their gradients up (collective)."""
        if self.world == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= self.world  # each share was scaled up for the wrapper, which averages

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        """Scale gradients down to the norm `limit` and return the norm they had (collective)."""
        norm = self.accelerator.clip_grad_norm_(parameters, limit)
        assert norm is not None, "accelerate gives no norm under DeepSpeed, which is not supported yet"
        return norm

    # --- what processes tell each other ---

    def barrier(self) -> None:
        """Wait until every process is here (collective)."""
        self.accelerator.wait_for_everyone()

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate the tensors of all processes along their first axis, in the order of ranks (collective)."""
        return self.accelerator.gather(tensor)

    def gather_objects(self, items: Sequence[T]) -> list[T]:
        """Concatenate the lists of all processes, in the order of ranks (collective)."""
        if self.world == 1:
            return [*items]
        from accelerate.utils import gather_object

        return cast("list[T]", gather_object([*items]))

    def reduce(self, values: dict[str, Tensor], *, largest: Collection[str] = ()) -> dict[str, Tensor]:
        """Add numbers over processes, by name; of those named in `largest` take the maximum instead (collective).

        All of them travel in one collective.
        """
        if self.world == 1:
            return values
        names = sorted(values)
        columns = self.gather(torch.stack([values[name].float() for name in names])[None]).T
        return {
            name: column.amax() if name in largest else column.sum()
            for name, column in zip(names, columns, strict=True)
        }

    def broadcast(self, value: T) -> T:
        """Return the main process's `value` on every process (collective)."""
        if self.world == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    # --- whole tensors ---

    def full(self, tensor: Tensor) -> Tensor:
        """Return the whole tensor behind a parameter or buffer of the module (collective). DDP keeps them whole."""
        return tensor.detach()

    @torch.no_grad()
    def load(self, parameter: Tensor, value: Tensor) -> None:
        """Set a parameter or buffer of the module from the whole tensor (collective)."""
        parameter.copy_(value)

    # --- the end ---

    def finish(self) -> None:
        """Leave the process group (collective)."""
        self.accelerator.end_training()


def make_parallel(*, seed: int, dtype: str = "float32") -> Parallel:
    """Join the processes of this launch, check that they can train together, and seed their random numbers.

    Args:
        seed: of Python, numpy and torch, the same on every process.
        dtype: `model.dtype`, with which accelerate's `mixed_precision` has to agree where it is set.

    Raises:
        UserError: the launcher started processes that do not know of each other, or accelerate is configured for
            something that the learner does not support.
    """
    from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
    from accelerate.utils import set_seed

    accelerator = Accelerator(
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)],
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise UserError(
            f"the launcher started {launched} processes, but each sees {accelerator.num_processes}: they would all "
            "train alone and write the same files. On CPU launch with ACCELERATE_USE_CPU=true and "
            "--multi_gpu --num_processes N"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError(
            f"accelerate is configured with gradient_accumulation_steps {accelerator.gradient_accumulation_steps}, "
            "which would scale the loss: remove it; train.max_tokens_per_micro_batch decides what is computed at once"
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise UserError(
            f"accelerate is configured with mixed_precision {accelerator.mixed_precision}, which is not supported: "
            'write "no" there; model.dtype chooses the type that the model computes in'
        )
    if accelerator.mixed_precision == "bf16" and dtype != "bfloat16":
        raise UserError(
            f"accelerate is configured with mixed_precision bf16, but model.dtype is {dtype}: set --model.dtype "
            'bfloat16 (it computes in bfloat16 and trains weights in float32), or mixed_precision "no"'
        )
    accelerator.native_amp = False  # bf16 says what model.dtype bfloat16 already does, without autocast
    supported = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
    if accelerator.distributed_type not in supported:
        raise UserError(
            f"accelerate is configured for {accelerator.distributed_type.value}; this version trains in one process or "
            "with data parallelism (DDP): use recipes/accelerate/ddp.yaml"
        )
    set_seed(seed)
    return Parallel(accelerator)
