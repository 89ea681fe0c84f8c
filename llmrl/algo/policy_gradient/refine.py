"""Between stages 4 and 5: advantages changed by what the policy that took the batch thinks of its tokens.

In: a batch whose samples carry old log-probabilities, entropies or influences. Out: the same batch with advantages per
token. All of it is over the whole batch, so micro-batches and processes change nothing; pure functions do the
arithmetic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from llmrl.algo.ops import advantages as adv
from llmrl.algo.ops import kl, masks
from llmrl.algo.ops import token_hidden_reward as thr

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from llmrl.algo.policy_gradient.algorithm import GRPO
    from llmrl.types import Sample, TrainBatch

INFLUENCE, INFLUENCE_WEIGHTS = "influence", "influence_weights"
ENTROPIES, COLLISIONS, KL_COV = "old_entropies", "collisions", "kl_cov"


class Refinement:
    """One pass of `refine` over one batch, or over the `samples` of it that are given.

    A rollout may be several samples (a rewritten context); `self.rollouts` holds the samples of each, in order.
    """

    def __init__(self, algorithm: GRPO, batch: TrainBatch, samples: list[Sample] | None = None) -> None:
        self.algorithm, self.config, self.batch = algorithm, algorithm.config, batch
        self.samples = batch.samples if samples is None else samples
        self.rollouts: dict[tuple[int, int], list[Sample]] = {}
        for sample in self.samples:
            self.rollouts.setdefault((sample.group, sample.index), []).append(sample)

    def run(self) -> None:
        """All steps that the configuration asks for, in their order."""
        c = self.config
        self.estimate()
        if c.whiten_advantages:
            self.whiten()
        if c.token_weighting == "thr":
            self.batch.metrics["thr/p"] = self.thr_p
        if c.token_weighting != "none":
            for p in range(len(self.batch.groups)):
                self.weigh_tokens(p)
        if (c.top_entropy_quantile or 1) < 1:
            self.keep_high_entropy()
        if c.policy_loss in ("clip_cov", "kl_cov"):
            self.hold_back_covariance()
        self._finish(range(len(self.batch.groups)))

    def reweight(self, p: int) -> None:
        """Token Hidden Reward alone, in one group."""
        self.weigh_tokens(p)
        self._finish([p])

    def estimate(self) -> None:
        """The advantages themselves, where the policy's view of its tokens enters them."""
        if self.config.kl_in == "reward":
            self.subtract_kl()
        if self.config.baseline == "optimal_token":
            self.token_baseline()

    def subtract_kl(self) -> None:
        """KL in the reward: off the whole rollout's reward, before the baseline; with baseline none off each token's,
        and the advantage is the return to go.
        """
        divergence = {
            key: kl.k1(stream(s, "old_logprobs"), stream(s, "ref_logprobs")) for key, s in self.rollouts.items()
        }
        tokens = torch.cat(list(divergence.values())) if divergence else torch.zeros(1)
        self.batch.metrics["kl/ref"] = tokens.mean().item()
        beta, groups = self.algorithm.beta, self.batch.groups
        if self.config.baseline == "none":
            for key, samples in self.rollouts.items():
                self._set(samples, stream(samples, "advantages") - beta * adv.returns_to_go(divergence[key]))
            return
        rewards = self.algorithm.shaped_rewards(groups)
        for p, group in enumerate(groups):
            for g, rollout in enumerate(group.rollouts):
                if (p, rollout.index) in divergence:
                    rewards[p, g] -= beta * divergence[p, rollout.index].sum()
        advantages = self.algorithm.advantages(rewards, groups)
        for p, group in enumerate(groups):
            for g, rollout in enumerate(group.rollouts):
                for sample in self.rollouts.get((p, rollout.index), ()):
                    sample.advantages = np.full_like(sample.advantages, advantages[p, g].item())

    def token_baseline(self) -> None:
        """The optimal token baseline, in the groups that have signal."""
        rewards = self.algorithm.shaped_rewards(self.batch.groups)
        for p, group in enumerate(self.batch.groups):
            keys = [(p, r.index) for r in group.rollouts if (p, r.index) in self.rollouts]
            keys = [key for key in keys if COLLISIONS in self.rollouts[key][0].extras]
            if not keys:
                continue
            places = [[r.index for r in group.rollouts].index(index) for _, index in keys]
            found = adv.optimal_token_advantages(
                rewards[p, places],
                [stream(self.rollouts[key], "old_logprobs") for key in keys],
                [stream(self.rollouts[key], COLLISIONS) for key in keys],
            )
            for key, values in zip(keys, found, strict=True):
                self._set(self.rollouts[key], values)

    def whiten(self) -> None:
        """Mean 0 and deviation 1 over all tokens of the batch."""
        samples = self.samples
        if samples:
            self._set(samples, adv.whiten(stream(samples, "advantages")))

    def weigh_tokens(self, p: int) -> None:
        """Token Hidden Reward or NTHR: a factor on every token of group `p`, if it was scored."""
        c, group = self.config, self.batch.groups[p]
        scored = {r.index: self.rollouts[p, r.index] for r in group.rollouts if (p, r.index) in self.rollouts}
        scored = {index: samples for index, samples in scored.items() if INFLUENCE in samples[0].extras}
        (correct,) = self.algorithm.correct([group])
        right = {r.index: value == 1 for r, value in zip(group.rollouts, correct.tolist(), strict=True)}
        if not any(right[index] for index in scored):
            return
        influences = {index: stream(samples, INFLUENCE) for index, samples in scored.items()}
        rule = {"rule": c.thr_threshold, "value": c.thr_threshold_value or 0.0}
        above = thr.threshold([*influences.values()], [right[index] for index in scored], **rule)
        eta = thr.nthr_eta(correct[~torch.isnan(correct)] == 1) if c.nthr_eta is None else c.nthr_eta
        for rollout in (r for r in group.rollouts if r.index in scored):
            influence, is_right = influences[rollout.index], right[rollout.index]
            score = influence if is_right else -influence
            if c.token_weighting == "thr":
                weights = thr.thr_weights(score, p=self.thr_p, above=above)
            else:
                weights = torch.ones_like(score) if is_right else thr.nthr_weights(influence, eta=eta, above=above)
            samples = scored[rollout.index]
            self._set(samples, stream(samples, "advantages") * weights)
            rollout.token_scores[c.token_weighting] = score.tolist()
            self._count(int((weights != 0).sum()), len(weights))

    @property
    def thr_p(self) -> float:
        """THR's p at this step."""
        c = self.config
        return thr.scheduled_p(self.batch.policy_version, start=c.thr_p or 0.0, end=c.thr_p_end, steps=c.thr_p_steps)

    def _count(self, num_kept: int, num_scored: int) -> None:
        metrics = self.batch.metrics
        metrics["thr/kept_tokens"] = metrics.get("thr/kept_tokens", 0) + num_kept
        metrics["thr/scored_tokens"] = metrics.get("thr/scored_tokens", 0) + num_scored
        metrics["thr/kept_frac"] = metrics["thr/kept_tokens"] / metrics["thr/scored_tokens"]

    def keep_high_entropy(self) -> None:
        """Advantage 0 (so no policy loss) for all but the tokens of highest entropy among those that carry signal."""
        samples = self._with_signal()
        if samples:
            keep = masks.high_entropy_mask(stream(samples, ENTROPIES), self.config.top_entropy_quantile)
            self._set(samples, stream(samples, "advantages") * keep)

    def hold_back_covariance(self) -> None:
        """Clip-Cov: advantage 0 for the drawn tokens. KL-Cov: a stream that says where the loss penalises movement."""
        for sample in self.samples if self.config.policy_loss == "kl_cov" else ():
            sample.extras[KL_COV] = np.zeros_like(sample.advantages)
        samples = self._with_signal()
        if not samples:
            return
        advantages = stream(samples, "advantages")
        covariance = masks.token_covariance(stream(samples, "old_logprobs"), advantages)
        self.batch.metrics["advantage/covariance"] = covariance.mean().item()
        if self.config.policy_loss == "clip_cov":
            generator = torch.Generator().manual_seed(self.batch.policy_version)
            chosen = masks.clip_cov_selection(covariance, self.config.cov_fraction, generator)
            self._set(samples, advantages * ~chosen)
        else:
            chosen = masks.kl_cov_selection(covariance, self.config.cov_fraction).float()
            for sample, values in zip(samples, chosen.split([s.num_tokens for s in samples]), strict=True):
                sample.extras[KL_COV] = values.numpy()

    def _with_signal(self) -> list[Sample]:
        return [sample for sample in self.samples if np.any(sample.advantages)]

    def _set(self, samples: list[Sample], values: Tensor) -> None:
        for sample, part in zip(samples, values.split([s.num_tokens for s in samples]), strict=True):
            sample.advantages = part.numpy().astype(np.float32)

    def _finish(self, groups: Iterable[int]) -> None:
        """Drop the streams that were used. Rollouts show what was trained on: one number, or one per token."""
        for sample in self.samples:
            for name in (INFLUENCE, ENTROPIES, COLLISIONS):
                sample.extras.pop(name, None)
        for p in groups:
            for rollout in self.batch.groups[p].rollouts:
                if samples := self.rollouts.get((p, rollout.index)):
                    values = np.concatenate([s.advantages for s in samples])
                    same = len(values) and np.all(values == values[0])
                    rollout.advantage = float(values[0]) if same else values.tolist()


def stream(samples: list[Sample], name: str) -> Tensor:
    """A stream of several samples, one behind the other."""
    values = [s.extras[name] if name in s.extras else getattr(s, name) for s in samples]
    return torch.from_numpy(np.concatenate(values))
