"""DPO and its family: pairs of completions -> a loss on their log-ratios to the reference.

The options choose the member of the family. The pairs come from a dataset (each row is a group of two "rollouts" with
rewards 1 and 0) or from the policy's own rollouts; this module does not tell the two apart. Every loss is a mean over
all pairs of the optimizer step, on all processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from llmrl.algo.base import Algorithm, Needs
from llmrl.algo.ops import preference_losses as losses
from llmrl.algo.options import sampling_batches
from llmrl.algo.preference import loss_options, options
from llmrl.algo.preference.hierarchy import net_wins
from llmrl.algo.preference.pairs import Rollouts, attach_pairs, choose_pairs, rollouts_of
from llmrl.algo.samples import samples_of
from llmrl.types import TrainBatch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from llmrl.types import Counts, ForwardOutputs, MicroBatch, RolloutGroup

Key = tuple[int, int]
"""(group, index) of a rollout."""


class DPO(Algorithm):
    """Direct Preference Optimization and its relatives.

    Args:
        config: the family's options for pairs.

    References:
        Rafailov et al. 2023, arXiv:2305.18290; for the others see `preference_losses.py` and `docs/algorithms`.
    """

    def __init__(self, config: options.DPO | options.OnlineDPO) -> None:
        self.config = config
        self.num_iterations, self.num_mini_batches = config.num_iterations, config.num_mini_batches
        online = config if isinstance(config, options.OnlineDPO) else None
        self.needs = Needs(
            ref_logprobs=config.needs_reference,
            every_sample=True,
            old_logprobs=config.sorts_batch,
            collisions=config.use_weighting,
            refine=config.sorts_batch,
            whole_groups=True,
            ref_sync=ref_sync(config),
            sampling_batches=sampling_batches(online.dynamic_sampling if online else None),
        )

    # --- stage 4 ---

    def prepare(self, groups: list[RolloutGroup], *, policy_version: int) -> TrainBatch:
        """Stage 4: choose pairs inside every group, and make samples of the rollouts that are in one.

        A rollout's advantage is its net share of wins. The loss does not read it; it is kept for the records.
        """
        pairs = choose_pairs(groups, self.config)
        for group, chosen in zip(groups, pairs, strict=True):
            for rollout, advantage in zip(group.rollouts, net_wins(chosen, len(group.rollouts)), strict=True):
                rollout.advantage = advantage
        samples = attach_pairs(samples_of(groups), groups, pairs)
        return TrainBatch(
            samples=samples,
            num_groups=len(groups),
            policy_version=policy_version,
            metrics={
                "preference/num_pairs": float(sum(map(len, pairs))),
                "advantage/zero_variance_frac": sum(not chosen for chosen in pairs) / max(1, len(pairs)),
            },
            groups=groups,
            sampled=isinstance(self.config, options.OnlineDPO),
        )

    # --- between 4 and 5 ---

    def refine(self, batch: TrainBatch) -> None:
        """Sort over all pairs of the batch (AOT), and set the values that each pair is compared with.

        A small step does not change which values have equal rank. So the loss and its gradient equal those of sorting
        inside the loss, however the batch is cut into micro-batches.
        """
        old: dict[Key, float] = {(s.group, s.index): 0.0 for s in batch.samples}
        ref = dict(old)
        for s in batch.samples:
            assert s.old_logprobs is not None and s.ref_logprobs is not None
            old[s.group, s.index] += float(s.old_logprobs.sum(dtype="float32"))
            ref[s.group, s.index] += float(s.ref_logprobs.sum(dtype="float32"))
        found = [((s.group, s.index), (s.group, p.over), p) for s in batch.samples for p in s.preferences]

        def tensor(value: Callable[[Key, Key], float]) -> Tensor:
            return torch.tensor([value(chosen, rejected) for chosen, rejected, _ in found])

        if any(isinstance(term, loss_options.Aot) for term in self.config.terms):
            now = tensor(lambda chosen, rejected: old[chosen] - old[rejected])
            targets = losses.matched(now, tensor(lambda chosen, rejected: ref[chosen] - ref[rejected]))
            pairs = [(target, 0.0) for target in _floats(targets)]
        else:
            chosen = tensor(lambda chosen, _: old[chosen] - ref[chosen])
            rejected = tensor(lambda _, rejected: old[rejected] - ref[rejected])
            both = losses.matched(chosen, rejected), losses.matched(rejected, chosen)
            pairs = list(zip(_floats(both[0]), _floats(both[1]), strict=True))
        for (_, _, preference), pair in zip(found, pairs, strict=True):
            preference.targets = pair

    # --- stage 5 ---

    def loss(self, outputs: ForwardOutputs, batch: MicroBatch, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 5: compute this micro-batch's share of the mean over all pairs."""
        pairs = PairTerms(outputs, batch, rollouts_of(batch), self.config)
        total = outputs.logprobs.new_zeros(len(pairs.rollouts.chosen))
        for term in self.config.terms:
            total = total + term.weight * pairs.loss(term, counts)
        if self.config.use_weighting:
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
        self,
        outputs: ForwardOutputs,
        batch: MicroBatch,
        rollouts: Rollouts,
        config: options.DPO | options.OnlineDPO,
    ) -> None:
        self.config = config
        self.rollouts = rollouts
        self.logprobs = outputs.logprobs
        self.has_reference = batch.ref_logprobs is not None
        self.chosen_logps, self.rejected_logps = self._sums(outputs.logprobs)
        self.lengths = tuple(rollouts.lengths[i].clamp(min=1) for i in (rollouts.chosen, rollouts.rejected))
        if batch.ref_logprobs is not None:
            ref_chosen_logps, ref_rejected_logps = self._sums(batch.ref_logprobs)
            self.chosen = self.chosen_logps - ref_chosen_logps
            self.rejected = self.rejected_logps - ref_rejected_logps
            divergence = config.divergence
            alpha = divergence.coef if isinstance(divergence, loss_options.AlphaDivergence) else 0.5  # 0.5 is not read
            self.scores = (
                losses.f_score(self.chosen, divergence.kind, alpha=alpha),
                losses.f_score(self.rejected, divergence.kind, alpha=alpha),
            )
            self.delta = self.scores[0] - self.scores[1]

    def _sums(self, stream: Float[Tensor, " M"]) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
        if self.config.ld_alpha is not None:
            return self.rollouts.shared(stream, tail=self.config.ld_alpha)
        sums = self.rollouts.sum(stream)
        return sums[self.rollouts.chosen], sums[self.rollouts.rejected]

    def _means(self) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
        return self.chosen_logps / self.lengths[0], self.rejected_logps / self.lengths[1]

    def loss(self, term: loss_options.PairLoss, counts: Counts) -> Float[Tensor, " K"]:
        """Compute one loss of each pair, without its weight."""
        match term:
            # of the difference of two scores
            case loss_options.Sigmoid():
                return losses.sigmoid_loss(self.delta, beta=term.beta, label_smoothing=term.label_smoothing)
            case loss_options.SigmoidNorm():
                return losses.sigmoid_loss(self._delta_per_token(), beta=term.beta)
            case loss_options.Hinge():
                return losses.hinge_loss(self.delta, beta=term.beta)
            case loss_options.Ipo():
                return losses.ipo_loss(self._delta_per_token(), beta=term.beta)
            case loss_options.ExoPair():
                return losses.exo_pair_loss(self.delta, beta=term.beta, label_smoothing=term.label_smoothing)
            case loss_options.Robust():
                return losses.robust_loss(self.delta, beta=term.beta, label_smoothing=term.label_smoothing)
            case loss_options.Discopop():
                return losses.discopop_loss(self.delta, beta=term.beta, tau=term.tau)
            # of two log-ratios, each on its own
            case loss_options.NcaPair():
                return losses.nca_pair_loss(self.chosen, self.rejected, beta=term.beta)
            case loss_options.BcoPair():
                return losses.bco_pair_loss(self.chosen, self.rejected, beta=term.beta)
            case loss_options.SppoHard():
                return losses.sppo_hard_loss(self.chosen, self.rejected, beta=term.beta)
            case loss_options.ApoZero():
                return losses.apo_zero_loss(self.chosen, self.rejected, beta=term.beta)
            case loss_options.ApoDown():
                return losses.apo_down_loss(self.chosen, self.rejected, beta=term.beta)
            # of all pairs of the batch
            case loss_options.Aot() | loss_options.AotUnpaired():
                return self._aot(term)
            # without a reference
            case loss_options.Sft():
                return self._sft(counts)
            case loss_options.Simpo():
                smoothing = term.label_smoothing
                return losses.simpo_loss(*self._means(), beta=term.beta, gamma=term.gamma, label_smoothing=smoothing)
            case loss_options.Orpo():
                return losses.odds_ratio_loss(*self._means())

    def _delta_per_token(self) -> Float[Tensor, " K"]:
        return self.scores[0] / self.lengths[0] - self.scores[1] / self.lengths[1]

    def _sft(self, counts: Counts) -> Float[Tensor, " K"]:
        """Minus the mean log-probability of all tokens of chosen completions, as a share for each pair."""
        # Not `chosen_logps`: ld_alpha discounts a comparison of two lengths, and there is none here.
        sums = self.rollouts.sum(self.logprobs)[self.rollouts.chosen]
        return -sums * (counts.num_pairs / counts.num_preferred_tokens)  # `DPO.loss` divides by num_pairs

    def _aot(self, term: loss_options.WholeBatch) -> Float[Tensor, " K"]:
        targets = self.logprobs.new_tensor([p.targets for p in self.rollouts.preferences]).reshape(-1, 2)

        def compare(delta: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
            return losses.aot_loss(delta, beta=term.beta, label_smoothing=term.label_smoothing)

        if isinstance(term, loss_options.Aot):
            return compare(self.chosen_logps - self.rejected_logps - targets[:, 0])
        # Chosen and rejected completions of equal rank belong to different pairs. Each is compared with the other's
        # value as a constant: both gradients are whole, and the value, twice the loss, is halved without touching them.
        both = compare(self.chosen - targets[:, 0]) + compare(targets[:, 1] - self.rejected)
        return both - 0.5 * both.detach()

    def wpo_weights(self, batch: MicroBatch) -> Float[Tensor, " K"]:
        """Compute the weight of each pair (`wpo_weight`)."""
        aligned = self.rollouts.sum(self.logprobs.detach() - batch.extras["collisions"].log())
        aligned = aligned / self.rollouts.lengths.clamp(min=1)
        return losses.wpo_weight(aligned[self.rollouts.chosen], aligned[self.rollouts.rejected])

    def rewards(self) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
        """Return the implicit rewards: beta times the log-ratio; without a reference, times the mean log-probability.

        In a sum, beta is that of the first loss that has one.
        """
        pair = (self.chosen, self.rejected) if self.has_reference else self._means()
        betas = [term.beta for term in self.config.terms if isinstance(term, loss_options.BetaLoss)]
        beta = betas[0] if betas else 1.0
        return beta * pair[0].detach(), beta * pair[1].detach()


def ref_sync(config: options.PreferenceOptions) -> tuple[int, float] | None:
    """Return how the reference follows the policy (`Needs.ref_sync`)."""
    return None if config.reference is None else (config.reference.steps, config.reference.alpha)


def _floats(values: Float[Tensor, " K"]) -> list[float]:
    return [float(value) for value in values]
