"""KTO: completions with a label, desirable or not; no pairs needed.

    accelerate launch recipes/kto.py --config recipes/kto_mix_14k.yaml
    accelerate launch recipes/kto.py --config recipes/kto_mix_14k_tiny.yaml --data.path rows.jsonl  # on a CPU

kto_mix_14k.yaml       Qwen2.5-0.5B-Instruct with LoRA, one GPU
kto_mix_14k_tiny.yaml  a random tiny model, to see every part work on a CPU in a minute
"""

from __future__ import annotations

from pathlib import Path

from llmrl.errors import run_main
from llmrl.verify.spec import load_file

main = load_file(Path(__file__).resolve().with_name("train.py")).main
"""recipes/train.py. Loaded by its path, because a recipe may be run as a file, installed, or loaded by a test."""

if __name__ == "__main__":
    run_main(main)
