"""Run one update of several presets on whole groups and write what each did; started by `accelerate launch`.

family_worker.py OUT.pt SEED
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate import Accelerator

from llmrl.config import LoraConfig
from llmrl.model.parallel import Parallel
from llmrl.model.policy import Policy
from llmrl.run.methods import make_algorithm
from llmrl.train.learner import Learner
from tests.algo.ops.test_token_hidden_reward import make_groups
from tests.invariance.cases import make_config, make_ppo_learner, scored_groups, tiny_model, trained_parameters
from tests.invariance.edges import recorded_edges

CASES: dict[str, dict[str, Any]] = {
    "thr": {"name": "thr", "token_weighting": {"p": 0.25}},
    "nthr, two mini-batches": {"name": "nthr", "num_mini_batches": 2},
    "gspo_token with thr": {"name": "gspo_token", "token_weighting": "thr", "num_mini_batches": 2},
    "reinforce_pp": {"name": "reinforce_pp", "kl": {"beta": 0.1}},
    "rloo": {"name": "rloo"},
    "optimal_token": {"name": "optimal_token"},
    "high entropy only": {"top_entropy_quantile": 0.3},
    "clip_cov": {"name": "clip_cov", "num_mini_batches": 2},
    "kl_cov": {"name": "kl_cov", "loss": {"fraction": 0.1}, "num_mini_batches": 2},
    "prompt_mean": {"aggregation": "prompt_mean", "baseline": "batch"},
}


CRITICS: dict[str, dict[str, Any]] = {
    "separate critic": {"kind": "separate", "algo": {"num_iterations": 2}},
    "separate critic with adapters, one step": {
        "kind": "separate", "algo": {"num_mini_batches": 1}, "critic": {"lora": LoraConfig(r=2)},
    },
    "shared critic": {"kind": "shared", "algo": {"positive_lm_coef": 0.1}},
    "adapter critic, penalty": {
        "kind": "adapter", "lora": True, "algo": {"kl": {"kind": "reward", "beta": 0.1}},
    },
    "value pre-training": {"kind": "separate", "algo": {"warmup": {"steps": 1}}},
    "value pre-training of a shared critic": {"kind": "shared", "algo": {"warmup": {"steps": 1, "iterations": 2}}},
    "value pre-training of an adapter critic": {"kind": "adapter", "lora": True, "algo": {"warmup": {"steps": 1}}},
}  # fmt: skip


def run_critics(seed: int, parallel: Parallel) -> dict[str, dict[str, Any]]:
    """Return the same for every kind of critic, after two updates."""
    results = {}
    for name, case in CRITICS.items():
        options = case | {"algo": {"num_mini_batches": 2} | case.get("algo", {})}
        learner, algorithm = make_ppo_learner(parallel=parallel, **options)
        metrics: dict[str, float] = {}
        may_flip: dict[str, float] = {}
        for step in range(2):
            batch = algorithm.prepare(scored_groups(seed + step), policy_version=step)
            with recorded_edges(learner, algorithm) as edges:
                found = learner.update(batch, algorithm)
            metrics |= {f"{step} {k}": v for k, v in (found | batch.metrics).items()}
            may_flip |= {f"{step} {k}": v for k, v in edges.items()}
            algorithm.observe(batch.metrics)
        advantages = [r.advantage for group in batch.groups for r in group.rollouts]  # pyright: ignore
        results[name] = {
            "metrics": metrics,
            "may_flip": may_flip,
            "parameters": trained_parameters(learner),
            "scores": [],
            "advantages": advantages,
        }
    return results


def run_cases(seed: int, parallel: Parallel) -> dict[str, dict[str, Any]]:
    """Return metrics, parameters and token scores after one update of every case."""
    results = run_critics(seed, parallel)
    for name, algo in CASES.items():
        config = make_config(algo=algo)
        algorithm = make_algorithm(config)
        policy = Policy(tiny_model(), temperature=1.0, keep_reference=algorithm.needs.reference)
        learner = Learner(policy, config.train, parallel)  # pyright: ignore
        groups = make_groups(seed)
        with recorded_edges(learner, algorithm) as may_flip:
            metrics = learner.update(algorithm.prepare(groups, policy_version=0), algorithm)
        scores = [r.token_scores for group in groups for r in group.rollouts]
        advantages = [r.advantage for group in groups for r in group.rollouts]
        results[name] = {
            "metrics": metrics,
            "may_flip": may_flip,
            "parameters": trained_parameters(learner),
            "scores": scores,
            "advantages": advantages,
        }
    return results


def main() -> None:
    parallel = Parallel(Accelerator(cpu=True))
    assert parallel.world == 2, parallel.world
    results = run_cases(int(sys.argv[2]), parallel)
    if parallel.is_main:
        torch.save(results, sys.argv[1])
    parallel.barrier()
    parallel.finish()


if __name__ == "__main__":
    main()
