"""Frozen bases in 4 bits (QLoRA): what of them bitsandbytes can do here, and the weights they compute with.

A 4-bit layer computes with its weights dequantized, so that an engine that is sent those computes the same.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmrl.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from llmrl.model.options import ModelConfig


def check_device(config: ModelConfig, device: torch.device) -> None:
    """Check, before anything loads, that a base can be quantized here.

    Raises:
        UserError: there is no CUDA GPU, or no bitsandbytes.
    """
    if config.quantization is None:
        return
    if device.type != "cuda":
        raise UserError(
            f"model.quantization {config.quantization} needs a CUDA GPU, and this process runs on {device.type}: on "
            "other devices bitsandbytes' layers round differently with and without gradient; leave it out"
        )
    if find_spec("bitsandbytes") is None:
        raise UserError(f"model.quantization {config.quantization} needs bitsandbytes: pip install bitsandbytes")


def loading_options(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return what `from_pretrained` has to be told to quantize a model."""
    if config.quantization is None:
        return {}
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


def is_quantized(module: nn.Module) -> bool:
    """Return whether any parameter of a module or model is quantized."""
    return any(_packed(parameter) for parameter in module.parameters())


def check_quantized(model: nn.Module) -> None:
    """Check that a model which may be quantized can be trained.

    Raises:
        UserError: its layers quantize in a way that no engine can repeat, or it has no adapters to train.
    """
    kinds = {type(p).__name__ for p in model.parameters() if not p.is_floating_point()}
    if others := kinds - {"Params4bit"}:
        what = "8-bit layers round activations too" if "Int8Params" in others else "its layers cannot be read"
        raise UserError(
            f"the model is quantized ({', '.join(sorted(others))}), and {what}, so that no engine computes the same "
            "probabilities: load it in 4 bits (model.quantization nf4), or not quantized"
        )
    if kinds and not hasattr(model, "disable_adapter"):
        raise UserError("the weights of a quantized model cannot be trained: train adapters (model.lora)")


def to_device(model: Any, device: torch.device) -> Any:
    """Move a model, unless it is quantized: then it was loaded where it belongs."""
    return model if is_quantized(model) else model.to(device)


@torch.no_grad()
def weight_of(layer: nn.Module) -> Tensor:
    """Return the weight that a quantized layer computes with."""
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(layer).detach()


def _packed(parameter: nn.Parameter) -> bool:
    return type(parameter).__name__ == "Params4bit"
