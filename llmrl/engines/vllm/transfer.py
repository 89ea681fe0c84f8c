"""Weights through shared memory, the trainer's half: tensors in, a file and its description out. Needs no vLLM.

The other half, inside vLLM's workers, is `llmrl.engines.vllm.receiver`. Together they form a weight-transfer backend
that works without a GPU: start vLLM with `RECEIVER_ARGS` (in Python) or `RECEIVER_FLAGS` (`vllm serve`), then for
every push

    weights = StagedWeights()                     # once
    update_info = weights.stage(policy.weights)   # writes the file, returns JSON
    init_weight_transfer_engine({}) once, start_weight_update(), update_weights(update_info), finish_weight_update("7")
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
import tempfile
import uuid
import weakref
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmrl.errors import RunFailed

if TYPE_CHECKING:
    from torch import Tensor

    from llmrl.types import WeightSource

BACKEND = "llmrl_shared_memory"
NOTED_LOADING = "llmrl_noted"
"""vLLM's `load_format` under which workers note digests of what they load (see `receiver.NotedLoader`)."""
WORKER_EXTENSION = "llmrl.engines.vllm.receiver.WeightReceiver"
RECEIVER_ARGS: dict[str, Any] = {
    "weight_transfer_config": {"backend": BACKEND},
    "worker_extension_cls": WORKER_EXTENSION,
}
"""Arguments of `EngineArgs` that make a vLLM engine accept `StagedWeights`."""
RECEIVER_FLAGS = (
    "--weight-transfer-config",
    f'{{"backend": "{BACKEND}"}}',
    "--worker-extension-cls",
    WORKER_EXTENSION,
)
"""The same as flags of `vllm serve`. The server must run on the trainer's machine and see its shared memory."""
REFUSED = "weights refused, the old ones are still served"
"""Start of a worker's error message when it has changed nothing."""
ALIGNMENT = 64
"""Each tensor starts at a multiple of this many bytes, so that it can be viewed in its type."""
SHARED_MEMORY = Path("/dev/shm")
PREFIX = "llmrl"


class StagedWeights:
    """A file in shared memory that each push overwrites. `close` or the end of the process removes it."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self._remove: weakref.finalize | None = None

    def stage(self, source: WeightSource) -> dict[str, Any]:
        """Write every tensor of `source`, which is iterated once.

        Returns:
            What the worker needs: the path, and for each tensor its name, type, shape and offset in bytes.

        Raises:
            RunFailed: there is no room for the weights.
        """
        names, dtypes, shapes, offsets = [], [], [], []
        if self.path is None:
            self.path = shared_path("weights")
            self.path.touch(mode=0o600)
            self._remove = weakref.finalize(self, _unlink, self.path)
        try:
            with self.path.open("r+b") as file:
                for name, tensor in source():
                    names.append(name)
                    dtypes.append(str(tensor.dtype).removeprefix("torch."))
                    shapes.append(list(tensor.shape))
                    offsets.append(file.seek(-(-file.tell() // ALIGNMENT) * ALIGNMENT))
                    file.write(_bytes(tensor))
        except OSError as error:
            raise RunFailed(
                f"weights cannot be written to {self.path}: {error}. In a container give it more shared memory "
                "(docker run --shm-size), or name a folder with room in LLMRL_SHARED_MEMORY"
            ) from error
        return {"path": str(self.path), "names": names, "dtypes": dtypes, "shapes": shapes, "offsets": offsets}

    def close(self) -> None:
        if self._remove is not None:
            self._remove()
        self.path = None


def read_staged(info: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the (name, tensor) pairs that `StagedWeights.stage` described, as views of the file."""
    import mmap

    check_path(Path(info["path"]))
    with open(info["path"], "rb") as file:
        # Not closed here: the tensors keep the mapping alive, and vLLM keeps some tensors for a while.
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    for name, dtype, shape, offset in zip(info["names"], info["dtypes"], info["shapes"], info["offsets"], strict=True):
        kind = getattr(torch, dtype)
        size = torch.Size(shape).numel() * kind.itemsize
        yield name, buffer[offset : offset + size].view(kind).reshape(shape)


def shared_path(kind: str) -> Path:
    """Return an unused path in shared memory (or the temporary folder), and remove what dead processes left there.

    The folder may be shared by machines and containers. A name says whose process made it: only where that one could be
    seen from here, and is gone, the file goes too.
    """
    folder, mine = shared_folder(), "_".join([PREFIX, _host(), _boot(), _pid_namespace()])
    for left in folder.glob(f"{mine}_*"):
        owner = left.name.removeprefix(f"{mine}_").partition("_")[0]
        if owner.isdigit() and not _alive(int(owner)):
            _remove(left)
    return folder / f"{mine}_{os.getpid()}_{kind}_{uuid.uuid4().hex[:8]}"


def remove_files_of(pid: int) -> None:
    """Remove what a process of this machine left in shared memory."""
    for left in shared_folder().glob("_".join([PREFIX, _host(), _boot(), _pid_namespace(), str(pid), "*"])):
        _remove(left)


def shared_folder() -> Path:
    """Return `$LLMRL_SHARED_MEMORY`, or the machine's shared memory, or its folder for temporary files."""
    default = SHARED_MEMORY if SHARED_MEMORY.is_dir() else tempfile.gettempdir()
    return Path(os.environ.get("LLMRL_SHARED_MEMORY") or default)


def check_path(path: Path) -> None:
    """Check that a server may open a file it was told of: one that a trainer has staged.

    Raises:
        PermissionError: it is anything else.
    """
    if not path.name.startswith(f"{PREFIX}_") or not stat.S_ISREG(path.lstat().st_mode):
        raise PermissionError(f"{path} is not a file of weights that a trainer has staged")


def _remove(left: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def _host() -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "-.") else "-" for c in socket.gethostname())


@cache
def _boot() -> str:
    """Return which start of which machine this is: process numbers mean nothing elsewhere, and begin anew with each."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    return "0"


def _pid_namespace() -> str:
    """Return in which container process numbers mean what they mean here."""
    with contextlib.suppress(OSError):
        return str(Path("/proc/self/ns/pid").stat().st_ino)
    return "0"


def check_names_and_shapes(given: Iterable[tuple[str, Any]], wanted: dict[str, tuple[int, ...]]) -> str:
    """Describe what is missing, unexpected, given twice or wrongly shaped, one per line. "" means all is right."""
    seen: dict[str, tuple[int, ...]] = {}
    wrong = []
    for name, shape in given:
        if name in seen:
            wrong.append(f"given twice: {name}")
        seen[name] = tuple(shape)
        if name not in wanted:
            wrong.append(f"unexpected: {name} {tuple(shape)}")
        elif tuple(shape) != wanted[name]:
            wrong.append(f"wrong shape: {name} {tuple(shape)}, expected {wanted[name]}")
    wrong += [f"missing: {name} {shape}" for name, shape in wanted.items() if name not in seen]
    return "\n  ".join(wrong[:20] + ([f"... and {len(wrong) - 20} more"] if len(wrong) > 20 else []))


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
