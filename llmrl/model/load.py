"""Load tokenizers and causal language models by name, with the adapters that they are saved as or are to get."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmrl.errors import UserError, first_line
from llmrl.model.adapter_folder import SavedAdapter, find_adapter, load_adapter, without_adapter_files
from llmrl.model.adapters import check_kind, check_model, differences
from llmrl.model.positions import longest_exact
from llmrl.model.quantized import loading_options
from llmrl.types import ModelLimits

if TYPE_CHECKING:
    from torch import nn
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from llmrl.model.options import ModelConfig


TINY = "tiny:"
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a hub model or local folder, or the byte tokenizer of a tiny model (`tiny:ARCH`).

    Raises:
        UserError: no tokenizer can be loaded.
    """
    if config.path.startswith(TINY):
        from llmrl.tiny import byte_tokenizer

        return byte_tokenizer()
    from transformers import AutoTokenizer

    hint = "save one beside the model, or name another folder or hub id with --model.tokenizer"
    adapter = None if config.tokenizer else find_adapter(config)
    if adapter is not None and not adapter.inside_base and not _has_tokenizer(config.path):
        return load_tokenizer(_of_base(config, adapter))
    source = config.tokenizer or config.path
    if Path(source).is_dir() and not _has_tokenizer(source):
        # transformers would silently make an empty tokenizer of the model's class.
        raise UserError(f"model {source!r}: the folder holds no tokenizer; {hint}")
    options = {} if config.tokenizer else {"revision": config.revision}
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code, **options)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise UserError(
            f"model {source!r}: no tokenizer can be loaded from it ({first_line(error)}); {hint}"
        ) from error


def base_of(config: ModelConfig) -> ModelConfig:
    """Return the options of a whole model: where `path` is an adapter, its base with the adapter's tokenizer."""
    adapter = find_adapter(config)
    if adapter is None:
        return config
    own = config.path if _has_tokenizer(config.path) else None
    return replace(_of_base(config, adapter), tokenizer=config.tokenizer or own)


def _of_base(config: ModelConfig, adapter: SavedAdapter) -> ModelConfig:
    return replace(config, path=adapter.base, revision=adapter.base_revision, adapter=None, base=None)


def _has_tokenizer(source: str) -> bool:
    """Return whether a folder or a repository of the hub holds a tokenizer."""
    if Path(source).is_dir():
        return any(file for kind in TOKENIZER_FILES for file in Path(source).glob(kind))
    from transformers.utils.hub import has_file

    return has_file(source, "tokenizer_config.json")


def load_generation_config(config: ModelConfig) -> GenerationConfig | None:
    """Load the model's generation configuration (its stop tokens), or return None where the folder has none."""
    from transformers import GenerationConfig

    if config.path.startswith(TINY):
        return None
    try:
        return GenerationConfig.from_pretrained(config.path, revision=config.revision or "main")
    except OSError:
        adapter = find_adapter(config)
        if adapter is None or adapter.inside_base:
            return None
        return load_generation_config(_of_base(config, adapter))


def model_limits(config: ModelConfig, loaded: Any = None, *, longest: int | None = None) -> ModelLimits:
    """Return what a model can take, as far as its configuration says, without loading its weights.

    Args:
        config: which model.
        loaded: the model itself, if it was given in Python.
        longest: tokens that the engine serves at most, if it says so.
    """
    if loaded is None and config.path.startswith(TINY):
        from llmrl.tiny import MAX_POSITIONS

        return ModelLimits(context=min(longest or MAX_POSITIONS, MAX_POSITIONS))
    adapter = find_adapter(config) if loaded is None else None
    found = (
        loaded.config if loaded is not None else _read_config(config if adapter is None else _of_base(config, adapter))
    )
    if found is None:
        return ModelLimits(context=longest)
    text = found.get_text_config()
    contexts = (longest, getattr(text, "max_position_embeddings", None), longest_exact(found))
    # Adapters may have added rows to the embedding, which only the loaded model knows.
    vocab_size = getattr(text, "vocab_size", None) if adapter is None and loaded is None else None
    return ModelLimits(context=min(filter(None, contexts), default=None), vocab_size=vocab_size)


def _read_config(config: ModelConfig) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            config.path, revision=config.revision or "main", trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, ImportError, KeyError):  # loading the model will say what is wrong
        return None


def load_model(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    trained: bool = False,
    device: torch.device | None = None,
) -> Any:
    """Load a causal language model from the hub or a local folder, or make a tiny random one (`tiny:ARCH`).

    Args:
        config: which model, and the type it computes in.
        tokenizer: of the tiny model.
        seed: of the tiny model's weights.
        trained: all of it will be trained, so that it is loaded in float32 whatever type it computes in. The frozen
            base of an adapter that is trained further is not.
        device: where to put a quantized model; others are loaded on the CPU.

    Returns:
        A transformers model; where `path` is an adapter, a peft model that goes on training it, or with `adapter merge`
        its base with the adapter merged in.

    Raises:
        UserError: the model cannot be loaded, or the architecture is unknown.
    """
    adapter = find_adapter(config)
    merges = adapter is not None and config.adapter == "merge"  # in float32, so that it is rounded once
    wide = merges or (trained and adapter is None)
    dtype = torch.float32 if wide else getattr(torch, config.dtype)
    if config.path.startswith(TINY):
        return _tiny(config, tokenizer, seed=seed, dtype=dtype)
    if adapter is None:
        return _load_whole(config, dtype, device)
    if adapter.inside_base:
        with without_adapter_files(config.path) as links:
            base: Any = _load_whole(_of_base(config, replace(adapter, base=links)), dtype, device)
        base.name_or_path = base.config._name_or_path = config.path
    else:
        base = merged(load_model(_of_base(config, adapter), tokenizer, seed=seed, trained=merges, device=device))
    model = load_adapter(base, adapter)
    if merges:
        return merged(model)
    if (fresh := config.fresh_adapters) is not None and (differing := differences(adapter_config(fresh), model)):
        raise UserError(
            f"model.path {config.path} is an adapter already, and {'model.lora' if config.lora else 'model.peft'} "
            f"asks for another ({'; '.join(differing)}): leave that out to train this adapter further, or set "
            "model.adapter merge to merge it into its base and train a fresh one on that"
        )
    return model


def merged(model: Any) -> Any:
    """Return the language model with the adapters of a peft model merged in, if it is one."""
    if not hasattr(model, "merge_and_unload"):
        return model
    whole = model.merge_and_unload()
    whole.requires_grad_(True)
    return whole


def _tiny(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    from llmrl.tiny import build_tiny_model

    model = build_tiny_model(
        config.path.removeprefix(TINY),
        vocab_size=len(tokenizer),
        seed=seed,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    for parameter in model.parameters():  # not `model.to`, which would round the frequencies of the positions too
        parameter.data = parameter.data.to(dtype)
    model.set_attn_implementation(config.attn_implementation)
    return model


def _load_whole(config: ModelConfig, dtype: torch.dtype, device: torch.device | None) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            config.path,
            revision=config.revision,
            dtype=dtype,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
            **loading_options(config, dtype, device or torch.device("cpu")),
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"model {config.path!r} cannot be loaded: {first_line(error)}") from error


def adapter_config(adapters: Any) -> Any:
    """Return peft's configuration of fresh adapters.

    Args:
        adapters: `LoraConfig`, a mapping with peft's own names (`model.peft`), or a configuration of peft's.

    Raises:
        UserError: peft does not know the kind or a field, or it is not for language models.
    """
    import peft

    place = "model.peft"
    try:
        if isinstance(adapters, peft.PeftConfig):
            config, place = copy.copy(adapters), "peft_config"
        elif isinstance(adapters, dict):
            config = peft.get_peft_config(adapters)
        else:
            config, place = peft.LoraConfig(**asdict(adapters)), "model.lora"
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{place}: {first_line(error)}") from error
    check_kind(config, place)
    config.task_type = peft.TaskType.CAUSAL_LM
    return config


def add_lora(model: PreTrainedModel, adapters: Any, *, seed: int) -> nn.Module:
    """Wrap `model` with fresh adapters, which alone are trained.

    Args:
        model: changed in place; the wrapper shares its layers.
        adapters: what `adapter_config` takes.
        seed: of their initial weights. The process's random state is left as it was.

    Raises:
        UserError: no layer matches `target_modules`.
    """
    import peft

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            wrapped = peft.get_peft_model(model, adapter_config(adapters))
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"model.lora: {first_line(error)}") from error
    check_model(wrapped)
    return wrapped
