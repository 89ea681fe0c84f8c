"""KTO: completions with a label, desirable or not; no pairs needed.

    accelerate launch recipes/kto.py --config recipes/kto_mix_14k.yaml
    accelerate launch recipes/kto.py --config recipes/kto_mix_14k_tiny.yaml --data.path rows.jsonl  # on a CPU

kto_mix_14k.yaml       Qwen2.5-0.5B-Instruct with LoRA, one GPU
kto_mix_14k_tiny.yaml  a random tiny model, to see every part work on a CPU in a minute
"""

from __future__ import annotations

from llmrl import Trainer, load_config
from llmrl.errors import run_main


def main() -> None:
    Trainer(load_config()).train()


if __name__ == "__main__":
    run_main(main)
