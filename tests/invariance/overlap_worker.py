"""A run that works ahead of its learner; started by `accelerate launch`, on every process.

overlap_worker.py OUTPUT_DIR MAX_STEPS [CHECKPOINT]
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import torch

from llmrl import Trainer
from llmrl.types import Rollout

ROWS = [{"prompt": f"Count to {i}", "answer": str(i)} for i in range(24)]


async def letters(completion: str, rollout: Rollout) -> float:
    """Some rollouts take longer than an update, on one process or the other."""
    await asyncio.sleep(0.05 * (len(rollout.task.id + completion) % 4))
    return sum(character.isalpha() for character in completion) / 16


def main(folder: str, max_steps: str, checkpoint: str | None = None) -> None:
    settings: dict[str, Any] = {
        "train.output_dir": folder,
        "train.max_steps": int(max_steps),
        "train.learning_rate": 1e-3,
        "train.save_steps": 2,
        "train.resume_from_checkpoint": checkpoint,
        "rollout.max_staleness": 1,
        "rollout.num_prompts": 4,
        "rollout.num_generations": 4,
        "rollout.max_completion_length": 16,
        "track.console": "quiet",
    }
    run = Trainer(settings, model="tiny:qwen2", reward=letters, train_dataset=ROWS)
    assert run.parallel.world == 2, run.parallel.world
    run.train()
    weights = torch.cat([parameter.detach().flatten() for parameter in run.policy.module.parameters()])
    torch.save(weights, f"{folder}/weights_{run.parallel.rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
