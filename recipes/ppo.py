"""PPO with a critic and verifiable rewards: any model, any dataset, any reward, all by configuration.

    accelerate launch recipes/ppo.py --config recipes/ppo_gsm8k.yaml
    accelerate launch recipes/ppo.py --config recipes/ppo_gsm8k.yaml --algo.name vapo --critic.learning_rate 1e-4
    accelerate launch recipes/ppo.py --config recipes/ppo_gsm8k.yaml --critic.kind separate    # or shared, or adapter

ppo_gsm8k.yaml       Qwen2.5-0.5B-Instruct with LoRA on GSM8K, the critic a second adapter on the same base, one GPU
ppo_gsm8k_tiny.yaml  a random tiny model on the same questions, to see every part work on a CPU in a minute
"""

from __future__ import annotations

from pathlib import Path

from llmrl.errors import run_main
from llmrl.verify.spec import load_file

main = load_file(Path(__file__).resolve().with_name("train.py")).main
"""recipes/train.py. Loaded by its path, because a recipe may be run as a file, installed, or loaded by a test."""

if __name__ == "__main__":
    run_main(main)
