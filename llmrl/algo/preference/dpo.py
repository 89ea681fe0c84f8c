"""DPO and its family: pairs of completions -> a loss on their log-ratios to the reference.

Which member is configuration.

The pairs come from a dataset (each row is a group of two "rollouts" with rewards 1 and 0) or from the policy's own
rollouts; from here on both are the same. Every loss is a mean over all pairs of the optimizer step, on all processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from llmrl.algo.base import Algorithm, Needs
from llmrl.algo.ops import preference_losses as losses
from llmrl.algo.preference.hierarchy import net_wins
from llmrl.algo.preference.pairs import Rollouts, attach_pairs, choose_pairs, rollouts_of
from llmrl.algo.preference_presets import WHOLE_BATCH, needs_reference
from llmrl.algo.samples import samples_of
from llmrl.types import TrainBatch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from llmrl.config import PreferenceConfig
    from llmrl.types import Counts, ForwardOutputs, MicroBatch, RolloutGroup


class DPO(Algorithm):
    """Direct Preference Optimization and its relatives.

    Args:
        config: what is chosen, without gaps (`preference_presets.resolve_preference`).
        max_completion_length: of the batch's record; not read here.

    References:
        Rafailov et al. 2023, arXiv:2305.18290; for the others see `preference_losses.py` and `docs/algorithms`.
    """

    def __init__(self, config: PreferenceConfig, *, max_completion_length: int = 0) -> None:
        self.config: Any = config
        self.max_completion_length = max_completion_length
        sorts = any(loss in WHOLE_BATCH for loss in config.loss_type or ())
        self.needs = Needs(
            ref_logprobs=needs_reference(config),
            every_sample=True,
            old_logprobs=sorts,
            collisions=bool(config.use_weighting),
            refine=sorts,
            whole_groups=True,
            ref_sync=ref_sync(config),
        )

    # --- stage 4 ---

    def prepare(self, groups: list[RolloutGroup], *, policy_version: int) -> TrainBatch:
        """Stage 4: pairs inside every group, and the samples of the rollouts that are in one.

        A rollout's advantage is its net share of wins, for the record.
        """
        pairs = choose_pairs(groups, self.config)
        for group, chosen in zip(groups, pairs, strict=True):
            for rollout, advantage in zip(group.rollouts, net_wins(chosen, len(group.rollouts)), strict=True):
                rollout.advantage = advantage
        samples = attach_pairs(samples_of(groups), groups, pairs)
        return TrainBatch(
            samples=samples,
            num_groups=len(groups),
            max_completion_length=self.max_completion_length,
            policy_version=policy_version,
            metrics={
                "preference/num_pairs": float(sum(map(len, pairs))),
                "advantage/zero_variance_frac": sum(not chosen for chosen in pairs) / max(1, len(pairs)),
            },
            groups=groups,
            sampled=self.config.source == "rollouts",
        )

    # --- between 4 and 5 ---

    def refine(self, batch: TrainBatch) -> None:
        """AOT: sort over all pairs of the batch, and tell each pair what it is compared with.

        Which values have equal rank does not change for a small step, so the loss and its gradient are those of sorting
        inside the loss, however the batch is cut into micro-batches.
        """
        old = {(s.group, s.index): 0.0 for s in batch.samples}
        ref = dict(old)
        for s in batch.samples:
            assert s.old_logprobs is not None and s.ref_logprobs is not None
            old[s.group, s.index] += float(s.old_logprobs.sum(dtype="float32"))
            ref[s.group, s.index] += float(s.ref_logprobs.sum(dtype="float32"))
        found = [((s.group, s.index), (s.group, p.over), p) for s in batch.samples for p in s.preferences]

        def tensor(of: Callable[[tuple[int, int], tuple[int, int]], float]) -> Tensor:
            return torch.tensor([of(chosen, rejected) for chosen, rejected, _ in found])

        if "aot" in self.config.loss_type:
            now = tensor(lambda chosen, rejected: old[chosen] - old[rejected])
            targets = losses.matched(now, tensor(lambda chosen, rejected: ref[chosen] - ref[rejected]))
            pairs = [(target, 0.0) for target in targets.tolist()]
        else:
            chosen = tensor(lambda chosen, _: old[chosen] - ref[chosen])
            rejected = tensor(lambda _, rejected: old[rejected] - ref[rejected])
            both = losses.matched(chosen, rejected), losses.matched(rejected, chosen)
            pairs = list(zip(both[0].tolist(), both[1].tolist(), strict=True))
        for (_, _, preference), targets in zip(found, pairs, strict=True):
            preference.targets = targets

    # --- stage 5 ---

    def loss(self, outputs: ForwardOutputs, batch: MicroBatch, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 5: this micro-batch's share of the mean over all pairs."""
        c = self.config
        pairs = PairTerms(outputs, batch, rollouts_of(batch), c)
        total = outputs.logprobs.new_zeros(len(pairs.rollouts.chosen))
        for name, weight in zip(c.loss_type, c.loss_weights, strict=True):
            total = total + weight * pairs.loss(name, counts)
        if c.use_weighting:
            total = total * pairs.wpo_weights(batch)
        chosen, rejected = pairs.rewards()
        margin = chosen - rejected
        shares = {
            "preference/accuracy": (margin > 0).float(),
            "preference/margin": margin,
            "preference/chosen_reward": chosen,
            "preference/rejected_reward": rejected,
        }
        return total.sum() / counts.num_pairs, {k: v.sum() / counts.num_pairs for k, v in shares.items()}


class PairTerms:
    """What the losses of a micro-batch's K pairs are made of; every tensor is [K], chosen and rejected."""

    def __init__(
        self, outputs: ForwardOutputs, batch: MicroBatch, rollouts: Rollouts, config: PreferenceConfig
    ) -> None:
        self.config: Any = config
        self.rollouts = rollouts
        self.logprobs = outputs.logprobs
        self.chosen_logps, self.rejected_logps = self._sums(outputs.logprobs)
        self.lengths = tuple(rollouts.lengths[i].clamp(min=1) for i in (rollouts.chosen, rollouts.rejected))
        if batch.ref_logprobs is not None:
            self.ref_chosen_logps, self.ref_rejected_logps = self._sums(batch.ref_logprobs)
            self.chosen = self.chosen_logps - self.ref_chosen_logps
            self.rejected = self.rejected_logps - self.ref_rejected_logps
            options: dict[str, Any] = {"divergence": config.f_divergence_type or "reverse_kl"}
            if config.f_alpha_divergence_coef is not None:
                options["alpha"] = config.f_alpha_divergence_coef
            self.scores = losses.f_score(self.chosen, **options), losses.f_score(self.rejected, **options)
            self.delta = self.scores[0] - self.scores[1]

    def _sums(self, stream: Float[Tensor, " M"]) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
        if self.config.ld_alpha is not None:
            return self.rollouts.shared(stream, tail=self.config.ld_alpha)
        sums = self.rollouts.sum(stream)
        return sums[self.rollouts.chosen], sums[self.rollouts.rejected]

    def _means(self) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
        return self.chosen_logps / self.lengths[0], self.rejected_logps / self.lengths[1]

    def loss(self, name: str, counts: Counts) -> Float[Tensor, " K"]:
        """The named loss of each pair."""
        c = self.config
        beta = {"beta": c.beta}
        smooth = {"label_smoothing": c.label_smoothing}
        if name == "sft":
            return self._sft(counts)
        if name == "simpo":
            return losses.simpo_loss(*self._means(), **beta, gamma=c.simpo_gamma, **smooth)
        if name == "orpo":
            return losses.odds_ratio_loss(*self._means())
        if name in ("aot", "aot_unpaired"):
            return self._aot(name)
        if name in _OF_TWO:
            return _OF_TWO[name](self.chosen, self.rejected, **beta)
        if name in ("ipo", "sigmoid_norm"):
            per_token = self.scores[0] / self.lengths[0] - self.scores[1] / self.lengths[1]
            # Smoothing is the sigmoid's alone here, as in TRL: a sharper target of lengths would mean something else.
            return losses.ipo_loss(per_token, **beta) if name == "ipo" else losses.sigmoid_loss(per_token, **beta)
        if name == "hinge":
            return losses.hinge_loss(self.delta, **beta)
        if name == "discopop":
            return losses.discopop_loss(self.delta, **beta, tau=c.discopop_tau)
        of_delta = {"sigmoid": losses.sigmoid_loss, "robust": losses.robust_loss, "exo_pair": losses.exo_pair_loss}
        return of_delta[name](self.delta, **beta, **smooth)

    def _sft(self, counts: Counts) -> Float[Tensor, " K"]:
        """Minus the mean log-probability of all tokens of chosen completions, as a share for each pair."""
        sums = self.rollouts.sum(self.logprobs)[self.rollouts.chosen]
        return -sums * (counts.num_pairs / counts.num_preferred_tokens)

    def _aot(self, name: str) -> Float[Tensor, " K"]:
        c = self.config
        options = {"beta": c.beta, "label_smoothing": c.label_smoothing}
        targets = self.logprobs.new_tensor([p.targets for p in self.rollouts.preferences]).reshape(-1, 2)
        if name == "aot":
            return losses.aot_loss(self.chosen_logps - self.rejected_logps - targets[:, 0], **options)
        # Chosen and rejected completions of equal rank belong to different pairs. Each is compared with the other's
        # value as a constant: both gradients are whole, and the value, twice the loss, is halved without touching them.
        both = losses.aot_loss(self.chosen - targets[:, 0], **options)
        both = both + losses.aot_loss(targets[:, 1] - self.rejected, **options)
        return both - 0.5 * both.detach()

    def wpo_weights(self, batch: MicroBatch) -> Float[Tensor, " K"]:
        """The weight of each pair (`wpo_weight`)."""
        aligned = self.rollouts.sum(self.logprobs.detach() - batch.extras["collisions"].log())
        aligned = aligned / self.rollouts.lengths.clamp(min=1)
        return losses.wpo_weight(aligned[self.rollouts.chosen], aligned[self.rollouts.rejected])

    def rewards(self) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
        """The implicit rewards: beta times the log-ratio; without a reference, times the mean log-probability."""
        pair = (self.chosen, self.rejected) if hasattr(self, "chosen") else self._means()
        beta = self.config.beta or 1.0
        return beta * pair[0].detach(), beta * pair[1].detach()


_OF_TWO: dict[str, Callable[..., Any]] = {
    "nca_pair": losses.nca_pair_loss,
    "bco_pair": losses.bco_pair_loss,
    "sppo_hard": losses.sppo_hard_loss,
    "apo_zero": losses.apo_zero_loss,
    "apo_down": losses.apo_down_loss,
}
"""Losses of the two log-ratios, each on its own."""


def ref_sync(config: PreferenceConfig) -> tuple[int, float] | None:
    """How the reference follows the policy (`Needs.ref_sync`)."""
    if not config.ref_model_sync_steps:
        return None
    assert config.ref_model_mixup_alpha is not None
    return config.ref_model_sync_steps, config.ref_model_mixup_alpha
