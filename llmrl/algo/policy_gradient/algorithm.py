"""GRPO and its family: rewards of groups -> advantages -> a policy-gradient loss. Which member is configuration.

The order of operations: reward (C-GRPO mixing, overlong punishment) -> baseline and scale -> [`refine`, where the
policy's own view of its tokens is needed: KL in the reward, token baselines, whitening, Token Hidden Reward, entropy
and covariance masks] -> loss (ratio, policy loss, off-policy mask, KL penalty, entropy bonus) -> aggregation.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmrl.algo.base import Algorithm, Needs
from llmrl.algo.ops import advantages as adv
from llmrl.algo.ops import corrections, kl, losses, masks
from llmrl.algo.ops.mixing import mixed_rewards
from llmrl.algo.ops.reduce import GROUP_TOKENS, aggregate
from llmrl.algo.policy_gradient.refine import INFLUENCE_WEIGHTS, KL_COV, Refinement
from llmrl.algo.presets import resolve
from llmrl.algo.samples import lengths, reward_matrix, samples_of, token_rewards
from llmrl.types import Sample, TrainBatch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from llmrl.config import AlgoConfig
    from llmrl.types import Counts, ForwardOutputs, MicroBatch, RolloutGroup


class GRPO(Algorithm):
    """Group Relative Policy Optimization and its relatives.

    Args:
        config: what is chosen; gaps are filled from its preset.
        max_completion_length: tokens of a rollout, Dr. GRPO's constant and the limit of the overlong punishment.
        rewards: weight by name of reward; the first above 0 is the accuracy. Without any, the reward itself is.

    References:
        Shao et al. 2024, arXiv:2402.03300; for the others see `docs/algorithms.md`.
    """

    def __init__(
        self, config: AlgoConfig, *, max_completion_length: int, rewards: dict[str, float] | None = None
    ) -> None:
        c: Any = resolve(config)  # no gaps are left where an option is read
        self.config = c
        self.max_completion_length = max_completion_length
        self.rewards = rewards or {}
        self.num_rollouts = 0
        self.beta: float = c.beta or 0.0
        in_reward = c.kl_in == "reward"
        entropies, token_baseline = (c.top_entropy_quantile or 1) < 1, c.baseline == "optimal_token"
        covariance, influence = c.policy_loss in ("clip_cov", "kl_cov"), c.token_weighting != "none"
        self.needs = Needs(
            ref_logprobs=self.beta > 0 and c.kl_estimator != "full",
            full_kl=self.beta > 0 and c.kl_estimator == "full",
            every_sample=self.beta > 0 or bool(c.entropy_coef) or bool(c.whiten_advantages),
            entropy_gradient=bool(c.entropy_coef),
            old_logprobs=in_reward or covariance or token_baseline,
            rollout_as_old=c.vllm_importance_sampling_mode == "bypass",
            old_entropies=entropies,
            collisions=token_baseline,
            influence=influence,
            greedy_reward=c.baseline == "greedy",
            refine=in_reward or entropies or token_baseline or covariance or influence,
        )

    # --- stage 4 ---

    def prepare(self, groups: list[RolloutGroup], *, policy_version: int) -> TrainBatch:
        """Stage 4: every rollout's advantage, and one sample per rollout."""
        rewards = self.shaped_rewards(groups)
        self.num_rollouts = rewards.numel()
        if self.config.gamma is not None:  # read, and so filled in, where single tokens are paid
            metrics = self._pay_tokens(groups, rewards)
        else:
            metrics = {"advantage/zero_variance_frac": adv.flat_groups(rewards).float().mean().item()}
            for group, row in zip(groups, self.advantages(rewards, groups).tolist(), strict=True):
                for rollout, advantage in zip(group.rollouts, row, strict=True):
                    rollout.advantage = advantage
        batch = TrainBatch(
            samples=self._samples(groups),
            num_groups=len(groups),
            max_completion_length=self.max_completion_length,
            policy_version=policy_version,
            metrics=metrics,
            groups=groups,
        )
        if self.config.whiten_advantages and not self.needs.refine:
            Refinement(self, batch).whiten()
        return batch

    def shaped_rewards(self, groups: list[RolloutGroup]) -> Float[Tensor, "P G"]:
        """Rewards as the advantage sees them: mixed (C-GRPO), punished for length. NaN without a score."""
        c = self.config
        rewards = mixed_rewards(groups, c.rubric_alpha, c.rubric_norm) if c.rubric_alpha else reward_matrix(groups)
        if c.overlong_buffer:
            limit = self.max_completion_length
            rewards = rewards + adv.overlong_penalty(lengths(groups), limit=limit, buffer=c.overlong_buffer * limit)
        return rewards

    def advantages(self, rewards: Float[Tensor, "P G"], groups: list[RolloutGroup]) -> Float[Tensor, "P G"]:
        """One advantage per rollout from rewards that are shaped (and, by `refine`, reduced by the KL)."""
        c = self.config
        if c.multi_objective_aggregation == "normalize_then_sum":
            weights = {name: weight for name, weight in self.rewards.items() if weight > 0}
            parts = torch.stack([reward_matrix(groups, name) for name in weights])
            return adv.multi_reward_advantages(parts, torch.tensor(list(weights.values())))
        if c.baseline == "leave_one_out":
            return adv.leave_one_out(rewards)
        if c.baseline == "length_weighted":
            return adv.length_weighted(rewards, lengths(groups))
        if c.baseline == "greedy":
            greedy = [math.nan if group.greedy_reward is None else group.greedy_reward for group in groups]
            return adv.greedy_baseline(rewards, torch.tensor(greedy))
        if c.baseline == "passk":
            by_subsets = adv.pass_at_k_advantages(self.correct(groups), c.passk_k)
            return c.passk_mix * by_subsets + (1 - c.passk_mix) * adv.group_advantages(rewards)
        if c.baseline == "optimal_token":  # `refine` puts the baseline per token in its place
            return adv.group_advantages(rewards, scale="none")
        return adv.group_advantages(
            rewards, mean=c.baseline, scale=c.scale_rewards, batch_std_of=c.batch_std_of or "raw"
        )

    def _pay_tokens(self, groups: list[RolloutGroup], rewards: Float[Tensor, "P G"]) -> dict[str, float]:
        """Give every token its own advantage: the discounted sum of its reward and the later ones. No baseline.

        References:
            Li et al. 2024, arXiv:2401.16637 (IRCoCo: gamma 0, rewards that are differences of an evaluator's scores).
        """
        everything = [torch.zeros(0)]
        for group, row in zip(groups, rewards.tolist(), strict=True):
            for rollout, reward in zip(group.rollouts, row, strict=True):
                paid = torch.from_numpy(token_rewards(rollout, reward, dense=True))
                everything.append(adv.returns_to_go(paid, self.config.gamma))
                rollout.advantage = everything[-1].tolist()
        tokens = torch.cat(everything)
        return {"advantage/mean": tokens.mean().item(), "advantage/std": tokens.std(correction=0).item()}

    def correct(self, groups: list[RolloutGroup]) -> Float[Tensor, "P G"]:
        """1 for rollouts whose accuracy is at least 1, 0 for others, NaN without a score."""
        name = next((name for name, weight in self.rewards.items() if weight > 0), None)
        accuracy = reward_matrix(groups, name)
        return torch.where(torch.isnan(accuracy), torch.nan, (accuracy >= 1).float())

    def _samples(self, groups: list[RolloutGroup]) -> list[Sample]:
        samples = samples_of(groups)
        if self.config.mask_truncated_completions:
            cut = {(p, r.index) for p, group in enumerate(groups) for r in group.rollouts if r.status.is_truncated}
            samples = [s for s in samples if (s.group, s.index) not in cut]
        if self.config.loss_type == "prompt_mean":
            totals = [0] * len(groups)
            for s in samples:
                totals[s.group] += s.num_tokens
            for s in samples:
                s.extras[GROUP_TOKENS] = s.advantages * 0 + totals[s.group]
        if self.needs.influence:
            self._set_influence_weights(samples, groups)
        return samples

    def _set_influence_weights(self, samples: list[Sample], groups: list[RolloutGroup]) -> None:
        """THR's 1 / response length (NTHR's 1) for tokens of correct responses, 0 for others and for groups whose
        responses are all correct: those are not reweighted.
        """
        correct, total = self.correct(groups), lengths(groups)
        mixed = ~adv.flat_groups(correct)
        places = {(p, r.index): (p, g) for p, group in enumerate(groups) for g, r in enumerate(group.rollouts)}
        for s in samples:
            place = places[s.group, s.index]
            right = bool(mixed[s.group]) and correct[place].item() == 1
            unit = 1.0 if self.config.token_weighting == "nthr" else 1.0 / total[place].item()
            s.extras[INFLUENCE_WEIGHTS] = np.full(s.num_tokens, unit if right else 0.0, np.float32)

    # --- between 4 and 5 ---

    def reweight(self, batch: TrainBatch, samples: list[Sample]) -> None:
        """Token Hidden Reward in one group."""
        Refinement(self, batch, samples).reweight(samples[0].group)

    def refine(self, batch: TrainBatch) -> None:
        """Change advantages by what the policy that took the batch thinks of its tokens; see `refine.py`."""
        Refinement(self, batch).run()

    def observe(self, metrics: dict[str, float]) -> list[str]:
        """Adapt beta to the measured KL, where it is adaptive."""
        c, measured = self.config, metrics.get("kl/ref")
        if c.kl_target is not None and measured is not None:
            self.beta = kl.adapted_beta(
                self.beta,
                measured,
                target=c.kl_target,
                horizon=c.kl_horizon,
                num_rollouts=self.num_rollouts,
            )
        return []

    def state_dict(self) -> dict[str, Any]:
        """The adaptive coefficient."""
        return {"beta": self.beta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        if self.config.kl_target is not None:
            self.beta = state["beta"]

    # --- stage 5 ---

    def loss(self, outputs: ForwardOutputs, batch: MicroBatch, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 5: policy loss, corrected where off-policy, plus KL penalty, aggregated; less the entropy bonus."""
        c, logprobs = self.config, outputs.logprobs
        # Without old_logprobs the policy is the one that took the batch: the ratio is 1, its gradient is not zero.
        old_logprobs = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        sequences = (batch.sequence_ids, batch.sequence_lengths)
        level = c.importance_sampling_level or "token"
        ratio = losses.importance_ratio(logprobs, old_logprobs, *sequences, level)
        metrics = self._ratio_metrics(ratio.detach(), batch, counts)
        weights, found = corrections.of_batch(c, old_logprobs, batch, counts)
        metrics |= found
        if weights is not None and c.policy_loss == "vespo":  # they enter its ratio, which is the whole sequence's
            old_logprobs, weights = old_logprobs - weights.clamp(min=losses.MIN_WEIGHT).log(), None
        token_losses = self._policy_loss(ratio, logprobs, old_logprobs, batch)
        if weights is not None:
            token_losses = token_losses * weights
        if c.off_policy_mask_threshold is not None:
            keep = masks.off_policy_keep(
                logprobs, batch.rollout_logprobs, batch.advantages, *sequences, threshold=c.off_policy_mask_threshold
            )
            token_losses = token_losses * keep
            metrics["loss/off_policy_frac"] = (~keep).sum() / counts.num_tokens
        if c.kl_in == "loss":
            penalty = self._penalty(outputs, batch)
            metrics["kl/ref"] = penalty.detach().sum() / counts.num_tokens
            if c.use_bias_correction_kl:
                penalty = penalty * ratio
            token_losses = token_losses + self.beta * penalty
        total = aggregate(token_losses, batch, counts, c.loss_type)
        if c.entropy_coef:
            total = total - c.entropy_coef * outputs.entropy.sum() / counts.num_tokens
        return total, metrics

    def _policy_loss(self, ratio: Tensor, logprobs: Tensor, old_logprobs: Tensor, batch: MicroBatch) -> Tensor:
        c, advantages = self.config, batch.advantages
        log_ratio = logprobs - old_logprobs
        sequences = (batch.sequence_ids, batch.sequence_lengths)
        if c.policy_loss == "cispo":
            return losses.cispo_loss(ratio, logprobs, advantages, max_ratio=c.max_ratio)
        if c.policy_loss == "sapo":
            temperatures = {"temperature_pos": c.sapo_temperature_pos, "temperature_neg": c.sapo_temperature_neg}
            return losses.sapo_loss(ratio, advantages, **temperatures)
        if c.policy_loss == "gmpo":
            return losses.gmpo_loss(log_ratio, advantages, *sequences, epsilon=c.epsilon)
        if c.policy_loss == "vespo":
            shape = {"k_pos": c.vespo_k_pos, "lambda_pos": c.vespo_lambda_pos}
            shape |= {"k_neg": c.vespo_k_neg, "lambda_neg": c.vespo_lambda_neg}
            return losses.vespo_loss(log_ratio, logprobs, advantages, *sequences, **shape)
        if c.policy_loss == "kl_cov":
            selected = batch.extras.get(KL_COV, torch.zeros_like(advantages))
            return losses.kl_cov_loss(ratio, log_ratio, advantages, selected, coef=c.kl_cov_coef)
        bounds = {"epsilon": c.epsilon, "epsilon_high": c.epsilon_high}
        return losses.clipped_surrogate(ratio, advantages, **bounds, delta=c.delta, dual_clip=c.dual_clip)

    def _penalty(self, outputs: ForwardOutputs, batch: MicroBatch) -> Float[Tensor, " M"]:
        """The divergence from the reference, estimated from the drawn token or exact."""
        found = outputs.kl if self.config.kl_estimator == "full" else batch.ref_logprobs
        if found is None:
            raise ValueError("beta > 0 needs ref_logprobs in the batch, or kl in the outputs")
        if self.config.kl_estimator == "full":
            return found
        return kl.penalty(self.config.kl_estimator, outputs.logprobs, found)

    def _ratio_metrics(self, ratio: Tensor, batch: MicroBatch, counts: Counts) -> dict[str, Tensor]:
        c, metrics = self.config, {"loss/ratio/max": ratio.max() if ratio.numel() else ratio.new_zeros(())}
        if c.policy_loss in ("clip", "clip_cov"):
            bounds = {"epsilon": c.epsilon, "epsilon_high": c.epsilon_high}
            low, high = losses.clip_masks(ratio, batch.advantages, **bounds)
            metrics["loss/clip_low_frac"] = low.sum() / counts.num_tokens
            metrics["loss/clip_high_frac"] = high.sum() / counts.num_tokens
        elif c.policy_loss == "cispo":
            metrics["loss/clip_high_frac"] = (ratio > c.max_ratio).sum() / counts.num_tokens
        return metrics
