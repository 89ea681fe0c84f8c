"""Train a reward model on preferences with TRL's RewardTrainer; `rewards/reward_model.py` uses the result.

    accelerate launch recipes/reward_model.py --config recipes/reward_model_ultrafeedback.yaml
    ... --config recipes/reward_model_ultrafeedback_tiny.yaml --data.path pairs.jsonl                  # on a CPU

HERON: make pairs of the rollouts that an earlier run recorded, by a ranked list of reward parts:

    ... --data.path runs/grpo/rollouts.jsonl --hierarchy '[{"part": "math_answer"}, {"part": "length", "margin": 0.5}]'
"""

from __future__ import annotations

import json
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Lt

from llmrl.algo.preference.options import Level
from llmrl.config import LoraConfig, ModelConfig, PreferenceData, parse
from llmrl.errors import UserError, run_main
from llmrl.option import Count, Natural, NotNegative, Positive, option


@option
class RewardModelConfig:
    """A reward model: data, model and optimizer. The names are TRL's."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model to start from."""
    data: PreferenceData = field(default_factory=PreferenceData)
    """Where the pairs come from."""
    hierarchy: list[Level] = field(default_factory=list)
    """Reward parts, the most important first, that decide the pairs; `data.path` is then a run's rollouts.jsonl."""
    output_dir: str = "runs/reward_model"
    """The folder of the trained model."""
    seed: Natural = 0
    """Fixes every random number."""
    max_steps: Annotated[int, Ge(-1)] = -1
    """Optimizer steps; -1 trains for `num_train_epochs`."""
    num_train_epochs: Positive = 1.0
    """Passes over the pairs."""
    learning_rate: NotNegative = 1e-5
    """AdamW's learning rate; it falls linearly to 0."""
    per_device_train_batch_size: Count = 8
    """Pairs in one forward pass of one process."""
    gradient_accumulation_steps: Count = 1
    """Forward passes of an optimizer step."""
    max_length: Count = 1024
    """Leave out pairs with longer texts (tokens)."""
    center_rewards_coefficient: NotNegative | None = None
    """Weight of (chosen + rejected)^2, which keeps rewards around 0."""
    eval_frac: Annotated[float, Ge(0), Lt(1)] = 0.05
    """Share of the pairs that is held out to measure accuracy."""


def main() -> None:
    config = parse(config_class=RewardModelConfig)
    rows = pairs(config)
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    num_held_out = int(config.eval_frac * len(rows))
    model, tokenizer = load(config)
    cpu = not _accelerator()
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            output_dir=config.output_dir,
            seed=config.seed,
            max_steps=config.max_steps,
            num_train_epochs=config.num_train_epochs,
            learning_rate=config.learning_rate,
            per_device_train_batch_size=config.per_device_train_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            max_length=config.max_length,
            center_rewards_coefficient=config.center_rewards_coefficient,
            gradient_checkpointing=config.model.gradient_checkpointing,
            bf16=not cpu and config.model.dtype == "bfloat16",
            use_cpu=cpu,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list(rows[num_held_out:]),
        eval_dataset=Dataset.from_list(rows[:num_held_out]) if num_held_out else None,
        processing_class=tokenizer,
        peft_config=lora(config.model.lora) if config.model.lora else None,
    )
    if not len(trainer.train_dataset):  # pyright: ignore - TRL drops pairs that are too long
        raise UserError(f"max_length {config.max_length}: every pair is longer; raise it")
    trainer.train()
    measured = {k: v for k, v in trainer.evaluate().items() if "accuracy" in k or "margin" in k} if num_held_out else {}
    if config.model.lora is not None:
        trainer.model = trainer.model.merge_and_unload()  # pyright: ignore
    trainer.save_model(config.output_dir)
    tokenizer.save_pretrained(config.output_dir)
    print(json.dumps({"pairs": len(rows), "output_dir": config.output_dir, **measured}))


def pairs(config: RewardModelConfig) -> list[dict[str, Any]]:
    """Return rows of prompt, chosen, rejected: from the dataset, or made of recorded rollouts by the hierarchy."""
    from llmrl.algo.preference.hierarchy import HierarchicalPreference
    from llmrl.data.preferences import load_preferences, preferences_from_rollouts
    from llmrl.track.files import read_jsonl

    if config.hierarchy:
        if not Path(config.data.path).is_file():
            raise UserError(f"data.path {config.data.path}: with a hierarchy it must be a run's rollouts.jsonl")
        rows = preferences_from_rollouts(read_jsonl(config.data.path), HierarchicalPreference(config.hierarchy))
        if not rows:
            raise UserError(f"data.path {config.data.path}: the hierarchy decides no pair; check its parts")
        return rows
    found = load_preferences(config.data)
    if len(found[0].completions) != 2:
        raise UserError(f"{found[0].place}: a reward model needs pairs: columns prompt, chosen, rejected")
    return [{"prompt": row.prompt, "chosen": row.completions[0], "rejected": row.completions[1]} for row in found]


def load(config: RewardModelConfig) -> tuple[Any, Any]:
    """Return a classifier with one output and its tokenizer; a tiny random one for `tiny:ARCH`."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from llmrl.model.load import TINY, load_model, load_tokenizer

    tokenizer = load_tokenizer(config.model)
    if not config.model.path.startswith(TINY):
        dtype = getattr(torch, config.model.dtype)
        return AutoModelForSequenceClassification.from_pretrained(
            config.model.path, num_labels=1, dtype=dtype
        ), tokenizer
    settings = load_model(config.model, tokenizer, seed=config.seed).config
    settings.num_labels = 1
    torch.manual_seed(config.seed)
    return AutoModelForSequenceClassification.from_config(settings), tokenizer


def lora(config: LoraConfig) -> Any:
    """Return peft's configuration; the new output layer is trained in full."""
    import peft

    return peft.LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], **vars(config))


def _accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


if __name__ == "__main__":
    run_main(main)
