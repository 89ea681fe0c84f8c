"""Train by configuration: any model, any data, any reward, any algorithm.

    accelerate launch recipes/train.py --config recipes/grpo_gsm8k.yaml          # GRPO with verifiable rewards
    accelerate launch recipes/train.py --config recipes/ppo_gsm8k.yaml           # PPO: a critic is the baseline
    accelerate launch recipes/train.py --config recipes/online_dpo_gsm8k.yaml    # pairs from the policy's own rollouts
    accelerate launch recipes/train.py --config recipes/dpo_ultrafeedback.yaml   # pairs from a dataset
    accelerate launch recipes/train.py --config recipes/kto_mix_14k.yaml         # labeled completions from a dataset

The file decides what kind of run it is (`algo.name`), so one program serves all kinds. `grpo.py`, `ppo.py`, `dpo.py`,
`kto.py` and `online_dpo.py` are this program under the names that people look for; each lists the commands of its kind.

Any option can be given dotted (`--train.learning_rate 2e-6`). `--print_config` prints the complete configuration and
needs no GPU; `--help` explains the options of what was chosen.
"""

from __future__ import annotations

from llmrl import Trainer, load_config
from llmrl.errors import run_main


def main() -> None:
    Trainer(load_config()).train()


if __name__ == "__main__":
    run_main(main)
