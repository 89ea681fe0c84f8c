"""GRPO and its family: rewards of groups -> advantages -> a policy-gradient loss. The options choose the member.

The order of operations: reward (C-GRPO mixing, overlong penalty) -> baseline and scale -> [`refine`, where the
policy's own view of its tokens is needed: KL in the reward, token baselines, whitening, Token Hidden Reward, entropy
and covariance masks] -> loss (ratio, policy loss, off-policy mask, KL penalty, entropy bonus) -> aggregation.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from llmrl.algo.base import Algorithm, Needs
from llmrl.algo.ops import advantages as adv
from llmrl.algo.ops import corrections, kl, losses, masks
from llmrl.algo.ops.mixing import mixed_rewards
from llmrl.algo.ops.reduce import GROUP_TOKENS, aggregate
from llmrl.algo.options import sampling_batches
from llmrl.algo.policy_gradient import refine as steps
from llmrl.algo.policy_gradient.choices import (
    Bypass,
    Cispo,
    Clip,
    ClipCov,
    Correction,
    EachReward,
    Gmpo,
    Greedy,
    Group,
    KlCov,
    LeaveOneOut,
    LengthWeighted,
    NoBaseline,
    OptimalToken,
    PassK,
    Sapo,
    Thr,
    TokenRewards,
    Vespo,
)
from llmrl.algo.policy_gradient.refine import INFLUENCE_WEIGHTS, KL_COV, View
from llmrl.algo.samples import environment_terms, lengths, reward_matrix, samples_of, token_rewards
from llmrl.types import Sample, TrainBatch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from llmrl.algo.policy_gradient.options import PolicyGradient, PolicyLossOptions
    from llmrl.types import Counts, ForwardOutputs, MicroBatch, RolloutGroup


class PolicyLoss(Algorithm):
    """What GRPO's family and PPO share: the loss, the adaptive KL, and the last refinements.

    Args:
        options: the choices.
        max_completion_length: tokens of a rollout; Dr. GRPO's constant, and the limit of the overlong penalty.
        rewards: weight of each reward by name; the first above 0 is the accuracy. Without any, the reward itself is.
    """

    def __init__(
        self, options: PolicyLossOptions, *, max_completion_length: int, rewards: dict[str, float] | None = None
    ) -> None:
        self.loss_options = options
        self.num_iterations, self.num_mini_batches = options.num_iterations, options.num_mini_batches
        self.max_completion_length = max_completion_length
        self.rewards = rewards or {}
        self.num_rollouts = 0
        self.beta = options.beta

    def _needs(self) -> Needs:
        """Return what the loss reads; a subclass adds to it."""
        o = self.loss_options
        full = o.kl_in_loss is not None and o.kl_in_loss.estimator == "full"
        entropies, covariance = o.top_entropy_quantile < 1, isinstance(o.loss, ClipCov | KlCov)
        in_reward = o.kl_in_reward is not None
        return Needs(
            ref_logprobs=self.beta > 0 and not full,
            full_kl=full,
            every_sample=self.beta > 0 or o.entropy_coef > 0 or o.whiten,
            old_logprobs=in_reward or covariance,
            rollout_as_old=isinstance(o.sampler, Bypass),
            old_entropies=entropies,
            refine=in_reward or entropies or covariance,
        )

    # --- stage 4 ---

    def shaped_rewards(self, groups: list[RolloutGroup]) -> Float[Tensor, "P G"]:
        """Return rewards with the overlong penalty; NaN without a score."""
        return self._with_length_penalty(reward_matrix(groups), groups)

    def _with_length_penalty(self, rewards: Float[Tensor, "P G"], groups: list[RolloutGroup]) -> Float[Tensor, "P G"]:
        return rewards + self._length_penalty(groups) if self.loss_options.overlong_buffer else rewards

    def _length_penalty(self, groups: list[RolloutGroup]) -> Float[Tensor, "P G"]:
        limit = self.max_completion_length
        return adv.overlong_penalty(lengths(groups), limit=limit, buffer=self.loss_options.overlong_buffer * limit)

    def correct(self, groups: list[RolloutGroup]) -> Float[Tensor, "P G"]:
        """Return 1 for rollouts whose accuracy is at least 1, 0 for others, NaN without a score."""
        name = next((name for name, weight in self.rewards.items() if weight > 0), None)
        accuracy = reward_matrix(groups, name)
        return torch.where(torch.isnan(accuracy), torch.nan, (accuracy >= 1).float())

    def _samples(self, groups: list[RolloutGroup]) -> list[Sample]:
        samples = samples_of(groups)
        if self.loss_options.mask_truncated_completions:
            cut = {(p, r.index) for p, group in enumerate(groups) for r in group.rollouts if r.status.is_truncated}
            for s in samples:
                s.probe = (s.group, s.index) in cut
            if not self._measures_masked:
                samples = [s for s in samples if not s.probe]
        if self.loss_options.aggregation == "prompt_mean":
            totals = [0] * len(groups)
            for s in samples:
                totals[s.group] += 0 if s.probe else s.num_tokens
            for s in samples:
                s.extras[GROUP_TOKENS] = s.advantages * 0 + totals[s.group]
        return samples

    @property
    def _measures_masked(self) -> bool:
        """Whether rollouts that are left out of the loss are computed too, until `refine` has read what it needs."""
        return False

    # --- between 4 and 5 ---

    def _hold_back(self, view: View) -> None:
        """Run the last refinements, which choose the tokens that keep their advantage."""
        o = self.loss_options
        if o.top_entropy_quantile < 1:
            steps.keep_high_entropy(view, o.top_entropy_quantile)
        if isinstance(o.loss, ClipCov):
            steps.drop_covariant(view, o.loss.fraction)
        if isinstance(o.loss, KlCov):
            steps.mark_covariant(view, o.loss.fraction)
        view.finish(range(len(view.batch.groups)))

    def observe(self, metrics: dict[str, float]) -> list[str]:
        """Adapt beta to the measured KL, if `kl.target` is set."""
        penalty, measured = self.loss_options.kl, metrics.get("kl/ref")
        if penalty is not None and penalty.target is not None and measured is not None:
            self.beta = kl.adapted_beta(
                self.beta, measured, target=penalty.target, horizon=penalty.horizon, num_rollouts=self.num_rollouts
            )
        return []

    def state_dict(self) -> dict[str, Any]:
        """Return the adaptive coefficient."""
        return {"beta": self.beta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore from `state_dict`."""
        if self.loss_options.kl is not None and self.loss_options.kl.target is not None:
            self.beta = state["beta"]

    # --- stage 5 ---

    def loss(self, outputs: ForwardOutputs, batch: MicroBatch, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
        """Aggregate the policy loss, corrected where off-policy, and the KL penalty; subtract the entropy bonus."""
        o, logprobs = self.loss_options, outputs.logprobs
        # Without old_logprobs the policy is the one that took the batch: the ratio is 1, its gradient is not zero.
        old_logprobs = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        sequences = (batch.sequence_ids, batch.sequence_lengths)
        level = o.loss.ratio if isinstance(o.loss, Clip | Cispo | Sapo) else "token"
        ratio = losses.importance_ratio(logprobs, old_logprobs, *sequences, level)
        metrics = self._ratio_metrics(ratio.detach(), batch, counts)
        weights = None
        if isinstance(o.sampler, Correction):
            mode = f"{o.sampler.of}_{o.sampler.outside}"
            weights, found = corrections.of_batch(mode, o.sampler.bounds, old_logprobs, batch, counts)
            metrics |= found
        if weights is not None and isinstance(o.loss, Vespo):  # VESPO's ratio is the sequence's: they enter it
            old_logprobs, weights = old_logprobs - weights.clamp(min=losses.MIN_WEIGHT).log(), None
        token_losses = self._policy_loss(ratio, logprobs, old_logprobs, batch)
        if weights is not None:
            token_losses = token_losses * weights
        if o.off_policy_mask_threshold is not None:
            keep = masks.off_policy_keep(
                logprobs, batch.rollout_logprobs, batch.advantages, *sequences, threshold=o.off_policy_mask_threshold
            )
            token_losses = token_losses * keep
            metrics["loss/off_policy_frac"] = (~keep).sum() / counts.num_computed_tokens
        if o.kl_in_loss is not None:
            penalty = self._penalty(o.kl_in_loss.estimator, outputs, batch)
            metrics["kl/ref"] = penalty.detach().sum() / counts.num_computed_tokens
            if o.kl_in_loss.bias_correction:
                penalty = penalty * ratio
            token_losses = token_losses + self.beta * penalty
        total = aggregate(token_losses, batch, counts, o.aggregation)
        if o.entropy_coef:
            total = total - o.entropy_coef * outputs.entropy.sum() / counts.num_tokens
        return total, metrics

    def _policy_loss(
        self, ratio: Float[Tensor, " M"], logprobs: Float[Tensor, " M"], old_logprobs: Tensor, batch: MicroBatch
    ) -> Float[Tensor, " M"]:
        o, advantages = self.loss_options.loss, batch.advantages
        log_ratio = logprobs - old_logprobs
        sequences = (batch.sequence_ids, batch.sequence_lengths)
        if isinstance(o, Cispo):
            return losses.cispo_loss(ratio, logprobs, advantages, max_ratio=o.max_ratio)
        if isinstance(o, Sapo):
            temperatures = {"temperature_pos": o.temperature_pos, "temperature_neg": o.temperature_neg}
            return losses.sapo_loss(ratio, advantages, **temperatures)
        if isinstance(o, Gmpo):
            return losses.gmpo_loss(log_ratio, advantages, *sequences, epsilon=o.epsilon)
        if isinstance(o, Vespo):
            shape = {"k_pos": o.k_pos, "lambda_pos": o.lambda_pos, "k_neg": o.k_neg, "lambda_neg": o.lambda_neg}
            return losses.vespo_loss(log_ratio, logprobs, advantages, *sequences, **shape)
        if isinstance(o, KlCov):
            selected = batch.extras.get(KL_COV, torch.zeros_like(advantages))
            return losses.kl_cov_loss(ratio, log_ratio, advantages, selected, coef=o.coef)
        caps = {"delta": o.delta, "dual_clip": o.dual_clip} if isinstance(o, Clip) else {}
        return losses.clipped_surrogate(ratio, advantages, epsilon=o.epsilon, epsilon_high=o.high, **caps)

    def _penalty(
        self, estimator: Literal["k2", "k3", "abs", "full"], outputs: ForwardOutputs, batch: MicroBatch
    ) -> Float[Tensor, " M"]:
        """Return the divergence from the reference, exact or estimated from the drawn token."""
        found = outputs.kl if estimator == "full" else batch.ref_logprobs
        if found is None:
            raise ValueError("beta > 0 needs ref_logprobs in the batch, or kl in the outputs")
        return found if estimator == "full" else kl.penalty(estimator, outputs.logprobs, found)

    def _ratio_metrics(self, ratio: Tensor, batch: MicroBatch, counts: Counts) -> dict[str, Tensor]:
        o, metrics = self.loss_options.loss, {"loss/ratio/max": ratio.max() if ratio.numel() else ratio.new_zeros(())}
        if isinstance(o, Clip | ClipCov):
            low, high = losses.clip_masks(ratio, batch.advantages, epsilon=o.epsilon, epsilon_high=o.high)
            metrics["loss/clip_low_frac"] = low.sum() / counts.num_computed_tokens
            metrics["loss/clip_high_frac"] = high.sum() / counts.num_computed_tokens
        elif isinstance(o, Cispo):
            metrics["loss/clip_high_frac"] = (ratio > o.max_ratio).sum() / counts.num_computed_tokens
        return metrics


class GRPO(PolicyLoss):
    """Group Relative Policy Optimization and its relatives.

    Args:
        options: the choices.
        max_completion_length, rewards: as in `PolicyLoss`.

    References:
        Shao et al. 2024, arXiv:2402.03300; for the others see docs/algorithms/.
    """

    def __init__(
        self, options: PolicyGradient, *, max_completion_length: int, rewards: dict[str, float] | None = None
    ) -> None:
        super().__init__(options, max_completion_length=max_completion_length, rewards=rewards)
        self.options = options
        per_token, weighted = isinstance(options.baseline, OptimalToken), options.token_weighting is not None
        needs = self._needs()
        self.needs = dataclasses.replace(
            needs,
            old_logprobs=needs.old_logprobs or per_token,
            collisions=per_token,
            influence=weighted,
            greedy_reward=isinstance(options.baseline, Greedy),
            sampling_batches=sampling_batches(options.dynamic_sampling),
            refine=needs.refine or per_token or weighted,
        )

    # --- stage 4 ---

    def prepare(self, groups: list[RolloutGroup], *, policy_version: int) -> TrainBatch:
        """Set every rollout's advantage, and lay out one sample per rollout."""
        rewards, baseline = self.shaped_rewards(groups), self.options.baseline
        self.num_rollouts = rewards.numel()
        if isinstance(baseline, TokenRewards):
            metrics = self._pay_tokens(groups, rewards, baseline.gamma)
        else:
            advantages, whiten = self.advantages(rewards, groups), self.options.whiten
            silent = adv.silent_frac(advantages, ~torch.isnan(rewards), whiten=whiten)
            metrics = {"advantage/zero_variance_frac": silent}
            for group, row in zip(groups, advantages, strict=True):
                for rollout, advantage in zip(group.rollouts, row, strict=True):
                    rollout.advantage = advantage.item()
        batch = TrainBatch(
            samples=self._samples(groups),
            num_groups=len(groups),
            max_completion_length=self.max_completion_length,
            policy_version=policy_version,
            metrics=metrics,
            groups=groups,
        )
        if self.options.whiten and not self.needs.refine:
            steps.whiten(View(batch))
        return batch

    def shaped_rewards(self, groups: list[RolloutGroup]) -> Float[Tensor, "P G"]:
        """Return rewards, mixed with the rubric (C-GRPO), with the overlong penalty; NaN without a score."""
        rubric = self.options.rubric
        rewards = reward_matrix(groups) if rubric is None else mixed_rewards(groups, rubric.alpha, rubric.norm)
        return self._with_length_penalty(rewards, groups)

    def advantages(self, rewards: Float[Tensor, "P G"], groups: list[RolloutGroup]) -> Float[Tensor, "P G"]:
        """Return one advantage per rollout from shaped rewards (which `refine` may have reduced by the KL)."""
        o = self.options.baseline
        if isinstance(o, EachReward):
            return self._each_reward(groups)
        if isinstance(o, LeaveOneOut):
            return adv.leave_one_out(rewards)
        if isinstance(o, LengthWeighted):
            return adv.length_weighted(rewards, lengths(groups))
        if isinstance(o, Greedy):
            greedy = [math.nan if group.greedy_reward is None else group.greedy_reward for group in groups]
            return adv.greedy_baseline(rewards, torch.tensor(greedy))
        if isinstance(o, PassK):
            by_subsets = adv.pass_at_k_advantages(self.correct(groups), o.k)
            return o.mix * by_subsets + (1 - o.mix) * adv.group_advantages(rewards)
        if isinstance(o, OptimalToken | TokenRewards):  # `refine` or `_pay_tokens` puts a value per token in its place
            return adv.group_advantages(rewards, scale="none")
        # Shifting all rewards of the batch alike does not change their deviation: only a group's mean leaves a choice.
        std_of = o.batch_std_of if isinstance(o, Group) else "raw"
        return adv.group_advantages(rewards, mean=o.kind, scale=o.scale, batch_std_of=std_of)

    def _each_reward(self, groups: list[RolloutGroup]) -> Float[Tensor, "P G"]:
        """Return GDPO's advantages. The punishment of length is one more reward, of weight 1."""
        weights = {name: weight for name, weight in self.rewards.items() if weight != 0}
        weights |= dict.fromkeys(environment_terms(groups), 1.0)
        parts = [reward_matrix(groups, name, term=True) for name in weights]
        factors = [*weights.values()]
        if self.options.overlong_buffer:
            unscored = torch.stack(parts).isnan().all(dim=0)
            parts.append(torch.where(unscored, torch.nan, self._length_penalty(groups)))
            factors.append(1.0)
        return adv.multi_reward_advantages(torch.stack(parts), torch.tensor(factors))

    def _pay_tokens(self, groups: list[RolloutGroup], rewards: Float[Tensor, "P G"], gamma: float) -> dict[str, float]:
        """Give every token its own advantage: the discounted sum of its reward and the later ones. No baseline.

        References:
            Li et al. 2024, arXiv:2401.16637 (IRCoCo: gamma 0, rewards that are differences of an evaluator's scores).
        """
        everything, silent = [torch.zeros(0)], list[bool]()
        for group, row in zip(groups, rewards, strict=True):
            for rollout, reward in zip(group.rollouts, row, strict=True):
                paid = torch.as_tensor(token_rewards(rollout, reward.item(), dense=True))
                everything.append(adv.returns_to_go(paid, gamma))
                rollout.advantage = everything[-1].numpy().tolist()
            silent.append(not any(paid.any() for paid in everything[-len(group.rollouts) :]))
        tokens = torch.cat(everything)
        return {
            "advantage/zero_variance_frac": sum(silent) / max(1, len(silent)),
            "advantage/mean": tokens.mean().item(),
            "advantage/std": tokens.std(correction=0).item(),
        }

    def _samples(self, groups: list[RolloutGroup]) -> list[Sample]:
        samples = super()._samples(groups)
        if self.needs.influence:
            self._set_influence_weights(samples, groups)
        return samples

    @property
    def _measures_masked(self) -> bool:
        """A masked rollout's reward still enters the baseline, so a penalty in the reward has to be known there."""
        alone = isinstance(self.options.baseline, NoBaseline | TokenRewards)
        return self.options.kl_in_reward is not None and not alone

    def _set_influence_weights(self, samples: list[Sample], groups: list[RolloutGroup]) -> None:
        """Weigh tokens of correct responses: 1 / length for THR, 1 for NTHR. All others weigh 0, and so do groups whose
        responses are all correct, since they are not reweighted.
        """
        correct, total = self.correct(groups), lengths(groups)
        mixed = ~adv.flat_groups(correct)
        places = {(p, r.index): (p, g) for p, group in enumerate(groups) for g, r in enumerate(group.rollouts)}
        for s in samples:
            place = places[s.group, s.index]
            right = bool(mixed[s.group]) and correct[place].item() == 1 and not s.probe
            unit = 1.0 / total[place].item() if isinstance(self.options.token_weighting, Thr) else 1.0
            s.extras[INFLUENCE_WEIGHTS] = np.full(s.num_tokens, unit if right else 0.0, np.float32)

    # --- between 4 and 5 ---

    def refine(self, batch: TrainBatch) -> None:
        """Apply the steps of `refine.py` that the options choose, in the order of the module's docstring."""
        o, view = self.options, View(batch)
        if o.kl_in_reward is not None:
            if isinstance(o.baseline, NoBaseline | TokenRewards):
                gamma = o.baseline.gamma if isinstance(o.baseline, TokenRewards) else 1.0
                steps.subtract_kl_from_tokens(view, self.beta, gamma)
            else:
                rewards = steps.subtract_kl(view, self.beta, self.shaped_rewards(batch.groups))
                steps.spread(view, self.advantages(rewards, batch.groups))
                batch.samples = [s for s in batch.samples if not s.probe]
                view = View(batch)
        if isinstance(o.baseline, OptimalToken):
            steps.token_baseline(view, self.shaped_rewards(batch.groups))
        if o.whiten:
            steps.whiten(view)
        if isinstance(o.token_weighting, Thr):
            batch.metrics["thr/p"] = steps.thr_p(o.token_weighting, batch.policy_version)
        if o.token_weighting is not None:
            for p, correct in enumerate(self.correct(batch.groups)):
                steps.weigh_tokens(view, p, o.token_weighting, correct)
        self._hold_back(view)

    def reweight(self, batch: TrainBatch, samples: list[Sample]) -> None:
        """Apply Token Hidden Reward to one group."""
        assert self.options.token_weighting is not None
        view, p = View(batch, samples), samples[0].group
        (correct,) = self.correct([batch.groups[p]])
        steps.weigh_tokens(view, p, self.options.token_weighting, correct)
        view.finish([p])
