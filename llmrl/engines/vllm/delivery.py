"""Delivery of weights to vLLM servers: staged once by the trainer, delivered to all, and again to one that returns.

Both ways use vLLM's weight-transfer protocol. They differ in its backend, which the servers are started with.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from llmrl.engines.vllm.replicas import ReplicaFailed, ReplicaLost
from llmrl.engines.vllm.transfer import RECEIVER_FLAGS, StagedWeights
from llmrl.errors import RunFailed, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from llmrl.engines.vllm.http import VllmServer
    from llmrl.types import WeightSource

NCCL_BUFFER_BYTES = 1 << 30
"""Size of the pieces into which both ends cut the stream of tensors."""
NCCL_NUM_BUFFERS = 2


class Delivery(Protocol):
    """How weights travel to servers. The weights staged last can be delivered again, to a replica that returned."""

    def stage(self, source: WeightSource) -> None:
        """Keep a copy of the weights, because the learner keeps changing its own."""
        ...

    async def deliver(self, servers: list[VllmServer], label: str) -> dict[VllmServer, str]:
        """Make paused servers serve the staged weights, under the name `label`.

        Returns:
            The servers that were lost on the way, and why.

        Raises:
            UserError: a server was not started with the options that this needs.
            RunFailed: a server refused the weights.
        """
        ...

    def close(self) -> None: ...


class SharedMemoryDelivery:
    """Delivers through a file in shared memory, to servers on this machine (see `llmrl.engines.vllm.transfer`)."""

    def __init__(self) -> None:
        self.staged = StagedWeights()
        self.info: dict[str, Any] = {}

    def stage(self, source: WeightSource) -> None:
        self.info = self.staged.stage(source)

    async def deliver(self, servers: list[VllmServer], label: str) -> dict[VllmServer, str]:
        """See `Delivery.deliver`."""
        flags = " ".join(f"'{flag}'" if "{" in flag else flag for flag in RECEIVER_FLAGS)
        how = f"through shared memory: start it on this machine, where llmrl is installed, with {flags}"

        async def one(server: VllmServer) -> None:
            if not server.ready_to_receive:
                await _initialise(server, {}, how)
            await _accepted(server, server.update_weights(self.info, label=label))

        return await _all(servers, one)

    def close(self) -> None:
        self.staged.close()


class NcclDelivery:
    """Delivers from GPU to GPU by NCCL, to servers on any machine. The trainer is rank 0 of a group with their workers.

    The staged copy is in the trainer's main memory. The group is rebuilt whenever its servers change, because a server
    that dies takes its ranks with it. A server that dies during the transfer itself ends the run, since the others wait
    for it in NCCL: resume from the checkpoint.

    Args:
        host: address of this machine that the servers can reach.
        device: the GPU to send from.
        open_group: joins the NCCL group (host, port, world size). Default: vLLM's own; tests replace it.
        broadcast: sends the tensors to the group. Default: vLLM's own; tests replace it.
    """

    def __init__(
        self,
        *,
        host: str | None = None,
        device: torch.device | str = "cuda",
        open_group: Callable[[str, int, int], Any] | None = None,
        broadcast: Callable[[Any, list[tuple[str, Tensor]]], None] | None = None,
    ) -> None:
        self.host = host or socket.gethostname()
        self.device = torch.device(device)
        self.open_group = open_group or self._open_group
        self.broadcast = broadcast or self._broadcast
        self.tensors: list[tuple[str, Tensor]] = []
        self.members: list[VllmServer] = []
        self.group: Any = None

    def stage(self, source: WeightSource) -> None:
        self.tensors = [(name, tensor.detach().to("cpu", copy=True).contiguous()) for name, tensor in source()]

    async def deliver(self, servers: list[VllmServer], label: str) -> dict[VllmServer, str]:
        """See `Delivery.deliver`."""
        lost = await _all(servers, lambda server: server.check_alive())
        servers = [server for server in servers if server not in lost]
        if not servers:
            return lost
        if servers != self.members or not all(server.ready_to_receive for server in servers):
            await self._join(servers)
        names, tensors = zip(*self.tensors, strict=True)
        info = {
            "names": list(names),
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
            "shapes": [list(tensor.shape) for tensor in tensors],
        }
        send = _on_daemon_thread(self.broadcast, self.group, self.tensors)
        updates = [_accepted(server, server.update_weights(info, label=label)) for server in servers]
        await self._run_collective(send, updates, "the transfer")
        return lost

    async def _join(self, servers: list[VllmServer]) -> None:
        """Build a new group: this process is rank 0, then come the workers of each server."""
        sizes = [await server.world_size() for server in servers]
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        how = 'by NCCL: start it on a GPU with --weight-transfer-config \'{"backend": "nccl"}\''
        common: dict[str, Any] = {"master_address": self.host, "master_port": port, "world_size": 1 + sum(sizes)}
        common |= {
            "packed": True,
            "packed_buffer_size_bytes": NCCL_BUFFER_BYTES,
            "packed_num_buffers": NCCL_NUM_BUFFERS,
        }
        joins = [
            _initialise(server, common | {"rank_offset": 1 + sum(sizes[:index])}, how)
            for index, server in enumerate(servers)
        ]
        send = _on_daemon_thread(self.open_group, self.host, port, 1 + sum(sizes))
        self.group = (await self._run_collective(send, joins, "joining a group"))[0]
        self.members = servers

    async def _run_collective(self, mine: Awaitable[Any], theirs: Sequence[Awaitable[None]], what: str) -> list[Any]:
        """Run both ends of a collective. The first failure ends the wait, since the other ends would wait forever."""
        tasks = [asyncio.ensure_future(end) for end in (mine, *theirs)]
        try:
            return list(await asyncio.gather(*tasks))
        except ReplicaFailed as error:
            self.members = []
            raise RunFailed(f"weights by NCCL: {what} failed: {error}") from None

    def _open_group(self, host: str, port: int, world_size: int) -> Any:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        self._use_device()
        return trainer_init({"master_address": host, "master_port": port, "world_size": world_size})

    def _use_device(self) -> None:
        """Select the GPU in this thread. Every thread starts on the first one, the one that plain `cuda` means."""
        if self.device.index is not None:
            torch.cuda.set_device(self.device)

    def _broadcast(self, group: Any, tensors: list[tuple[str, Tensor]]) -> None:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        self._use_device()
        packed_nccl_broadcast_producer(
            iterator=iter(tensors),
            group=group,
            src=0,
            post_iter_func=lambda item: item[1].to(self.device),
            buffer_size_bytes=NCCL_BUFFER_BYTES,
            num_buffers=NCCL_NUM_BUFFERS,
        )
        torch.cuda.synchronize()

    def close(self) -> None:
        group, self.group = self.group, None
        if hasattr(group, "destroy"):
            group.destroy()
        self.tensors = []


def _on_daemon_thread(function: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
    """Call a function on a thread that does not keep the process: in NCCL it may wait for a server for ever."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def finish(result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        future.set_result(result) if error is None else future.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = function(*args)
        except BaseException as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
            loop.call_soon_threadsafe(finish, result, error)

    threading.Thread(target=run, name="llmrl nccl", daemon=True).start()
    return future


async def _all(servers: list[VllmServer], work: Callable[[VllmServer], Awaitable[None]]) -> dict[VllmServer, str]:
    """Run `work` on all servers at once and return the lost ones, and why. Other failures are raised once all ended."""
    outcomes = await asyncio.gather(*map(work, servers), return_exceptions=True)
    failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    for failure in failures:
        if not isinstance(failure, ReplicaLost):
            raise failure
    return {server: str(failure) for server, failure in zip(servers, outcomes, strict=True) if failure is not None}


async def _initialise(server: VllmServer, init_info: dict[str, Any], how: str) -> None:
    try:
        await server.init_weight_transfer(init_info)
    except ReplicaLost:
        raise
    except (ReplicaFailed, RunFailed) as error:
        await server.check_alive()
        raise UserError(f"the vLLM server {server.name} cannot receive weights {how}\n({error})") from None
    server.ready_to_receive = True


async def _accepted(server: VllmServer, update: Awaitable[None]) -> None:
    """Await an update. A server that fails at it although it is healthy has refused the weights."""
    try:
        await update
    except ReplicaLost:
        raise
    except ReplicaFailed as error:
        await server.check_alive()
        raise RunFailed(f"{server.name} did not take the weights: {error}") from None
