"""Run one update of several presets on whole groups and write what each did; started by `accelerate launch`.

family_worker.py OUT.pt SEED
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate import Accelerator

from llmrl.train.learner import Learner
from llmrl.train.policy import Policy
from llmrl.train.setup import make_algorithm
from tests.algo.test_token_hidden_reward import make_groups
from tests.invariance.cases import make_config, tiny_model, trained_parameters

CASES: dict[str, dict[str, Any]] = {
    "thr": {"name": "thr", "thr_p": 0.25},
    "nthr, two mini-batches": {"name": "nthr", "num_mini_batches": 2},
    "gspo_token with thr": {"name": "gspo_token", "token_weighting": "thr", "num_mini_batches": 2},
    "reinforce_pp": {"name": "reinforce_pp", "beta": 0.1},
    "rloo": {"name": "rloo"},
    "optimal_token": {"name": "optimal_token"},
    "high entropy only": {"top_entropy_quantile": 0.3},
    "clip_cov": {"name": "clip_cov", "num_mini_batches": 2},
    "kl_cov": {"name": "kl_cov", "cov_fraction": 0.1, "num_mini_batches": 2},
    "prompt_mean": {"loss_type": "prompt_mean", "baseline": "batch"},
}


def run_cases(seed: int, accelerator: Accelerator) -> dict[str, dict[str, Any]]:
    """Metrics, parameters and token scores after one update of every case."""
    results = {}
    for name, algo in CASES.items():
        config = make_config(algo=algo)
        algorithm = make_algorithm(config)
        policy = Policy(tiny_model(), temperature=1.0, keep_reference=algorithm.needs.ref_logprobs)
        learner = Learner(config, policy, accelerator)
        groups = make_groups(seed)
        metrics = learner.update(algorithm.prepare(groups, policy_version=0), algorithm)
        scores = [r.token_scores for group in groups for r in group.rollouts]
        advantages = [r.advantage for group in groups for r in group.rollouts]
        results[name] = {
            "metrics": metrics,
            "parameters": trained_parameters(learner),
            "scores": scores,
            "advantages": advantages,
        }
    return results


def main() -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2, accelerator.num_processes
    results = run_cases(int(sys.argv[2]), accelerator)
    if accelerator.is_main_process:
        torch.save(results, sys.argv[1])
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
