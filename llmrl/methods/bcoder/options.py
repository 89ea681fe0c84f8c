"""Options of B-Coder: its two stages, its Q function, and the mix of programs it learns from."""

from __future__ import annotations

from typing import Annotated, Literal

from llmrl.algo.options import AlgorithmOptions, Setting
from llmrl.option import KIND, Count, NotNegative, Positive, Share, option


@option
class ValueStage:
    """Learn V of the model as it is."""

    kind: Literal["value"] = "value"
    hidden_size: Count | None = None
    """Width of the value head's hidden layer. Default: the model's."""


@option
class PolicyStage:
    """Learn Q, starting from the model/ folder of a run of stage value."""

    kind: Literal["policy"] = "policy"
    q_coef: NotNegative = 1.0
    """Weight of the Bellman error."""
    adv_coef: NotNegative | None = None
    """Weight of |A| of right programs, summed over their tokens. Default: 0.1; 0 without right programs."""
    ce_coef: NotNegative | None = None
    """Weight of the cross-entropy of right programs, summed over their tokens. Default: 0.5; 0 without right
    programs."""


Stage = Annotated[ValueStage | PolicyStage, KIND]


@option
class BCoderOptions(AlgorithmOptions):
    """Value-based training on stored programs with outcomes.

    Rows carry `samples`, as `llmrl eval --save_samples` writes them, and a right program.
    """

    name: str = "bcoder"
    """The preset."""
    stage: Stage = ValueStage()
    """Which of the two stages this run is."""
    alpha: Positive = 1.0
    """Temperature: A = alpha (l - max l)."""
    gamma: Share = 0.999
    """Discount per token."""
    real_frac: Share = 0.5
    """Share of right programs (column `solution_column`) in a batch; the others are samples."""
    solution_column: str = "solution"
    """Column with a right program. Rows need none where `real_frac` is 0."""
    softabs_const: float | None = None
    """Constant of the SOFTABS that keeps V below the largest reward. Default: -ln 2, which lets V reach it; the paper
    prints +ln 2, with which it cannot exceed -0.386."""
    num_iterations: Count = 1
    """Passes over each batch of programs."""
    num_mini_batches: Count = 1
    """Optimizer steps per pass; groups are dealt out whole."""

    @property
    def coefs(self) -> tuple[float, float, float]:
        """(q_coef, adv_coef, ce_coef) of stage policy, with their defaults."""
        stage = self.stage
        assert isinstance(stage, PolicyStage)
        adv, ce = (0.1, 0.5) if self.real_frac > 0 else (0.0, 0.0)
        return (
            stage.q_coef,
            adv if stage.adv_coef is None else stage.adv_coef,
            ce if stage.ce_coef is None else stage.ce_coef,
        )

    def findings(self) -> list[str]:
        """Return what is wrong among these options: one line each, with the fix."""
        if isinstance(self.stage, PolicyStage) and self.real_frac == 0 and any(self.coefs[1:]):
            return [
                "algo.stage.adv_coef and ce_coef are terms of right programs, but algo.real_frac is 0: set them to 0 "
                "or leave them out"
            ]
        return []

    def findings_with(self, setting: Setting) -> list[str]:
        """Return what is wrong between these options and the other sections: one line each, with the fix."""
        size = setting.num_generations or 1
        rules = {
            f"algo.real_frac {self.real_frac} of rollout.num_generations {size} is not a whole number of programs: "
            "change either":
                self.real_frac * size % 1 != 0,
            "rollout.max_staleness is not read by algo.name bcoder: leave it out": setting.max_staleness > 0,
            "rollout.temperature is not read by algo.name bcoder: leave it out": setting.temperature != 1.0,
            "model.lora is given, but algo.stage value trains the value head alone: leave it out":
                isinstance(self.stage, ValueStage) and setting.has_adapters,
        }  # fmt: skip
        found = [text for text, wrong in rules.items() if wrong]
        return found + setting.mini_batch_findings(self.num_mini_batches)


PRESETS: dict[str, BCoderOptions] = {"bcoder": BCoderOptions()}
