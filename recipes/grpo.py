"""GRPO with verifiable rewards: any model, any dataset, any reward, all by configuration.

    accelerate launch recipes/grpo.py --config recipes/grpo_gsm8k.yaml
    accelerate launch recipes/grpo.py --config recipes/grpo_gsm8k.yaml --train.learning_rate 2e-6  # any option, dotted
    accelerate launch recipes/grpo.py --config recipes/grpo_gsm8k_tiny.yaml --data.path train.jsonl  # a laptop, no hub
    python recipes/grpo.py --config recipes/grpo_gsm8k.yaml --print_config                           # needs no GPU

grpo_gsm8k.yaml       Qwen2.5-0.5B-Instruct with LoRA on GSM8K, one GPU
grpo_gsm8k_tiny.yaml  a random tiny model on the same questions, to see every part work on a CPU in a minute
"""

from __future__ import annotations

from pathlib import Path

from llmrl.errors import run_main
from llmrl.verify.spec import load_file

main = load_file(Path(__file__).resolve().with_name("train.py")).main
"""recipes/train.py. Loaded by its path, because a recipe may be run as a file, installed, or loaded by a test."""

if __name__ == "__main__":
    run_main(main)
