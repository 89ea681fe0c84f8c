"""Low-rank adapters of the policy: the form engines load them in, and what-ifs that explain a wrong weight sync."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, cast

from llmrl.types import Adapter

if TYPE_CHECKING:
    from torch import Tensor, nn


def current_adapter(model: nn.Module) -> Adapter:
    """Return the trained adapter of a peft model in peft's own format, its tensors on the CPU."""
    import peft

    adapted: Any = model
    fields = {key: _plain(value) for key, value in active_config(model).to_dict().items()}
    state: dict[str, Tensor] = cast("Any", peft).get_peft_model_state_dict(model, adapter_name=adapted.active_adapter)
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}
    return Adapter(config=fields | {"inference_mode": True}, tensors=tensors)


def active_config(model: nn.Module) -> Any:
    """Return the peft configuration of a model's active adapter."""
    adapted: Any = model
    return adapted.peft_config[adapted.active_adapter]


SERVED_FIELDS = {
    *(
        "peft_type",
        "task_type",
        "peft_version",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *("r", "lora_alpha", "use_rslora", "lora_dropout", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}
"""Fields of a LoRA configuration that vLLM reads, or that change nothing for it."""


def adapter_obstacle(model: nn.Module) -> str | None:
    """Return why vLLM cannot serve the model's adapter beside the base weights, or None when it can."""
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    config = active_config(model)
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        return f"it serves LoRA only, not {kind}"
    plain = vars(peft.LoraConfig())
    used = [name for name, value in vars(config).items() if name in plain and value != plain[name]]
    if not isinstance(config.init_lora_weights, bool) and config.init_lora_weights != "gaussian":
        return f"init_lora_weights {config.init_lora_weights} changes the base weights"
    if further := sorted(set(used) - SERVED_FIELDS):
        return f"the adapter uses {', '.join(further)}"
    head = cast("Any", model).get_base_model().get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and (
            module is head
            or not isinstance(module, peft.tuners.lora.Linear)
            or type(module.base_layer) is not nn.Linear
        ):
            return f"the adapter is on {name}, which is not a linear layer of the trunk"
    return None


@contextlib.contextmanager
def scaled(model: nn.Module, factor: float) -> Generator[None]:
    """Multiply the adapter's update by `factor` inside the block. 0 leaves the base model alone."""
    layers: list[Any] = [module for module in model.modules() if isinstance(getattr(module, "scaling", None), dict)]
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            for name in layer.scaling:
                layer.scaling[name] *= factor
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


def _plain(value: Any) -> Any:
    """Convert a value to what JSON can hold."""
    if isinstance(value, set):
        return sorted(cast("set[Any]", value))
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in cast("dict[Any, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in cast("list[Any]", value)]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(getattr(value, "value", value))
