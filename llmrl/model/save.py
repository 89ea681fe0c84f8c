"""Write a language model for `from_pretrained`, with the parts of a multi-modal checkpoint that were not trained."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrl.model.attention import decoder_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def save_language_model(model: PreTrainedModel, folder: Path) -> None:
    """Save a model as the class that it was loaded from.

    `AutoModelForCausalLM` loads only the language model of some multi-modal checkpoints. What it left out (vision
    towers, projectors) is read again and saved unchanged beside the trained weights, so that the folder can do all that
    the original could.

    Args:
        model: the trained model.
        folder: is made.
    """
    whole = _whole_of(model)
    if whole is None:
        model.save_pretrained(folder)
        return
    found: Any = model
    decoder_of(whole).load_state_dict(decoder_of(found).state_dict())
    whole.get_output_embeddings().load_state_dict(found.get_output_embeddings().state_dict())
    whole.save_pretrained(folder)
    _copy_processor(found.config.name_or_path, folder)


def _whole_of(model: PreTrainedModel) -> Any:
    """Load the multi-modal model that `model` is a part of; None where it is whole itself."""
    import transformers

    path = str(model.config.name_or_path or "")
    try:
        config = transformers.AutoConfig.from_pretrained(path) if path else None
    except (OSError, ValueError):  # made in memory, or its folder is gone
        return None
    if config is None or type(config.get_text_config()) is type(config):
        return None
    names = config.architectures or []
    if not names or names[0] == type(model).__name__ or not hasattr(transformers, names[0]):
        return None
    return getattr(transformers, names[0]).from_pretrained(path, dtype=model.dtype)


def _copy_processor(path: str, folder: Path) -> None:
    from transformers.utils.hub import cached_file

    for name in PROCESSOR_FILES:
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            shutil.copy(file, folder / name)
