"""Train one stage of B-Coder on stored programs; started by `accelerate launch`.

bcoder_worker.py STAGE FOLDER    (`policy` starts from what `value` left in the folder)
"""

from __future__ import annotations

import sys
from pathlib import Path

from llmrl import Trainer

OUTCOMES = {"return x": 1.0, "return y": -0.3, "retrun": -0.6, "(": -1.0}
ROWS = [
    {
        "prompt": f"task {i}",
        "solution": f"return {i}",
        "samples": [{"completion": text, "reward": reward} for text, reward in OUTCOMES.items()],
    }
    for i in range(8)
]


def train(stage: str, folder: Path) -> Path:
    """Returns the model/ folder."""
    options = {
        "algo.name": "bcoder",
        "algo.stage": stage,
        "train.output_dir": str(folder / stage),
        "train.max_steps": 2,
        "train.learning_rate": 1e-2,
        "train.adam_epsilon": 1e-2,  # or Adam would blow up the rounding of gradients that are nearly zero
        "train.save_steps": 0,
        "data.prompt_format": "text",
        "rollout.num_prompts": 4,
        "rollout.num_generations": 2,
        "rollout.max_completion_length": 16,
        "track.console": "quiet",
    }
    model = "tiny:qwen2" if stage == "value" else str(folder / "value" / "model")
    Trainer(options, model=model, reward=lambda completion: 0.0, train_dataset=ROWS).train()
    return folder / stage / "model"


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]))
