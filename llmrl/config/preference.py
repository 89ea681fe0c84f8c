"""What DPO and its relatives read: where pairs come from, the loss over them, the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PairLoss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm", "simpo", "orpo", "kto", "apo_zero_unpaired",
]  # fmt: skip


@dataclass
class LevelConfig:
    """One level of a hierarchy of reward parts (HERON)."""

    part: str = "???"
    """Name of a reward; with weight 0 it is measured without being added up."""
    margin: float = 0.0
    """Differences up to this much decide nothing and leave it to the next level."""
    margin_in: Literal["std", "value"] = "std"
    """The margin counts in standard deviations of the part over the batch, or is a difference itself."""
    lower_is_better: bool = False


@dataclass
class PreferenceConfig:
    """Preference optimisation. A field left out has the value of the preset that `algo.name` names.

    An option that the other choices leave without a reader stays None, and giving it is an error.
    """

    source: Literal["dataset", "rollouts"] | None = None
    """`dataset`: rows with prompt, chosen, rejected (or prompt, completion, label), no engine and no rewards.
    `rollouts`: the policy's own completions, compared by the rewards."""
    loss_type: list[PairLoss] | None = None
    """One or several losses of `llmrl/algo/ops/preference_losses.py`, added up."""
    loss_weights: list[float] | None = None
    """One for each loss; default 1."""
    beta: float | None = None
    """How strongly a log-ratio counts: higher stays closer to the reference (ipo: the paper's tau)."""
    label_smoothing: float | None = None
    """Probability that a label is wrong: sigmoid (then it is cDPO), robust, exo_pair (where it must be above 0), aot,
    aot_unpaired, simpo."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] | None = None
    """The divergence that ties the policy to the reference, for losses of the difference of two scores."""
    f_alpha_divergence_coef: float | None = None
    """alpha of the alpha divergence."""
    discopop_tau: float | None = None
    """discopop: how sharply the loss goes over from logistic to exponential."""
    simpo_gamma: float | None = None
    """simpo: the margin that chosen should be ahead by."""
    ld_alpha: float | None = None
    """LD-DPO: weight of the tokens beyond the shorter completion's length, from 0 to 1. None: all weigh alike."""
    use_weighting: bool | None = None
    """WPO: weigh a pair by how likely the policy itself would have written it."""
    desirable_weight: float | None = None
    """kto, apo_zero_unpaired: weight of completions labelled true."""
    undesirable_weight: float | None = None
    pairs: Literal["best_worst", "all"] | None = None
    """Rollouts: of each group the best against the worst, or every pair that is decided."""
    min_margin: float | None = None
    """Rollouts: a pair is decided when the rewards differ by more than this."""
    hierarchy: list[LevelConfig] | None = None
    """Rollouts: compare by reward parts in this order instead of by the reward (HERON)."""
    desirable_above: float | None = None
    """Rollouts with kto: completions with a reward above this are desirable."""
    max_length: int | None = None
    """Dataset: sequences (prompt and completion, tokens) are cut here; rows with no room for a completion are left
    out."""
    precompute_ref_log_probs: bool | None = None
    """Dataset: compute the reference's log-probabilities of all rows before the first step; no reference is kept."""
    ref_cache_dir: str | None = None
    """... and keep them in this folder for further runs with the same model and rows (default: the run directory)."""
    ref_model_sync_steps: int | None = None
    """Move the reference towards the policy every so many optimizer steps (TR-DPO; with alpha 1: rounds of iterative
    DPO); 0 never."""
    ref_model_mixup_alpha: float | None = None
    """reference = alpha * policy + (1 - alpha) * reference; 1 replaces it."""
