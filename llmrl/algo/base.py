"""The base of all algorithms: what they need from the forward pass, how they prepare a batch, and their loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from llmrl.types import Counts, ForwardOutputs, MicroBatch, RolloutGroup, Sample, TrainBatch


@dataclass(frozen=True, kw_only=True)
class Needs:
    """The quantities that an algorithm reads. Nothing else is computed."""

    ref_logprobs: bool = False
    """Log-probabilities under the reference model."""
    full_kl: bool = False
    """`ForwardOutputs.kl`: the divergence from the reference model over the whole vocabulary."""
    every_sample: bool = False
    """Samples whose advantages are all zero are computed too: a KL or entropy term gives them a gradient."""
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
    """`extras["influence"]`: each token's influence on the tokens of its group whose `extras["influence_weights"]`, set
    by `prepare`, are above 0. `refine` reads it; but if only one optimizer step uses the batch and none of the three
    above is needed, `reweight` reads it, group by group, while the group is trained on."""
    values: bool = False
    """`extras["old_values"]`: the critic's values of the states before each token, before `refine`."""
    sampling_batches: int = 1
    """Dynamic sampling: draw further groups in place of those without signal, up to this many batches; 1 is off."""
    greedy_reward: bool = False
    """A greedy completion of every task, for `RolloutGroup.greedy_reward`."""
    policy_streams: bool = False
    """The streams that `Policy.streams` adds to `extras`, from a policy with further outputs."""
    refine: bool = False
    """Call `refine` once the quantities above are computed."""
    whole_groups: bool = False
    """The loss compares the samples of a group, so they must be in one micro-batch."""
    ref_sync: tuple[int, float] | None = None
    """(n, alpha): every n optimizer steps the reference becomes alpha * policy + (1 - alpha) * reference."""

    @property
    def reference(self) -> bool:
        """Whether a reference model is read."""
        return self.ref_logprobs or self.full_kl


class Algorithm:
    """The base of one family of methods. Override `prepare` and `loss`, and the hooks that the family needs.

    Attributes:
        needs: the quantities that it reads.
        num_iterations: passes over each batch of rollouts.
        num_mini_batches: optimizer steps per pass.
        policy_frozen: the current update trains the critic only, and the policy's parameters must not move.
    """

    needs: Needs
    num_iterations: int = 1
    num_mini_batches: int = 1
    policy_frozen: bool = False

    # --- override these ---

    def prepare(self, groups: list[RolloutGroup], *, policy_version: int) -> TrainBatch:
        """Set every rollout's advantage and lay out the training samples (stage 4). Every process does the same."""
        raise NotImplementedError

    def loss(self, outputs: ForwardOutputs, batch: MicroBatch, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute this micro-batch's share of the loss, and its share of metrics (stage 5).

        Shares are added over micro-batches and processes; of metrics whose key ends in `/max` the maximum is taken.
        """
        raise NotImplementedError

    # --- and these where `needs` or `policy_frozen` asks for them ---

    def value_loss(
        self, values: Float[Tensor, " M"], batch: MicroBatch, counts: Counts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the critic's share of `loss` and of the metrics. With `policy_frozen` it is the whole loss."""
        raise NotImplementedError

    def refine(self, batch: TrainBatch) -> None:
        """Adjust the advantages by the policy's own view of the batch (between stages 4 and 5; with `needs.refine`).

        Every process does the same, for the whole batch. Samples whose advantages are all zero have the needed
        quantities only with `needs.every_sample`.
        """
        raise NotImplementedError

    def reweight(self, batch: TrainBatch, samples: list[Sample]) -> None:
        """Adjust the advantages of one group's `samples` by their `extras["influence"]` (after `refine`).

        It is called once, in the end on every process, for each group with a weight that `refine` has not handled.
        """
        raise NotImplementedError

    # --- what adapts, and is kept from step to step ---

    def observe(self, metrics: dict[str, float]) -> list[str]:
        """Adapt to what the update measured, the same on every process. Returns lines to show."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on, as plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore from `state_dict`."""

    # --- machinery of the learner ---

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps on each batch."""
        return self.num_iterations * self.num_mini_batches

    @property
    def passes(self) -> int:
        """Passes over the current batch."""
        return self.num_iterations

    @property
    def num_frozen_updates(self) -> int:
        """Planned optimizer steps of value pre-training, over which the critic's learning rate falls to 0."""
        return 0
