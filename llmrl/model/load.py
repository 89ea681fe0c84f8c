"""Load tokenizers and causal language models by name, and add adapters to them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from llmrl.errors import UserError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from llmrl.model.options import LoraConfig, ModelConfig

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

    source = config.tokenizer or config.path
    hint = "save one beside the model, or name another folder or hub id with --model.tokenizer"
    if Path(source).is_dir() and not any(file for kind in TOKENIZER_FILES for file in Path(source).glob(kind)):
        # transformers would silently make an empty tokenizer of the model's class.
        raise UserError(f"model {source!r}: the folder holds no tokenizer; {hint}")
    options = {} if config.tokenizer else {"revision": config.revision}
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code, **options)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise UserError(
            f"model {source!r}: no tokenizer can be loaded from it ({_first_line(error)}); {hint}"
        ) from error


def load_generation_config(config: ModelConfig) -> GenerationConfig | None:
    """Load the model's generation configuration (its stop tokens), or return None where the folder has none."""
    from transformers import GenerationConfig

    if config.path.startswith(TINY):
        return None
    try:
        return GenerationConfig.from_pretrained(config.path, revision=config.revision or "main")
    except OSError:
        return None


def load_model(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, trained: bool = False
) -> PreTrainedModel:
    """Load a causal language model from the hub or a local folder, or make a tiny random one (`tiny:ARCH`).

    Args:
        config: which model, and the type it computes in.
        tokenizer: of the tiny model.
        seed: of the tiny model's weights.
        trained: all of it will be trained, so that it is loaded in float32 whatever type it computes in.

    Raises:
        UserError: the model cannot be loaded, or the architecture is unknown.
    """
    dtype = torch.float32 if trained else getattr(torch, config.dtype)
    if config.path.startswith(TINY):
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
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            config.path,
            revision=config.revision,
            dtype=dtype,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"model {config.path!r} cannot be loaded: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def add_lora(model: PreTrainedModel, config: LoraConfig, *, seed: int) -> nn.Module:
    """Wrap `model` with fresh adapters, which alone are trained.

    Args:
        model: changed in place; the wrapper shares its layers.
        config: the adapters' options.
        seed: of their initial weights. The process's random state is left as it was.

    Raises:
        UserError: no layer matches `target_modules`.
    """
    import peft

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **asdict(config)))
        except ValueError as error:
            raise UserError(f"model.lora: {_first_line(error)}") from error
