"""Run some updates of a tiny model and write what each did; started by `accelerate launch`, or called in one process.

process_worker.py OUT.pt SEED             the updates, written by the main process
process_worker.py --refused OUTPUT_DIR    exit code 2 if make_parallel refuses the launch
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate import Accelerator

from llmrl.errors import UserError
from llmrl.model.parallel import Parallel, make_parallel
from llmrl.types import Preference
from tests.invariance.cases import make_config, make_learner, make_lora, make_samples, tiny_model, update_and_look
from tests.invariance.edges import recorded_edges

CASES: dict[str, dict[str, Any]] = {
    "packed": {"algo": {"aggregation": "dapo"}},
    "padded, small micro-batches": {
        "algo": {"aggregation": "grpo"},
        "train": {"packing": False, "max_tokens_per_micro_batch": 25},
    },
    "penalty": {"algo": {"aggregation": "dr_grpo", "kl": {"beta": 0.1}}},
    "penalty, lora": {"algo": {"aggregation": "dapo", "kl": {"beta": 0.1}}, "lora": True},
    "exact penalty": {
        "algo": {"kl": {"beta": 0.1, "estimator": "full"}},
        "train": {"max_tokens_per_micro_batch": 25},
    },
    "exact penalty, lora": {
        "algo": {"aggregation": "dapo", "kl": {"beta": 0.1, "estimator": "full"}},
        "lora": True,
    },
    "two mini-batches, two passes": {"algo": {"num_mini_batches": 2, "num_iterations": 2}},
    "pairs": {"algo": {"name": "dpo"}, "pairs": True},
    "pairs, small micro-batches, sorted": {
        "algo": {"name": "dpo", "loss": {"kind": "sum", "terms": [{"kind": "aot_unpaired"}, {"kind": "sft"}]}},
        "train": {"max_tokens_per_micro_batch": 25},
        "pairs": True,
    },
    "fewer pairs than processes, lora": {
        "algo": {"name": "dpo"},
        "samples": {"groups": 1, "size": 2},
        "pairs": True,
        "lora": True,
    },
    "bfloat16": {"algo": {"aggregation": "dapo", "kl": {"beta": 0.1}}, "dtype": torch.bfloat16},
    "bfloat16, lora": {"algo": {"aggregation": "dapo"}, "lora": True, "dtype": torch.bfloat16},
    "fewer sequences than processes": {"samples": {"groups": 1, "size": 1}},
    "fewer sequences than processes, penalty": {"algo": {"kl": {"beta": 0.1}}, "samples": {"groups": 1, "size": 1}},
}
STEPS = 2


def run_cases(seed: int, parallel: Parallel) -> dict[str, list[dict[str, Any]]]:
    """Return metrics and gradients of every step of every case."""
    results = {}
    for name, case in CASES.items():
        model = make_lora(tiny_model()) if case.get("lora") else tiny_model()
        config = make_config(algo=case.get("algo"), train=case.get("train"))
        learner, algorithm = make_learner(model, config, parallel=parallel, dtype=case.get("dtype"))
        steps = []
        for step in range(STEPS):
            samples = make_samples(seed + step, **case.get("samples", {}))
            if case.get("pairs"):  # the first of a group is preferred to the others
                for sample in samples[:: case.get("samples", {}).get("size", 3)]:
                    others = [s.index for s in samples if s.group == sample.group and s.index != sample.index]
                    sample.preferences = [Preference(over=index) for index in others]
            with recorded_edges(learner, algorithm) as may_flip:
                outcome = update_and_look(learner, algorithm, samples)
            steps.append({"metrics": outcome.metrics, "may_flip": may_flip, "gradients": outcome.gradients})
        results[name] = steps
    return results


def main() -> int:
    if sys.argv[1] == "--refused":
        try:
            make_parallel(seed=0)
        except UserError as error:
            print(error, file=sys.stderr)
            return error.exit_code
        return 0
    parallel = Parallel(Accelerator(cpu=True))
    assert parallel.world == 2, parallel.world
    assert parallel.broadcast(parallel.rank) == 0
    assert parallel.gather_objects([parallel.rank, "both"]) == [0, "both", 1, "both"]
    numbers = {"sum": torch.tensor(1.0 + parallel.rank), "most/max": torch.tensor(1.0 + parallel.rank)}
    assert parallel.reduce(numbers, largest={"most/max"}) == {"sum": torch.tensor(3.0), "most/max": torch.tensor(2.0)}
    results = run_cases(int(sys.argv[2]), parallel)
    if parallel.is_main:
        torch.save(results, sys.argv[1])
    parallel.barrier()
    parallel.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
