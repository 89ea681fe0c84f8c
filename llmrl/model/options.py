"""Options of the models: the policy, its adapters, and the trunk of a critic."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt

from llmrl.option import KIND, MISSING, Count, NotNegative, Place, Positive, option

Attention = Literal[
    "sdpa",
    "eager",
    "flex_attention",
    "flash_attention_2",
    "flash_attention_3",
    "kernels-community/flash-attn2",
    "kernels-community/vllm-flash-attn3",
]


@option
class LoraConfig:
    """Low-rank adapters (peft). The reference is the same network with the adapters it started with, mostly none."""

    r: Count = 16
    """Rank."""
    lora_alpha: Positive = 32.0
    """The update is scaled by lora_alpha / r (by lora_alpha / sqrt(r) with use_rslora)."""
    lora_dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Dropout on the adapter's input, with `train.dropout`."""
    target_modules: str | list[str] = "all-linear"
    """Names (or a regular expression) of layers that get an adapter; `all-linear`: every linear layer but the head."""
    target_parameters: list[str] | None = None
    """Names of parameters that get an adapter, where no layer holds them: the experts of a mixture, such as
    `mlp.experts.gate_up_proj`."""
    modules_to_save: list[str] | None = None
    """Names of layers that are trained whole beside the adapters, such as embed_tokens and lm_head for new tokens."""
    use_rslora: bool = False
    """Scale by 1 / sqrt(r) instead of 1 / r."""
    use_dora: bool = False
    """Train direction and magnitude of each weight separately (DoRA)."""


@option
class ModelConfig:
    """The policy."""

    path: Place = MISSING
    """Hub id, local folder, or `tiny:ARCH` (a small random model with a byte tokenizer, to try things offline). It may
    be an adapter (with an adapter_config.json): the run then starts from its model, which is the reference too."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    tokenizer: Place | None = None
    """Hub id or folder of the tokenizer, where it is not the model's own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that the model computes in, here and in engines. Whatever is trained is held in float32 all the same."""
    float32_head: bool = False
    """Keep logits in float32 where the model computes in bfloat16, in training and in engines; else each is rounded."""
    attn_implementation: Attention = "sdpa"
    """Attention kernel, by transformers' name. `flex_attention` and the flash kernels need a GPU; the latter compute in
    bfloat16 and share no prefixes. The hf engine samples with sdpa instead of either."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora: LoraConfig | None = None
    """Train adapters instead of the whole model."""
    peft: dict[str, Any] | None = None
    """Train adapters that `lora` cannot express: `peft_type` and the fields of peft's configuration, by its names."""
    quantization: Literal["nf4"] | None = None
    """Hold the frozen base of adapters in 4 bits (QLoRA, bitsandbytes), on CUDA GPUs. Engines serve the weights that it
    computes with, not quantized."""
    adapter: Literal["continue", "merge"] | None = None
    """Where `path` is an adapter: train it further, or merge it into its base and train that, whole or under the fresh
    adapters of `lora`. Default: continue."""
    base: str | None = None
    """Where `path` is an adapter: hub id or folder of its base. Default: the model in the same folder, if there is one,
    or what adapter_config.json names."""

    @property
    def fresh_adapters(self) -> LoraConfig | dict[str, Any] | None:
        """The adapters that are asked for here."""
        return self.lora if self.peft is None else self.peft

    def findings(self) -> list[str]:
        """Return what is wrong among these options: one line each, with the fix."""
        rules = {
            "model.lora and model.peft both describe adapters: keep one": self.lora is not None
            and self.peft is not None,
            "model.peft names no peft_type, such as LORA or IA3": self.peft is not None
            and not self.peft.get("peft_type"),
            "model.quantization rounds what model.adapter merge would merge into: use continue, or leave it out":
                self.quantization is not None and self.adapter == "merge",
        }  # fmt: skip
        return [text for text, wrong in rules.items() if wrong]


@option
class SeparateCritic:
    """A model of its own, at first a copy of the policy's trunk."""

    kind: Literal["separate"] = "separate"
    path: Place | None = None
    """Start from this model instead (same tokenizer). The value head is new; for a reward model (a sequence classifier
    with one label) it starts as the layer `score`."""
    lora: LoraConfig | None = None
    """Train adapters of the critic instead of the whole of it."""
    learning_rate: NotNegative | None = None
    """Learning rate of the critic's own parameters. Default: `train.learning_rate`."""


@option
class SharedCritic:
    """The policy's trunk with a value head."""

    kind: Literal["shared"] = "shared"
    train_trunk: bool = True
    """The value loss also trains the trunk (or the policy's adapters in it), not the head alone."""
    learning_rate: NotNegative | None = None
    """Learning rate of the value head. Default: `train.learning_rate`."""


@option
class AdapterCritic:
    """A second set of adapters on the frozen base of a policy trained with LoRA."""

    kind: Literal["adapter"] = "adapter"
    lora: LoraConfig | None = None
    """Default: `model.lora`."""
    learning_rate: NotNegative | None = None
    """Learning rate of the critic's adapters and head. Default: `train.learning_rate`."""


CriticConfig = SeparateCritic | SharedCritic | AdapterCritic
Critic = Annotated[CriticConfig, KIND]
"""What the critic of PPO is made of."""
