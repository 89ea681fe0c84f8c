"""Options of PPO: the policy's loss, and how a critic's values become advantages and targets.

The critic's own options are in `llmrl/model/options.py`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from annotated_types import Le

from llmrl.algo.options import Setting
from llmrl.algo.policy_gradient.choices import Clip
from llmrl.algo.policy_gradient.options import PolicyLossOptions
from llmrl.option import Count, NotNegative, Positive, Share, option


@option
class ValueOptions:
    """Advantages and targets from values, and the critic's loss."""

    clip: NotNegative = 0.2
    """A value that has moved further than this towards its target has no gradient; 0 is off."""
    coef: NotNegative | None = None
    """Weight of the value loss beside the policy loss. Default: 0.1 where both train the policy's trunk (critic.kind
    shared), else 1. Only a shared trunk reads it."""
    gamma: Share = 1.0
    """Discount from one trained token to the next."""
    lam: Share | None = None
    """Lambda of the advantages. Default: 0.95, or `length_alpha` where that is given."""
    length_alpha: Positive | None = None
    """Instead of `lam`: lambda is 1 - 1 / (length_alpha * tokens) of each rollout (VAPO)."""
    lam_critic: Share | None = None
    """Lambda of the critic's targets; 1 makes them the rewards still to come (VC-PPO). Default: as the advantages."""


@option
class Warmup:
    """Value pre-training: steps (of `train.max_steps`) that train the critic alone (VC-PPO).

    Targets have lambda 1 and the value loss is not clipped. The policy's weights do not move, and the critic's learning
    rate falls linearly to 0.
    """

    steps: Count = 50
    """At most this many steps."""
    iterations: Count = 4
    """Passes over each of their batches, in `algo.num_mini_batches` optimizer steps each."""
    explained_variance: Annotated[float, Le(1)] = 0.5
    """End early when the mean of the last 8 batches' explained variance, measured before training on them, reaches
    this."""


@option
class PPO(PolicyLossOptions):
    """Rewards of tokens and a critic's values -> advantages -> a policy-gradient loss and the critic's loss."""

    reads_critic: ClassVar[bool] = True

    name: str = "ppo"
    """The preset. Options given beside it override it."""
    use_token_rewards: bool = True
    """Where a verifier gives dense rewards, pay these instead of the reward at the end."""
    positive_lm_coef: NotNegative = 0.0
    """Weight of the language-model loss on correct rollouts (VAPO); 0 is off."""
    value: ValueOptions = ValueOptions()
    """How values become advantages and targets."""
    warmup: Warmup | None = None
    """Value pre-training. Default: none."""

    def findings(self) -> list[str]:
        """Return what is wrong among these options: one line each, with the fix."""
        found = self.loss_findings("a critic")
        if self.value.lam is not None and self.value.length_alpha is not None:
            found.append("algo.value.lam and algo.value.length_alpha are two ways to say the same: set one to null")
        return found

    def findings_with(self, setting: Setting) -> list[str]:
        """Return what is wrong between these options and the other sections: one line each, with the fix."""
        found = setting.mini_batch_findings(self.num_mini_batches)
        if self.warmup is not None and self.warmup.steps >= setting.max_steps:
            found.append(
                f"algo.warmup.steps {self.warmup.steps} leaves nothing of train.max_steps {setting.max_steps} to train "
                "the policy: they are steps of it; lower it, or raise train.max_steps"
            )
        return found

    @property
    def lam(self) -> float | None:
        """Lambda of the advantages; None where it depends on the length."""
        return 0.95 if self.value.lam is None and self.value.length_alpha is None else self.value.lam


PRESETS: dict[str, PPO] = {
    "ppo": PPO(whiten=True, aggregation="dapo", num_mini_batches=4),
    "vapo": PPO(
        name="vapo",
        whiten=True,
        aggregation="dapo",
        num_mini_batches=4,
        loss=Clip(epsilon_high=0.28),
        positive_lm_coef=0.1,
        value=ValueOptions(length_alpha=0.05, lam_critic=1.0),
        warmup=Warmup(),
    ),
}
