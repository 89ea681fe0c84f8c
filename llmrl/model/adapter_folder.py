"""Models that are saved as an adapter: which base they belong to, and the model that the two are together.

In: the options of a model whose path holds an adapter_config.json. Out: a peft model, or its merged weights.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrl.errors import UserError, first_line
from llmrl.model.adapters import check_kind

if TYPE_CHECKING:
    from torch import Tensor

    from llmrl.model.options import ModelConfig

WEIGHT_FILES = ("model*.safetensors", "pytorch_model*.bin")
ADAPTER_FILES = "adapter_*"
HINT = "name the folder or hub id of the base that it was trained on with --model.base"


@dataclass(frozen=True, kw_only=True)
class SavedAdapter:
    """An adapter that was saved with peft."""

    path: str
    """Its folder or hub id."""
    revision: str | None
    config: Any
    """Its peft configuration."""
    base: str
    """Folder or hub id of the model that it changes."""
    base_revision: str | None

    @property
    def inside_base(self) -> bool:
        """Whether its files lie among those of the base."""
        return os.path.realpath(self.base) == os.path.realpath(self.path)


def find_adapter(model: ModelConfig) -> SavedAdapter | None:
    """Return the adapter at `model.path`, or None where that is a whole model.

    Raises:
        UserError: the adapter's base is not known, or options of adapters are given for a whole model.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        file = find_adapter_config_file(model.path, revision=model.revision)
    except (OSError, ValueError):  # neither a folder nor a hub id, as `tiny:ARCH`; what loads the model says so
        file = None
    if file is None:
        for name in ("adapter", "base"):
            if (value := getattr(model, name)) is not None:
                raise UserError(
                    f"model.{name} {value} is given, but model.path {model.path} is a whole model (it has no "
                    f"adapter_config.json): leave it out"
                )
        return None
    import peft

    try:
        config = peft.PeftConfig.from_pretrained(str(Path(file).parent))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"model.path {model.path}: its adapter_config.json cannot be read by peft ({error})") from error
    base = _base(model, config.base_model_name_or_path)
    check_kind(config, f"model.path {model.path}")
    same = base == config.base_model_name_or_path
    return SavedAdapter(
        path=model.path,
        revision=model.revision,
        config=config,
        base=base,
        base_revision=config.revision if same else None,
    )


def _base(model: ModelConfig, named: str | None) -> str:
    folder = Path(model.path)
    if model.base is not None:
        return model.base
    if (folder / "config.json").is_file() and any(file for kind in WEIGHT_FILES for file in folder.glob(kind)):
        return model.path  # transformers reads such a folder in this way too
    if not named:
        raise UserError(f"model.path {model.path} is an adapter, whose adapter_config.json names no base: {HINT}")
    for place in (Path(named), folder / named):
        if place.is_dir():
            return str(place)
    if named.startswith(("/", ".", "~")) or named.count("/") > 1:
        raise UserError(f"model.path {model.path} is an adapter of {named}, which is not there: {HINT}")
    return named  # a hub id


def load_adapter(base: Any, adapter: SavedAdapter) -> Any:
    """Return the base with the saved adapter in its layers, ready to be trained.

    The base's embeddings get the number of rows that the adapter was trained with.

    Raises:
        UserError: the adapter does not fit the base.
    """
    import peft

    hub: dict[str, Any] = {} if adapter.revision is None else {"revision": adapter.revision}
    try:
        tensors = peft.load_peft_weights(adapter.path, device="cpu", **hub)
        rows = _embedding_rows(base, adapter.config, tensors)
        if rows is not None and rows != base.get_input_embeddings().weight.shape[0]:
            base.resize_token_embeddings(rows)
        model: Any = peft.PeftModel.from_pretrained(base, adapter.path, is_trainable=True, **hub)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"model.path {adapter.path}: the adapter does not fit its base {adapter.base} ({first_line(error)}); {HINT}"
        ) from error
    model.peft_config[model.active_adapter].base_model_name_or_path = _absolute(adapter.base)
    return model


def _embedding_rows(base: Any, config: Any, tensors: dict[str, Tensor]) -> int | None:
    """Return how many rows the embeddings had when the adapter was trained, where its tensors tell."""
    embeddings = [m for m in (base.get_input_embeddings(), base.get_output_embeddings()) if m is not None]
    names = {name for name, module in base.named_modules() if any(module is m for m in embeddings)}
    dimensions = {"weight": 0, "lora_embedding_A": 1, "lora_B.weight": 0}
    for name in names:
        for ending, dimension in dimensions.items():
            if (tensor := tensors.get(f"base_model.model.{name}.{ending}")) is not None:
                return tensor.shape[dimension]
    trained = getattr(config, "trainable_token_indices", None) or []
    last = max((i for part in (trained.values() if isinstance(trained, dict) else [trained]) for i in part), default=-1)
    return last + 1 if last >= base.get_input_embeddings().weight.shape[0] else None


def without_adapter_files(folder: str) -> tempfile.TemporaryDirectory[str]:
    """Return a folder with links to the files of `folder` that are not the adapter's, so that only the base loads."""
    links = tempfile.TemporaryDirectory(prefix="llmrl-base-")
    hidden = {file.name for file in Path(folder).glob(ADAPTER_FILES)}
    for file in Path(folder).iterdir():
        if file.name not in hidden:
            (Path(links.name) / file.name).symlink_to(file.resolve())
    return links


def _absolute(base: str) -> str:
    return str(Path(base).resolve()) if Path(base).is_dir() else base
