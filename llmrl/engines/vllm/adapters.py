"""Adapters for vLLM: folders in shared memory, in peft's format. Needs no vLLM; servers read the same folders."""

from __future__ import annotations

import contextlib
import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llmrl.engines.vllm.digests import adapter_digests
from llmrl.engines.vllm.transfer import shared_path
from llmrl.errors import RunFailed

if TYPE_CHECKING:
    from llmrl.types import Adapter, WeightSource

ADAPTERS_KEPT = 4
"""Newest versions whose folders stay, because requests may still run under them."""


class AdapterFolders:
    """One folder per version, numbered from 1. Old ones are removed; `close` or the end of the process removes all."""

    def __init__(self) -> None:
        self.count = 0
        self.saved: dict[str, str] = {}
        """Digests of the newest one, by name."""
        self._root: Path | None = None
        self._kept: list[int] = []
        self._remove: weakref.finalize | None = None

    def save(self, adapter: Adapter) -> tuple[Path, list[int]]:
        """Write `adapter` to a new folder, number `count`.

        Returns:
            The folder, and the numbers of the folders that were removed.
        """
        from safetensors.torch import save_file

        if self._root is None:
            self._root = shared_path("adapters")
            self._remove = weakref.finalize(self, shutil.rmtree, self._root, ignore_errors=True)
        self.count += 1
        folder = self._root / str(self.count)
        try:
            folder.mkdir(parents=True, mode=0o700)
            save_file(adapter.tensors, folder / "adapter_model.safetensors")
            (folder / "adapter_config.json").write_text(json.dumps(adapter.config))
        except OSError as error:
            raise RunFailed(f"the adapter cannot be written to {folder}: {error}") from error
        self.saved = adapter_digests(adapter)
        self._kept.append(self.count)
        old, self._kept = self._kept[:-ADAPTERS_KEPT], self._kept[-ADAPTERS_KEPT:]
        for number in old:
            shutil.rmtree(self._root / str(number), ignore_errors=True)
        return folder, old

    def close(self) -> None:
        if self._remove is not None:
            self._remove()


@contextlib.contextmanager
def save_base(source: WeightSource) -> Iterator[str]:
    """Provide a folder in shared memory with the tensors of `source`, for as long as vLLM needs to load them."""
    from safetensors.torch import save_file

    folder = shared_path("base")
    try:
        folder.mkdir(mode=0o700)
        save_file(
            {name: tensor.contiguous() for name, tensor in source()}, folder / "model.safetensors", {"format": "pt"}
        )
        yield str(folder)
    except OSError as error:
        raise RunFailed(f"the base weights cannot be written to {folder}: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
