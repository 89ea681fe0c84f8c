"""Between stages 4 and 5: steps that adjust advantages by old log-probabilities, entropies or influences.

Each step changes the advantages of a `View` in place, and each algorithm chooses its steps. They see the whole batch,
so micro-batches and processes change nothing. The arithmetic is in `llmrl/algo/ops`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from llmrl.algo.ops import advantages as adv
from llmrl.algo.ops import kl, masks
from llmrl.algo.ops import token_hidden_reward as thr
from llmrl.algo.policy_gradient.choices import Thr

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jaxtyping import Float
    from torch import Tensor

    from llmrl.algo.policy_gradient.choices import TokenWeighting
    from llmrl.types import Sample, TrainBatch

INFLUENCE, INFLUENCE_WEIGHTS = "influence", "influence_weights"
ENTROPIES, COLLISIONS, KL_COV = "old_entropies", "collisions", "kl_cov"

Key = tuple[int, int]
"""(group, index) of a rollout."""


class View:
    """A batch, or some `samples` of it, by rollout. A rollout with a rewritten context is several samples, in order."""

    def __init__(self, batch: TrainBatch, samples: list[Sample] | None = None) -> None:
        self.batch = batch
        self.samples = batch.samples if samples is None else samples
        self.rollouts: dict[Key, list[Sample]] = {}
        for sample in self.samples:
            self.rollouts.setdefault((sample.group, sample.index), []).append(sample)

    def with_signal(self) -> list[Sample]:
        """Return the samples with an advantage other than 0."""
        return [sample for sample in self.samples if np.any(sample.advantages)]

    def set_advantages(self, samples: list[Sample], values: Float[Tensor, " M"]) -> None:
        """Set the advantages of `samples` from one stream over all of them."""
        for sample, part in zip(samples, split(values, samples), strict=True):
            sample.advantages = part.numpy().astype(np.float32)

    def divergences(self) -> dict[Key, Float[Tensor, " M"]]:
        """Return the k1 estimate for every token of each rollout, and log its mean."""
        found = {key: kl.k1(stream(s, "old_logprobs"), stream(s, "ref_logprobs")) for key, s in self.rollouts.items()}
        tokens = torch.cat(list(found.values())) if found else torch.zeros(1)
        self.batch.metrics["kl/ref"] = tokens.mean().item()
        return found

    def finish(self, groups: Iterable[int]) -> None:
        """Drop the used streams, and record each rollout's final advantage: one number, or one per token."""
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
    """Return a stream of several samples, concatenated."""
    values = [s.extras[name] if name in s.extras else getattr(s, name) for s in samples]
    return torch.as_tensor(np.concatenate(values))


def split(values: Tensor, samples: list[Sample]) -> tuple[Tensor, ...]:
    """Undo the concatenation of `stream`."""
    return torch.split(values, [sample.num_tokens for sample in samples])


def subtract_kl_from_tokens(view: View, beta: float, gamma: float) -> None:
    """Put the KL into the reward of every token. There is no baseline: the advantage is the return to go."""
    divergence = view.divergences()
    for key, samples in view.rollouts.items():
        to_come = adv.returns_to_go(divergence[key], gamma)
        view.set_advantages(samples, stream(samples, "advantages") - beta * to_come)


def subtract_kl(view: View, beta: float, rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """Return `rewards` minus beta times the KL of the whole rollout, where it is known."""
    divergence, rewards = view.divergences(), rewards.clone()
    for p, group in enumerate(view.batch.groups):
        for g, rollout in enumerate(group.rollouts):
            if (p, rollout.index) in divergence:
                rewards[p, g] -= beta * divergence[p, rollout.index].sum()
    return rewards


def spread(view: View, advantages: Float[Tensor, "P G"]) -> None:
    """Give all tokens of a rollout its advantage."""
    for p, group in enumerate(view.batch.groups):
        for g, rollout in enumerate(group.rollouts):
            for sample in view.rollouts.get((p, rollout.index), ()):
                sample.advantages = np.full_like(sample.advantages, advantages[p, g].item())


def token_baseline(view: View, rewards: Float[Tensor, "P G"]) -> None:
    """Subtract the optimal token baseline in the groups that have signal."""
    for p, group in enumerate(view.batch.groups):
        keys = [(p, r.index) for r in group.rollouts if (p, r.index) in view.rollouts]
        keys = [key for key in keys if COLLISIONS in view.rollouts[key][0].extras]
        if not keys:
            continue
        places = [[r.index for r in group.rollouts].index(index) for _, index in keys]
        found = adv.optimal_token_advantages(
            rewards[p, places],
            [stream(view.rollouts[key], "old_logprobs") for key in keys],
            [stream(view.rollouts[key], COLLISIONS) for key in keys],
        )
        for key, values in zip(keys, found, strict=True):
            view.set_advantages(view.rollouts[key], values)


def whiten(view: View) -> None:
    """Give the advantages of all tokens of the batch mean 0 and deviation 1."""
    if view.samples:
        view.set_advantages(view.samples, adv.whiten(stream(view.samples, "advantages")))


def keep_high_entropy(view: View, quantile: float) -> None:
    """Set advantage 0 (so no policy loss) for all but the tokens of highest entropy among those with signal."""
    if samples := view.with_signal():
        keep = masks.high_entropy_mask(stream(samples, ENTROPIES), quantile)
        view.set_advantages(samples, stream(samples, "advantages") * keep)


def drop_covariant(view: View, fraction: float) -> None:
    """Set advantage 0 for tokens drawn among those with a high covariance (Clip-Cov)."""
    if samples := view.with_signal():
        advantages, covariance = _covariance(view, samples)
        generator = torch.Generator().manual_seed(view.batch.policy_version)
        chosen = masks.clip_cov_selection(covariance, fraction, generator)
        view.set_advantages(samples, advantages * ~chosen)


def mark_covariant(view: View, fraction: float) -> None:
    """Add the stream that is 1 where the loss penalizes movement (KL-Cov)."""
    for sample in view.samples:
        sample.extras[KL_COV] = np.zeros_like(sample.advantages)
    if samples := view.with_signal():
        _, covariance = _covariance(view, samples)
        chosen = masks.kl_cov_selection(covariance, fraction).float()
        for sample, values in zip(samples, split(chosen, samples), strict=True):
            sample.extras[KL_COV] = values.numpy()


def _covariance(view: View, samples: list[Sample]) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"]]:
    """Return the advantages and covariances of the tokens of `samples`."""
    advantages = stream(samples, "advantages")
    covariance = masks.token_covariance(stream(samples, "old_logprobs"), advantages)
    view.batch.metrics["advantage/covariance"] = covariance.mean().item()
    return advantages, covariance


def weigh_tokens(view: View, p: int, options: TokenWeighting, correct: Float[Tensor, " G"]) -> None:
    """Multiply the advantages of group `p` by Token Hidden Reward or NTHR, if its influences were computed.

    Args:
        view: holds the samples of the group.
        p: index of the group.
        options: the rule.
        correct: 1 for correct rollouts of the group, 0 for others, NaN without a score.
    """
    group = view.batch.groups[p]
    scored = {r.index: view.rollouts[p, r.index] for r in group.rollouts if (p, r.index) in view.rollouts}
    scored = {index: samples for index, samples in scored.items() if INFLUENCE in samples[0].extras}
    right = {r.index: value.item() == 1 for r, value in zip(group.rollouts, correct, strict=True)}
    if not any(right[index] for index in scored):
        return
    influences = {index: stream(samples, INFLUENCE) for index, samples in scored.items()}
    value = 0.0 if options.threshold == "none" else options.threshold_value
    flags = [right[index] for index in scored]
    above = thr.threshold([*influences.values()], flags, rule=options.threshold, value=value)
    success = thr.nthr_eta(correct[~torch.isnan(correct)] == 1)
    for rollout in (r for r in group.rollouts if r.index in scored):
        influence, is_right = influences[rollout.index], right[rollout.index]
        score = influence if is_right else -influence
        if isinstance(options, Thr):
            weights = thr.thr_weights(score, p=thr_p(options, view.batch.policy_version), above=above)
        else:
            eta = success if options.eta is None else options.eta
            weights = torch.ones_like(score) if is_right else thr.nthr_weights(influence, eta=eta, above=above)
        samples = scored[rollout.index]
        view.set_advantages(samples, stream(samples, "advantages") * weights)
        rollout.token_scores[options.kind] = score.numpy().tolist()
        _count(view.batch, int((weights != 0).sum()), len(weights))


def thr_p(options: Thr, policy_version: int) -> float:
    """Return THR's p at this policy version."""
    return thr.scheduled_p(policy_version, start=options.p, end=options.p_end, steps=options.p_steps)


def _count(batch: TrainBatch, num_kept: int, num_scored: int) -> None:
    metrics = batch.metrics
    metrics["thr/kept_tokens"] = metrics.get("thr/kept_tokens", 0) + num_kept
    metrics["thr/scored_tokens"] = metrics.get("thr/scored_tokens", 0) + num_scored
    metrics["thr/kept_frac"] = metrics["thr/kept_tokens"] / metrics["thr/scored_tokens"]
