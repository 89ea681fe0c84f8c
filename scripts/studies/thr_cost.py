"""Measure what Token Hidden Reward adds to an update of a 21M-parameter model with 32,000 tokens: time and memory.

Updates with and without it alternate, so other load on the machine affects both. Peak memory is measured in a process
that does nothing else.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from statistics import median
from typing import Any

import numpy as np
import torch

from llmrl.algo.policy_gradient.algorithm import GRPO
from llmrl.algo.policy_gradient.options import PolicyGradient, Thr
from llmrl.config import TrainConfig
from llmrl.model.parallel import Parallel
from llmrl.model.policy import Policy
from llmrl.tiny import build_tiny_model
from llmrl.train.learner import Learner
from llmrl.train.selfcheck import check_forward
from llmrl.types import Rollout, RolloutGroup, Score, Task, Turn

VOCABULARY, PROMPT, COMPLETION, GROUPS, SIZE, REPETITIONS = 32_000, 64, 96, 4, 8, 8
ARMS: dict[str, dict[str, Any]] = {"grpo": {}, "thr": {"token_weighting": Thr(p=0.1)}}


def make_groups(seed: int) -> list[RolloutGroup]:
    """Make groups of which half the rollouts are correct; tokens follow a power law, as text does."""
    random = np.random.default_rng(seed)
    groups = []
    for p in range(GROUPS):
        task, prompt = Task(id=str(p), messages=[]), random.integers(0, VOCABULARY, PROMPT).tolist()
        rollouts = []
        for g in range(SIZE):
            turn = Turn(
                prompt_ids=prompt,
                completion_ids=random.zipf(1.3, COMPLETION).clip(0, VOCABULARY - 1).tolist(),
                rollout_logprobs=[-5.0] * COMPLETION,
                finish="stop",
                policy_version=(0, 0),
                message={},
            )
            rollouts.append(Rollout(task=task, index=g, turns=[turn], score=Score(reward=float(g % 2))))
        groups.append(RolloutGroup(task=task, rollouts=rollouts))
    return groups


def build(num_steps: int) -> tuple[Learner, dict[str, GRPO]]:
    """Build a learner and both algorithms; each batch is used for `num_steps` optimizer steps."""
    torch.set_num_threads(1)
    model = build_tiny_model(
        "qwen2",
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=1024,
        num_layers=5,
        num_heads=6,
        num_kv_heads=6,
        seed=0,
    )
    configs = {name: PolicyGradient(num_mini_batches=num_steps, **options) for name, options in ARMS.items()}
    train = TrainConfig(max_tokens_per_micro_batch=2048, learning_rate=1e-6)
    policy = Policy(model, temperature=1.0, keep_reference=False)
    check_forward(policy)
    learner = Learner(policy, train, Parallel.alone())
    algorithms = {name: GRPO(config, max_completion_length=COMPLETION) for name, config in configs.items()}
    for algorithm in algorithms.values():
        algorithm.num_mini_batches = num_steps
    return learner, algorithms


def measure_time(num_steps: int) -> None:
    """Print the median CPU seconds of an update for each arm, and the median ratio of neighboring updates."""
    learner, algorithms = build(num_steps)
    seconds: dict[str, list[float]] = {name: [] for name in algorithms}
    for i in range(REPETITIONS + 1):
        for name, algorithm in algorithms.items():
            batch = algorithm.prepare(make_groups(i), policy_version=i)
            start = time.process_time()
            learner.update(batch, algorithm)
            seconds[name].append(time.process_time() - start)
    grpo, thr = (seconds[name][1:] for name in ("grpo", "thr"))
    ratio = median(b / a for a, b in zip(grpo, thr, strict=True))
    print(
        f"{num_steps} optimizer step(s): grpo {median(grpo):.2f} CPU s, thr {median(thr):.2f}, ratio {ratio:.3f}",
        flush=True,
    )


def measure_memory(num_steps: int, arm: str) -> None:
    """Print the peak memory of this process after two updates."""
    learner, algorithms = build(num_steps)
    for i in range(2):
        learner.update(algorithms[arm].prepare(make_groups(i), policy_version=i), algorithms[arm])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{num_steps} optimizer step(s): {arm} peak memory {peak} MB", flush=True)


def main() -> None:
    for num_steps in (2, 1):
        calls = [f"measure_time({num_steps})", *(f"measure_memory({num_steps}, {arm!r})" for arm in ARMS)]
        for call in calls:
            subprocess.run([sys.executable, "-c", f"from studies.thr_cost import *; {call}"], check=True)
