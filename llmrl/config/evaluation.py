"""The options of `llmrl eval`, and what types cannot say about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llmrl.config.checks import server_findings, vllm_findings
from llmrl.config.fields import MISSING, DataConfig, ModelConfig, RewardConfig, RolloutConfig, VerifyConfig
from llmrl.errors import UserError


@dataclass
class EvalRun:
    """Sample from a model and score what it says: mean@k, pass@k, maj@k."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How completions are drawn; `num_generations` is the number of samples of each task."""
    rewards: list[RewardConfig] = field(default_factory=list)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    seed: int = 0
    """Of the samples."""
    ks: list[int] = field(default_factory=list)
    """For pass@k and maj@k. Default: the powers of two up to the number of samples, and that number."""
    output: str | None = None
    """JSON file for the numbers; `-` is standard output."""
    save_samples: str | None = None
    """JSON-lines file for the samples with their scores: a row per task, which is a dataset for B-Coder."""
    rerank: Literal["logprob", "bcoder"] | None = None
    """Also put each task's samples in order and report how often the first passes: by mean log-probability, or by
    B-Coder's recovered reward."""
    rerank_model: str | None = None
    """bcoder: the model/ folder of a B-Coder run. It may rank the programs of any model."""
    rerank_exact: bool = False
    """bcoder: recover the reward with the next action of the targets instead of with V (what the paper does). Needed
    where no right programs were trained on."""


def validate_evaluation(c: EvalRun) -> None:
    """Check what types cannot say.

    Raises:
        UserError: with all findings, each with its fix.
    """
    samples = c.rollout.num_generations
    pairs = [
        (c.model.path == MISSING, "--model is not given: a hub id or a local folder"),
        (c.data.path == MISSING, "--data is not given: a hub id or a local file"),
        (not c.rewards, "--reward is not given: such as rewards/math_answer.py:math_answer"),
        (c.rollout.num_prompts != RolloutConfig.num_prompts, "rollout.num_prompts is not read here: leave it out"),
        (c.seed < 0, f"--seed is {c.seed}: must not be negative"),
        (samples < 1, f"--samples is {samples}: must be at least 1"),
        (not 0 < c.rollout.top_p <= 1, f"rollout.top_p is {c.rollout.top_p}: must lie above 0 and at most at 1"),
        (c.rollout.top_k < 0, f"rollout.top_k is {c.rollout.top_k}: must not be negative"),
        (c.rollout.max_completion_length < 1, "rollout.max_completion_length must be at least 1"),
        (c.rollout.temperature < 0, f"rollout.temperature is {c.rollout.temperature}: must not be negative"),
        (
            c.rollout.temperature == 0 and samples > 1,
            f"--samples is {samples}, but at rollout.temperature 0 all samples of a task are the same: use one",
        ),
        (
            any(not 1 <= k <= samples for k in c.ks),
            f"ks {c.ks}: each k must lie between 1 and the {samples} samples",
        ),
        (c.rerank == "bcoder" and c.rerank_model is None, "--rerank bcoder needs --rerank_model RUN_DIR/model"),
        (c.rerank != "bcoder" and c.rerank_model is not None, "--rerank_model is only read with --rerank bcoder"),
        (c.rerank != "bcoder" and c.rerank_exact, "--rerank_exact is only read with --rerank bcoder"),
        (c.rerank is not None and samples < 2, "--rerank needs at least 2 samples to choose from"),
    ]
    findings = [text for wrong, text in pairs if wrong] + vllm_findings(c) + server_findings(c)
    for name, place in (("--output", c.output), ("--save_samples", c.save_samples)):
        if place is not None and place != "-" and not Path(place).parent.is_dir():
            findings.append(f"{name} {place}: there is no folder {Path(place).parent}")
    findings += [f"rewards[{i}].fn is not set" for i, reward in enumerate(c.rewards) if reward.fn == MISSING]
    if findings:
        raise UserError("llmrl eval:\n" + "\n".join(f"  - {line}" for line in findings))
