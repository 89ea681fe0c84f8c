"""What an algorithm is: it says what it needs of the forward pass, prepares a batch, and computes a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from llmrl.types import Counts, ForwardOutputs, MicroBatch, RolloutGroup, Sample, TrainBatch


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
    sampling_batches: int = 1
    """Dynamic sampling: draw further groups in place of those without signal, up to this many batches; 1 is off."""
    greedy_reward: bool = False
    """A greedy completion of every task, for `RolloutGroup.greedy_reward`."""
    policy_streams: bool = False
    """The streams that `Policy.streams` computes in `extras`: what a policy with further outputs adds."""
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


class Algorithm:
    """The base of one family of methods. Override `prepare` and `loss`, and the hooks that the family needs.

    Attributes:
        needs: the quantities that it reads.
        num_iterations: passes over each batch of rollouts.
        num_mini_batches: optimizer steps per pass.
        policy_frozen: the update at hand trains the critic only: the policy's parameters must not move.
    """

    needs: Needs
    num_iterations: int = 1
    num_mini_batches: int = 1
    policy_frozen: bool = False

    # --- override these ---

    def prepare(self, groups: list[RolloutGroup], *, policy_version: int) -> TrainBatch:
        """Stage 4: set every rollout's advantage and lay out the training samples. Runs on every process, alike."""
        raise NotImplementedError

    def loss(self, outputs: ForwardOutputs, batch: MicroBatch, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 5: this micro-batch's share of the loss, and metrics that are shares too (added over micro-batches and
        processes; keys ending in `/max` take the maximum instead).
        """
        raise NotImplementedError

    # --- and these where `needs` asks for them ---

    def refine(self, batch: TrainBatch) -> None:
        """Between stages 4 and 5: change the advantages by what the policy that took the batch thinks of its tokens.

        Runs on every process alike, over the whole batch, and only with `needs.refine`. Samples whose advantages are
        all zero carry the quantities asked for only with `needs.every_sample`.
        """
        raise NotImplementedError

    def reweight(self, batch: TrainBatch, samples: list[Sample]) -> None:
        """After `refine`: change the advantages of the `samples` of one group by their `extras["influence"]`.

        Runs once for each group that has a weight and was not scored before `refine`, in the end on every process.
        """
        raise NotImplementedError

    # --- what adapts, and is kept from step to step ---

    def observe(self, metrics: dict[str, float]) -> list[str]:
        """Adapt to what the update measured, the same on every process. Returns lines to show."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on, as plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore from `state_dict`."""

    # --- machinery of the learner ---

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps that a batch is used for."""
        return self.num_iterations * self.num_mini_batches

    @property
    def passes(self) -> int:
        """Passes over the batch at hand."""
        return self.num_iterations

    @property
    def num_frozen_updates(self) -> int:
        """Optimizer steps of value pre-training that were planned: over them the critic's learning rate falls to 0."""
        return 0
