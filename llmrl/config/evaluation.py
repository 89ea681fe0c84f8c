"""The options of `llmrl eval`, and what types cannot express about them."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Literal

from llmrl.data.options import DataConfig
from llmrl.errors import UserError
from llmrl.model.options import ModelConfig
from llmrl.option import MISSING, Count, Natural, Place, option
from llmrl.rollout.options import SamplingConfig
from llmrl.verify.options import RewardConfig, VerifyConfig


@option
class EvalRun:
    """Sample from a model and score what it says: mean@k, pass@k, maj@k."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The tasks."""
    rollout: SamplingConfig = field(default_factory=SamplingConfig)
    """How completions are drawn; `num_generations` is the number of samples of each task."""
    rewards: list[RewardConfig] = field(default_factory=list)
    """The reward functions; the first with weight > 0 decides what is right."""
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    """How rewards are computed."""
    seed: Natural = 0
    """Sampling seed."""
    ks: list[Count] = field(default_factory=list)
    """For pass@k and maj@k. Default: the powers of two up to the number of samples, and that number."""
    output: Place | None = None
    """JSON file for the numbers; `-` is standard output."""
    save_samples: Place | None = None
    """JSON-lines file for the samples with their scores: a row per task, which is a dataset for B-Coder."""
    rerank: Literal["logprob", "bcoder"] | None = None
    """Also rank each task's samples and report how often the first one passes: by mean log-probability, or by B-Coder's
    recovered reward."""
    rerank_model: Place | None = None
    """bcoder: the model/ folder of a B-Coder run. It may rank the programs of any model."""
    rerank_exact: bool = False
    """bcoder: recover the reward with the next action of the targets instead of with V (what the paper does). Needed
    where no right programs were trained on."""


def check_evaluation(c: EvalRun) -> None:
    """Check what types cannot express.

    Raises:
        UserError: with all findings, each with its fix.
    """
    samples = c.rollout.num_generations
    rules = [
        (c.model.path == MISSING, "--model is not given: a hub id or a local folder"),
        (c.data.path == MISSING and not c.data.sources, "--data is not given: a hub id or a local file"),
        (not c.rewards, "--reward is not given: such as rewards/math_answer.py:math_answer"),
        (
            c.rollout.temperature == 0 and samples > 1,
            f"--samples is {samples}, but at rollout.temperature 0 all samples of a task are the same: use one",
        ),
        (any(k > samples for k in c.ks), f"ks {c.ks}: each k must lie between 1 and the {samples} samples"),
        (c.rerank == "bcoder" and c.rerank_model is None, "--rerank bcoder needs --rerank_model RUN_DIR/model"),
        (c.rerank != "bcoder" and c.rerank_model is not None, "--rerank_model is only read with --rerank bcoder"),
        (c.rerank != "bcoder" and c.rerank_exact, "--rerank_exact is only read with --rerank bcoder"),
        (c.rerank is not None and samples < 2, "--rerank needs at least 2 samples to choose from"),
    ]
    found = [text for wrong, text in rules if wrong] + c.rollout.findings()
    for name, place in (("--output", c.output), ("--save_samples", c.save_samples)):
        if place is not None and place != "-" and not Path(place).parent.is_dir():
            found.append(f"{name} {place}: there is no folder {Path(place).parent}")
    found += [f"rewards[{i}].fn is not set" for i, reward in enumerate(c.rewards) if reward.fn == MISSING]
    if found:
        raise UserError("llmrl eval:\n" + "\n".join(f"  - {line}" for line in found))
