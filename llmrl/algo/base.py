"""What an algorithm is: it says what it needs of the forward pass, prepares a batch, and computes a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from llmrl.types import Sample

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from llmrl.types import Counts, ForwardOutputs, MicroBatch, Rollout, RolloutGroup, TrainBatch


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Which quantities an algorithm reads, so that nothing else is computed."""

    ref_logprobs: bool = False
    """Log-probabilities under the reference model."""
    full_kl: bool = False
    """`ForwardOutputs.kl`: the divergence from the reference model over the whole vocabulary."""
    every_sample: bool = False
    """Samples whose advantages are all zero still have a gradient (a KL or entropy term) and must be computed."""
    entropy_gradient: bool = False
    """The loss differentiates through the entropy."""
    old_logprobs: bool = False
    """Log-probabilities under the policy that took the batch, before `refine` (otherwise they are computed only when
    several optimizer steps use the batch)."""
    rollout_as_old: bool = False
    """The sampler's log-probabilities take the place of old_logprobs, which are then not computed (bypass)."""
    old_entropies: bool = False
    """`extras["old_entropies"]`: entropies (nats) under that policy."""
    collisions: bool = False
    """`extras["collisions"]`: sum_v p(v)^2 under that policy."""
    influence: bool = False
    """`extras["influence"]`: each token's influence on the group's tokens that `extras["influence_weights"]`, set by
    `prepare`, give a weight above 0. Either `refine` finds it; or, where only one optimizer step uses the batch and
    none of the three above is asked for, `reweight` does, group by group, while the group is trained on."""
    values: bool = False
    """`extras["old_values"]`: the critic's values of the states before each token, before `refine`."""
    greedy_reward: bool = False
    """A greedy completion of every task, for `RolloutGroup.greedy_reward`."""
    anchors: bool = False
    """`extras["anchors"]` and `extras["base_values"]`: see `llmrl.methods.bcoder.policy`."""
    refine: bool = False
    """`refine` is called once the quantities above are there."""
    whole_groups: bool = False
    """The loss compares a group's samples with each other: they have to lie in one micro-batch."""
    ref_sync: tuple[int, float] | None = None
    """(n, alpha): every n optimizer steps the reference becomes alpha * policy + (1 - alpha) * reference."""

    @property
    def reference(self) -> bool:
        """A reference model is read at all."""
        return self.ref_logprobs or self.full_kl


class Algorithm(Protocol):
    """One file of `llmrl/algo/` implements this for one family of methods."""

    needs: Needs
    policy_frozen: bool
    """The update at hand trains the critic only: the policy's parameters must not move."""

    def prepare(self, groups: list[RolloutGroup], *, policy_version: int) -> TrainBatch:
        """Stage 4: set every rollout's advantage and lay out the training samples. Runs on every rank, alike."""
        ...

    def reweight(self, batch: TrainBatch, samples: list[Sample]) -> None:
        """After `refine`: change the advantages of the `samples` of one group by their `extras["influence"]`.

        Runs once for each group that has a weight and was not scored before `refine`, in the end on every process.
        """
        ...

    def refine(self, batch: TrainBatch) -> None:
        """Between stages 4 and 5: change the advantages by what the policy that took the batch thinks of its tokens.

        Runs on every process alike, over the whole batch, and only with `needs.refine`. Samples whose advantages are
        all zero carry the quantities asked for only with `needs.every_sample`.
        """
        ...

    def observe(self, metrics: dict[str, float]) -> list[str]:
        """What the update measured, the same on every process. Returns lines to show, if there is anything to say."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on, as plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""
        ...

    def loss(self, outputs: ForwardOutputs, batch: MicroBatch, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 5: this micro-batch's share of the loss, and metrics that are shares too (added over micro-batches and
        ranks; keys ending in `/max` take the maximum instead).
        """
        ...


class Stateless:
    """The methods of an `Algorithm` that reweighs nothing, adapts to nothing and keeps nothing from step to step."""

    policy_frozen = False

    def reweight(self, batch: TrainBatch, samples: list[Sample]) -> None:
        """Never asked for."""
        raise NotImplementedError

    def refine(self, batch: TrainBatch) -> None:
        """Never asked for, unless overridden."""
        raise NotImplementedError

    def observe(self, metrics: dict[str, float]) -> list[str]:
        """Nothing adapts."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Nothing is kept."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`."""


def reward_matrix(groups: list[RolloutGroup], part: str | None = None) -> Float[Tensor, "P G"]:
    """Rewards of all rollouts, NaN where there is no score; the reward itself, or one named part of it."""

    def value(rollout) -> float:
        if rollout.score is None:
            return float("nan")
        found = rollout.score.reward if part is None else rollout.score.parts.get(part)
        return float("nan") if found is None else float(found)

    return torch.tensor([[value(rollout) for rollout in group.rollouts] for group in groups], dtype=torch.float32)


def token_rewards(rollout: Rollout, reward: float, *, dense: bool) -> np.ndarray:
    """What is paid for each trained token of a rollout.

    Args:
        rollout: with or without a score.
        reward: its reward, shaped (a punishment of length may have been added).
        dense: pay `Score.token_rewards`, where the verifier gave them, in place of the score's reward at the last
            token; what shaping added stays there.
    """
    paid = np.zeros(rollout.num_completion_tokens, np.float32)
    if rollout.score is None or rollout.score.reward is None or not len(paid):
        return paid
    if dense and rollout.score.token_rewards is not None:
        paid[:] = rollout.score.token_rewards
        reward -= float(np.float32(rollout.score.reward))  # as precise as the reward itself: what is left is shaping
    paid[-1] += reward
    return paid


def samples_of(groups: list[RolloutGroup]) -> list[Sample]:
    """Training samples of all rollouts with a score, in order; `rollout.advantage` must be set.

    Turns that extend each other (the next prompt begins with the last prompt and completion) become one sample; where a
    prompt was rewritten, a new sample begins, with the same advantage.
    """
    samples = []
    for number, group in enumerate(groups):
        for rollout in group.rollouts:
            if rollout.score is not None and rollout.score.reward is not None:
                samples += _samples_of_rollout(rollout, number)
    return samples


def _samples_of_rollout(rollout: Rollout, group: int) -> list[Sample]:
    total = rollout.num_completion_tokens
    given = rollout.advantage
    advantages = np.full(total, given, np.float32) if np.isscalar(given) else np.asarray(given, np.float32)
    if len(advantages) != total:
        raise ValueError(f"task {rollout.task.id}: {len(advantages)} advantages for {total} completion tokens")
    pieces: list[tuple[list[int], list[bool], list[float]]] = []
    for turn in rollout.turns:
        if not turn.completion_ids:
            continue
        ids, mask, logprobs = pieces[-1] if pieces else ([], [], [])
        if not pieces or turn.prompt_ids[: len(ids)] != ids:
            ids, mask, logprobs = [], [], []
            pieces.append((ids, mask, logprobs))
        new = turn.prompt_ids[len(ids) :]
        ids += new + turn.completion_ids
        mask += [False] * len(new) + [True] * len(turn.completion_ids)
        logprobs += turn.rollout_logprobs
    samples, start, known = [], 0, rollout.ref_logprobs
    for ids, mask, logprobs in pieces:
        if mask[0] or len(logprobs) != sum(mask):
            raise ValueError(
                f"task {rollout.task.id}: an empty prompt, or {len(logprobs)} rollout_logprobs for {sum(mask)} tokens"
            )
        samples.append(
            Sample(
                input_ids=np.asarray(ids, np.int64),
                loss_mask=np.asarray(mask, bool),
                advantages=advantages[start : start + len(logprobs)],
                rollout_logprobs=np.asarray(logprobs, np.float32),
                group=group,
                index=rollout.index,
                ref_logprobs=None if known is None else known[start : start + len(logprobs)],
            )
        )
        start += len(logprobs)
    return samples
