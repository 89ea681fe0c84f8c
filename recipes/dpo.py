"""DPO and its relatives on a dataset of preferences: no engine, no rewards.

    accelerate launch recipes/dpo.py --config recipes/dpo_ultrafeedback.yaml
    accelerate launch recipes/dpo.py --config recipes/dpo_ultrafeedback_tiny.yaml --data.path rows.jsonl  # on a CPU

dpo_ultrafeedback.yaml       Qwen2.5-0.5B-Instruct with LoRA, one GPU
dpo_ultrafeedback_tiny.yaml  a random tiny model, to see every part work on a CPU in a minute
"""

from __future__ import annotations

from llmrl import Trainer, load_config
from llmrl.errors import run_main


def main() -> None:
    Trainer(load_config()).train()


if __name__ == "__main__":
    run_main(main)
