"""Low-rank adapters, of the policy and of its critic."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LoraConfig:
    """Low-rank adapters (peft). The reference model is the same network with its adapter switched off."""

    r: int = 16
    """Rank."""
    lora_alpha: float = 32
    """The update is scaled by lora_alpha / r (by lora_alpha / sqrt(r) with use_rslora)."""
    lora_dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    """Names (or a regular expression) of layers that get an adapter; `all-linear`: every linear layer but the head."""
    use_rslora: bool = False
    use_dora: bool = False
