"""The critic of PPO: what it is made of, how it learns, and how advantages are made of its values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmrl.config.adapters import LoraConfig


@dataclass
class CriticConfig:
    """The value function. A field left out has the value of the preset that `algo.name` names.

    An option that the other choices leave without a reader stays None, and giving it is an error.
    """

    kind: Literal["separate", "shared", "adapter"] = "separate"
    """`separate`: a model of its own, at first a copy of the policy's trunk. `shared`: the policy's trunk with a value
    head. `adapter`: a second set of adapters on the frozen base of a policy trained with LoRA."""
    path: str | None = None
    """separate: the trunk of this model instead (same tokenizer). The value head is new; of a reward model (a sequence
    classifier with one label) it starts as the layer `score`."""
    lora: LoraConfig | None = None
    """separate: train adapters of the critic instead of the whole of it. adapter: default `model.lora`."""
    train_trunk: bool | None = None
    """shared: the value loss also trains the trunk (or the policy's adapters in it), not the head alone."""
    learning_rate: float | None = None
    """Of the critic's own parameters. Default: `train.learning_rate`. The same schedule, but for value pre-training."""
    vf_coef: float | None = None
    """shared, with train_trunk: weight of the value loss beside the policy loss."""
    value_clip: float | None = None
    """A value that has moved further than this towards its target has no gradient; 0 is off."""
    gamma: float | None = None
    """Discount from one trained token to the next."""
    lam: float | None = None
    """Lambda of the advantages."""
    length_alpha: float | None = None
    """Instead of `lam`: lambda is 1 - 1 / (length_alpha * tokens) of each rollout (VAPO)."""
    lam_critic: float | None = None
    """Lambda of the critic's targets; 1 makes them the rewards still to come (VC-PPO)."""
    warmup_steps: int | None = None
    """Value pre-training: at most so many steps (of `train.max_steps`) that train the critic alone, on targets with
    lambda 1 and without `value_clip`; 0 is off. The policy's weights do not move, and the critic's learning rate falls
    linearly to 0."""
    warmup_iterations: int | None = None
    """... passes over each of their batches, in `algo.num_mini_batches` optimizer steps each."""
    warmup_explained_variance: float | None = None
    """... it ends early when the mean of the last 8 batches' explained variance, measured before training on them,
    reaches this."""
