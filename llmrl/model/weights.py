"""The weights that engines are sent: a model's tensors with its adapters merged in, under the names of a checkpoint.

transformers keeps some layers in another form than their checkpoint (the experts of a layer are one tensor in memory
and many on disk). Both directions of its own conversion are applied here to one layer at a time, so that no more than
a layer is ever held twice.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmrl.errors import UserError
from llmrl.model.quantized import is_quantized, weight_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

Named = tuple[str, "Tensor"]


def checkpoint_weights(
    model: PreTrainedModel, *, merged: bool, served: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor.detach()
) -> Iterator[Named]:
    """Yield (name, tensor) of what `model.save_pretrained` would write, one layer at a time.

    Tied weights appear once. The model's own tensors are never written to.

    Args:
        model: a transformers model; peft may have put adapters into it.
        merged: with the active adapters merged in, each through peft's own merge on a copy of its layer, and trained
            copies of layers (`modules_to_save`) in place of the originals. Otherwise as if there were no adapters.
        served: returns a tensor as an engine should have it, from its name in memory: whole, in the type to serve.
    """
    from transformers.core_model_loading import revert_weight_conversion

    for parts in _by_layer(_distinct(model, merged=merged)):
        held = {
            name: served(name, tensor) for part in parts for name, tensor in part.read().items() if name in part.names
        }
        yield from revert_weight_conversion(model, held).items()


def memory_weights(model: PreTrainedModel, checkpoint: Iterable[Named]) -> Iterator[Named]:
    """Convert a stream of checkpoint tensors to the names and shapes that `model` has in memory.

    It is what `from_pretrained` does, for a stream that holds the tensors of a layer one after another. Tensors that
    have their name in memory already are passed on.
    """
    from transformers import conversion_mapping, core_model_loading

    mapping = conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
    renamings = [each for each in mapping if isinstance(each, core_model_loading.WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, core_model_loading.WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    known = model.state_dict()
    for _, layer in itertools.groupby(checkpoint, lambda item: _layer(item[0])):
        targets: dict[str, Any] = {}
        for name, tensor in sorted(layer, key=lambda item: core_model_loading.dot_natural_key(item[0])):
            new, pattern = core_model_loading.rename_source_key(name, renamings, converters)
            if new not in known and name in known:
                new, pattern = name, None
            if pattern is None:
                transform = targets.setdefault(new, core_model_loading.WeightRenaming(name, new))
            else:
                transform = targets.setdefault(new, copy.deepcopy(by_pattern[pattern]))
            transform.add_tensor(new, name, pattern or name, tensor)
        for first, transform in targets.items():
            for name, found in transform.convert(first, model=model, config=model.config).items():
                yield name, found[0] if isinstance(found, list) else found


def distinct_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by their names in memory, tied ones once. Writing to them is allowed."""
    parts = _distinct(model, merged=False)
    return {name: tensor.data for part in parts for name, tensor in part.read().items()}


def checkpoint_shapes(config: PretrainedConfig) -> list[dict[str, tuple[int, ...]]] | None:
    """Return names and shapes of the tensors in a checkpoint of an architecture, tied ones once.

    There can be more than one answer: a language model taken out of a larger one may or may not keep that one's prefix
    in its names. The result is None for an architecture that transformers cannot build by itself.
    """
    from transformers import AutoModelForCausalLM
    from transformers.conversion_mapping import get_model_conversion_mapping

    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    except (ValueError, ImportError, KeyError, AttributeError):
        return None
    model.tie_weights()
    answers = [{name: tuple(tensor.shape) for name, tensor in checkpoint_weights(model, merged=False)}]
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)  # with its changes of prefix
    prefixed = {name: tuple(tensor.shape) for name, tensor in checkpoint_weights(model, merged=False)}
    return answers if prefixed == answers[0] else [*answers, prefixed]


def served_config(model: PreTrainedModel) -> PretrainedConfig:
    """Return the configuration under which an engine computes what `model` computes with its adapters.

    It is the model's own, except where an adapter changes one of two tied weights (the input embedding or the output
    head): then they are not tied any more. The weights of a quantized model are served as it computes with them.
    """
    served, base = (
        {name for part in _distinct(model, merged=merged) for name in part.names} for merged in (True, False)
    )
    quantized = is_quantized(model)
    if served == base and not quantized:
        return model.config
    config = copy.deepcopy(model.config)
    for each in (config, config.get_text_config()):
        if served != base:
            each.tie_word_embeddings = False
        if quantized and hasattr(each, "quantization_config"):
            del each.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
    return config


def head_weight(head: nn.Module) -> Tensor:
    """Return the weight with which an output head computes, differentiable in an adapter on it.

    Raises:
        UserError: an adapter of a kind whose update is not a matrix that is added to the weight.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer: Any = head
    if not isinstance(head, BaseTunerLayer) or head.disable_adapters:
        return layer.weight  # peft's wrappers of trained copies and trained tokens give theirs
    if hasattr(layer, "get_merged_weights"):
        return layer.get_merged_weights(layer.active_adapters)
    active = [name for name in layer.active_adapters if name in getattr(layer, "lora_A", ())]
    if not isinstance(head, LoraLayer) or any(name in layer.lora_variant or layer.lora_bias[name] for name in active):
        raise UserError(
            f"the adapter on the output head ({type(layer).__module__}) is of a kind that log-probabilities cannot be "
            "computed with: give the head plain LoRA (no DoRA, no lora_bias), train a copy of it (modules_to_save), or "
            "leave it out of target_modules"
        )
    return layer.weight + sum(layer.get_delta_weight(name) for name in active)


def merge_obstacle(model: nn.Module) -> str | None:
    """Return why the adapters of `model` cannot be merged into weights of its own architecture, or None."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        layer: Any = module
        if not isinstance(module, BaseTunerLayer):
            continue
        biases: dict[str, bool] = getattr(layer, "lora_bias", {})
        if any(biases.get(each) for each in layer.active_adapters) and layer.get_base_layer().bias is None:
            return f"lora_bias adds a bias to {name}, which has none"
        if is_quantized(layer.get_base_layer()) and (not hasattr(layer, "lora_A") or layer.lora_variant):
            return f"the adapter on {name}, which is quantized, is of another kind than plain LoRA"
        if not hasattr(layer, "merge"):
            return f"adapters of the kind {type(layer).__module__}.{type(layer).__name__} do not merge"
    return None


@dataclass(frozen=True)
class _Part:
    """Some tensors of a model that can only be read together."""

    names: dict[str, Hashable]
    """Name in memory -> what tells tensors apart: tied ones have the same."""
    read: Callable[[], dict[str, Tensor]]


def _parts(module: nn.Module, prefix: str, *, merged: bool) -> Iterator[_Part]:
    """Take a module apart, as it would be without peft's wrappers."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    inner: Any = module
    if isinstance(module, ModulesToSaveWrapper):
        active = [name for name in inner.active_adapters if name in inner.modules_to_save]
        trained = inner.modules_to_save[active[0]] if merged and active else inner.original_module
        yield from _parts(trained, prefix, merged=merged)
    elif isinstance(module, TrainableTokensWrapper):
        tokens = inner.token_adapter
        yield from _parts(tokens, prefix, merged=merged)
    elif isinstance(module, BaseTunerLayer):
        base = inner.get_base_layer()
        if merged:
            yield _merged_part(inner, base, prefix)
        else:
            yield from _parts(base, prefix, merged=False)
    else:
        hidden = module._non_persistent_buffers_set
        own = {**module._parameters, **{name: b for name, b in module._buffers.items() if name not in hidden}}
        quantized = is_quantized(module) and not [*module.children()]
        for name, tensor in own.items():
            if quantized and name == "weight":
                yield _Part({prefix + name: id(tensor)}, lambda: {prefix + "weight": weight_of(module)})
            elif tensor is not None:
                yield _Part({prefix + name: id(tensor)}, lambda name=prefix + name, tensor=tensor: {name: tensor})
        for name, child in module.named_children():
            yield from _parts(child, f"{prefix}{name}.", merged=merged)


def _merged_part(layer: Any, base: nn.Module, prefix: str) -> _Part:
    """Return a layer with its adapters merged in; they are merged when it is read."""
    # Tied layers that share their trained tokens stay tied; any other adapter makes a weight that nothing else has.
    shared = getattr(layer, "trainable_tokens_delta", None)
    names: dict[str, Hashable] = {
        name: (id(layer) if shared is None else id(shared), identity)
        for part in _parts(base, prefix, merged=True)
        for name, identity in part.names.items()
    }

    @torch.no_grad()
    def read() -> dict[str, Tensor]:
        if is_quantized(base):  # peft would quantize the sum
            found = {name: tensor for part in _parts(base, prefix, merged=True) for name, tensor in part.read().items()}
            update = sum(layer.get_delta_weight(name) for name in layer.active_adapters if name in layer.lora_A)
            return found | {prefix + "weight": found[prefix + "weight"].float() + update}
        base_layer = _copied(layer)
        while hasattr(base_layer, "base_layer"):  # one inside the other, where several parameters of a layer have one
            base_layer.merge(safe_merge=False)
            base_layer = base_layer.base_layer
        return {
            name: tensor for part in _parts(base_layer, prefix, merged=True) for name, tensor in part.read().items()
        }

    return _Part(names, read)


def _copied(layer: Any) -> Any:
    """Copy an adapted layer; the copy shares the adapters' tensors, which merging only reads."""
    base = {id(parameter) for parameter in layer.get_base_layer().parameters()}
    shared: list[Any] = [parameter for parameter in layer.parameters() if id(parameter) not in base]
    inner = layer
    while hasattr(inner, "base_layer"):
        shared += [each for name, child in inner.named_children() if name != "base_layer" for each in child.children()]
        # what peft remembers of a layer that this one's adapter is tied to
        shared += [getattr(inner, "kwargs", None), getattr(inner, "_tied_adapter", None)]
        inner = inner.base_layer
    return copy.deepcopy(layer, {id(each): each for each in shared})


def _distinct(model: PreTrainedModel, *, merged: bool) -> list[_Part]:
    """Take a model apart without tensors that repeat another one, and without those that transformers never saves."""
    parts = list(_parts(model, "", merged=merged))
    repeats = set(getattr(model, "all_tied_weights_keys", None) or ())
    ignored = set(model._keys_to_ignore_on_save or ())
    kept: dict[Hashable, str] = {}
    for name, identity in ((n, i) for part in parts for n, i in part.names.items()):
        if identity not in kept or (kept[identity] in repeats and name not in repeats):
            kept[identity] = name
    names = set(kept.values()) - ignored
    chosen = [_Part({n: i for n, i in part.names.items() if n in names}, part.read) for part in parts]
    return [part for part in chosen if part.names]


def _layer(name: str) -> str:
    """Return the part of a name up to its first number: which layer it belongs to. Outside of layers it is empty."""
    pieces = name.split(".")
    number = next((i for i, piece in enumerate(pieces) if piece.isdigit()), None)
    return "" if number is None else ".".join(pieces[: number + 1])


def _by_layer(parts: Iterable[_Part]) -> Iterable[list[_Part]]:
    layers: dict[str, list[_Part]] = {}
    for part in parts:
        layers.setdefault(_layer(next(iter(part.names))), []).append(part)
    return layers.values()
