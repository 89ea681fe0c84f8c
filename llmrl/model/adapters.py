"""Adapters of the policy (peft): which can be trained, their reference, and the form engines load them in."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from llmrl.errors import UserError
from llmrl.types import Adapter

if TYPE_CHECKING:
    from torch import Tensor, nn

CHANGES_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Values of `init_lora_weights` that take what the adapter starts with out of the base's weights."""


def check_kind(config: Any, place: str) -> None:
    """Check that adapters of a peft configuration can be trained here.

    Raises:
        UserError: they are virtual tokens instead of changed layers, or are not made for a language model.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise UserError(
            f"{place}: {kind} adds virtual tokens to the prompt, which neither packed rows nor engines have; use an "
            "adapter that changes layers, such as LORA"
        )
    task = getattr(config.task_type, "value", config.task_type)
    if task not in (None, "CAUSAL_LM"):
        raise UserError(f"{place} is an adapter for {task}, not for a language model (CAUSAL_LM)")


def check_model(model: nn.Module) -> None:
    """Check that training a model's adapters trains what the user sees, where it has any.

    Raises:
        UserError: the adapter is frozen, is of a kind that cannot be trained, or is one of several that are active; or
            transformers put it into the layers itself.
    """
    adapted: Any = model
    if not hasattr(model, "disable_adapter"):
        if getattr(model, "_hf_peft_config_loaded", False):
            raise UserError(
                "the model holds an adapter that transformers loaded, which it cannot train: load the base and then "
                "peft.PeftModel.from_pretrained(base, FOLDER, is_trainable=True), or give the adapter's folder as model"
            )
        return
    active = adapted.active_adapters if hasattr(adapted, "active_adapters") else [adapted.active_adapter]
    if len(active) != 1 or not isinstance(adapted.active_adapter, str):
        raise UserError(f"the model has several active adapters ({active}): choose one with model.set_adapter(NAME)")
    check_kind(active_config(model), f"the adapter {active[0]!r}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            f"the adapter {active[0]!r} is frozen, so there is nothing to train: load it with "
            "peft.PeftModel.from_pretrained(base, FOLDER, is_trainable=True)"
        )


IGNORED = (
    "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version", "auto_mapping",
    "init_lora_weights", "init_weights", "loftq_config", "eva_config", "corda_config", "lora_dropout",
)  # fmt: skip
"""Fields of a peft configuration that do not tell two adapters apart."""


def differences(wanted: Any, model: nn.Module) -> list[str]:
    """Return how a peft configuration differs from that of the model's adapter, a phrase for each field."""
    has: dict[str, Any] = active_config(model).to_dict()
    asked: dict[str, Any] = wanted.to_dict()
    if has["peft_type"] != asked["peft_type"]:
        return [f"peft_type {plain(asked['peft_type'])}, not {plain(has['peft_type'])}"]
    if asked.get("target_modules") == "all-linear" and _on_all_linear(model):
        asked["target_modules"] = has["target_modules"]
    return [
        f"{name} {plain(asked[name])}, not {plain(has.get(name))}"
        for name in asked
        if name not in IGNORED and (plain(asked[name]) or None) != (plain(has.get(name)) or None)
    ]


def _on_all_linear(model: nn.Module) -> bool:
    """Return whether every linear layer but the output head carries an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base: Any = model.get_base_model()  # pyright: ignore
    adapted = tuple(f"{name}." for name, module in base.named_modules() if isinstance(module, BaseTunerLayer))
    linear = {name: module for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    return all(name.startswith(adapted) or module is base.get_output_embeddings() for name, module in linear.items())


def base_is_start(model: nn.Module) -> bool:
    """Return whether the model without its adapter computes what it computes with it, as with fresh LoRA."""
    originals = {
        f"{name}.modules_to_save.{adapter}.{inner}": parameter
        for name, module in model.named_modules()
        if hasattr(module, "modules_to_save") and hasattr(module, "original_module")
        for adapter in module.modules_to_save  # pyright: ignore
        for inner, parameter in module.original_module.named_parameters()  # pyright: ignore
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or ".lora_A." in name or ".lora_embedding_A." in name:
            continue
        if name in originals:
            if not torch.equal(parameter, originals[name]):
                return False
        elif not (".lora_B." in name or ".lora_embedding_B." in name) or parameter.any():
            return False
    return True


def base_is_changed(model: nn.Module) -> bool:
    """Return whether the adapter's initialization wrote to the base's weights."""
    start = getattr(active_config(model), "init_lora_weights", True)
    return isinstance(start, str) and start.lower().startswith(CHANGES_THE_BASE)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the trained parameters, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@contextlib.contextmanager
def replaced(model: nn.Module, values: dict[str, Tensor]) -> Generator[None]:
    """Let the parameters named in `values` have these values inside the block. Nothing is copied."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in values}
    before = {name: parameter.data for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data = values[name]
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]


def current_adapter(model: nn.Module) -> Adapter:
    """Return the trained adapter of a peft model in peft's own format, its tensors on the CPU."""
    import peft

    adapted: Any = model
    fields = {key: plain(value) for key, value in active_config(model).to_dict().items()}
    state: dict[str, Tensor] = cast("Any", peft).get_peft_model_state_dict(model, adapter_name=adapted.active_adapter)
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}
    return Adapter(config=fields | {"inference_mode": True}, tensors=tensors)


def save(model: nn.Module, folder: Path) -> None:
    """Write the trained adapter of a peft model into `folder`, whatever its name."""
    adapted: Any = model
    name: str = adapted.active_adapter
    adapted.save_pretrained(folder, selected_adapters=[name])
    if name != "default":  # peft puts others into a folder of their name
        for file in (folder / name).iterdir():
            file.replace(folder / file.name)
        (folder / name).rmdir()


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

    if reason := configured_obstacle(active_config(model)):
        return reason
    head = cast("Any", model).get_base_model().get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and (
            module is head
            or not isinstance(module, peft.tuners.lora.Linear)
            or type(module.base_layer) is not nn.Linear
        ):
            return f"the adapter is on {name}, which is not a linear layer of the trunk"
    return None


def configured_obstacle(config: Any) -> str | None:
    """Return why vLLM cannot serve adapters of a peft configuration beside the base weights, or None."""
    import peft

    kind = plain(config.peft_type)
    if kind != "LORA":
        return f"it serves LoRA only, not {kind}"
    defaults = vars(peft.LoraConfig())
    used = [k for k, value in vars(config).items() if k in defaults and (value or None) != (defaults[k] or None)]
    if not isinstance(config.init_lora_weights, bool) and config.init_lora_weights != "gaussian":
        return f"init_lora_weights {config.init_lora_weights} changes the base weights"
    if further := sorted(set(used) - SERVED_FIELDS):
        return f"the adapter uses {', '.join(further)}"
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


def plain(value: Any) -> Any:
    """Convert a value of a peft configuration to what JSON and YAML can hold."""
    if isinstance(value, set):
        return sorted(cast("set[Any]", value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in cast("dict[Any, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in cast("list[Any]", value)]
    value = getattr(value, "value", value)  # of an enumeration
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
